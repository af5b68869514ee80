from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ldvae_ext import get, pl
from tests.pl.helpers import assert_legible


def panels_of(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def cells_of(ax):
    return np.concatenate([np.asarray(points.get_offsets()) for points in ax.collections])


def by_row(cells):
    return cells[np.lexsort(cells.T)]


def test_each_pair_of_the_first_four_factors_has_a_panel_with_all_cells(exported):
    adata = exported(6)
    names = get.factors(adata).index
    figure = pl.latent_pairs(adata, show=False)
    panels = panels_of(figure)
    pairs = [(x, y) for y in range(1, 4) for x in range(y)]
    assert len(panels) == len(pairs)
    for ax, (x, y) in zip(panels, pairs, strict=True):
        np.testing.assert_array_equal(by_row(cells_of(ax)), by_row(adata.obsm["X_ldvae"][:, [x, y]]))
        assert ax.get_xlabel() in {"", names[x]}
        assert ax.get_ylabel() in {"", names[y]}
    assert [ax.get_xlabel() for ax in panels[3:]] == names[:3].tolist()
    assert [panels[i].get_ylabel() for i in (0, 1, 3)] == names[1:4].tolist()


def test_chosen_factors_are_drawn_in_the_order_asked_for(exported):
    adata = exported(6)
    names = get.factors(adata).index
    (ax,) = panels_of(pl.latent_pairs(adata, factors=[names[5], 2], show=False))
    assert (ax.get_xlabel(), ax.get_ylabel()) == (names[5], names[2])
    np.testing.assert_array_equal(by_row(cells_of(ax)), by_row(adata.obsm["X_ldvae"][:, [5, 2]]))


def test_groups_have_a_legend_and_can_be_told_apart(exported):
    adata = exported(n_cells=300)
    groups = [f"T/{i}" for i in range(25)]
    adata.obs["many"] = pd.Categorical(np.resize(groups, 300), categories=groups)
    figure = pl.latent_pairs(adata, color="many", show=False)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == groups
    assert legend.get_title().get_text() == "many"
    assert len({(h.get_color(), h.get_marker()) for h in legend.legend_handles}) == 25
    for ax in panels_of(figure):
        assert len(cells_of(ax)) == 300


def test_cells_have_the_colour_that_the_legend_gives_their_group(exported):
    adata = exported()
    figure = pl.latent_pairs(adata, factors=[0, 1], color="population", show=False)
    colour_of = {
        t.get_text(): to_hex(h.get_color())
        for t, h in zip(figure.legends[0].get_texts(), figure.legends[0].legend_handles)
    }
    (points,) = panels_of(figure)[0].collections
    expected = {tuple(z): colour_of[g] for z, g in zip(adata.obsm["X_ldvae"][:, :2], adata.obs["population"])}
    for z, colour in zip(np.asarray(points.get_offsets()), points.get_facecolors(), strict=True):
        assert to_hex(colour) == expected[tuple(z.astype(np.float32))]


@pytest.mark.parametrize("n_colors", [3, 4, 6])
def test_colours_of_the_anndata_are_used_if_there_are_enough(exported, n_colors):
    adata = exported()
    given = ["#111111", "#222222", "#333333", "#444444", "#555555", "#666666"][:n_colors]
    adata.uns["population_colors"] = np.array(given)
    figure = pl.latent_pairs(adata, color="population", show=False)
    drawn = [handle.get_color() for handle in figure.legends[0].legend_handles]
    assert (drawn == given[:4]) == (n_colors >= 4)


@pytest.mark.parametrize("column", ["text", "flag", "group"])
def test_cells_without_a_value_are_grey_and_last_in_the_legend(exported, column):
    adata = exported()
    adata.obs["text"] = np.where(np.arange(adata.n_obs) % 2, "a/b", "c").astype(object)
    adata.obs["flag"] = pd.array(np.arange(adata.n_obs) % 2 == 0, dtype="boolean")
    adata.obs["group"] = pd.Categorical(
        np.where(np.arange(adata.n_obs) % 2, "a/b", "c"), categories=["c", "unused", "a/b"]
    )
    adata.obs.loc[adata.obs_names[:5], column] = None
    figure = pl.latent_pairs(adata, factors=[0, 1], color=column, show=False)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == {"text": ["a/b", "c"], "flag": ["False", "True"], "group": ["c", "a/b"]}[column] + ["no value"]
    colours = np.concatenate([points.get_facecolors() for points in figure.axes[0].collections])
    assert sum(to_hex(colour) == to_hex("lightgray") for colour in colours) == 5


def test_numbers_have_a_colour_bar(exported):
    adata = exported()
    adata.obs.loc[adata.obs_names[:5], "depth"] = np.nan
    figure = pl.latent_pairs(adata, color="depth", show=False)
    assert not figure.legends
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "depth"
    np.testing.assert_allclose(bar.get_ylim(), [adata.obs["depth"].min(), adata.obs["depth"].max()])
    colours = figure.axes[0].collections[0].get_facecolors()
    assert sum(to_hex(colour) == to_hex("lightgray") for colour in colours) == 5


def test_without_a_single_number_all_cells_are_grey(exported):
    adata = exported()
    adata.obs["depth"] = np.nan
    figure = pl.latent_pairs(adata, color="depth", show=False)
    assert {to_hex(c) for c in figure.axes[0].collections[0].get_facecolors()} == {to_hex("lightgray")}


def test_many_cells_are_drawn_as_an_image_in_vector_files(exported):
    few, many = (pl.latent_pairs(exported(2, n_cells=n), show=False) for n in (60, 6000))
    assert not few.axes[0].collections[0].get_rasterized()
    assert many.axes[0].collections[0].get_rasterized()


@pytest.mark.grid(0)
@pytest.mark.parametrize("color", [None, "many", "population", "depth"])
@pytest.mark.parametrize("n_factors", [2, 3, 5])
def test_no_label_overlaps_another_or_is_cut_off(exported, color, n_factors):
    adata = exported(7)
    groups = [f"CD4+/CD45RA+/CD25- Naive T, subset {i}" for i in range(40)]
    adata.obs["many"] = pd.Categorical(np.resize(groups, adata.n_obs), categories=groups)
    assert_legible(pl.latent_pairs(adata, factors=range(n_factors), color=color, return_fig=True))


def test_a_missing_column_is_named_before_anything_is_drawn(exported):
    with pytest.raises(KeyError, match=r"`color`: 'celltype' is not a column of `adata.obs`, which has 'batch'"):
        pl.latent_pairs(exported(), color="celltype")
    assert not plt.get_fignums()


def test_one_factor_makes_no_pair(exported):
    with pytest.raises(ValueError, match="`factors` must name at least two factors; got 'Z_0'"):
        pl.latent_pairs(exported(1))
    with pytest.raises(ValueError, match="`factors` must name at least two factors; got 'Z_1'"):
        pl.latent_pairs(exported(), factors=["Z_1", "Z_1"])


def test_the_anndata_is_left_as_it_was(exported):
    adata = exported()
    before = adata.copy()
    pl.latent_pairs(adata, color="population", show=False)
    assert set(adata.uns) == set(before.uns)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
