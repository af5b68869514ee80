from __future__ import annotations

import itertools
import warnings

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import stats
from sklearn.linear_model import LogisticRegression

from ldvae_ext import tl
from ldvae_ext._formats import RANKING
from tests.helpers import counts, untrained
from tests.tl.helpers import GROUPS, latents

METHODS = ["wilcoxon", "t-test", "t-test_overestim_var", "logreg"]
# A regression has no reference.
COMPARISONS = [*itertools.product(METHODS, ["rest"]), *itertools.product(METHODS[:-1], ["B"])]
REG = "CD4+/CD25 T Reg"


def in_exported_order(adata, field, key="rank_factors_groups"):
    """Groups x factors, in the order of the latents."""
    entry, names = adata.uns[key], adata.uns["ldvae"]["names"]
    return pd.DataFrame(
        {
            group: pd.Series(entry[field][group], index=entry["names"][group])[names]
            for group in entry["names"].dtype.names
        }
    ).T


def compared(adata, group, reference="rest", groupby="population"):
    """Latents of a group and of what it is compared with, in float64, by the definition."""
    group_n, z_nk = adata.obs[groupby], adata.obsm["X_ldvae"].astype(np.float64)
    other = (group_n != group) & group_n.notna() if reference == "rest" else group_n == reference
    return z_nk[(group_n == group).to_numpy()], z_nk[other.to_numpy()]


@pytest.mark.parametrize("reference", ["rest", "B"])
def test_wilcoxon_is_the_mann_whitney_test_of_scipy(reference):
    adata = latents()
    tl.rank_factors_groups(adata, "population", reference=reference)
    score, p = in_exported_order(adata, "scores"), in_exported_order(adata, "pvals")
    assert list(score.index) == [g for g in GROUPS if g != reference]
    for group in score.index:
        x, y = compared(adata, group, reference)
        expected = stats.mannwhitneyu(x, y, method="asymptotic", use_continuity=False)
        np.testing.assert_allclose(p.loc[group], expected.pvalue, rtol=1e-9)
        direction = np.sign(expected.statistic - len(x) * len(y) / 2)
        np.testing.assert_allclose(score.loc[group], direction * stats.norm.isf(expected.pvalue / 2), rtol=1e-5)


@pytest.mark.parametrize("method", ["t-test", "t-test_overestim_var"])
@pytest.mark.parametrize("reference", ["rest", "B"])
def test_t_tests_are_those_of_scipy(method, reference):
    adata = latents()
    tl.rank_factors_groups(adata, "population", method=method, reference=reference)
    score, p = in_exported_order(adata, "scores"), in_exported_order(adata, "pvals")
    for group in score.index:
        x, y = compared(adata, group, reference)
        # The overestimated variance is that of a mean of as many cells as the group has.
        n_other = len(x) if method == "t-test_overestim_var" else len(y)
        moments = (x.mean(0), x.std(0, ddof=1), len(x), y.mean(0), y.std(0, ddof=1), n_other)
        expected = stats.ttest_ind_from_stats(*moments, equal_var=False)
        np.testing.assert_allclose(score.loc[group], expected.statistic, rtol=1e-5)
        np.testing.assert_allclose(p.loc[group], expected.pvalue, rtol=1e-9)
        if method == "t-test":
            np.testing.assert_allclose(p.loc[group], stats.ttest_ind(x, y, equal_var=False).pvalue, rtol=1e-9)


def test_logistic_regression_is_that_of_scikit_learn():
    adata = latents()
    tl.rank_factors_groups(adata, "population", method="logreg")
    codes = adata.obs["population"].cat.codes
    fit = LogisticRegression().fit(adata.obsm["X_ldvae"].astype(np.float64), codes)
    np.testing.assert_allclose(in_exported_order(adata, "scores").loc[list(GROUPS)], fit.coef_, rtol=1e-5)
    assert {"pvals", "pvals_adj"}.isdisjoint(adata.uns["rank_factors_groups"])


@pytest.mark.parametrize("groups", [["B", REG], [REG, "B"]])
def test_a_regression_between_two_groups_has_both_with_the_sign_that_is_theirs(groups):
    adata = latents()
    tl.rank_factors_groups(adata, "population", method="logreg", groups=groups)
    pair = adata[adata.obs["population"].isin(groups)]
    z_nk = pair.obsm["X_ldvae"].astype(np.float64)
    score = in_exported_order(adata, "scores")
    assert list(score.index) == groups
    for group in groups:
        fit = LogisticRegression().fit(z_nk, pair.obs["population"] == group)
        np.testing.assert_allclose(score.loc[group], fit.coef_[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "reference"), COMPARISONS)
def test_instead_of_a_log_ratio_there_is_the_difference_of_means(method, reference):
    adata = latents()
    tl.rank_factors_groups(adata, "population", method=method, reference=reference)
    difference = in_exported_order(adata, "logfoldchanges")
    for group in difference.index:
        x, y = compared(adata, group, reference)
        np.testing.assert_allclose(difference.loc[group], x.mean(0) - y.mean(0), rtol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("reference", ["rest", "B"])
def test_auroc_is_the_share_of_pairs_in_which_the_group_is_higher(ties, reference):
    adata = latents(30, 3, ties=ties)
    tl.rank_factors_groups(adata, "population", reference=reference)
    auroc = in_exported_order(adata, "auroc")
    for group in auroc.index:
        x, y = compared(adata, group, reference)
        for k in range(3):
            pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(x[:, k], y[:, k])]
            assert auroc.loc[group].iloc[k] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_factors_that_separate_groups_completely_have_an_auroc_of_zero_or_one():
    adata = latents(30, 2)
    adata.obsm["X_ldvae"][:, 0] = adata.obs["population"] == "B"
    adata.obsm["X_ldvae"][:, 1] = -10 * (adata.obs["population"] == "B")
    tl.rank_factors_groups(adata, "population", method="t-test")
    assert in_exported_order(adata, "auroc").loc["B"].tolist() == [1, 0]


def test_a_regression_of_some_groups_compares_them_with_each_other_alone():
    adata = latents(120, 5, (*GROUPS, "NK"))
    part = adata[adata.obs["population"] != "NK"].copy()
    tl.rank_factors_groups(adata, "population", method="logreg", groups=GROUPS)
    tl.rank_factors_groups(part, "population", method="logreg")
    for field in ("scores", "logfoldchanges", "auroc"):
        np.testing.assert_array_equal(in_exported_order(adata, field), in_exported_order(part, field))


def test_other_tests_of_some_groups_compare_each_with_all_other_cells():
    adata = latents()
    everything = tl.rank_factors_groups(adata, "population", copy=True)
    tl.rank_factors_groups(adata, "population", groups=["B"])
    assert adata.uns["rank_factors_groups"]["names"].dtype.names == ("B",)
    for field in ("scores", "logfoldchanges", "auroc", "pvals"):
        np.testing.assert_allclose(
            in_exported_order(adata, field).loc["B"], in_exported_order(everything, field).loc["B"], rtol=1e-6
        )


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_ranked_by_the_size_of_the_score_whatever_its_sign(method):
    adata = latents()
    tl.rank_factors_groups(adata, "population", method=method)
    scores = np.array(adata.uns["rank_factors_groups"]["scores"].tolist())
    assert (np.diff(np.abs(scores), axis=0) <= 0).all()
    assert (scores < 0).any()
    assert (scores > 0).any()
    tl.rank_factors_groups(adata, "population", method=method, rankby_abs=False)
    assert (np.diff(np.array(adata.uns["rank_factors_groups"]["scores"].tolist()), axis=0) <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_turned_around_has_the_opposite_signs_and_the_same_place(method):
    adata = latents()
    turned = adata.copy()
    turned.obsm["X_ldvae"] = -turned.obsm["X_ldvae"]
    for each in (adata, turned):
        tl.rank_factors_groups(each, "population", method=method)
    entry, opposite = (each.uns["rank_factors_groups"] for each in (adata, turned))
    assert entry["names"].tolist() == opposite["names"].tolist()
    for field in ("scores", "logfoldchanges"):
        np.testing.assert_allclose(
            in_exported_order(adata, field), -in_exported_order(turned, field), rtol=1e-3, atol=1e-4
        )
    np.testing.assert_allclose(in_exported_order(adata, "auroc"), 1 - in_exported_order(turned, "auroc"))


def test_p_values_are_corrected_over_the_factors_of_a_group():
    adata = latents()
    for method in ("benjamini-hochberg", "bonferroni"):
        tl.rank_factors_groups(adata, "population", corr_method=method)
        p = in_exported_order(adata, "pvals").to_numpy()
        bonferroni = np.minimum(p * p.shape[1], 1)
        expected = bonferroni if method == "bonferroni" else stats.false_discovery_control(p, axis=1)
        np.testing.assert_allclose(in_exported_order(adata, "pvals_adj"), expected)


@pytest.mark.parametrize(("method", "reference"), COMPARISONS)
def test_cells_without_a_group_and_groups_without_cells_are_left_out(method, reference):
    adata = latents()
    # Scanpy takes an empty category for the cells of the one that is named after its position.
    adata.obs["population"] = adata.obs["population"].cat.set_categories(["empty", *GROUPS, "0"])
    adata.obs.loc[adata.obs_names[:20], "population"] = np.nan
    adata.obs.loc[adata.obs_names[20:30], "population"] = "0"
    part = adata[20:].copy()
    part.obs["population"] = part.obs["population"].cat.remove_unused_categories()
    for each in (adata, part):
        tl.rank_factors_groups(each, "population", method=method, reference=reference)
    entry, expected = (each.uns["rank_factors_groups"] for each in (adata, part))
    assert "empty" not in entry["names"].dtype.names
    assert set(entry) == set(expected)
    for field in set(entry) - {"params", "factors"}:
        assert entry[field].tolist() == expected[field].tolist()


def test_the_entry_has_the_form_of_scanpys_own():
    adata = latents()
    tl.rank_factors_groups(adata, "population")
    genes = ad.AnnData(np.abs(adata.obsm["X_ldvae"]), obs=adata.obs)
    sc.tl.rank_genes_groups(genes, "population", method="wilcoxon")
    entry, own = adata.uns["rank_factors_groups"], genes.uns["rank_genes_groups"]
    for field in set(own) - {"params"}:
        assert type(entry[field]) is type(own[field]) is np.recarray
        assert entry[field].dtype == own[field].dtype
    assert entry["auroc"].dtype == entry["pvals"].dtype
    assert type(entry["auroc"]) is np.recarray
    assert entry["factors"].tolist() == adata.uns["ldvae"]["names"].tolist()
    assert entry["params"] == {
        "format": RANKING,
        "groupby": "population",
        "reference": "rest",
        "method": "wilcoxon",
        "corr_method": "benjamini-hochberg",
        "use_raw": False,
        "key": "ldvae",
        "export": entry["params"]["export"],
    }


def rewritten(adata, tmp_path, form):
    if form == "h5ad":
        adata.write_h5ad(tmp_path / "a.h5ad")
        return ad.read_h5ad(tmp_path / "a.h5ad")
    if form == "zarr":
        adata.write_zarr(tmp_path / "a.zarr")
        return ad.read_zarr(tmp_path / "a.zarr")
    return adata


@pytest.mark.grid(1)
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.drop")  # in scanpy's reader
@pytest.mark.parametrize("form", ["memory", "h5ad", "zarr"])
@pytest.mark.parametrize("method", METHODS)
def test_scanpys_readers_read_it_also_from_a_file(tmp_path, form, method):
    adata = latents()
    tl.rank_factors_groups(adata, "population", method=method)
    entry = adata.uns["rank_factors_groups"]
    read = rewritten(adata, tmp_path, form)
    table = sc.get.rank_genes_groups_df(read, REG, key="rank_factors_groups")
    assert table["names"].tolist() == entry["names"][REG].tolist()
    assert table["scores"].tolist() == entry["scores"][REG].tolist()
    if method != "logreg":
        assert table["logfoldchanges"].tolist() == entry["logfoldchanges"][REG].tolist()
        assert table["pvals_adj"].tolist() == entry["pvals_adj"][REG].tolist()
    assert len(sc.get.rank_genes_groups_df(read, None, key="rank_factors_groups")) == 15
    assert read.uns["rank_factors_groups"]["auroc"][REG].tolist() == entry["auroc"][REG].tolist()
    axes = sc.pl.rank_genes_groups(read, key="rank_factors_groups", show=False)
    assert [ax.get_title() for ax in axes] == [f"{group} vs. rest" for group in GROUPS]
    assert [text.get_text() for text in axes[0].texts] == entry["names"][REG].tolist()
    plt.close("all")


@pytest.mark.parametrize("options", [{}, {"latent_distribution": "ln"}], ids=["normal", "ln"])
def test_the_latents_of_an_export_are_compared_as_they_are(options):
    adata = counts(n_batches=3)
    untrained(adata, **options).export_to_anndata()
    tl.rank_factors_groups(adata, "batch")
    x, y = compared(adata, "b1", groupby="batch")
    np.testing.assert_allclose(
        in_exported_order(adata, "logfoldchanges").loc["b1"], x.mean(0) - y.mean(0), rtol=1e-5, atol=1e-8
    )


def test_another_export_and_another_place():
    adata = latents(key="other")
    tl.rank_factors_groups(adata, "population", key="other", key_added="ranked")
    assert sorted(adata.uns) == ["other", "ranked"]
    assert adata.uns["ranked"]["params"]["key"] == "other"


def test_a_copy_leaves_the_original_as_it_was():
    adata = latents()
    ranked = tl.rank_factors_groups(adata, "population", copy=True)
    assert "rank_factors_groups" not in adata.uns
    assert tl.rank_factors_groups(adata, "population") is None
    assert ranked.uns["rank_factors_groups"]["names"].tolist() == adata.uns["rank_factors_groups"]["names"].tolist()


@pytest.mark.parametrize(
    "labels",
    [np.arange(90) % 3, np.arange(90) % 2 == 0, np.array(["a", "b", "c"])[np.arange(90) % 3]],
    ids=["integers", "booleans", "strings"],
)
def test_any_column_of_labels_will_do_and_stays_as_it_is(labels):
    adata = latents()
    adata.obs["label"] = labels
    before = adata.copy()
    names = [str(label) for label in np.unique(labels)]
    tl.rank_factors_groups(adata, "label", groups=np.unique(labels), reference=labels[0])
    assert adata.uns["rank_factors_groups"]["names"].dtype.names == tuple(n for n in names if n != str(labels[0]))
    assert adata.uns["rank_factors_groups"]["params"]["reference"] == str(labels[0])
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    np.testing.assert_array_equal(adata.obsm["X_ldvae"], before.obsm["X_ldvae"])


@pytest.mark.parametrize("method", METHODS)
def test_no_setting_is_left_behind_and_no_warning_reaches_the_user(method):
    adata = latents(160, 3, tuple(f"group {i}" for i in range(40)))
    adata.obsm["X_ldvae"][:, 0] = 0
    # Beyond what an exponential function takes.
    adata.obsm["X_ldvae"][:, 1] *= 1000
    # Settings that no test before this one can have left.
    with warnings.catch_warnings(record=True) as caught, np.errstate(all="warn"):
        warnings.simplefilter("always")
        before = np.geterr(), mpl.rcParams.copy(), sc.settings.verbosity, warnings.filters.copy()
        tl.rank_factors_groups(adata, "population", method=method)
        assert before == (np.geterr(), mpl.rcParams.copy(), sc.settings.verbosity, warnings.filters)
    ours = [w for w in caught if "option is deprecated" not in str(w.message)]
    # Of latents of such a size, that a regression has not converged is worth knowing.
    assert [w.category.__name__ for w in ours] in ([], ["ConvergenceWarning"] * (method == "logreg"))
    assert np.isfinite(in_exported_order(adata, "scores").to_numpy()).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groupby": "cluster"}, KeyError, "`groupby`: 'cluster' is not a column of `adata.obs`, which has 'population'"),
        ({"key": "other"}, KeyError, "No export 'other' in `adata.uns`, which has 'ldvae'"),
        ({"method": "anova"}, ValueError, "`method` must be one of 'wilcoxon', .*; got 'anova'"),
        ({"corr_method": "fdr"}, ValueError, "`corr_method` must be one of 'benjamini-hochberg', 'bonferroni'; got 'fdr'"),
        ({"groups": "T"}, ValueError, "`groups`: 'T' not among the groups"),
        ({"groups": ["B", "T"]}, ValueError, r"`groups`: 'T' .*'population', which has 'CD4\+/CD25 T Reg', 'B'"),
        ({"groups": []}, ValueError, "`groups` must name at least one"),
        ({"groups": ["B"], "reference": "B"}, ValueError, "`groups` leaves no group"),
        ({"reference": "T"}, ValueError, r"`reference` must be 'rest' or a group of 'population', which has .*; got 'T'"),
        ({"method": "logreg", "reference": "B"}, ValueError, "`reference` must be 'rest' for .*'logreg'.*; got 'B'"),
        ({"method": "logreg", "groups": ["B"]}, ValueError, "fewer than 2 cells to compare 'B' with"),
        ({"key_added": "a/b"}, ValueError, "`key_added` must be a non-empty string without '/'"),
        ({"key_added": "ldvae"}, ValueError, "`key_added`: 'ldvae' .*export"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(arguments, error, message):
    adata = latents()
    with pytest.raises(error, match=message):
        tl.rank_factors_groups(adata, **{"groupby": "population", **arguments})
    assert list(adata.uns) == ["ldvae"]
    assert "decoder" in adata.uns["ldvae"]


def test_groups_that_cannot_be_tested_are_named():
    adata = latents()
    adata.obs["population"] = adata.obs["population"].cat.add_categories(["few", "none"])
    adata.obs.loc[adata.obs_names[0], "population"] = "few"
    for arguments in ({}, {"groups": ["few", "B"]}, {"groups": ["B"], "reference": "few"}):
        with pytest.raises(ValueError, match="'few' has fewer than 2 cells"):
            tl.rank_factors_groups(adata, "population", **arguments)
    with pytest.raises(ValueError, match="'none'"):
        tl.rank_factors_groups(adata, "population", groups=["none"])
    # What it is compared with may be one of many.
    tl.rank_factors_groups(adata, "population", groups=GROUPS)
    adata.obs["population"] = np.where(adata.obs_names == "cell0", "other", "B")
    with pytest.raises(ValueError, match="fewer than 2 cells to compare 'B' with"):
        tl.rank_factors_groups(adata, "population", groups=["B"])
    adata.obs["population"] = pd.Categorical([None] * 90, categories=["B"])
    with pytest.raises(ValueError, match="no cell has a value in 'population'"):
        tl.rank_factors_groups(adata, "population")


def test_a_group_called_rest_is_a_group():
    adata = latents()
    expected = tl.rank_factors_groups(adata, "population", copy=True)
    adata.obs["population"] = adata.obs["population"].cat.rename_categories({"B": "rest"})
    tl.rank_factors_groups(adata, "population")
    np.testing.assert_array_equal(in_exported_order(adata, "scores"), in_exported_order(expected, "scores"))


@pytest.mark.parametrize("labels", [["", "B"], [1, "1"]])
def test_labels_that_cannot_name_a_field_are_refused(labels):
    adata = latents()
    adata.obs["label"] = pd.Categorical.from_codes((np.arange(90) % 2).tolist(), categories=labels)
    with pytest.raises(ValueError, match="`groupby`: the labels of 'label' must be distinct and not empty"):
        tl.rank_factors_groups(adata, "label")


def test_latents_that_are_not_finite_are_refused():
    adata = latents()
    adata.obsm["X_ldvae"][3, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 450 values of `adata.obsm\['X_ldvae'\]` are not finite"):
        tl.rank_factors_groups(adata, "population")


def test_two_groups_of_a_regression_are_ranked_in_opposite_order_by_the_score_itself():
    adata = latents(groups=GROUPS[:2])
    tl.rank_factors_groups(adata, "population", method="logreg", rankby_abs=False)
    names, scores = (adata.uns["rank_factors_groups"][field] for field in ("names", "scores"))
    assert names[GROUPS[0]].tolist() == names[GROUPS[1]][::-1].tolist()
    assert all((np.diff(scores[group]) <= 0).all() for group in GROUPS[:2])
