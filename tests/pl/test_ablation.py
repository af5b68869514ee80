from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext import pl
from tests.pl.helpers import assert_legible, drawn_texts

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
