"""Draws the figures of the gallery from the bundled example, when the pages are built."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "_static" / "gallery"
GROUPBY = "bulk_labels"


def figures() -> dict[str, Callable[[], Any]]:
    """A function for each figure, by the name of the function of ``pl`` that draws it."""
    import ldvae_ext
    from ldvae_ext import pl, tl

    adata = ldvae_ext.datasets.pbmc68k()
    result = ldvae_ext.run(adata, groupby=GROUPBY, n_runs=2, n_latent=8, silent=True)
    tl.rank_factors_groups(adata, GROUPBY)
    tl.population_loadings(adata, GROUPBY)
    tl.population_loadings(adata, GROUPBY, "path", key_added="path")
    one, two = result.ensemble.models
    matched = tl.match_factors(one, two)
    genes = tl.ablate_genes(adata, GROUPBY)
    gene = ldvae_ext.get.top_genes(adata, 0, n=1)["gene"].iloc[0]
    return {
        "factors": lambda: pl.factors(adata, groupby=GROUPBY, factors=[0, 1], return_fig=True),
        "loadings": lambda: pl.loadings(adata, n_genes=5, ncols=4, return_fig=True),
        "embedding_factors": lambda: pl.embedding_factors(adata, return_fig=True),
        "factor_scree": lambda: pl.factor_scree(adata, return_fig=True),
        "stability": lambda: pl.stability(adata, return_fig=True),
        "match": lambda: pl.match(matched, return_fig=True),
        "rotation": lambda: pl.rotation(adata, n_genes=2, return_fig=True),
        "latent_pairs": lambda: pl.latent_pairs(adata, factors=[0, 1, 2], color=GROUPBY, return_fig=True),
        "ablation": lambda: pl.ablation(result.ablation, GROUPBY, return_fig=True),
        "ablation_genes": lambda: pl.ablation_genes(genes, 0, return_fig=True),
        "factor_groups": lambda: pl.factor_groups(adata, return_fig=True),
        "population_loadings": lambda: pl.population_loadings(adata, 0, n_genes=10, return_fig=True),
        "attribution": lambda: pl.attribution(adata, gene, "CD14+ Monocyte", key="path", return_fig=True),
        "training_curves": lambda: pl.training_curves(result.model.history, return_fig=True),
    }


def draw() -> None:
    """Draw what is missing."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    if FOLDER.exists():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = {name: function() for name, function in figures().items()}
    FOLDER.mkdir(parents=True)
    for name, figure in drawn.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=90, bbox_inches="tight")
        plt.close(figure)


if __name__ == "__main__":
    draw()
