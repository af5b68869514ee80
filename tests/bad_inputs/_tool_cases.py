"""Bad inputs of `tl`, `get`, `pl` and `datasets`: an AnnData with exports, tables and figures."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from ldvae_ext import datasets, get, pl, tl
from tests.bad_inputs.case import N_GENES, Case, bad, right, trained_model


def tool(name, *arguments, spoil=None, **options):
    return lambda b: partial(getattr(tl, name), b.exported(spoil), *arguments, **options)


def read(name, *arguments, spoil=None, **options):
    return lambda b: partial(getattr(get, name), b.exported(spoil), *arguments, **options)


def draw(name, *arguments, spoil=None, **options):
    return lambda b: partial(getattr(pl, name), b.exported(spoil), *arguments, show=False, **options)


def drop(slot, key):
    def spoil(adata):
        del getattr(adata, slot)[key]

    return spoil


def put(slot, key, value):
    def spoil(adata):
        getattr(adata, slot)[key] = value

    return spoil


def with_path(adata):
    tl.population_loadings(adata, "batch", "path")


def drop_part(*path):
    """Remove an entry of a mapping in uns."""

    def spoil(adata):
        inside = adata.uns
        for key in path[:-1]:
            inside[key] = dict(inside[key])
            inside = inside[key]
        del inside[path[-1]]

    return spoil


def put_part(*path, value):
    def spoil(adata):
        inside = adata.uns
        for key in path[:-1]:
            inside[key] = dict(inside[key])
            inside = inside[key]
        inside[path[-1]] = value

    return spoil


# Functions of an AnnData with an export, with the arguments that they need.
OF_EXPORT = {
    "tl": {
        "ablate": (), "ablate_genes": ("batch",), "population_expression": ("batch",), "population_loadings": ("batch",),
        "rank_factors_groups": ("batch",),
    },
    "get": {
        "consensus_loadings": (), "decoder": (), "factor_ranks": (), "factors": (), "gene_scores": (), "loadings": (),
        "population_directions_df": (), "population_loadings_df": (), "programs": (), "rank_factors_groups_df": (),
        "rotation": (), "stability": (), "top_genes": (),
    },
    "pl": {
        "attribution": ("gene0", "b1"), "embedding_factors": (), "factor_groups": (), "factor_scree": (), "latent_pairs": (),
        "loadings": (), "population_loadings": ("Z_0",), "rotation": (), "stability": (),
    },
}  # fmt: skip
ROOMS = {"tl": tl, "get": get, "pl": pl}
WITHOUT = [
    bad(f"{room}.{name}", "an AnnData without an export", lambda b, room=room, name=name, given=given: partial(getattr(ROOMS[room], name), b.counts(), *given), KeyError, "adata.")
    for room, functions in OF_EXPORT.items()
    for name, given in functions.items()
]  # fmt: skip
NO_ANNDATA = [
    bad(f"{room}.{name}", "a path for the AnnData", lambda b, room=room, name=name, given=given: partial(getattr(ROOMS[room], name), "cells.h5ad", *given), TypeError, "`adata`", "str")
    for room, functions in OF_EXPORT.items()
    for name, given in functions.items()
]  # fmt: skip

TOOLS = [
    bad("tl.ablate", "a latent that does not exist", tool("ablate", [9]), ValueError, "`latents`", "9", "Z_0"),
    bad("tl.ablate", "a mode that does not exist", tool("ablate", mode="remove"), ValueError, "`mode`", "'zero'", "'remove'"),
    bad("tl.ablate", "a layer that does not exist", tool("ablate", layer="raw"), KeyError, "`layer`", "'raw'", "none"),
    bad("tl.ablate", "a key of path traversal", tool("ablate", key="../ldvae"), ValueError, "'../ldvae'"),
    bad("tl.ablate", "no cells at a time", tool("ablate", chunk_size=0), ValueError, "`chunk_size`", "0"),
    bad("tl.ablate", "a mask of another length", tool("ablate", indices=[True]), ValueError, "`indices`", "60 cells", "(1,)"),
    bad("tl.ablate", "no counts", tool("ablate", spoil=lambda a: setattr(a, "X", None)), ValueError, "`adata.X` is empty"),
    bad("tl.ablate", "negative counts", tool("ablate", spoil=lambda a: setattr(a, "X", -a.X)), ValueError, "`adata.X`", "negative"),
    bad("tl.ablate", "counts of NaN", tool("ablate", spoil=lambda a: setattr(a, "X", a.X * np.nan)), ValueError, "`adata.X`", "NaN"),
    bad("tl.ablate", "no column of batches", tool("ablate", spoil=drop("obs", "batch")), KeyError, "'batch'", "adata.obs"),
    bad("tl.ablate", "a batch that the decoder does not know", tool("ablate", spoil=put("obs", "batch", "new")), ValueError, "'new'", "'b1'"),
    bad("tl.ablate", "no latents", tool("ablate", spoil=drop("obsm", "X_ldvae")), KeyError, "adata.obsm['X_ldvae']"),
    bad("tl.ablate", "latents of another width", tool("ablate", spoil=put("obsm", "X_ldvae", np.zeros((60, 7)))), ValueError, "adata.obsm['X_ldvae']", "7", "3"),
    bad("tl.ablate", "latents of text", tool("ablate", spoil=put("obsm", "X_ldvae", np.full((60, 3), "a"))), (ValueError), "adata.obsm['X_ldvae']", "numbers"),
    right("tl.ablate", "latents of NaN", tool("ablate", spoil=put("obsm", "X_ldvae", np.full((60, 3), np.nan))), lambda effects: np.testing.assert_array_equal(np.isnan(effects.X), True)),
    bad("tl.ablate", "no library sizes", tool("ablate", spoil=drop("obs", "ldvae_library")), KeyError, "ldvae_library"),
    bad("tl.ablate", "a decoder without loadings", tool("ablate", spoil=drop_part("ldvae", "decoder", "weight_gk")), ValueError, "'weight_gk'"),
    bad("tl.ablate_genes", "a column that does not exist", tool("ablate_genes", "type"), KeyError, "`groupby`", "'type'", "'batch'"),
    bad("tl.ablate_genes", "a value without its mode", tool("ablate_genes", value=1.0), ValueError, "`value`"),
    bad("tl.population_expression", "a gene that does not exist", tool("population_expression", "batch", gene_list=["ACTB"]), ValueError, "`gene_list`", "'ACTB'"),
    bad("tl.population_expression", "a negative library size", tool("population_expression", "batch", library_size=-1), ValueError, "`library_size`", "-1"),
    bad("tl.population_expression", "a column that does not exist", tool("population_expression", "type"), KeyError, "`groupby`", "'type'"),
    bad("tl.population_loadings", "a list for the column of groups", tool("population_loadings", ["batch"]), TypeError, "`groupby`", "['batch']"),
    bad("tl.population_loadings", "a kind that does not exist", tool("population_loadings", "batch", "slope"), ValueError, "`kind`", "'slope'"),
    bad("tl.population_loadings", "a reference that does not exist", tool("population_loadings", "batch", "contribution", reference="T"), ValueError, "`reference`", "'T'"),
    bad("tl.population_loadings", "the key of the export", tool("population_loadings", "batch", key_added="ldvae"), ValueError, "`key_added`", "'ldvae'"),
    bad("tl.population_loadings", "a key with a slash", tool("population_loadings", "batch", key_added="a/b"), ValueError, "`key_added`", "'a/b'"),
    bad("tl.population_loadings", "groups that are all missing", tool("population_loadings", "type", spoil=put("obs", "type", np.nan)), ValueError, "`groupby`", "type"),
    bad("tl.rank_factors_groups", "a method that does not exist", tool("rank_factors_groups", "batch", method="anova"), ValueError, "`method`", "'wilcoxon'", "'anova'"),
    bad("tl.rank_factors_groups", "a group that does not exist", tool("rank_factors_groups", "batch", groups=["b9"]), ValueError, "`groups`", "'b9'"),
    bad("tl.rank_factors_groups", "a reference that does not exist", tool("rank_factors_groups", "batch", reference="b9"), ValueError, "`reference`", "'b9'"),
    bad("tl.rank_factors_groups", "a correction that does not exist", tool("rank_factors_groups", "batch", corr_method="holm"), ValueError, "`corr_method`", "'holm'"),
    bad("tl.rank_factors_groups", "the key of the export", tool("rank_factors_groups", "batch", key_added="ldvae"), ValueError, "`key_added`", "'ldvae'"),
    bad("tl.match_factors", "a path", lambda b: partial(tl.match_factors, "a.h5ad", b.exported()), TypeError, "a LinearDecoder, an AnnData or a DataFrame", "str"),
    bad("tl.match_factors", "a comparison that does not exist", lambda b: partial(tl.match_factors, b.exported(), b.exported(), by="cells"), ValueError, "`by`", "'loadings'", "'cells'"),
    bad("tl.match_factors", "no genes in common", lambda b: partial(tl.match_factors, b.decoder(), _renamed(b)), ValueError, "genes"),
    bad("tl.match_factors", "an AnnData without an export", lambda b: partial(tl.match_factors, b.exported(), b.counts()), KeyError, "adata.uns"),
    bad("tl.project", "a path of a reference that does not exist", lambda b: partial(tl.project, b.counts(), b.folder / "none.npz", batch="mean"), (FileNotFoundError), "none.npz"),
    bad("tl.project", "a number for the reference", lambda b: partial(tl.project, b.counts(), 3), TypeError, "`reference`", "int"),
    bad("tl.project", "no genes of the reference", lambda b: partial(tl.project, b.counts(lambda a: setattr(a, "var_names", [f"x{i}" for i in range(N_GENES)])), b.decoder(), batch="mean"), ValueError, "genes", "`min_share`"),
    bad("tl.project", "a batch that the reference does not have", lambda b: partial(tl.project, b.counts(), b.decoder(), batch="b9"), ValueError, "`batch`", "'b9'", "'b1'"),
    bad("tl.project", "a share above 1", lambda b: partial(tl.project, b.counts(), b.decoder(), batch="mean", min_share=2), ValueError, "`min_share`", "2"),
    bad("tl.project", "negative counts", lambda b: partial(tl.project, b.counts(lambda a: setattr(a, "X", -a.X)), b.decoder(), batch="mean"), ValueError, "`adata.X`", "negative"),
    bad("tl.project", "counts of text", lambda b: partial(tl.project, b.counts(lambda a: setattr(a, "X", a.X.toarray().astype(str))), b.decoder(), batch="mean"), TypeError, "`adata.X`", "numbers"),
    bad("tl.project", "a key of path traversal", lambda b: partial(tl.project, b.counts(), b.decoder(), batch="mean", key_added="../x"), ValueError, "`key_added`", "'../x'"),
    bad("tl.project", "a column that does not exist", lambda b: partial(tl.project, b.counts(), b.decoder(), batch_key="lane"), KeyError, "`batch_key`", "'lane'"),
    bad("tl.project", "an array of the user in the way", lambda b: partial(tl.project, b.counts(put("obsm", "X_ldvae", np.zeros((60, 2)))), b.decoder(), batch="mean"), ValueError, "X_ldvae", "`overwrite=True`"),
]  # fmt: skip


def _renamed(b):
    arrays = b.decoder().to_arrays()
    return type(b.decoder()).from_arrays({**arrays, "genes": [f"other{i}" for i in range(N_GENES)]})


READS = [
    bad("get.ablation_df", "an AnnData without an ablation", lambda b: partial(get.ablation_df, b.exported()), TypeError, "`ablation`", "ablate", "AnnData"),
    bad("get.ablation_df", "a DataFrame", lambda b: partial(get.ablation_df, b.ablation().to_df()), TypeError, "`ablation`", "DataFrame"),
    bad("get.ablation_df", "a column that does not exist", lambda b: partial(get.ablation_df, b.ablation(), "type"), KeyError, "`groupby`", "'type'"),
    bad("get.ablation_df", "an alternative that does not exist", lambda b: partial(get.ablation_df, b.ablation(), "batch", alternative="more"), ValueError, "`alternative`", "'more'"),
    bad("get.ablation_df", "an effect of NaN", lambda b: partial(get.ablation_df, b.ablation(), "batch", min_effect=np.nan), ValueError, "`min_effect`", "nan"),
    bad("get.gene_ablation_df", "an ablation of cells", lambda b: partial(get.gene_ablation_df, b.ablation()), ValueError, "`ablation`", "ablate_genes"),
    bad("get.gene_ablation_df", "a factor that does not exist", lambda b: partial(get.gene_ablation_df, b.gene_ablation(), "Z_9"), ValueError, "`factor`", "'Z_9'"),
    bad("get.decoder", "a decoder without genes", read("decoder", spoil=drop_part("ldvae", "decoder", "genes")), ValueError, "'genes'"),
    bad("get.decoder", "a decoder that is a number", read("decoder", spoil=put_part("ldvae", "decoder", value=3)), KeyError, "adata.uns['ldvae']", "decoder"),
    bad("get.decoder", "an order with a factor twice", read("decoder", spoil=put_part("ldvae", "order", value=np.zeros(3, int))), ValueError, "order", "permutation"),
    bad("get.decoder", "no order", read("decoder", spoil=drop_part("ldvae", "order")), KeyError, "adata.uns['ldvae']", "'order'"),
    bad("get.decoder", "loadings of NaN", read("decoder", spoil=put_part("ldvae", "decoder", "weight_gk", value=np.full((N_GENES, 3), np.nan))), ValueError, "`weight_gk`", "finite"),
    bad("get.decoder", "a value of uns that is text", read("decoder", spoil=put("uns", "ldvae", "decoder")), KeyError, "adata.uns['ldvae']", "export_to_anndata"),
    bad("get.decoder", "a number for the key", read("decoder", key=3), ValueError, "key", "3"),
    bad("get.loadings", "no loadings", read("loadings", spoil=drop("varm", "ldvae_loadings")), KeyError, "adata.varm['ldvae_loadings']"),
    bad("get.loadings", "no column of genes", read("loadings", spoil=drop("var", "ldvae")), KeyError, "adata.var['ldvae']"),
    bad("get.loadings", "loadings of another width", read("loadings", spoil=put("varm", "ldvae_loadings", np.zeros((N_GENES, 7)))), ValueError, "adata.varm['ldvae_loadings']", "7", "3"),
    bad("get.factors", "no statistics", read("factors", spoil=drop_part("ldvae", "statistics")), KeyError, "adata.uns['ldvae']", "'statistics'"),
    bad("get.factors", "statistics of other factors", read("factors", spoil=put_part("ldvae", "statistics", "kl", value=np.zeros(7))), ValueError, "adata.uns['ldvae']", "kl", "7", "3"),
    bad("get.gene_scores", "a kind that does not exist", read("gene_scores", kind="size"), ValueError, "`kind`", "'information'", "'size'"),
    bad("get.gene_scores", "a statistic that does not exist", read("gene_scores", statistic="p"), ValueError, "`statistic`", "'score'", "'p'"),
    bad("get.top_genes", "no genes", read("top_genes", n=0), ValueError, "`n`", "0"),
    bad("get.top_genes", "a factor that does not exist", read("top_genes", "<b>Z_0</b>"), ValueError, "`factor`", "'<b>Z_0</b>'"),
    bad("get.top_genes", "a rank that does not exist", read("top_genes", rank_by="size"), ValueError, "`rank_by`", "'size'"),
    bad("get.population_loadings_df", "a group that does not exist", read("population_loadings_df", group="b9"), ValueError, "`group`", "'b9'", "'b1'"),
    bad("get.population_loadings_df", "a factor that does not exist", read("population_loadings_df", "Z_9"), ValueError, "`factor`", "'Z_9'"),
    bad("get.population_directions_df", "loadings of another kind", read("population_directions_df"), (ValueError), "'within'"),
    bad("get.programs", "a table that does not exist", read("programs", "usage"), ValueError, "`what`", "'scores'", "'usage'"),
    bad("get.rank_factors_groups_df", "a group that does not exist", read("rank_factors_groups_df", "b9"), ValueError, "`group`", "'b9'"),
    bad("get.rotation", "an export without a rotation", read("rotation"), KeyError, "LDVAE.rotate"),
    bad("get.stability", "a list for the key", read("stability", key=["ldvae_consensus"]), ValueError, "key", "['ldvae_consensus']"),
]  # fmt: skip
FIGURES = [
    bad("pl.ablation", "an AnnData without an ablation", lambda b: partial(pl.ablation, b.exported(), show=False), TypeError, "`ablation`", "ablate", "AnnData"),
    bad("pl.ablation", "a kind that does not exist", lambda b: partial(pl.ablation, b.ablation(), "batch", kind="violin", show=False), ValueError, "`kind`", "'heatmap'", "'violin'"),
    bad("pl.ablation", "a column that does not exist", lambda b: partial(pl.ablation, b.ablation(), "type", show=False), KeyError, "`groupby`", "'type'"),
    bad("pl.ablation", "a factor that does not exist", lambda b: partial(pl.ablation, b.ablation(), "batch", factors=["Z_9"], show=False), ValueError, "`factors`", "'Z_9'"),
    bad("pl.ablation", "text for the axes", lambda b: partial(pl.ablation, b.ablation(), "batch", ax="left", show=False), TypeError, "`ax`", "'left'"),
    bad("pl.ablation_genes", "no genes", lambda b: partial(pl.ablation_genes, b.gene_ablation(), "Z_0", n_genes=0, show=False), ValueError, "`n_genes`", "0"),
    bad("pl.ablation_genes", "a group that does not exist", lambda b: partial(pl.ablation_genes, b.gene_ablation(), "Z_0", groups=["b9"], show=False), ValueError, "`groups`", "'b9'"),
    bad("pl.ablation_genes", "a path", lambda b: partial(pl.ablation_genes, "cells.h5ad", "Z_0", show=False), TypeError, "`ablation`", "str"),
    bad("pl.attribution", "a gene that does not exist", draw("attribution", "ACTB", "b1", spoil=with_path), ValueError, "`gene`", "'ACTB'"),
    bad("pl.attribution", "a group that does not exist", draw("attribution", "gene0", "b9", spoil=with_path), ValueError, "`group`", "'b9'"),
    bad("pl.attribution", "no factors", draw("attribution", "gene0", "b1", n_factors=0), ValueError, "`n_factors`", "0"),
    bad("pl.embedding_factors", "an embedding that does not exist", draw("embedding_factors", basis="umap"), KeyError, "`basis`", "'umap'"),
    bad("pl.embedding_factors", "a negative size", draw("embedding_factors", basis="ldvae", size=-1), ValueError, "`size`", "-1"),
    bad("pl.embedding_factors", "an embedding in one dimension", draw("embedding_factors", basis="one", spoil=put("obsm", "X_one", np.zeros((60, 1)))), ValueError, "`basis`", "'X_one'", "(60, 1)"),
    bad("pl.factor_groups", "a factor that does not exist", draw("factor_groups", factors=[9]), ValueError, "`factors`", "9"),
    bad("pl.factor_scree", "a measure that does not exist", draw("factor_scree", measures="variance"), ValueError, "`measures`", "'variance'"),
    bad("pl.factors", "a column that does not exist", draw("factors", groupby="type"), KeyError, "`groupby`", "'type'"),
    bad("pl.factors", "half a gene", draw("factors", groupby="batch", n_genes=0.5), ValueError, "`n_genes`", "0.5"),
    bad("pl.latent_pairs", "a color that does not exist", draw("latent_pairs", color="type"), KeyError, "`color`", "'type'"),
    bad("pl.latent_pairs", "a single factor", draw("latent_pairs", factors=["Z_0"]), ValueError, "`factors`", "two"),
    bad("pl.loadings", "more genes than there are", draw("loadings", n_genes=999), ValueError, "`n_genes`", "999"),
    bad("pl.loadings", "no columns", draw("loadings", ncols=0), ValueError, "`ncols`", "0"),
    bad("pl.loadings", "a rank that does not exist", draw("loadings", rank_by="size"), ValueError, "`rank_by`", "'size'"),
    bad("pl.match", "a DataFrame", lambda b: partial(pl.match, pd.DataFrame(), show=False), TypeError, "`match`", "DataFrame"),
    bad("pl.population_loadings", "a factor that does not exist", draw("population_loadings", "F_0"), ValueError, "`factor`", "'F_0'"),
    bad("pl.population_loadings", "a group that does not exist", draw("population_loadings", "Z_0", groups=["b9"]), ValueError, "`groups`", "'b9'"),
    bad("pl.rotation", "an export without a rotation", draw("rotation"), KeyError, "LDVAE.rotate"),
    bad("pl.stability", "a key that does not exist", draw("stability", key="none"), KeyError, "'none'"),
    bad("pl.training_curves", "an AnnData", lambda b: partial(pl.training_curves, b.exported(), show=False), TypeError, "`history`", "AnnData"),
    bad("pl.training_curves", "a history of other losses", lambda b: partial(pl.training_curves, {"loss": pd.DataFrame()}, show=False), KeyError, "`history`", "'elbo_train'", "'loss'"),
    bad("pl.training_curves", "a number for show", lambda b: partial(pl.training_curves, trained_model().history, show="yes"), ValueError, "`show`", "'yes'"),
]  # fmt: skip
DATA = [
    bad("datasets.simulate", "no cells", lambda b: partial(datasets.simulate, 0), ValueError, "`n_cells`", "0"),
    bad("datasets.simulate", "half a gene", lambda b: partial(datasets.simulate, n_genes=0.5), ValueError, "`n_genes`", "0.5"),
    bad("datasets.simulate", "a kind that does not exist", lambda b: partial(datasets.simulate, kind="linear"), ValueError, "`kind`", "'log-linear'", "'linear'"),
    bad("datasets.simulate", "a likelihood that does not exist", lambda b: partial(datasets.simulate, likelihood="normal"), ValueError, "`likelihood`", "'nb'", "'normal'"),
    bad("datasets.simulate", "a library of NaN", lambda b: partial(datasets.simulate, median_library=np.nan), ValueError, "`median_library`", "nan"),
    bad("datasets.simulate", "a negative dispersion", lambda b: partial(datasets.simulate, theta=-1), ValueError, "`theta`", "-1"),
    bad("datasets.simulate", "dropout of 2", lambda b: partial(datasets.simulate, likelihood="zinb", dropout=2), ValueError, "`dropout`", "2"),
    bad("datasets.simulate", "a negative seed", lambda b: partial(datasets.simulate, seed=-1), ValueError, "`seed`", "-1"),
]  # fmt: skip

TOOL_CASES: list[Case] = [*WITHOUT, *NO_ANNDATA, *TOOLS, *READS, *FIGURES, *DATA]
