"""Bad inputs of the methods that read a trained model."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from tests.bad_inputs.case import N_GENES, N_LATENT, Case, bad, right, trained_model

LDVAE = "model.LDVAE"


def call(method, *arguments, **options):
    """A method of the shared model."""
    return lambda b: partial(getattr(b.model(), method), *arguments, **options)


def with_data(method, spoil, *arguments, **options):
    """A method of the shared model with other cells."""
    return lambda b: partial(getattr(b.model(), method), *arguments, adata=b.counts(spoil), **options)


def error(method, what, build, kind, *fragments):
    return bad(f"{LDVAE}.{method}", what, build, kind, *fragments)


def finite(shape):
    def check(result):
        values = np.asarray(getattr(result, "X", result))
        assert values.shape == shape, values.shape
        assert np.isfinite(values).all()

    return check


def as_in_order(effects):
    np.testing.assert_allclose(effects.X, trained_model().ablate().X, rtol=1e-4, atol=1e-4)


# Methods that take cells, with the arguments that they need.
OF_CELLS = {
    "ablate": (),
    "ablate_genes": (),
    "get_ablated_expression": (0,),
    "get_amortization_gap": (),
    "get_elbo": (),
    "get_explained_deviance": (),
    "get_factor_stats": (),
    "get_feature_correlation_matrix": (),
    "get_latent_kl": (),
    "get_latent_representation": (),
    "get_likelihood_parameters": (),
    "get_marginal_ll": (),
    "get_normalized_expression": (),
    "get_population_directions": ("batch",),
    "get_population_expression": ("batch",),
    "get_population_loadings": ("batch",),
    "get_programs": (),
    "get_reconstruction_error": (),
    "get_refined_posterior": (),
    "get_shrunken_loadings": (),
}
CELLS = [
    error(
        name,
        "a position beyond the cells",
        lambda b, name=name, given=given: partial(getattr(b.model(), name), *given, indices=[3, 999]),
        ValueError,
        "`indices`",
        "60 cells",
        "999",
    )
    for name, given in OF_CELLS.items()
]
INDICES = [
    error("ablate", "names of cells for positions", call("ablate", indices=["cell1"]), TypeError, "`indices`", "positions", "'cell1'"),
    error("ablate", "a mask of another length", call("ablate", indices=[True, False]), ValueError, "`indices`", "60 cells", "(2,)"),
    error("get_latent_kl", "fractions for positions", call("get_latent_kl", indices=[0.5]), TypeError, "`indices`", "float64"),
    error("get_latent_representation", "NaN for positions", call("get_latent_representation", indices=[np.nan]), TypeError, "`indices`", "nan"),
    error("get_normalized_expression", "a position before the cells", call("get_normalized_expression", indices=[-999]), ValueError, "`indices`", "60 cells", "-999"),
    right(f"{LDVAE}.get_explained_deviance", "no cells", call("get_explained_deviance", indices=[]), lambda table: np.testing.assert_equal(len(table), 0)),
    error("get_refined_posterior", "text for positions", call("get_refined_posterior", indices="first"), TypeError, "`indices`", "'first'"),
    right(f"{LDVAE}.get_latent_kl", "no cells", call("get_latent_kl", indices=[]), finite((0, N_LATENT))),
    right(f"{LDVAE}.ablate", "one cell twice, and counted from the end", call("ablate", indices=[5, 5, -55]), finite((3, N_LATENT))),
]  # fmt: skip
OTHER_DATA = [
    error("get_latent_representation", "a path for the AnnData", call("get_latent_representation", "cells.h5ad"), TypeError, "`adata`", "'cells.h5ad'"),
    right(f"{LDVAE}.get_latent_representation", "genes of other names", with_data("get_latent_representation", lambda a: setattr(a, "var_names", [f"other{i}" for i in range(N_GENES)])), finite((60, N_LATENT)), "other0", "gene0", "in the same order"),
    error("ablate", "fewer genes", lambda b: partial(b.model().ablate, b.watch(b.counts()[:, :9].copy())), ValueError, "9", "30"),
    right(f"{LDVAE}.ablate", "genes in another order", lambda b: partial(b.model().ablate, b.watch(b.counts()[:, ::-1].copy())), as_in_order),
    error("ablate", "negative counts", with_data("ablate", lambda a: setattr(a, "X", -a.X)), ValueError, "`adata.X`", "negative"),
    error("get_normalized_expression", "counts of NaN", with_data("get_normalized_expression", lambda a: setattr(a, "X", a.X * np.nan)), ValueError, "`adata.X`", "NaN"),
    error("get_latent_kl", "counts of text", with_data("get_latent_kl", lambda a: setattr(a, "X", a.X.toarray().astype(str))), TypeError, "`adata.X`", "numbers"),
    error("ablate", "a batch that the model has not seen", with_data("ablate", lambda a: a.obs.__setitem__("batch", "new")), ValueError, "batch", "'new'", "'b1'"),
    error("ablate", "no column of batches", with_data("ablate", lambda a: a.obs.pop("batch")), KeyError, "`batch_key`", "'batch'"),
    error("get_factor_stats", "a missing batch", with_data("get_factor_stats", lambda a: a.obs.__setitem__("batch", a.obs["batch"].where(np.arange(60) > 0))), ValueError, "batch", "NaN for 1 of 60 cells"),
    error("get_refined_posterior", "cells of 10x as a DataFrame", lambda b: partial(b.model().get_refined_posterior, b.counts().to_df()), TypeError, "`adata`", "DataFrame"),
]  # fmt: skip
LATENTS = [
    error("ablate", "a latent beyond the last", call("ablate", latents=[7]), ValueError, "`latents`", "7", "'Z_0'"),
    error("ablate", "a negative latent", call("ablate", latents=[-1]), ValueError, "`latents`", "-1", "'Z_0'"),
    error("ablate", "a name of a rotated factor", call("ablate", latents="F_0"), ValueError, "`latents`", "'F_0'", "LDVAE.rotate"),
    error("ablate", "no latents", call("ablate", latents=[]), ValueError, "`latents`", "at least one"),
    error("ablate", "True for a latent", call("ablate", latents=[True]), ValueError, "`latents`", "True"),
    error("ablate", "a fraction of a latent", call("ablate", latents=0.5), (ValueError), "`latents`", "0.5"),
    error("ablate", "an array of latents in two dimensions", call("ablate", latents=np.zeros((2, 2), int)), ValueError, "`latents`"),
    error("ablate_genes", "a latent of None", call("ablate_genes", latents=[None]), ValueError, "`latents`", "None"),
    error("get_ablated_expression", "a latent named by path traversal", call("get_ablated_expression", "../../etc/passwd"), ValueError, "`latents`", "'../../etc/passwd'"),
    error("get_explained_deviance", "a latent that does not exist", call("get_explained_deviance", latents="Z_9"), ValueError, "`latents`", "'Z_9'"),
    error("ablate", "a mode that does not exist", call("ablate", mode="remove"), ValueError, "`mode`", "'zero'", "'remove'"),
    error("ablate", "an array for the mode", call("ablate", mode=np.zeros(3)), ValueError, "`mode`", "'zero'"),
    error("ablate", "the mode of a value without one", call("ablate", mode="value"), ValueError, "`value`"),
    error("ablate", "a value without its mode", call("ablate", value=1.0), ValueError, "`value`", "mode"),
    error("ablate", "a value of NaN", call("ablate", mode="value", value=np.nan), ValueError, "`value`", "nan"),
    error("ablate", "as many values as there are no latents", call("ablate", mode="value", value=[1.0, 2.0]), ValueError, "`value`", "2"),
    error("ablate", "text for the value", call("ablate", mode="value", value="high"), (ValueError), "`value`", "'high'"),
    error("ablate", "a scheme that does not exist", call("ablate", scheme="all"), ValueError, "`scheme`", "'leave_out'", "'all'"),
    error("ablate", "a column that does not exist", call("ablate", mode="group_mean", groupby="type"), (KeyError), "`groupby`", "'type'", "'batch'"),
    error("ablate", "a posterior that does not exist", call("ablate", use_posterior="median"), ValueError, "`use_posterior`", "'mean'", "'median'"),
    error("ablate", "no samples", call("ablate", use_posterior="samples", n_samples=0), ValueError, "`n_samples`", "0"),
    error("ablate", "a seed of text", call("ablate", use_posterior="samples", seed="x"), (ValueError), "`seed`", "'x'"),
    error("ablate", "a minibatch of no cells", call("ablate", batch_size=0), ValueError, "`batch_size`", "0"),
    error("ablate", "a batch to decode as that does not exist", call("ablate", transform_batch="lane9"), ValueError, "`transform_batch`", "'lane9'", "'b1'"),
    error("ablate_genes", "a list for the column of groups", call("ablate_genes", ["batch"]), TypeError, "`groupby`", "['batch']"),
]  # fmt: skip
Z = np.zeros((4, N_LATENT))
STEPS, NAMES = np.arange(12.0).reshape(4, 3) / 6, ["Z_0", "Z_1", "Z_2"]


def as_decoded(found):
    np.testing.assert_array_equal(found, trained_model().decode(STEPS, batch="b1"))


DECODING = [
    error("decode", "latents of another width", call("decode", np.zeros((4, 9)), batch="b1"), ValueError, "`z`", "(cells, 3)", "(4, 9)"),
    error("decode", "a vector of latents", call("decode", np.zeros(3), batch="b1"), ValueError, "`z`", "(3,)"),
    error("decode", "latents of text", call("decode", [["a", "b", "c"]], batch="b1"), (ValueError), "`z`", "numbers"),
    error("decode", "latents of NaN", call("decode", Z * np.nan, batch="b1"), ValueError, "`z`", "finite"),
    right(f"{LDVAE}.decode", "columns in another order", lambda b: partial(b.model().decode, pd.DataFrame(STEPS, columns=NAMES)[NAMES[::-1]], batch="b1"), as_decoded),
    error("decode", "no batch", call("decode", Z), ValueError, "`batch`", "'b1'"),
    error("decode", "a batch that does not exist", call("decode", Z, batch="../b1"), ValueError, "`batch`", "'../b1'", "'b1'"),
    error("decode", "a code of a batch beyond the last", call("decode", Z, batch=3), ValueError, "`batch`", "3", "0 to 2"),
    error("decode", "fewer batches than cells", call("decode", Z, batch=["b1", "b2"]), ValueError, "`batch`", "4 cells", "2"),
    error("decode", "covariates that the model does not have", call("decode", Z, batch="b1", covariates={"age": 3}), ValueError, "`covariates`", "'age'"),
    error("decode", "a gene that does not exist", call("decode", Z, batch="b1", gene_list=["gene0", "ACTB"]), ValueError, "`gene_list`", "'ACTB'"),
    error("decode", "a library size of NaN", call("decode", Z, batch="b1", library_size=np.nan), ValueError, "`library_size`", "nan"),
    error("decode", "library sizes of another number of cells", call("decode", Z, batch="b1", library_size=[1.0, 2.0, 3.0]), ValueError, "`library_size`", "4", "3"),
    error("get_normalized_expression", "a gene that does not exist", call("get_normalized_expression", gene_list=["<b>gene</b>"]), ValueError, "`gene_list`", "'<b>gene</b>'"),
    error("get_normalized_expression", "no genes", call("get_normalized_expression", gene_list=[]), ValueError, "`gene_list`", "at least one"),
    error("get_normalized_expression", "a negative library size", call("get_normalized_expression", library_size=-1), ValueError, "`library_size`", "-1"),
    error("get_normalized_expression", "a library size of an unknown kind", call("get_normalized_expression", library_size="observed"), ValueError, "`library_size`", "'latent'", "'observed'"),
    error("get_normalized_expression", "a batch to decode as that does not exist", call("get_normalized_expression", transform_batch=["b1", "lane9"]), ValueError, "`transform_batch`", "'lane9'"),
    error("get_normalized_expression", "a batch number of a fraction", call("get_normalized_expression", transform_batch=0.5), ValueError, "`transform_batch`", "0.5"),
    error("get_normalized_expression", "no samples", call("get_normalized_expression", n_samples=0), ValueError, "`n_samples`", "0"),
    error("get_normalized_expression", "an argument with a typo", call("get_normalized_expression", gene_lst=["gene0"]), TypeError, "gene_lst"),
    error("get_population_expression", "a gene that does not exist", call("get_population_expression", "batch", gene_list=["ACTB"]), ValueError, "`gene_list`", "'ACTB'"),
    error("get_population_expression", "a column that does not exist", call("get_population_expression", "type"), KeyError, "`groupby`", "'type'", "'batch'"),
    error("get_likelihood_parameters", "no samples", call("get_likelihood_parameters", n_samples=0), ValueError, "`n_samples`", "0"),
    error("get_marginal_ll", "no samples", call("get_marginal_ll", n_mc_samples=0), ValueError, "`n_mc_samples`", "0"),
    error("get_latent_representation", "a posterior of no samples", call("get_latent_representation", give_mean=False, mc_samples=0), ValueError, "`mc_samples`", "0"),
    error("get_feature_correlation_matrix", "a correlation that does not exist", call("get_feature_correlation_matrix", correlation_type="kendall"), ValueError, "`correlation_type`", "'kendall'"),
    error("get_reconstruction_error", "a minibatch of no cells", call("get_reconstruction_error", batch_size=0), ValueError, "`batch_size`", "0"),
    error("get_amortization_gap", "no samples", call("get_amortization_gap", n_samples=0), ValueError, "`n_samples`", "0"),
    error("get_importance_weights", "None for the posterior", lambda b: partial(b.model().get_importance_weights, None, [0], None, None, np.zeros((2, 1, 3))), TypeError, "`qz`", "NoneType"),
]  # fmt: skip
POPULATIONS = [
    error("get_population_loadings", "a column that does not exist", call("get_population_loadings", "type"), KeyError, "`groupby`", "'type'", "'batch'"),
    error("get_population_loadings", "a kind that does not exist", call("get_population_loadings", "batch", "slope"), ValueError, "`kind`", "'gradient'", "'slope'"),
    error("get_population_loadings", "a reference that does not exist", call("get_population_loadings", "batch", "contribution", reference="T cells"), ValueError, "`reference`", "'rest'", "'T cells'"),
    error("get_population_loadings", "a scale that does not exist", call("get_population_loadings", "batch", scale="linear"), ValueError, "`scale`", "'log'", "'linear'"),
    error("get_population_directions", "a column of numbers without groups", with_data("get_population_directions", lambda a: a.obs.__setitem__("type", np.nan), "type"), ValueError, "`groupby`", "type"),
    error("get_factor_stats", "a column that does not exist", call("get_factor_stats", "type"), KeyError, "`groupby`", "'type'"),
    error("get_factor_stats", "no cells for the statistics", call("get_factor_stats", max_cells=0), ValueError, "`max_cells`", "0"),
    error("get_factor_stats", "a posterior that does not exist", call("get_factor_stats", use_posterior="mode"), ValueError, "`use_posterior`", "'encoder'", "'mode'"),
    error("get_shrunken_loadings", "a level of 1", call("get_shrunken_loadings", level=1.0), ValueError, "`level`", "1.0"),
    error("get_shrunken_loadings", "text for the level", call("get_shrunken_loadings", level="95 %"), ValueError, "`level`", "'95 %'"),
    error("get_programs", "no programs", call("get_programs", 0), ValueError, "`n_programs`", "0"),
    error("get_programs", "more programs than genes", call("get_programs", 999), ValueError, "`n_programs`", "999"),
    error("get_programs", "a column that does not exist", call("get_programs", 2, "type"), KeyError, "`groupby`", "'type'"),
    error("differential_expression", "a group that does not exist", call("differential_expression", groupby="batch", group1="b9"), ValueError, "`group1`", "'b1'", "'b9'"),
    error("differential_expression", "a column that does not exist", call("differential_expression", groupby="type", group1="T"), KeyError, "`groupby`", "'type'"),
    error("differential_expression", "a mode that does not exist", call("differential_expression", groupby="batch", group1="b1", mode="lfc"), ValueError, "`mode`", "'lfc'"),
    error("differential_expression", "a position beyond the cells", call("differential_expression", idx1=[999], idx2=[0]), ValueError, "`idx1`", "60 cells", "999"),
    error("differential_expression", "a factor that does not exist", call("differential_expression", groupby="batch", group1="b1", factors=[9]), ValueError, "`factors`", "9"),
    error("differential_abundance", "a column that does not exist", call("differential_abundance", sample_key="donor"), KeyError, "`sample_key`", "'donor'"),
    error("rotate", "a method that does not exist", call("rotate", "oblimin"), ValueError, "`method`", "'varimax'", "'oblimin'"),
    error("rotate", "a position beyond the cells", call("rotate", "ica", indices=[999]), ValueError, "`indices`", "60 cells", "999"),
    error("rotate", "no cells", call("rotate", "ica", indices=[]), ValueError, "`indices`", "none"),
    error("get_loadings", "rotated loadings without a rotation", call("get_loadings", rotated=True), ValueError, "`rotated`"),
    error("get_decoder", "a rotated decoder without a rotation", call("get_decoder", rotated=True), ValueError, "`rotated`"),
]  # fmt: skip
STATS = [
    bad(f"model.FactorStats.{name}", "a group that does not exist", lambda b, name=name: partial(getattr(b.model().get_factor_stats("batch"), name), "b9"), ValueError, "`group`", "'b1'", "'b9'")
    for name in ("table", "ranks", "agreement")
]  # fmt: skip

READING_CASES: list[Case] = [*CELLS, *INDICES, *OTHER_DATA, *LATENTS, *DECODING, *POPULATIONS, *STATS]
