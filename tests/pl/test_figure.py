"""What all figures promise: how they are shown and returned, and what they leave alone."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldvae_ext import get, pl, tl
from ldvae_ext.pl._figure import em, folded
from tests.pl.helpers import assert_legible, drawn_texts

SINGLE = [
    "factor_scree",
    "ablation",
    "factor_groups",
    "ablation_genes",
    "population_loadings",
    "attribution",
    "stability",
    "match",
]
MULTI = ["factors", "loadings", "embedding_factors", "latent_pairs", "training_curves", "rotation"]


@pytest.fixture
def draw(rotated, readable, ablated, consensus):
    adata = consensus(rotated())
    tl.rank_factors_groups(adata, "population")
    populations = readable()
    tl.population_loadings(populations, "population", "path")
    history = {"elbo_train": pd.DataFrame({"elbo_train": np.linspace(9, 5, 10)}, index=pd.RangeIndex(10, name="epoch"))}
    arguments = {
        "ablation": (ablated(), "population"),
        "ablation_genes": (tl.ablate_genes(populations, "population"), "Z_1"),
        "population_loadings": (populations, "Z_1"),
        "attribution": (populations, populations.var_names[5], "B"),
        "training_curves": (history,),
        "match": (tl.match_factors(adata, populations),),
    }
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    options = {"factors": {"groupby": "population"}}
    return lambda name, **kwargs: getattr(pl, name)(*arguments.get(name, (adata,)), **options.get(name, {}), **kwargs)


@pytest.fixture
def set_autoshow():
    before = sc.settings.autoshow
    yield lambda value: setattr(sc.settings, "autoshow", value)
    sc.settings.autoshow = before


def test_every_public_figure_is_tested_here():
    assert sorted(pl.__all__) == sorted(SINGLE + MULTI)


@pytest.mark.grid(0)
@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_the_axes_or_figure_comes_back_when_not_shown(draw, shown, name):
    drawn = draw(name, show=False)
    assert isinstance(drawn, Axes if name in SINGLE else Figure)
    assert not shown
    assert len(plt.get_fignums()) == 1


@pytest.mark.grid(0)
@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_a_shown_figure_is_not_returned_and_not_left_open(draw, shown, name):
    assert draw(name, show=True) is None
    assert [len(open_) for open_ in shown] == [1]
    assert not plt.get_fignums()


@pytest.mark.grid(0)
@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_the_figure_can_be_asked_for_and_is_then_not_shown(draw, shown, set_autoshow, name):
    set_autoshow(True)
    assert isinstance(draw(name, return_fig=True), Figure)
    assert not shown


@pytest.mark.grid(0)
@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_a_figure_that_is_asked_for_and_shown_stays_open(draw, shown, name):
    figure = draw(name, show=True, return_fig=True)
    assert isinstance(figure, Figure)
    assert shown == [[figure.number]] == [plt.get_fignums()]


@pytest.mark.grid(0)
@pytest.mark.parametrize("autoshow", [True, False])
@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_scanpy_decides_at_call_time_whether_to_show(draw, shown, set_autoshow, name, autoshow):
    set_autoshow(autoshow)
    assert (draw(name) is None) == autoshow
    assert len(shown) == autoshow


def test_an_interactive_session_keeps_what_it_shows(draw, shown):
    with plt.ion():
        assert draw("factor_scree", show=True) is None
    assert len(plt.get_fignums()) == 1


@pytest.mark.grid(0)
@pytest.mark.parametrize("name", SINGLE)
def test_given_axes_are_drawn_in_and_their_figure_keeps_its_size_and_layout(draw, shown, name):
    figure, axes = plt.subplots(1, 2, figsize=(13, 4))
    layout = figure.get_layout_engine()
    assert draw(name, ax=axes[1], show=False) is axes[1]
    assert draw(name, ax=axes[0], return_fig=True) is figure
    assert figure.get_size_inches().tolist() == [13, 4]
    assert figure.get_layout_engine() is layout
    assert axes[1].patches or axes[1].images or axes[1].collections
    assert plt.get_fignums() == [figure.number]
    assert draw(name, ax=axes[1], show=True) is None
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", SINGLE)
def test_axes_in_a_subfigure_belong_to_the_whole_figure(draw, name):
    figure = plt.figure(figsize=(13, 4), layout="constrained")
    ax = figure.subfigures(1, 2)[0].subplots()
    assert draw(name, ax=ax, return_fig=True) is figure


@pytest.mark.parametrize("name", ["factor_scree", "loadings", "latent_pairs", "rotation"])
def test_a_missing_export_is_named_before_anything_is_drawn(draw, name):
    with pytest.raises(KeyError, match=r"No export 'other'.*'ldvae'.*export_to_anndata"):
        draw(name, key="other")
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", ["factor_scree", "loadings", "latent_pairs", "rotation"])
def test_another_key_is_read(rotated, name):
    adata = rotated(key="other")
    assert isinstance(getattr(pl, name)(adata, key="other", return_fig=True), Figure)


@pytest.mark.parametrize("name", ["loadings", "ablation", "factor_groups", "latent_pairs"])
@pytest.mark.parametrize("wrong", [["Z_0", "Z_9"], ["Z_0", 5], [], "Z_9", [None]])
def test_unknown_factors_are_named_before_anything_is_drawn(draw, name, wrong):
    with pytest.raises(ValueError, match="`factors`"):
        draw(name, factors=wrong)
    assert not plt.get_fignums()


@pytest.mark.grid(0)
@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_larger_type_makes_larger_figures(draw, name):
    small = draw(name, return_fig=True).get_size_inches()
    with plt.rc_context({"font.size": 15}):
        large = draw(name, return_fig=True).get_size_inches()
    assert (large > 1.2 * small).all()


FLAGGED = ["Z_0", "Z_1 (uncertain)", "Z_2", "Z_3 (unstable)"]


@pytest.fixture
def flagged(readable):
    """Draws a figure of four factors, two of which other trainings do not confirm, with results of that export."""
    adata = readable(4)
    info = adata.uns["ldvae"]
    scores = dict(zip([f"Z_{k}" for k in range(4)], [0.95, 0.7, 0.8, 0.3]))
    info["statistics"]["reproducibility"] = np.array([scores[name] for name in info["names"]])
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    tl.rank_factors_groups(adata, "population")
    tl.population_loadings(adata, "population", "path")
    ablation, genes = tl.ablate(adata), tl.ablate_genes(adata, "population")
    for result in (ablation, genes):
        result.var["flag"] = get.factors(adata)["flag"]
    info["rotation"] = {"method": "varimax", "matrix": np.eye(4), "latents": info["names"]}
    arguments = {
        "ablation": (ablation, "population"),
        "ablation_genes": (genes, "Z_1"),
        "population_loadings": (adata, "Z_1"),
        "attribution": (adata, adata.var_names[5], "B"),
    }
    options = {"factors": {"groupby": "population"}}

    def draw(name, **kwargs):
        return getattr(pl, name)(*arguments.get(name, (adata,)), **options.get(name, {}), **kwargs)

    draw.adata = adata
    return draw


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *(
            (name, {})
            for name in ("factors", "loadings", "embedding_factors", "latent_pairs", "factor_scree", "rotation")
        ),
        *((name, {}) for name in ("factor_groups", "ablation", "attribution")),
        ("factor_scree", {"measures": "kl"}),
        ("ablation", {"kind": "dotplot"}),
    ],
)
def test_factors_that_others_do_not_confirm_have_a_flag_in_every_figure(flagged, name, kwargs):
    figure = flagged(name, return_fig=True, **kwargs)
    named = {text.get_text().split(":")[0] for text in drawn_texts(figure)}
    assert set(FLAGGED) <= named
    assert not named & {"Z_0 (stable)", "Z_2 (stable)"}
    # The network's latents, left of a rotation, are not the factors that were compared.
    assert name == "rotation" or not named & {"Z_1", "Z_3"}


@pytest.mark.parametrize("name", ["ablation_genes", "population_loadings"])
def test_a_figure_of_one_factor_has_its_flag_in_the_title(flagged, name):
    assert flagged(name, show=False).get_title().split("\n")[0] == "Z_1 (uncertain)"


@pytest.mark.parametrize("name", ["factor_groups", "attribution"])
def test_flags_of_a_later_export_are_not_those_of_a_result(flagged, name):
    def flags():
        return {text.get_text() for text in drawn_texts(flagged(name, return_fig=True))} & set(FLAGGED) - {"Z_0", "Z_2"}

    assert flags()
    info = flagged.adata.uns["ldvae"]
    info["statistics"]["kl"] = info["statistics"]["kl"] + 1
    with pytest.warns(UserWarning, match="computed from an earlier export"):
        assert not flags()
    del flagged.adata.uns["ldvae"]
    assert not flags()


def test_long_names_are_in_two_lines_where_there_is_room():
    long, short = "CD4+/CD45RA+/CD25- Naive T, subset 0001 (20)", "CD4+/CD45RA+/CD25- Naive T (20)"
    assert folded([long, short], 4 * em()) == ["CD4+/CD45RA+/CD25-\nNaive T, subset 0001 (20)", short]
    assert folded([long, short], 3 * em()) == [long, short]
    assert folded(["x" * 60], 4 * em()) == ["x" * 60]


@pytest.fixture
def draw_many(readable, consensus):
    """Draws a figure of many factors and of populations with names of 40 characters, at 7 points."""

    def draw(name, n_latent, n_groups, **kwargs):
        adata = consensus(readable(n_latent, n_groups), n_latent)
        names = [f"CD4+/CD45RA+/CD25- Naive T, subset no. {p:02d}" for p in range(n_groups)]
        adata.obs["population"] = adata.obs["population"].cat.rename_categories(names)
        adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
        arguments = (adata,)
        match name:
            case "ablation":
                arguments = tl.ablate(adata), "population"
            case "ablation_genes":
                arguments = tl.ablate_genes(adata, "population"), 0
            case "attribution":
                tl.population_loadings(adata, "population", "path")
                arguments = adata, adata.var_names[5], names[1]
            case "factor_groups":
                tl.rank_factors_groups(adata, "population")
            case "factors":
                kwargs["groupby"] = "population"
            case "latent_pairs":
                kwargs["color"] = "population"
            case "match":
                arguments = (tl.match_factors(adata, adata),)
            case "population_loadings":
                tl.population_loadings(adata, "population")
                arguments = adata, 0
            case "rotation":
                info = adata.uns["ldvae"]
                info["rotation"] = {"method": "varimax", "matrix": np.eye(n_latent), "latents": info["names"]}
        with plt.rc_context({"font.size": 7}):
            if "figsize" in kwargs:
                kwargs["ax"] = plt.subplots(figsize=kwargs.pop("figsize"), layout="constrained")[1]
            return getattr(pl, name)(*arguments, **kwargs, return_fig=True)

    return draw


ANY_SIZE = sorted({*SINGLE, *MULTI} - {"training_curves"})
MILLIMETRES = 25.4


@pytest.mark.grid(1)
@pytest.mark.parametrize(("n_latent", "n_groups"), [(2, 40), (10, 3), (50, 40)])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_figures_are_legible_and_not_wider_than_a_page_is_high(draw_many, name, n_latent, n_groups):
    figure = draw_many(name, n_latent, n_groups)
    assert_legible(figure)
    width = figure.get_size_inches()[0] * MILLIMETRES
    # A rotation has two panels with a column for each factor.
    assert width < (330 if name == "rotation" else 250)


@pytest.mark.parametrize("name", SINGLE)
def test_ten_factors_and_three_populations_fit_in_a_column(draw_many, name):
    assert_legible(draw_many(name, 10, 3, figsize=(85 / MILLIMETRES, 90 / MILLIMETRES)))
