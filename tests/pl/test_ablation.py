from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext import get, pl, tl
from ldvae_ext._keys import ABLATION_INFO
from tests.pl.helpers import assert_legible, drawn_texts, panel_inches

MINUS = "\N{MINUS SIGN}"


def group_means(ablation, groupby="population"):
    groups = ablation.obs[groupby]
    return np.stack([ablation.X[(groups == g).to_numpy()].astype(float).mean(axis=0) for g in groups.cat.categories])


def test_the_heatmap_holds_the_mean_of_each_group_negative_ones_included(ablated):
    ablation = ablated()
    ax = pl.ablation(ablation, "population", show=False)
    drawn = ax.images[0].get_array()
    np.testing.assert_allclose(drawn, group_means(ablation))
    assert (drawn < 0).any()


def test_rows_carry_the_group_and_its_number_of_cells(ablated):
    ablation = ablated()
    ablation.obs.loc[ablation.obs_names[:20], "population"] = np.nan
    ax = pl.ablation(ablation, "population", show=False)
    sizes = ablation.obs["population"].value_counts(sort=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{g} ({n})" for g, n in sizes.items()]
    assert ax.get_yticklabels()[0].get_text().startswith("CD4+/CD45RA+/CD25- Naive T (")


def test_groups_without_cells_are_left_out(ablated):
    ablation = ablated()
    ablation = ablation[ablation.obs["population"] != "B"]
    ax = pl.ablation(ablation, "population", show=False)
    assert len(ax.get_yticklabels()) == ax.images[0].get_array().shape[0] == 3


def test_factors_are_drawn_in_the_order_asked_for(ablated):
    ablation = ablated()
    ax = pl.ablation(ablation, "population", factors=np.array(["Z_3", "Z_0"]), show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["Z_3", "Z_0"]
    np.testing.assert_allclose(ax.images[0].get_array(), group_means(ablation)[:, [3, 0]])


def test_opposite_effects_have_equally_strong_colours_and_no_effect_is_white(ablated):
    ablation = ablated(2, 3, 3)
    ablation.X = np.array([[5, -5], [0, 2], [-2, 0]], dtype=np.float32)
    image = pl.ablation(ablation, "population", show=False).images[0]
    helps, hurts, nothing = image.to_rgba(np.array([5.0, -5.0, 0.0]))[:, :3]
    assert helps.sum() == pytest.approx(hurts.sum(), abs=0.15)
    assert helps[2] > helps[0]
    assert hurts[0] > hurts[2]
    assert (nothing > 0.95).all()


def test_the_colour_bar_has_the_unit_and_covers_what_occurs(ablated):
    ablation = ablated()
    figure = pl.ablation(ablation, "population", return_fig=True)
    bar = figure.axes[1]
    means = group_means(ablation)
    assert "nats per cell" in bar.get_ylabel()
    np.testing.assert_allclose(bar.get_ylim(), [means.min(), means.max()])


@pytest.mark.parametrize("scale", [0.01, 1, 100, 1e5])
def test_values_are_written_with_three_digits_of_the_largest(ablated, scale):
    ablation = ablated()
    ablation.X = ablation.X * np.float32(scale)
    ax = pl.ablation(ablation, "population", show=False)
    written = np.array([float(text.get_text().replace(MINUS, "-")) for text in ax.texts])
    means = group_means(ablation).ravel()
    np.testing.assert_allclose(written, means, atol=0.005 * np.abs(means).max())


def test_where_values_do_not_fit_the_negative_ones_are_marked(ablated):
    ablation = ablated(40, 6)
    ax = pl.ablation(ablation, "population", show=False)
    assert {text.get_text() for text in ax.texts} == {MINUS}
    marked = {(round(y), round(x)) for x, y in (text.get_position() for text in ax.texts)}
    means = group_means(ablation)
    clearly = np.argwhere(means < -0.1)
    assert {tuple(cell) for cell in clearly.tolist()} <= marked
    assert all(means[cell] < 0 for cell in marked)


def test_what_rounds_to_zero_has_no_sign(ablated):
    ablation = ablated(2, 2, 2)
    ablation.X = np.array([[50, -0.001], [3, 2]], dtype=np.float32)
    ax = pl.ablation(ablation, "population", show=False)
    assert [text.get_text() for text in ax.texts] == ["50.0", "0.0", "3.0", "2.0"]


@pytest.mark.parametrize("value", [0.0, -3.0, 4.0])
def test_a_single_value_can_be_drawn(ablated, value):
    ablation = ablated(1, 1, 5)
    ablation.X = np.full((5, 1), value, dtype=np.float32)
    figure = pl.ablation(ablation, "population", return_fig=True)
    assert figure.axes[0].images[0].get_array().tolist() == [[value]]
    assert_legible(figure)


@pytest.mark.grid(0)
@pytest.mark.parametrize(("n_latent", "n_groups"), [(1, 4), (3, 4), (10, 2), (10, 25), (30, 25), (50, 2)])
def test_no_label_overlaps_another_or_is_cut_off(ablated, n_latent, n_groups):
    figure = pl.ablation(ablated(n_latent, n_groups), "population", return_fig=True)
    assert_legible(figure)
    assert len(drawn_texts(figure)) > n_latent + n_groups


def test_very_long_labels_take_no_room_from_the_heatmap(ablated):
    ablation = ablated(10, 2)
    ablation.obs["annotation_of_the_third_consensus_round"] = ablation.obs["population"].cat.rename_categories(
        lambda name: f"{name}/" * 6
    )
    figure = pl.ablation(ablation, "annotation_of_the_third_consensus_round", return_fig=True)
    assert_legible(figure)
    assert len(figure.axes[0].texts) == 20


def test_a_missing_column_is_named_before_anything_is_drawn(ablated):
    with pytest.raises(KeyError, match=r"`groupby`: 'celltype' is not a column of `adata.obs`, which has 'population'"):
        pl.ablation(ablated(), "celltype")
    assert not plt.get_fignums()


@pytest.mark.parametrize("kind", ["heatmap", "dotplot"])
def test_all_cells_are_one_group_without_a_column(ablated, kind):
    ablation = ablated()
    figure = pl.ablation(ablation, kind=kind, return_fig=True)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all (200)"]
    assert ax.get_ylabel() == ""
    drawn = ax.images[0].get_array()[0] if kind == "heatmap" else dots(ax)[0][0]
    np.testing.assert_allclose(drawn, ablation.X.astype(float).mean(axis=0))
    assert_legible(figure)


@pytest.mark.parametrize(
    ("scheme", "said"), [("leave_out", "without the factor"), ("leave_in", "alone"), ("keep_top", "these alone")]
)
@pytest.mark.parametrize("kind", ["heatmap", "dotplot"])
def test_the_colour_bar_says_what_was_taken_out(ablated, kind, scheme, said):
    ablation = ablated()
    ablation.uns[ABLATION_INFO]["scheme"] = scheme
    assert said in pl.ablation(ablation, "population", kind=kind, return_fig=True).axes[1].get_ylabel()


def test_an_unknown_kind_is_named(ablated):
    with pytest.raises(ValueError, match=r"`kind` must be one of 'heatmap', 'dotplot'; got 'bars'"):
        pl.ablation(ablated(), "population", kind="bars")


def dots(ax):
    """Values, sizes and widths of the edges, groups x factors, wherever they are in the collection."""
    (points,) = ax.collections
    parts = np.full((3, len(ax.get_yticklabels()), len(ax.get_xticklabels())), np.nan)
    x, y = np.asarray(points.get_offsets(), dtype=int).T
    parts[:, y, x] = points.get_array(), points.get_sizes(), points.get_linewidths()
    return parts


def wide(ablation, column, **kwargs):
    table = get.ablation_df(ablation, "population", **kwargs)
    return table.pivot_table(index="group", columns="factor", values=column, sort=False, dropna=False)[
        ablation.var_names
    ].to_numpy()


def noisy(ablated, n_latent=5, n_groups=4):
    """An ablation of small effects, some of which chance explains, some of which hurt all cells."""
    ablation = ablated(n_latent, n_groups)
    ablation.X = (0.1 * ablation.X + np.random.default_rng(3).normal(size=ablation.shape)).astype(np.float32)
    ablation.X[:, 0] = -np.abs(ablation.X[:, 0])
    return ablation


def test_dots_are_mean_effects_coloured_as_in_the_heatmap(ablated):
    ablation = noisy(ablated)
    factors = ["Z_3", "Z_0", "Z_1"]
    heat, dot = (
        pl.ablation(ablation, "population", kind=kind, factors=factors, return_fig=True)
        for kind in ("heatmap", "dotplot")
    )
    np.testing.assert_allclose(dots(dot.axes[0])[0], group_means(ablation)[:, [3, 0, 1]])
    for read in ("get_xticklabels", "get_yticklabels"):
        assert [t.get_text() for t in getattr(heat.axes[0], read)()] == [
            t.get_text() for t in getattr(dot.axes[0], read)()
        ]
    values = np.linspace(-1, 1, 9)
    np.testing.assert_array_equal(heat.axes[0].images[0].to_rgba(values), dot.axes[0].collections[0].to_rgba(values))
    assert heat.axes[1].get_ylabel() == dot.axes[1].get_ylabel()
    np.testing.assert_allclose(heat.axes[1].get_ylim(), dot.axes[1].get_ylim())
    top, bottom = dot.axes[0].get_ylim()[1], dot.axes[0].get_ylim()[0]
    assert top < 0 < 3 < bottom


def test_areas_grow_with_the_share_of_cells_helped_and_none_vanishes(ablated):
    ablation = noisy(ablated)
    size = dots(pl.ablation(ablation, "population", kind="dotplot", show=False))[1]
    share = wide(ablation, "share_helped")
    assert (share[:, 0] == 0).all()
    slope, intercept = np.polyfit(share.ravel(), size.ravel(), 1)
    np.testing.assert_allclose(size, intercept + slope * share)
    assert 0 < intercept < slope / 5


@pytest.mark.parametrize("min_effect", [0.0, 0.5])
def test_a_ring_marks_factors_that_help_more_than_chance_in_the_whole_ablation(ablated, min_effect):
    ablation = noisy(ablated)
    significant = wide(ablation, "q_value", alternative="greater", min_effect=min_effect) < 0.05
    assert not significant[:, 0].any()
    chosen = [0, 4, 2, 1]
    ax = pl.ablation(ablation, "population", kind="dotplot", factors=chosen, min_effect=min_effect, show=False)
    width = dots(ax)[2]
    assert len(np.unique(width)) == 2
    np.testing.assert_array_equal(width == width.max(), significant[:, chosen])


def test_a_smallest_effect_without_rings_is_refused(ablated):
    with pytest.raises(ValueError, match="`min_effect` is for the rings"):
        pl.ablation(ablated(), "population", min_effect=1.0)
    assert not plt.get_fignums()


def test_what_cannot_be_tested_has_no_ring(ablated):
    ablation = ablated(2, 2, 3)
    ablation.obs["population"] = ["a", "b", "b"]
    assert np.isnan(wide(ablation, "q_value")[0]).all()
    ax = pl.ablation(ablation, "population", kind="dotplot", show=False)
    assert len(set(dots(ax)[2].ravel())) == 1


def test_the_legend_explains_sizes_and_rings(ablated):
    ablation = noisy(ablated)
    figure = pl.ablation(ablation, "population", kind="dotplot", return_fig=True)
    _, size, width = dots(figure.axes[0])
    share = wide(ablation, "share_helped")
    legend = figure.axes[1].get_legend()
    assert legend.get_title().get_text() == "Cells helped"
    *shares, ring = [text.get_text() for text in legend.get_texts()]
    assert shares == ["100%", "50%", "0%"]
    slope, intercept = np.polyfit(share.ravel(), size.ravel(), 1)
    for text, handle in zip(shares, legend.legend_handles, strict=False):
        assert handle.get_markersize() ** 2 == pytest.approx(intercept + slope * float(text[:-1]) / 100)
        assert handle.get_markeredgewidth() == width.min()
    assert ring == "helps, q < 0.05"
    assert legend.legend_handles[-1].get_markeredgewidth() == width.max()
    assert legend.legend_handles[-1].get_markeredgecolor() == "black"


def test_groups_without_an_effect_have_no_dot_and_infinite_effects_the_strongest_colour(ablated):
    ablation = ablated()
    groups = ablation.obs["population"]
    ablation.X[(groups == "B").to_numpy()] = np.nan
    ablation.X[(groups == "CD34+").to_numpy(), 1] = np.inf
    with np.errstate(invalid="ignore"):
        ax = pl.ablation(ablation, "population", kind="dotplot", show=False)
    value = dots(ax)[0]
    row = groups.cat.categories.get_indexer(["B", "CD34+"])
    assert np.isnan(value[row[0]]).all()
    finite = np.delete(value, row[0], axis=0)
    assert np.isfinite(finite).all()
    assert value[row[1], 1] == np.abs(finite).max() == ax.collections[0].norm.halfrange


SIZES = [(1, 1), (2, 1), (1, 4), (3, 2), (10, 2), (10, 25), (30, 30), (50, 2)]


@pytest.mark.grid(0)
@pytest.mark.parametrize(("n_latent", "n_groups"), SIZES)
def test_no_dot_or_label_touches_another(ablated, n_latent, n_groups):
    figure = pl.ablation(ablated(n_latent, n_groups), "population", kind="dotplot", return_fig=True)
    assert_legible(figure)
    assert len(drawn_texts(figure)) > n_latent + n_groups
    width, height = panel_inches(figure)
    largest = figure.axes[1].get_legend().legend_handles[0].get_markersize() / 72
    assert largest < min(width / n_latent, height / n_groups)


def test_dots_shrink_where_given_axes_are_small(ablated):
    figure, ax = plt.subplots(figsize=(4, 3))
    pl.ablation(ablated(30, 30), "population", kind="dotplot", ax=ax, show=False)
    width, height = panel_inches(figure)
    largest = figure.axes[1].get_legend().legend_handles[0].get_markersize() / 72
    assert 0 < largest < min(width, height) / 30


def test_an_ablation_from_an_export_can_be_drawn(readable):
    adata = readable()
    ablation = tl.ablate(adata)
    ax = pl.ablation(ablation, "population", kind="dotplot", show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == adata.uns["ldvae"]["names"].tolist()
    np.testing.assert_allclose(dots(ax)[0], wide(ablation, "mean"))
