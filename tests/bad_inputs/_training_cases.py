"""Bad inputs of the set-up, the construction and the training of a model."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from scipy import sparse

from ldvae_ext.model import LDVAE
from tests.bad_inputs.case import Case, bad, right
from tests.helpers import TRAIN

SETUP, INIT, TRAINING = "model.LDVAE.setup_anndata", "model.LDVAE.__init__", "model.LDVAE.train"


def set_up(spoil=None, **arguments):
    return lambda b: partial(LDVAE.setup_anndata, b.counts(spoil), **arguments)


def with_value(value, dtype=None):
    def spoil(adata):
        dense = adata.X.toarray() if dtype is None else adata.X.toarray().astype(dtype)
        dense[-1, -1] = value
        adata.X = dense

    return spoil


def put(slot, key, value):
    def spoil(adata):
        getattr(adata, slot)[key] = value(adata) if callable(value) else value

    return spoil


def matrix(value):
    def spoil(adata):
        adata.X = value(adata)

    return spoil


def no_matrix(adata):
    del adata.X


def categories(*values):
    return put("obs", "lane", lambda a: np.resize(np.array(values, dtype=object), a.n_obs))


def numbers(*values):
    return put("obs", "depth", lambda a: np.resize(np.array(values), a.n_obs))


def is_set_up(adata):
    def check(result):
        assert result is None
        assert "_scvi_uuid" in adata.uns

    return check


def after(entry, what, spoil, levels, **arguments):
    """Set up, and the levels of the batch that the decoder of a model has."""

    def build(b):
        adata = b.counts(spoil)

        def call():
            LDVAE.setup_anndata(adata, **arguments)
            return LDVAE(adata, n_latent=2).get_decoder().batches.tolist()

        return call

    def check(found):
        assert found == levels, found

    return right(entry, what, build, check)


SET_UP: list[Case] = [
    bad(SETUP, "a path for the AnnData", lambda b: partial(LDVAE.setup_anndata, "cells.h5ad"), TypeError, "`adata`", "AnnData", "str"),
    bad(SETUP, "a DataFrame for the AnnData", lambda b: partial(LDVAE.setup_anndata, b.counts().to_df()), TypeError, "`adata`", "AnnData", "DataFrame"),
    bad(SETUP, "a negative count", set_up(with_value(-3)), ValueError, "`adata.X`", "counts", "-3"),
    bad(SETUP, "NaN among the counts", set_up(with_value(np.nan)), ValueError, "`adata.X`", "counts", "nan"),
    bad(SETUP, "infinity among the counts", set_up(with_value(np.inf)), ValueError, "`adata.X`", "counts", "inf"),
    bad(SETUP, "complex counts", set_up(with_value(1j, complex)), TypeError, "`adata.X`", "complex"),
    bad(SETUP, "counts of dtype object", set_up(matrix(lambda a: a.X.toarray().astype(object))), TypeError, "`adata.X`", "object"),
    bad(SETUP, "text for counts", set_up(matrix(lambda a: a.X.toarray().astype(str))), TypeError, "`adata.X`", "numbers"),
    bad(SETUP, "no counts at all", set_up(no_matrix), ValueError, "`adata.X` is empty"),
    bad(SETUP, "only zeros", set_up(matrix(lambda a: 0 * a.X)), ValueError, "`adata.X` has no counts"),
    bad(SETUP, "masked counts", set_up(matrix(lambda a: np.ma.masked_greater(a.X.toarray(), 3))), TypeError, "`adata.X`", "masked", "filled(0)"),
    bad(SETUP, "no cells", lambda b: partial(LDVAE.setup_anndata, b.watch(b.counts()[:0].copy())), ValueError, "`adata`", "0 cells"),
    bad(SETUP, "no genes", lambda b: partial(LDVAE.setup_anndata, b.watch(b.counts()[:, :0].copy())), ValueError, "`adata`", "0 genes"),
    bad(SETUP, "a layer that does not exist", set_up(layer="raw"), KeyError, "`layer`", "'raw'", "none"),
    bad(SETUP, "a layer of fractions with a negative value", set_up(put("layers", "raw", lambda a: -0.5 * a.X), layer="raw"), ValueError, "`adata.layers['raw']`", "negative", "-"),
    bad(SETUP, "a number for the layer", set_up(layer=3), KeyError, "`layer`", "3"),
    bad(SETUP, "a batch column that does not exist", set_up(batch_key="lane"), KeyError, "`batch_key`", "'lane'", "'batch'"),
    bad(SETUP, "a list for the batch column", set_up(batch_key=["batch"]), TypeError, "`batch_key`", "['batch']"),
    bad(SETUP, "a batch of values of several types", set_up(categories(1, "a"), batch_key="lane"), TypeError, "`batch_key`", "adata.obs['lane']", "1, 'a'"),
    bad(SETUP, "a batch with missing values", set_up(categories("a", None), batch_key="lane"), ValueError, "`batch_key`", "NaN for 30 of 60 cells"),
    bad(SETUP, "dates for labels", set_up(put("obs", "lane", lambda a: pd.date_range("2020", periods=a.n_obs)), labels_key="lane"), TypeError, "`labels_key`", "dates"),
    bad(SETUP, "a categorical covariate that does not exist", set_up(categorical_covariate_keys=["donor"]), KeyError, "`categorical_covariate_keys`", "'donor'", "'batch'"),
    bad(SETUP, "a continuous covariate with infinity", set_up(numbers(0.0, np.inf), continuous_covariate_keys=["depth"]), ValueError, "`continuous_covariate_keys`", "depth"),
    bad(SETUP, "a continuous covariate of text", set_up(categories("a"), continuous_covariate_keys=["lane"]), TypeError, "`continuous_covariate_keys`", "lane"),
    bad(SETUP, "size factors of 0", set_up(numbers(0.0, 1.0), size_factor_key="depth"), ValueError, "`size_factor_key`", "depth", "0"),
    bad(SETUP, "size factors of text", set_up(categories("a"), size_factor_key="lane"), TypeError, "`size_factor_key`", "lane"),
    bad(SETUP, "an argument with a typo", set_up(batchkey="batch"), TypeError, "'batchkey'", "'batch_key'"),
    after(SETUP, "batches with markup and path traversal", categories("<b>$x$</b>", "../../etc", "a\nb", "\x00c"), ["\x00c", "../../etc", "<b>$x$</b>", "a\nb"], batch_key="lane"),
    bad(SETUP, "a batch that ends with NUL", set_up(categories("a", "a\x00"), batch_key="lane"), ValueError, "`batch_key`", "NUL", r"'a\x00'"),
    bad(SETUP, "a gene that ends with NUL", set_up(lambda a: setattr(a, "var_names", [*a.var_names[:-1], "gene0\x00"])), ValueError, "`adata.var_names`", "NUL", r"'gene0\x00'"),
    after(SETUP, "batches of nullable integers", put("obs", "lane", lambda a: pd.array(np.resize([1, 2], a.n_obs), dtype="Int64")), ["1", "2"], batch_key="lane"),
    after(SETUP, "counts stored by columns with explicit zeros", matrix(lambda a: sparse.csc_matrix(a.X)), ["CD4+/CD25 T", "b1", "b2"], batch_key="batch"),
]  # fmt: skip


def construct(spoil=None, **arguments):
    return lambda b: partial(LDVAE, b.ready(spoil), **arguments)


CONSTRUCTION: list[Case] = [
    bad(INIT, "an AnnData that is not set up", lambda b: partial(LDVAE, b.counts()), ValueError, "setup_anndata"),
    bad(INIT, "a path for the AnnData", lambda b: partial(LDVAE, "cells.h5ad"), TypeError, "`adata`", "AnnData", "'cells.h5ad'"),
    bad(INIT, "counts that changed since the set-up", construct(matrix(lambda a: a.X * 2)), ValueError, "`adata.X`"),
    bad(INIT, "no latents", construct(n_latent=0), ValueError, "`n_latent`", "at least 1", "0"),
    bad(INIT, "half a latent", construct(n_latent=2.5), ValueError, "`n_latent`", "integer", "2.5"),
    bad(INIT, "NaN latents", construct(n_latent=np.nan), ValueError, "`n_latent`", "integer", "nan"),
    bad(INIT, "more latents than can be meant", construct(n_latent=2**40), ValueError, "`n_latent`", "at most", "1099511627776"),
    bad(INIT, "a negative number of layers", construct(n_layers=-1), ValueError, "`n_layers`", "-1"),
    bad(INIT, "True for the hidden nodes", construct(n_hidden=True), ValueError, "`n_hidden`", "True"),
    bad(INIT, "a dropout rate above 1", construct(dropout_rate=1.5), ValueError, "`dropout_rate`", "from 0 to 1", "1.5"),
    bad(INIT, "a likelihood that does not exist", construct(gene_likelihood="gauss"), ValueError, "`gene_likelihood`", "'nb'", "'gauss'"),
    bad(INIT, "a dispersion that does not exist", construct(dispersion="cell"), ValueError, "`dispersion`", "'gene'", "'cell'"),
    bad(INIT, "a latent distribution that does not exist", construct(latent_distribution="t"), ValueError, "`latent_distribution`", "'normal'", "'t'"),
    bad(INIT, "an argument with a typo", construct(n_laten=3), TypeError, "n_laten"),
]  # fmt: skip


def train(what_is_bad=None, **arguments):
    options = {**TRAIN, "max_epochs": 1, **arguments}
    return lambda b: partial(b.own_model().train, **options)


FITTING: list[Case] = [
    bad(TRAINING, "a negative number of epochs", train(max_epochs=-1), ValueError, "`max_epochs`", "at least 0", "-1"),
    bad(TRAINING, "text for the epochs", train(max_epochs="ten"), ValueError, "`max_epochs`", "'ten'"),
    bad(TRAINING, "a minibatch of no cells", train(batch_size=0), ValueError, "`batch_size`", "0"),
    bad(TRAINING, "a minibatch of a fraction", train(batch_size=1.5), ValueError, "`batch_size`", "1.5"),
    bad(TRAINING, "a backend that does not exist", train(backend="cuda"), ValueError, "`backend`", "'numba'", "'cuda'"),
    bad(TRAINING, "a KL warm-up that does not exist", train(kl_warmup="slow"), ValueError, "`kl_warmup`", "'auto'", "'slow'"),
    bad(TRAINING, "a negative KL warm-up", train(kl_warmup=-2), ValueError, "`kl_warmup`", "-2"),
    bad(TRAINING, "a share of cells above 1", train(train_size=1.5), ValueError, "train_size"),
    bad(TRAINING, "shares of cells that exceed 1", train(train_size=0.9, validation_size=0.5), ValueError, "validation_size"),
    bad(TRAINING, "NaN for the share of cells", train(train_size=np.nan), ValueError, "`train_size`", "nan"),
    bad(TRAINING, "a negative penalty", train(decoder_penalty=-1.0), ValueError, "`decoder_penalty`", "-1"),
    bad(TRAINING, "a penalty of an unknown kind", train(decoder_penalty={"l3": 1.0}), ValueError, "`decoder_penalty`", "'l1'", "'l3'"),
    bad(TRAINING, "a negative learning rate", train(plan_kwargs={"lr": -1.0}), ValueError, "lr", "-1"),
    bad(TRAINING, "a learning rate of NaN", train(plan_kwargs={"lr": np.nan}), ValueError, "lr", "nan"),
    bad(TRAINING, "text for the plan", train(plan_kwargs="lr=1"), TypeError, "`plan_kwargs`", "'lr=1'"),
    bad(TRAINING, "an argument of the plan with a typo", train(plan_kwargs={"leraning_rate": 1.0}), TypeError, "leraning_rate"),
    bad(TRAINING, "an argument of the trainer with a typo", train(max_epoch=3), TypeError, "max_epoch"),
    bad("model.LDVAE.train_ordered", "a negative number of epochs", lambda b: partial(LDVAE.train_ordered, b.ready(), 2, -1), ValueError, "`max_epochs`", "-1"),
    bad("model.LDVAE.train_ordered", "a negative number of epochs of fine-tuning", lambda b: partial(LDVAE.train_ordered, b.ready(), 2, 1, fine_tune_epochs=-1), ValueError, "`fine_tune_epochs`", "-1"),
    bad("model.LDVAE.train_ordered", "an AnnData that is not set up", lambda b: partial(LDVAE.train_ordered, b.counts(), 2, 1), ValueError, "setup_anndata"),
    bad("model.LDVAE.order_factors", "text for the learning rate", lambda b: partial(b.model().order_factors, lr="fast"), ValueError, "`lr`", "'fast'"),
    bad("model.LDVAE.order_factors", "a negative number of epochs", lambda b: partial(b.model().order_factors, -1), ValueError, "`fine_tune_epochs`", "-1"),
    bad("model.LDVAE.recalibrate_batch_norm", "positions beyond the cells", lambda b: partial(b.model().recalibrate_batch_norm, indices=[999]), ValueError, "`indices`", "60 cells", "999"),
    bad("model.LDVAE.recalibrate_batch_norm", "no cells", lambda b: partial(b.model().recalibrate_batch_norm, indices=[]), ValueError, "`indices`"),
    bad("model.LDVAE.minify_adata", "a type that does not exist", lambda b: partial(b.model().minify_adata, "counts"), ValueError, "`minified_data_type`", "'latent_posterior_parameters'", "'counts'"),
]  # fmt: skip

TRAINING_CASES = [*SET_UP, *CONSTRUCTION, *FITTING]
__all__ = ["TRAINING_CASES"]
