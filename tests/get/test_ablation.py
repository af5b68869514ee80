from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ldvae_ext import get
from tests.helpers import counts, untrained

ALTERNATIVES = ("two-sided", "greater", "less")


def ablation_of(columns, groups=None):
    """Effects column by column, of cells in groups."""
    x = np.stack(columns, axis=1)
    obs = pd.DataFrame(
        {"type": pd.Categorical(groups)} if groups is not None else {}, index=[str(i) for i in range(len(x))]
    )
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"Z_{k}" for k in range(x.shape[1])]))


def benjamini_hochberg(p_values):
    """The smallest false discovery rate at which each is still a discovery."""
    p_values = np.asarray(p_values)
    return [min(p * len(p_values) / (p_values <= p).sum() for p in p_values if p >= own) for own in p_values]


@pytest.fixture
def ablation():
    return ad.AnnData(
        X=np.array([[1.0, -2.0], [3.0, 0.0], [-1.0, 4.0], [9.0, 9.0]], dtype=np.float32),
        obs=pd.DataFrame(
            {
                "type": pd.Categorical(
                    ["CD4+/CD25 T", "CD4+/CD25 T", "B", None], categories=["B", "CD4+/CD25 T", "none"]
                )
            },
            index=list("abcd"),
        ),
        var=pd.DataFrame(index=["Z_0", "Z_1"]),
    )


def test_groups_are_summarised_and_cells_without_one_left_out(ablation):
    table = get.ablation_df(ablation, "type")
    expected = pd.DataFrame(
        {
            "group": ["B", "B", "CD4+/CD25 T", "CD4+/CD25 T"],
            "factor": ["Z_0", "Z_1"] * 2,
            "n_cells": [1, 1, 2, 2],
            "mean": [-1.0, 4.0, 2.0, -1.0],
            "median": [-1.0, 4.0, 2.0, -1.0],
            "share_helped": [0.0, 1.0, 1.0, 0.0],
        }
    )
    pd.testing.assert_frame_equal(table[list(expected)], expected)
    assert table.loc[table["group"] == "B", ["effect_size", "p_value", "q_value"]].isna().all(axis=None)
    np.testing.assert_allclose(table["effect_size"][2:], [2 / np.sqrt(2), -1 / np.sqrt(2)])


def test_a_missing_or_empty_column_is_named(ablation):
    with pytest.raises(KeyError, match=r"`groupby`: 'cluster' is not a column of `adata.obs`, which has 'type'"):
        get.ablation_df(ablation, "cluster")
    ablation.obs["none"] = pd.Categorical([None] * 4, categories=["x"])
    with pytest.raises(ValueError, match="no cell has a value in 'none'"):
        get.ablation_df(ablation, "none")


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("n_cells", [3, 12, 40, 200])
def test_p_values_are_wilcoxons_and_q_values_those_of_all_rows(n_cells, alternative):
    rng = np.random.default_rng(n_cells)
    columns = [rng.normal(shift, 1, 2 * n_cells) for shift in (0.0, 0.3, -0.3, 1.0)]
    groups = np.repeat(["B", "CD4+/CD25 T"], n_cells)
    table = get.ablation_df(ablation_of(columns, groups), "type", alternative=alternative)
    samples = [column[groups == g] for g in ("B", "CD4+/CD25 T") for column in columns]
    expected = [stats.wilcoxon(sample, alternative=alternative).pvalue for sample in samples]
    np.testing.assert_allclose(table["p_value"], expected, rtol=1e-12)
    np.testing.assert_allclose(table["q_value"], benjamini_hochberg(expected), rtol=1e-12)
    np.testing.assert_allclose(table["effect_size"], [np.mean(s) / np.std(s, ddof=1) for s in samples])
    if alternative == "two-sided":
        assert table["p_value"].equals(get.ablation_df(ablation_of(columns, groups), "type")["p_value"])


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize(
    "sample",
    [[1.0, 1.0, 1.0, 2.0], [2.0, -1.0, 3.0, 1.0, -3.0, 5.0, 5.0], [0.0, 0.0, 1.0, 2.0, -2.0, 4.0], [0.5, -4.0, 1.5, 2.5, 3.0]],
    ids=["ties", "ties of both signs", "zeros", "neither"],
)  # fmt: skip
def test_few_cells_with_ties_and_zeros_have_the_exact_p_value(sample, alternative):
    """All ways to give signs to the ranks of what is not zero."""
    ranks = stats.rankdata(np.abs([v for v in sample if v != 0]))
    observed = ranks[np.array([v for v in sample if v != 0]) > 0].sum()
    sums = np.array([np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=len(ranks))])
    at_least, at_most = (sums >= observed).mean(), (sums <= observed).mean()
    expected = {"greater": at_least, "less": at_most, "two-sided": min(1, 2 * min(at_least, at_most))}[alternative]
    table = get.ablation_df(ablation_of([np.array(sample)]), alternative=alternative)
    assert table["p_value"][0] == pytest.approx(expected, rel=1e-12)
    assert table["q_value"][0] == table["p_value"][0]


def test_many_cells_with_ties_have_the_corrected_normal_approximation():
    sample = np.random.default_rng(0).integers(-3, 5, 60).astype(float)
    rest = sample[sample != 0]
    n, ranks = len(rest), stats.rankdata(np.abs(rest))
    _, ties = np.unique(np.abs(rest), return_counts=True)
    z = (ranks[rest > 0].sum() - n * (n + 1) / 4) / np.sqrt(
        n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
    )
    assert get.ablation_df(ablation_of([sample]))["p_value"][0] == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)


def test_all_cells_are_one_group_without_a_column():
    rng = np.random.default_rng(0)
    ablation = ablation_of([rng.normal(size=50), rng.normal(1, 1, 50)], np.resize(["a", "b"], 50))
    table = get.ablation_df(ablation)
    assert table["group"].tolist() == ["all", "all"]
    assert table["factor"].tolist() == ["Z_0", "Z_1"]
    assert table["n_cells"].tolist() == [50, 50]
    np.testing.assert_allclose(table["mean"], ablation.X.mean(axis=0))
    np.testing.assert_allclose(table["median"], np.median(ablation.X, axis=0))
    np.testing.assert_allclose(table["share_helped"], (ablation.X > 0).mean(axis=0))


def test_groups_that_say_nothing_have_no_test_and_do_not_count_among_those_that_do():
    groups = ["one", *["same"] * 3, *["some"] * 5, *["none"] * 2, *["zero"] * 4]
    nan = np.nan
    column = np.array([2.0, 1.5, 1.5, 1.5, 1.0, nan, -2.0, 3.0, nan, nan, nan, 0.0, 0.0, 0.0, 0.0])
    zeros = np.where(np.isnan(column), nan, 0.0)
    table = get.ablation_df(ablation_of([column, zeros], groups), "type").set_index(["group", "factor"])
    tested = ("some", "Z_0")
    assert table["p_value"].dropna().index.tolist() == [tested]
    assert table["q_value"].dropna().index.tolist() == [tested]
    assert table["effect_size"].dropna().index.tolist() == [tested]
    assert table.loc[tested, "q_value"] == table.loc[tested, "p_value"] == stats.wilcoxon([1.0, -2.0, 3.0]).pvalue
    first = table.xs("Z_0", level="factor")
    assert first["n_cells"].to_dict() == {"none": 0, "one": 1, "same": 3, "some": 3, "zero": 4}
    assert first["mean"].to_dict() == pytest.approx(
        {"none": nan, "one": 2.0, "same": 1.5, "some": 2 / 3, "zero": 0.0}, nan_ok=True
    )
    assert first["share_helped"].to_dict() == pytest.approx(
        {"none": nan, "one": 1.0, "same": 1.0, "some": 2 / 3, "zero": 0.0}, nan_ok=True
    )
    assert np.isnan(first.loc["none", "median"])


@pytest.mark.parametrize(
    ("effects", "mean"), [([np.inf, 1.0, -2.0], np.inf), ([np.inf] * 3, np.inf), ([np.inf, -np.inf], np.nan)]
)
def test_infinite_effects_have_a_rank_but_no_size(effects, mean):
    table = get.ablation_df(ablation_of([np.array(effects)]))
    np.testing.assert_array_equal(table["mean"], [mean])
    assert np.isnan(table["effect_size"][0])
    assert table["n_cells"][0] == len(effects)


@pytest.mark.parametrize(("alternative", "sign"), [("greater", 1), ("less", -1)])
@pytest.mark.parametrize("n_cells", [9, 80])
def test_effects_are_tested_against_the_smallest_that_matters(alternative, sign, n_cells):
    columns = [np.random.default_rng(0).normal(0.5 * sign, 1.0, n_cells), np.linspace(-0.6, 1.0, n_cells)]
    table = get.ablation_df(ablation_of(columns), alternative=alternative, min_effect=0.3)
    expected = [stats.wilcoxon(column - 0.3 * sign, alternative=alternative).pvalue for column in columns]
    np.testing.assert_allclose(table["p_value"], expected, rtol=1e-12)
    np.testing.assert_allclose(table["q_value"], benjamini_hochberg(expected), rtol=1e-12)
    plain = get.ablation_df(ablation_of(columns), alternative=alternative)
    assert (table["p_value"] > plain["p_value"]).all()
    for column in ("mean", "median", "share_helped", "effect_size"):
        np.testing.assert_array_equal(table[column], plain[column])


@pytest.mark.parametrize("min_effect", [-0.1, np.inf, np.nan, "a", True])
def test_a_smallest_effect_that_makes_no_sense_is_named(ablation, min_effect):
    with pytest.raises(ValueError, match="`min_effect` must be a finite number of at least 0; got"):
        get.ablation_df(ablation, alternative="greater", min_effect=min_effect)


def test_a_smallest_effect_needs_a_side(ablation):
    with pytest.raises(ValueError, match="`min_effect` belongs to a one-sided test"):
        get.ablation_df(ablation, min_effect=0.1)


def test_an_unknown_alternative_is_named(ablation):
    with pytest.raises(ValueError, match="`alternative` must be one of 'two-sided', 'greater', 'less'; got 'more'"):
        get.ablation_df(ablation, "type", alternative="more")


@pytest.fixture(scope="module")
def model():
    adata = counts(n_batches=3)
    labels = np.resize(["CD4+/CD25 T", "B", None], 60)
    adata.obs["type"] = pd.Categorical(labels, categories=["CD4+/CD25 T", "B", "empty"])
    return untrained(adata)


@pytest.fixture(scope="module")
def genes(model):
    return model.ablate_genes("type")


def test_genes_are_listed_with_their_share_of_each_latents_effect(genes, model):
    table = get.gene_ablation_df(genes)
    assert table.columns.tolist() == ["group", "factor", "gene", "n_cells", "mean", "share"]
    assert table["group"].tolist() == np.repeat(["CD4+/CD25 T", "B"], 80).tolist()
    assert table["factor"].tolist() == np.tile(np.repeat(model.latent_names, 20), 2).tolist()
    assert table["gene"].tolist() == np.tile(model.adata.var_names, 8).tolist()
    assert set(table["n_cells"]) == {20}
    of_cells = get.ablation_df(model.ablate(), "type").set_index(["group", "factor"])["mean"]
    sums = table.groupby(["group", "factor"])["mean"].sum()
    # Genes are computed in float64, cells in float32 where loops are compiled.
    pd.testing.assert_series_equal(sums, of_cells.sort_index(), rtol=0, atol=1e-6 * of_cells.abs().max())
    whole = sums.loc[pd.MultiIndex.from_frame(table[["group", "factor"]])].to_numpy()
    np.testing.assert_allclose(table["share"], table["mean"] / whole)
    np.testing.assert_allclose(table.groupby(["group", "factor"])["share"].sum(), 1.0)


def test_genes_of_one_latent_by_name_or_position_and_of_several(genes):
    table = get.gene_ablation_df(genes)
    one = table[table["factor"] == "Z_2"].reset_index(drop=True)
    pd.testing.assert_frame_equal(get.gene_ablation_df(genes, "Z_2"), one)
    pd.testing.assert_frame_equal(get.gene_ablation_df(genes, 2), one)
    two = table[table["factor"].isin(["Z_0", "Z_2"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(get.gene_ablation_df(genes, ["Z_2", 0]), two)


def test_a_latent_without_effect_has_no_shares(genes):
    silent = genes.copy()
    silent.X[:, 1] = 0.0
    table = get.gene_ablation_df(silent)
    np.testing.assert_array_equal(table["share"].isna(), table["factor"] == "Z_1")


def test_tables_of_genes_and_of_cells_send_each_other_away(genes, model):
    cells = model.ablate()
    with pytest.raises(ValueError, match=r"`ablation` is one of genes; `get\.gene_ablation_df` reads it"):
        get.ablation_df(genes)
    without_description = genes.copy()
    del without_description.uns["ldvae_ablation"]
    for other in (cells, counts(), without_description):
        with pytest.raises(ValueError, match=r"`ablation` must come from `ablate_genes`; `get\.ablation_df` reads one"):
            get.gene_ablation_df(other)
    with pytest.raises(ValueError, match="`factor`: 'Z_7' is no latent"):
        get.gene_ablation_df(genes, "Z_7")


WAYS = {
    "default": {},
    "value": {"mode": "value", "value": {"Z_1": 0.5}, "latents": {"CD4+/CD25 T": ["Z_1"]}},
    "batches": {"transform_batch": ["CD4+/CD25 T", "b2"], "mode": "prior", "seed": 3},
    "top": {"scheme": "keep_top", "use_posterior": "samples", "n_samples": 2},
    "group_mean": {"mode": "group_mean"},
}


# What must be found in `uns` of the file.
SAID = {
    "value": {"value": [np.nan, 0.5, np.nan, np.nan]},
    "batches": {"transform_batch": ["CD4+/CD25 T", "b2"], "seed": 3},
    "top": {"n_samples": 2},
    "group_mean": {"groupby": "type"},
}


@pytest.mark.grid(1)
@pytest.mark.parametrize("fmt", ["h5ad", "zarr"])
@pytest.mark.parametrize("way", WAYS)
def test_a_written_ablation_reads_the_same(model, tmp_path, way, fmt):
    arguments = WAYS[way]
    groupby = {"groupby": "type"} if way == "group_mean" else {}
    for name, made in (
        ("cells", model.ablate(**arguments, **groupby)),
        ("genes", model.ablate_genes("type", **arguments)),
    ):
        getattr(made, f"write_{fmt}")(tmp_path / name)
        back = getattr(ad, f"read_{fmt}")(tmp_path / name)
        np.testing.assert_array_equal(back.X, made.X)
        pd.testing.assert_frame_equal(back.obs, made.obs, check_column_type=False)
        assert back.var_names.tolist() == made.var_names.tolist()
        assert back.uns.keys() == made.uns.keys() == {"ldvae_ablation"}
        info, again = made.uns["ldvae_ablation"], back.uns["ldvae_ablation"]
        assert info.keys() == again.keys()
        for key, entry in info.items():
            np.testing.assert_array_equal(again[key], entry, key)
        for key, entry in SAID.get(way, {}).items():
            np.testing.assert_array_equal(again[key], entry, key)
        read = get.gene_ablation_df if name == "genes" else (lambda ablation: get.ablation_df(ablation, "type"))
        pd.testing.assert_frame_equal(read(back), read(made))
