"""Every figure against a picture of it, in ``baseline``: colours, order, panels, names and sizes.

Pictures are compared where matplotlib has the minor version that drew them: others lay text out with other sizes. After
a change of a figure that is meant, or for another version (``DRAWN_WITH``), draw them again and look at each::

    pytest --mpl-generate-path=tests/pl/baseline tests/pl/test_images.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.testing.compare import compare_images

from ldvae_ext import pl, tl
from ldvae_ext._keys import ABLATION_INFO, export_keys
from ldvae_ext.core import LinearDecoder
from tests.pl.test_figure import MULTI, SINGLE

DRAWN_WITH = "3.11"
# Root mean square over all pixels, of 255: 0 between releases of one minor version, 5 or more for swapped colours of a few dots.
TOLERANCE = 2
STYLE = ["default", {"font.size": 7, "text.hinting": "none"}]
DPI = 60
BASELINE = Path(__file__).parent / "baseline"

needs_version = pytest.mark.skipif(
    not mpl.__version__.startswith(f"{DRAWN_WITH}."),
    reason=f"the pictures were drawn with matplotlib {DRAWN_WITH}; {mpl.__version__} gives text other sizes",
)


def picture(figure):
    """Mark of a test that returns a figure, which is to look like its picture."""
    compared = pytest.mark.mpl_image_compare(
        baseline_dir="baseline",
        style=STYLE,
        backend="Agg",
        tolerance=TOLERANCE,
        savefig_kwargs={"dpi": DPI},
    )
    return needs_version(compared(figure))


def waves(n_rows, n_columns, pace=1.0):
    """Numbers in [-1, 1] that differ between rows and columns."""
    row, column = np.indices((n_rows, n_columns))
    return np.sin(pace * (1 + row) * (1.3 + 0.7 * column) + column)


@pytest.fixture
def adata():
    """An export with four factors, not all of which are confirmed, and three populations with colours."""
    n_cells, n_genes, n_latent = 48, 16, 4
    names = [f"Z_{k}" for k in range(n_latent)]
    genes = [f"GENE{g}" for g in range(n_genes)]
    group_n = np.arange(n_cells) % 3
    latent_nk = 0.5 * waves(n_cells, n_latent) + np.eye(3, n_latent)[group_n]
    weight_gk = waves(n_genes, n_latent, pace=0.6) ** 3
    decoder = LinearDecoder(
        weight_gk=weight_gk,
        intercept_bg=np.linspace(-1, 1, n_genes)[None],
        genes=genes,
        batches=["lane"],
        factors=names,
        theta_bg=np.full((1, n_genes), 2.0),
        link="softmax",
    ).centered()
    rate_ng = np.exp(latent_nk @ decoder.weight_gk.T + decoder.intercept_bg)
    kl_k = np.array([3.0, 2.0, 1.2, 0.1])
    keys = export_keys()
    adata = AnnData(
        np.round(200 * rate_ng / rate_ng.sum(axis=1, keepdims=True)).astype(np.float32),
        obs=pd.DataFrame(
            {"population": pd.Categorical.from_codes(group_n.tolist(), ["CD4+/CD25 T Reg", "B cells", "Monocytes"])},
            index=[f"cell {n}" for n in range(n_cells)],
        ),
        var=pd.DataFrame({keys.genes: True}, index=genes),
        obsm={
            keys.latent: latent_nk.astype(np.float32),
            keys.variance: np.full((n_cells, n_latent), 0.1, dtype=np.float32),
            "X_umap": np.column_stack([np.cos(group_n * 2.1), np.sin(group_n * 2.1)]) + 0.5 * waves(n_cells, 2),
        },
        varm={keys.loadings: decoder.weight_gk.astype(np.float32)},
        uns={
            keys.info: {
                "names": np.array(names),
                "order": np.arange(n_latent),
                "signs": np.ones(n_latent),
                "order_by": "kl",
                "statistics": {
                    "kl": kl_k,
                    "kl_share": kl_k / kl_k.sum(),
                    "active_unit": kl_k[[1, 0, 2, 3]] / 4,
                    "reproducibility": np.array([0.95, 0.7, 0.9, 0.2]),
                },
                "decoder": decoder.to_arrays(),
                "setup": {"batch_key": "lane"},
            },
            "population_colors": ["#0072B2", "#E69F00", "#009E73"],
        },
    )
    adata.obs["lane"] = "lane"
    adata.obs[keys.library] = adata.X.sum(axis=1)
    return adata


@pytest.fixture
def rotated(adata):
    matrix_kk = np.linalg.qr(waves(4, 4) + np.eye(4))[0]
    adata.uns["ldvae"]["rotation"] = {"method": "varimax", "matrix": matrix_kk, "latents": adata.uns["ldvae"]["names"]}
    return adata


@pytest.fixture
def ablation(adata):
    """Effects that mostly help, with flags."""
    effect_nk = 3 * waves(3, 4)[np.arange(adata.n_obs) % 3] + waves(adata.n_obs, 4) + 2
    flags = ["stable", "uncertain", "stable", "unstable"]
    return AnnData(
        effect_nk,
        obs=adata.obs,
        var=pd.DataFrame({"flag": flags}, index=adata.uns["ldvae"]["names"]),
        uns={ABLATION_INFO: {"mode": "zero", "unit": "nats"}},
    )


@pytest.fixture
def consensus(adata):
    cosine_mk = np.clip(np.array([0.95, 0.85, 0.7, 0.3]) + 0.04 * waves(4, 4), 0, 1)
    mean_k = cosine_mk.mean(axis=0)
    adata.uns["ldvae_consensus"] = {
        "names": np.array([f"C_{k}" for k in range(4)]),
        "statistics": {"reproducibility": mean_k, "lowest": cosine_mk.min(axis=0), "kl": 3 * mean_k},
        "flag": np.array(["stable", "stable", "uncertain", "unstable"]),
        "cosine": cosine_mk,
        "resample": "none",
        "thresholds": np.array([0.6, 0.8]),
        "n_failed": 0,
    }
    return adata


@picture
def test_factors(adata):
    return pl.factors(adata, groupby="population", factors=[0, 1], n_genes=3, rank_by="loading", return_fig=True)


@picture
def test_loadings(adata):
    return pl.loadings(adata, n_genes=3, ncols=2, rank_by="loading", return_fig=True)


@picture
def test_embedding_factors(adata):
    return pl.embedding_factors(adata, factors=[0, 3], ncols=2, return_fig=True)


@picture
def test_latent_pairs(adata):
    return pl.latent_pairs(adata, factors=[0, 1, 2], color="population", return_fig=True)


@picture
def test_factor_scree(adata):
    return pl.factor_scree(adata, return_fig=True)


@picture
def test_factor_scree_of_measures(adata):
    return pl.factor_scree(adata, measures=["kl", "active_unit"], return_fig=True)


@picture
def test_rotation(rotated):
    return pl.rotation(rotated, return_fig=True)


@picture
def test_stability(consensus):
    return pl.stability(consensus, return_fig=True)


@picture
def test_match(adata):
    other = adata.copy()
    other.varm["ldvae_loadings"] = adata.varm["ldvae_loadings"][:, [1, 0, 3, 2]] + 0.4 * waves(16, 4)
    return pl.match(tl.match_factors(adata, other), return_fig=True)


@picture
def test_factor_groups(adata):
    tl.rank_factors_groups(adata, "population")
    return pl.factor_groups(adata, return_fig=True)


@picture
def test_ablation(ablation):
    return pl.ablation(ablation, "population", return_fig=True)


@picture
def test_ablation_dotplot(ablation):
    return pl.ablation(ablation, "population", kind="dotplot", return_fig=True)


@picture
def test_ablation_genes(adata):
    return pl.ablation_genes(tl.ablate_genes(adata, "population"), 1, n_genes=6, return_fig=True)


@picture
def test_population_loadings(adata):
    tl.population_loadings(adata, "population")
    return pl.population_loadings(adata, 1, n_genes=8, return_fig=True)


@picture
def test_attribution(adata):
    tl.population_loadings(adata, "population", "path")
    return pl.attribution(adata, "GENE3", "Monocytes", return_fig=True)


@picture
def test_training_curves():
    epochs = pd.RangeIndex(1, 21, name="epoch")
    history = {
        f"{metric}_{cells}": pd.DataFrame({"value": level + rise + 40 / epochs}, index=epochs)
        for metric, level in (("elbo", 110), ("reconstruction_loss", 100), ("kl_local", 10))
        for cells, rise in (("train", 0), ("validation", 4))
    }
    return pl.training_curves(history, return_fig=True)


def test_every_public_figure_has_a_small_picture_and_no_picture_is_left_over():
    pictures = {path.stem.removeprefix("test_"): path.stat().st_size for path in BASELINE.glob("*.png")}
    assert set(pictures) == {*SINGLE, *MULTI, "factor_scree_of_measures", "ablation_dotplot"}
    assert max(pictures.values()) < 20_000
    assert {f"test_{name}" for name in pictures} < set(globals())


def test_pictures_are_compared(pytestconfig):
    assert pytestconfig.getoption("--mpl") or pytestconfig.getoption("--mpl-generate-path")


@needs_version
@pytest.mark.parametrize("change", ["nothing", "order", "colours"])
def test_the_comparison_sees_a_changed_order_or_colour(adata, tmp_path, change):
    factors = [0, 2, 1] if change == "order" else [0, 1, 2]
    if change == "colours":
        adata.uns["population_colors"].reverse()
    path = tmp_path / "drawn.png"
    with plt.style.context(STYLE, after_reset=True):
        pl.latent_pairs(adata, factors=factors, color="population", return_fig=True).savefig(path, dpi=DPI)
    difference = compare_images(str(BASELINE / "test_latent_pairs.png"), str(path), TOLERANCE)
    assert (difference is None) == (change == "nothing")
