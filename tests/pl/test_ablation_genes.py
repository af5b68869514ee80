from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext import get, pl, tl
from ldvae_ext._keys import ABLATION_INFO
from tests.pl.conftest import POPULATIONS
from tests.pl.helpers import assert_legible, drawn_texts


@pytest.fixture
def by_gene(readable):
    """Makes an ablation of genes, of as many factors and groups as wanted."""

    def make(n_latent=5, n_groups=4, groupby="population"):
        return tl.ablate_genes(readable(n_latent, n_groups), groupby)

    return make


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def wide(ablation, factor):
    table = get.gene_ablation_df(ablation, factor)
    return table.pivot_table(index="gene", columns="group", values="mean")


def test_cells_hold_the_mean_change_of_gene_and_group(by_gene):
    ablation = by_gene()
    ax = pl.ablation_genes(ablation, "Z_2", show=False)
    genes = labels(ax.yaxis)
    assert len(set(genes)) == 10
    np.testing.assert_allclose(ax.images[0].get_array(), wide(ablation, "Z_2").loc[genes, POPULATIONS])
    sizes = get.gene_ablation_df(ablation).groupby("group")["n_cells"].first()
    assert labels(ax.xaxis) == [f"{group} ({sizes[group]})" for group in POPULATIONS]
    assert ax.get_xlabel() == "population"
    assert ax.get_title() == "Z_2"


def test_a_factor_may_be_given_by_position(by_gene):
    ablation = by_gene()
    by_name, by_position = (
        pl.ablation_genes(ablation, factor, show=False) for factor in (ablation.var_names[3], np.int64(3))
    )
    assert by_position.get_title() == by_name.get_title() == ablation.var_names[3]
    np.testing.assert_array_equal(by_position.images[0].get_array(), by_name.images[0].get_array())


def test_genes_are_those_that_matter_most_in_the_groups_drawn(by_gene):
    ablation = by_gene()
    groups = ["CD34+", "B"]
    ax = pl.ablation_genes(ablation, "Z_1", groups=groups, n_genes=6, show=False)
    assert [label.rpartition(" (")[0] for label in labels(ax.xaxis)] == groups
    values = wide(ablation, "Z_1")[groups]
    np.testing.assert_allclose(ax.images[0].get_array(), values.loc[labels(ax.yaxis)])
    assert set(labels(ax.yaxis)) == set(values.abs().max(axis=1).nlargest(6).index)
    everywhere = pl.ablation_genes(ablation, "Z_1", n_genes=6, show=False)
    assert set(labels(everywhere.yaxis)) == set(wide(ablation, "Z_1").abs().max(axis=1).nlargest(6).index)
    assert set(labels(everywhere.yaxis)) != set(labels(ax.yaxis))


def test_genes_that_are_helped_come_before_those_that_are_hurt(by_gene):
    ax = pl.ablation_genes(by_gene(groupby=None), "Z_0", n_genes=60, show=False)
    drawn = ax.images[0].get_array()[:, 0]
    assert drawn[0] > 0 > drawn[-1]
    assert (np.diff(drawn) <= 0).all()
    assert labels(ax.xaxis) == ["all (60)"]
    assert ax.get_xlabel() == ""


def test_all_genes_are_drawn_where_there_are_few(by_gene):
    ablation = by_gene()
    ablation = ablation[ablation.obs["gene"].isin(ablation.obs["gene"].unique()[:4])]
    assert len(pl.ablation_genes(ablation, 0, show=False).get_yticklabels()) == 4


def test_blue_helps_and_red_hurts_and_the_unit_is_said(by_gene):
    figure = pl.ablation_genes(by_gene(), 0, return_fig=True)
    helps, hurts = figure.axes[0].images[0].to_rgba(np.array([1e3, -1e3]))[:, :3]
    assert helps[2] > helps[0]
    assert hurts[0] > hurts[2]
    said = figure.axes[1].get_ylabel()
    assert "nats per cell" in said
    assert "without the factor" in said


def test_the_scheme_of_the_ablation_is_said(readable):
    ablation = tl.ablate_genes(readable(), "population", scheme="leave_in")
    assert ablation.uns[ABLATION_INFO]["scheme"] == "leave_in"
    assert "with the factor alone" in pl.ablation_genes(ablation, 0, return_fig=True).axes[1].get_ylabel()


@pytest.mark.grid(0)
@pytest.mark.parametrize(("n_groups", "n_genes"), [(1, 1), (1, 10), (2, 10), (10, 5), (30, 30)])
def test_no_label_overlaps_another_or_is_cut_off(by_gene, n_groups, n_genes):
    figure = pl.ablation_genes(by_gene(2, n_groups), 0, n_genes=n_genes, return_fig=True)
    assert_legible(figure)
    assert len(drawn_texts(figure)) > n_genes + n_groups


def test_an_ablation_of_cells_is_named_before_anything_is_drawn(ablated):
    with pytest.raises(ValueError, match="must come from `ablate_genes`"):
        pl.ablation_genes(ablated(), "Z_0")
    assert not plt.get_fignums()


@pytest.mark.parametrize("factor", ["Z_9", 5, -1, None, ["Z_0"], True, []])
def test_anything_but_one_known_factor_is_named(by_gene, factor):
    with pytest.raises(ValueError, match="`factor`"):
        pl.ablation_genes(by_gene(), factor)
    assert not plt.get_fignums()


@pytest.mark.parametrize("groups", ["T", ["B", "T"], []])
def test_unknown_groups_are_named(by_gene, groups):
    with pytest.raises(
        ValueError, match=r"`groups` must name some of 'CD4\+/CD45RA\+/CD25- Naive T', .*; got ('T'|none)"
    ):
        pl.ablation_genes(by_gene(), 0, groups=groups)
    assert not plt.get_fignums()


@pytest.mark.parametrize("n_genes", [0, 2.5, True])
def test_a_number_of_genes_is_a_count(by_gene, n_genes):
    with pytest.raises(ValueError, match="`n_genes` must be an integer of at least 1"):
        pl.ablation_genes(by_gene(), 0, n_genes=n_genes)
