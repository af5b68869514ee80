"""Bad inputs of exports, saved models, queries and ensembles."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pandas as pd
from scvi.model import SCVI

from ldvae_ext.model import LDVAE, Ensemble, fit_ensemble, order_latents, suggest_n_latent
from tests.bad_inputs.case import N_GENES, Case, bad, right, trained_programs
from tests.helpers import counts

EXPORT, SAVE, LOAD, QUERY = (f"model.LDVAE.{name}" for name in ("export_to_anndata", "save", "load", "load_query_data"))


def export(spoil=None, **options):
    return lambda b: partial(b.model().export_to_anndata, b.counts(spoil), **options)


def has_export(key):
    def build(b):
        adata = b.counts()
        model = b.model()

        def call():
            model.export_to_anndata(adata, key_added=key)
            return adata

        return call

    def check(adata):
        assert key in adata.uns
        assert f"X_{key}" in adata.obsm

    return build, check


EXPORTS = [
    bad(EXPORT, "a path for the AnnData", lambda b: partial(b.model().export_to_anndata, "cells.h5ad"), TypeError, "`adata`", "'cells.h5ad'"),
    bad(EXPORT, "a key of path traversal", export(key_added="../../etc"), ValueError, "`key_added`", "'../../etc'", "/"),
    bad(EXPORT, "an empty key", export(key_added=""), ValueError, "`key_added`", "''"),
    bad(EXPORT, "a key with NUL", export(key_added="a\x00b"), ValueError, "`key_added`", r"'a\x00b'"),
    bad(EXPORT, "a number for the key", export(key_added=3), ValueError, "`key_added`", "3"),
    bad(EXPORT, "the key of scanpy's PCA", export(key_added="pca"), ValueError, "`key_added='pca'`", "as_pca"),
    bad(EXPORT, "an order that does not exist", export(order_by="size"), ValueError, "`order_by`", "'kl'", "'size'"),
    bad(EXPORT, "a posterior that does not exist", export(use_posterior="mean"), ValueError, "`use_posterior`", "'encoder'", "'mean'"),
    bad(EXPORT, "a minibatch of no cells", export(batch_size=0), ValueError, "`batch_size`", "0"),
    bad(EXPORT, "a column of the user in the way", export(lambda a: a.var.__setitem__("ldvae", "mine")), ValueError, "`adata.var['ldvae']`", "`overwrite=True`"),
    bad(EXPORT, "an array of the user in the way", export(lambda a: a.obsm.__setitem__("X_ldvae", np.zeros((60, 2)))), ValueError, "obsm['X_ldvae']", "`overwrite=True`"),
    bad(EXPORT, "a PCA of the user in the way", export(lambda a: a.obsm.__setitem__("X_pca", np.zeros((60, 2))), as_pca=True), ValueError, "`as_pca`", "'X_pca'"),
    bad(EXPORT, "a value of uns in the way that is no mapping", export(lambda a: a.uns.__setitem__("ldvae", 3)), ValueError, "uns['ldvae']", "`overwrite=True`"),
    right(EXPORT, "a key with markup and mathtext", *has_export("$x_{1}$<b>")),
    bad("model.order_latents", "a path for the model", lambda b: partial(order_latents, "model"), TypeError, "`model`", "str"),
    bad("model.order_latents", "a path for the AnnData", lambda b: partial(order_latents, b.model(), "cells.h5ad"), TypeError, "`adata`", "AnnData", "str"),
    bad("model.LDVAE.from_linear_scvi", "a model of another class", lambda b: partial(LDVAE.from_linear_scvi, _scvi_model(b)), TypeError, "LinearSCVI", "SCVI"),
    bad("model.LDVAE.from_linear_scvi", "None", lambda b: partial(LDVAE.from_linear_scvi, None), TypeError, "LinearSCVI", "NoneType"),
]  # fmt: skip


def _scvi_model(b):
    adata = counts()
    SCVI.setup_anndata(adata)
    return SCVI(adata)


class Harmful:
    """A pickle that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(b, **options):
    b.model().save(b.folder / "model", **options)
    return b.folder / "model"


def save(path="new", **options):
    return lambda b: partial(b.model().save, b.folder / path, **options)


def save_into_a_file(b):
    (b.folder / "file").write_text("mine")
    return partial(b.model().save, b.folder / "file")


def save_over(b):
    (b.folder / "new").mkdir()
    (b.folder / "new" / "model.pt").write_text("mine")
    return partial(b.model().save, b.folder / "new")


def load(spoil=None, adata=True, **options):
    """Load a saved model whose folder was changed."""

    def build(b):
        folder = saved(b)
        if spoil is not None:
            spoil(folder)
        cells = b.counts() if adata is True else adata(b) if callable(adata) else adata
        return partial(LDVAE.load, folder, cells, accelerator="cpu", **options)

    return build


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, share):
    def spoil(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return spoil


def harmful(folder):
    """All plain files are gone, and the pickle would create a file."""
    (folder / "model.pt").write_bytes(pickle.dumps(Harmful(folder / "harm")))


CHECKPOINTS = [
    bad(SAVE, "a folder that is a file", save_into_a_file, NotADirectoryError, "`dir_path`", "FOLDER/file", "folder"),
    bad(SAVE, "a folder with a model", save_over, ValueError, "`dir_path`", "FOLDER/new", "overwrite"),
    bad(SAVE, "a prefix of path traversal", save(prefix="../../x"), ValueError, "`prefix`", "'../../x'"),
    bad(SAVE, "a number for the prefix", save(prefix=3), (ValueError), "`prefix`", "3"),
    bad(LOAD, "a folder that does not exist", lambda b: partial(LDVAE.load, b.folder / "none"), ValueError, "model.pt"),
    bad(LOAD, "a prefix of path traversal", load(prefix="../../x"), ValueError, "`prefix`", "'../../x'"),
    bad(LOAD, "an empty checkpoint", load(write("model.pt", b"")), ValueError, "model.pt"),
    bad(LOAD, "a checkpoint of text", load(write("model.pt", b"not a model")), ValueError, "model.pt"),
    bad(LOAD, "a checkpoint that is cut", load(cut("model.pt", 0.5)), ValueError, "model.pt"),
    bad(LOAD, "a pickle that runs code, not trusted", load(lambda f: (harmful(f), [p.unlink() for p in f.iterdir() if p.name != "model.pt"]), trusted=False), ValueError, "pickle runs code"),
    bad(LOAD, "plain weights that are cut", load(cut("weights.safetensors", 0.5), trusted=False), ValueError, "holds no model that can be read"),
    bad(LOAD, "a plain description that is no JSON", load(write("model.json", b"{"), trusted=False), ValueError, "holds no model that can be read"),
    bad(LOAD, "a path for the AnnData", load(adata="cells.h5ad"), TypeError, "`adata`", "AnnData", "'cells.h5ad'"),
    right(LOAD, "genes of other names", load(adata=lambda b: b.counts(lambda a: setattr(a, "var_names", [f"other{i}" for i in range(N_GENES)]))), lambda model: np.testing.assert_equal(model.get_latent_kl().shape, (60, 3)), "other0", "gene0"),
    bad(LOAD, "fewer genes", load(adata=lambda b: b.watch(b.counts()[:, :9].copy())), ValueError, "gene9"),
    bad(LOAD, "a batch that the model has not seen", load(adata=lambda b: b.counts(lambda a: a.obs.__setitem__("batch", "new"))), ValueError, "'new'"),
    bad(LOAD, "an accelerator that does not exist", lambda b: partial(LDVAE.load, saved(b), b.counts(), accelerator="abacus"), ValueError, "accelerator='abacus'", "cpu"),
]  # fmt: skip


def query(spoil=None, **options):
    def build(b):
        adata = b.counts(spoil)
        return partial(LDVAE.load_query_data, adata, b.model(), accelerator="cpu", **options)

    return build


QUERIES = [
    bad(QUERY, "a path for the AnnData", lambda b: partial(LDVAE.load_query_data, "cells.h5ad", b.model()), TypeError, "`adata`", "str"),
    bad(QUERY, "a folder that does not exist", lambda b: partial(LDVAE.load_query_data, b.counts(), b.folder / "none"), ValueError, "model.pt"),
    bad(QUERY, "a number for the reference", lambda b: partial(LDVAE.load_query_data, b.counts(), 3), TypeError, "`reference_model`", "int"),
    bad(QUERY, "other genes", query(lambda a: setattr(a, "var_names", [f"other{i}" for i in range(N_GENES)])), ValueError, "gene"),
    bad(QUERY, "negative counts", query(lambda a: setattr(a, "X", -a.X)), ValueError, "`adata.X`", "negative"),
    bad(QUERY, "no column of batches", query(lambda a: a.obs.pop("batch")), KeyError, "'batch'"),
    bad(QUERY, "an argument with a typo", query(unfrozn=True), TypeError, "unfrozn"),
    bad("model.LDVAE.prepare_query_anndata", "no genes of the reference", lambda b: partial(LDVAE.prepare_query_anndata, b.counts(lambda a: setattr(a, "var_names", [f"other{i}" for i in range(N_GENES)])), b.model()), ValueError, "reference var names"),
    bad("model.LDVAE.prepare_query_anndata", "a DataFrame", lambda b: partial(LDVAE.prepare_query_anndata, b.counts().to_df(), b.model()), TypeError, "`adata`", "DataFrame"),
]  # fmt: skip


def ensemble(spoil=None, n_runs=2, ready=True, **options):
    given = {"n_latent": 2, "max_epochs": 1, "n_jobs": 1, "silent": True, **options}
    return lambda b: partial(fit_ensemble, (b.ready if ready else b.counts)(spoil), n_runs, **given)


def suggest(**options):
    return lambda b: partial(suggest_n_latent, **options)


ENSEMBLES = [
    bad("model.fit_ensemble", "an AnnData that is not set up", ensemble(ready=False), ValueError, "setup_anndata"),
    bad("model.fit_ensemble", "a path for the AnnData", lambda b: partial(fit_ensemble, "cells.h5ad"), TypeError, "`adata`", "str"),
    bad("model.fit_ensemble", "a single run", ensemble(n_runs=1), ValueError, "`n_runs`", "at least 2", "1"),
    bad("model.fit_ensemble", "a number of latents of each run", ensemble(n_latent=[2, 3]), ValueError, "`n_latent`", "[2, 3]"),
    bad("model.fit_ensemble", "a resampling that does not exist", ensemble(resample="thirds"), ValueError, "`resample`", "'halves'", "'thirds'"),
    bad("model.fit_ensemble", "a negative seed", ensemble(seed=-1), ValueError, "`seed`", "-1"),
    bad("model.fit_ensemble", "no processes", ensemble(n_jobs=0), ValueError, "`n_jobs`", "0"),
    bad("model.fit_ensemble", "an argument of the model with a typo", ensemble(model_kwargs={"n_hiden": 8}), TypeError, "n_hiden"),
    bad("model.fit_ensemble", "an argument of the training with a typo", ensemble(train_kwargs={"learning_rte": 8}), TypeError, "learning_rte"),
    bad("model.fit_ensemble", "text for the arguments of the model", ensemble(model_kwargs="n_hidden=8"), TypeError, "`model_kwargs`", "'n_hidden=8'"),
    bad("model.fit_ensemble", "half an epoch", ensemble(max_epochs=0.5), ValueError, "`max_epochs`", "0.5"),
    bad("model.Ensemble.programs", "no programs", lambda b: partial(b.ensemble().programs, 0), ValueError, "`n_programs`", "0"),
    bad("model.Ensemble.programs", "text for the programs", lambda b: partial(b.ensemble().programs, "many"), ValueError, "`n_programs`", "'many'"),
    bad("model.Ensemble.programs", "a position beyond the cells", lambda b: partial(b.ensemble().programs, 2, indices=[999]), ValueError, "`indices`", "60 cells", "999"),
    bad("model.Ensemble.compare_readouts", "no genes", lambda b: partial(b.halves().compare_readouts, 2, 0), ValueError, "`n_top`", "0"),
    bad("model.Ensemble.compare_readouts", "no programs", lambda b: partial(b.halves().compare_readouts, 0), ValueError, "`n_programs`", "0"),
    bad("model.Ensemble.compare_readouts", "runs on the same cells", lambda b: partial(b.ensemble().compare_readouts), ValueError, "resample='halves'"),
    bad("model.Ensemble.export_to_anndata", "a path for the AnnData", lambda b: partial(b.ensemble().export_to_anndata, "cells.h5ad"), TypeError, "`adata`", "str"),
    bad("model.Ensemble.export_to_anndata", "a key of path traversal", lambda b: partial(b.ensemble().export_to_anndata, b.counts(), "a/b"), ValueError, "`key_added`", "'a/b'"),
    bad("model.Ensemble.export_to_anndata", "other genes", lambda b: partial(b.ensemble().export_to_anndata, b.counts(lambda a: setattr(a, "var_names", [f"other{i}" for i in range(N_GENES)]))), ValueError, "gene"),
    bad("model.Ensemble.export_to_anndata", "an array of the user in the way", lambda b: partial(b.ensemble().export_to_anndata, b.counts(lambda a: a.varm.__setitem__("ldvae_consensus", np.zeros((N_GENES, 2))))), ValueError, "ldvae_consensus", "`overwrite=True`"),
    bad("model.suggest_n_latent", "neither cells nor an ensemble", suggest(), ValueError, "`adata`", "`ensemble`"),
    bad("model.suggest_n_latent", "an increment of NaN", lambda b: partial(suggest_n_latent, ensemble=b.ensemble(), min_increment=np.nan), ValueError, "`min_increment`", "nan"),
    bad("model.suggest_n_latent", "cells beside an ensemble", lambda b: partial(suggest_n_latent, ensemble=b.ensemble(), adata=b.counts()), ValueError, "`adata`", "`ensemble`"),
    bad("model.suggest_n_latent", "a model for the ensemble", lambda b: partial(suggest_n_latent, ensemble=b.model()), TypeError, "`ensemble`", "LDVAE"),
    bad("model.Programs.top_genes", "no genes", lambda b: partial(trained_programs().top_genes, 0), ValueError, "`n`", "0"),
    bad("model.Programs.export_to_anndata", "a DataFrame", lambda b: partial(trained_programs().export_to_anndata, pd.DataFrame()), TypeError, "`adata`", "DataFrame"),
    bad("model.Programs.export_to_anndata", "other cells", lambda b: partial(trained_programs().export_to_anndata, b.counts(lambda a: setattr(a, "obs_names", [f"other{i}" for i in range(60)]))), ValueError, "cell"),
    bad("model.Programs.export_to_anndata", "a key with a slash", lambda b: partial(trained_programs().export_to_anndata, b.counts(), "a/b"), ValueError, "`key_added`", "'a/b'"),
]  # fmt: skip


def saved_ensemble(spoil=None, adata=None):
    """Load a saved ensemble whose folder was changed."""

    def build(b):
        b.ensemble().save(b.folder / "models")
        if spoil is not None:
            spoil(b.folder / "models")
        return partial(Ensemble.load, b.folder / "models", adata)

    return build


def ensemble_over_a_file(b):
    (b.folder / "models").mkdir()
    (b.folder / "models" / "thesis.txt").write_text("years of work")
    return partial(b.ensemble().save, b.folder / "models", overwrite=True)


ENSEMBLE_FILES = [
    bad("model.Ensemble.save", "a folder with a file of the user", ensemble_over_a_file, ValueError, "FOLDER/models", "thesis.txt"),
    bad("model.Ensemble.load", "a folder that does not exist", lambda b: partial(Ensemble.load, b.folder / "none"), ValueError, "FOLDER/none", "no ensemble"),
    bad("model.Ensemble.load", "a description that is no JSON", saved_ensemble(write("ensemble.json", b"{")), ValueError, "FOLDER/models", "no ensemble that can be read"),
    bad("model.Ensemble.load", "arrays that are cut", saved_ensemble(cut("consensus.safetensors", 0.5)), ValueError, "FOLDER/models", "no ensemble that can be read"),
    bad("model.Ensemble.load", "a path for the AnnData", saved_ensemble(adata="cells.h5ad"), TypeError, "`adata`", "AnnData", "str"),
]  # fmt: skip

SAVING_CASES: list[Case] = [*EXPORTS, *CHECKPOINTS, *QUERIES, *ENSEMBLES, *ENSEMBLE_FILES]
