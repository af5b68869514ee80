"""What all figures promise: how they are shown and returned, and what they leave alone."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldvae_ext import pl, tl

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
