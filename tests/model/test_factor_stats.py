"""The ledger of factors: each measure is what the method that it is named after says."""

from __future__ import annotations

from functools import cache

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.stats import norm, ortho_group, rankdata, spearmanr

from ldvae_ext._stats import MEASURES
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.ledger import information_ledger
from ldvae_ext.model import LDVAE, FactorStats
from tests.helpers import TRAIN, counts, untrained
from tests.rotated import GROUPS, grouped

OF_COUNTS = ["explained_deviance", "ablation_zero", "ablation_mean", "ablation_permute"]
OF_POSTERIORS = [name for name in MEASURES if name not in OF_COUNTS]


def cells(n_cells=150, seed=0):
    adata = grouped(n_cells, seed)
    adata.obs.loc["cell20", "type"] = np.nan
    return adata


@pytest.fixture(scope="module")
def trained():
    adata = cells()
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=4)
    model.train(15, kl_warmup="auto", batch_size=32, plan_kwargs={"lr": 1e-2}, **TRAIN)
    return model


@pytest.fixture(params=[False, True], ids=["latents", "factors"])
def model(trained, request):
    """On its own axes, and on axes that no rule would choose."""
    matrix = ortho_group.rvs(4, random_state=3)
    trained.rotation_ = {"matrix": matrix, "method": "varimax"} if request.param else None
    yield trained
    trained.rotation_ = None


def axes_of(model):
    return np.eye(4) if model.rotation is None else model.rotation.matrix_kk


def posterior(model, cells=slice(None)):
    mean, variance = model.get_latent_representation(return_dist=True)
    return mean.astype(float)[cells], variance.astype(float)[cells]


def column(stats, name, group="all"):
    table = stats.factors[stats.factors["group"] == group]
    return table.set_index("factor")[name]


class TestMeasures:
    def test_divergence_and_activity_are_those_of_the_marginal_posteriors(self, model):
        stats, rotation = model.get_factor_stats(), axes_of(model)
        mean, variance = posterior(model)
        kl = kl_per_dimension(mean @ rotation, variance @ rotation**2).mean(axis=0)
        np.testing.assert_allclose(column(stats, "kl"), kl, rtol=1e-5)
        np.testing.assert_allclose(column(stats, "kl_bits"), kl / np.log(2), rtol=1e-5)
        np.testing.assert_allclose(column(stats, "active_unit"), (mean @ rotation).var(axis=0), rtol=1e-5)
        assert column(stats, "kl").index.tolist() == model.factor_names
        assert (stats.factors["n_cells"] == 150).all()
        if model.rotation is None:
            np.testing.assert_allclose(column(stats, "kl"), model.get_latent_kl().mean(), rtol=1e-6)

    def test_explained_deviance_is_that_of_the_method(self, model):
        expected = model.get_explained_deviance().set_index("factor")["explained_deviance"]
        got = column(model.get_factor_stats(), "explained_deviance")
        np.testing.assert_allclose(got, expected[got.index], rtol=1e-9)
        some = np.arange(150) % 4 == 1
        expected = model.get_explained_deviance(indices=some).set_index("factor")["explained_deviance"]
        got = column(model.get_factor_stats(indices=some), "explained_deviance")
        np.testing.assert_allclose(got, expected[got.index], rtol=1e-6)

    @pytest.mark.grid(1)
    @pytest.mark.parametrize("mode", ["zero", "mean", "permute"])
    @pytest.mark.parametrize("seed", [None, 5])
    def test_effects_of_ablation_are_the_means_of_ablate(self, model, mode, seed):
        drawn = {"seed": seed} if mode == "permute" else {}
        cells = model.ablate(mode=mode, **drawn)
        got = column(model.get_factor_stats(seed=seed), f"ablation_{mode}")
        assert got.index.tolist() == cells.var_names.tolist()
        np.testing.assert_allclose(got, cells.X.mean(axis=0), rtol=1e-9)
        by_group = model.get_factor_stats("type", seed=seed)
        for group in GROUPS:
            expected = cells.X[(model.adata.obs["type"] == group).to_numpy()].mean(axis=0)
            np.testing.assert_allclose(column(by_group, f"ablation_{mode}", group), expected, rtol=1e-9)

    def test_the_split_is_that_of_the_ledger(self, model):
        stats = model.get_factor_stats(seed=4)
        mean, variance = posterior(model)
        ledger = information_ledger(mean, variance, axes_of(model), n_samples=100, seed=1)
        for name, atol in (("mutual_information", 1e-5), ("dimension_wise_kl", 1e-5), ("total_correlation", 0.03)):
            np.testing.assert_allclose(column(stats, name), getattr(ledger, f"{name}_k"), atol=atol, err_msg=name)
        for name, atol in (("mutual_information", 0.05), ("dimension_wise_kl", 1e-5), ("total_correlation", 0.05)):
            np.testing.assert_allclose(stats.totals[name], getattr(ledger, name), atol=atol, err_msg=name)
        np.testing.assert_allclose(stats.totals["kl"], ledger.kl, rtol=1e-6)
        assert stats.totals["n_cells"].tolist() == [150]
        np.testing.assert_allclose(
            column(stats, "mutual_information") + column(stats, "dimension_wise_kl"), column(stats, "kl"), rtol=1e-6
        )

    def test_the_divergence_of_the_aggregate_is_an_integral(self, model):
        """Independent of the ledger: the mixture of all cells on a fine grid."""
        mean, variance = posterior(model)
        rotation = axes_of(model)
        f, sd = mean @ rotation, np.sqrt(variance @ rotation**2)
        x = np.linspace(-9, 9, 6_001)
        got = column(model.get_factor_stats(), "dimension_wise_kl")
        for k in range(4):
            q = norm.pdf(x[:, None], f[:, k], sd[:, k]).mean(axis=1)
            integrand = np.where(q > 1e-300, q * (np.log(np.maximum(q, 1e-300)) - norm.logpdf(x)), 0)
            np.testing.assert_allclose(got.iloc[k], integrand.sum() * (x[1] - x[0]), atol=1e-4)

    def test_totals_close_up_to_the_error_of_the_samples(self, model):
        total = model.get_factor_stats("type").totals.set_index("group")
        assert total.index.tolist() == GROUPS
        parts = total[["mutual_information", "total_correlation", "dimension_wise_kl"]].sum(axis=1)
        np.testing.assert_allclose(parts, total["kl"], rtol=0.04)
        whole = model.get_factor_stats().totals.iloc[0]
        parts = whole["mutual_information"] + whole["total_correlation"] + whole["dimension_wise_kl"]
        np.testing.assert_allclose(parts, whole["kl"], rtol=0.04)
        assert 0 < whole["mutual_information"] <= np.log(150) + 0.1


def test_totals_that_know_no_axes_are_the_same_under_any_rotation(trained):
    plain = trained.get_factor_stats()
    trained.rotation_ = {"matrix": ortho_group.rvs(4, random_state=3), "method": "varimax"}
    rotated = trained.get_factor_stats()
    trained.rotation_ = None
    for name in ("kl", "mutual_information"):
        np.testing.assert_allclose(rotated.totals[name], plain.totals[name], rtol=1e-6, err_msg=name)
    for name in ("total_correlation", "dimension_wise_kl"):
        assert abs(rotated.totals[name][0] / plain.totals[name][0] - 1) > 1e-3, name
    both = (rotated.totals["total_correlation"] + rotated.totals["dimension_wise_kl"])[0]
    np.testing.assert_allclose(
        both, (plain.totals["total_correlation"] + plain.totals["dimension_wise_kl"])[0], rtol=0.05
    )
    assert not np.allclose(rotated.table()["kl"], plain.table()["kl"], rtol=0.05)


@pytest.mark.slow
def test_the_identity_closes_within_one_percent_at_5000_cells():
    adata = counts(5000, n_batches=3)
    model = untrained(adata, n_latent=5)
    with torch.no_grad():
        for head in (model.module.z_encoder.mean_encoder, model.module.z_encoder.var_encoder):
            head.weight *= 0.1
        model.module.z_encoder.var_encoder.bias -= 2  # posteriors as narrow as trained ones
    model.rotation_ = {"matrix": ortho_group.rvs(5, random_state=0), "method": "varimax"}
    total = model.get_factor_stats().totals.iloc[0]
    parts = total["mutual_information"] + total["total_correlation"] + total["dimension_wise_kl"]
    np.testing.assert_allclose(parts, total["kl"], rtol=0.01)


class TestCells:
    def test_each_group_is_what_its_cells_alone_are(self, model):
        whole = model.get_factor_stats("type")
        assert whole.factors["group"].unique().tolist() == GROUPS
        assert len(whole.factors) == 12
        rotation = axes_of(model)
        for group in GROUPS:
            inside = np.flatnonzero((model.adata.obs["type"] == group).to_numpy())
            assert set(column(whole, "n_cells", group)) == {len(inside)}
            mean, variance = posterior(model, inside)
            np.testing.assert_allclose(
                column(whole, "kl", group), kl_per_dimension(mean @ rotation, variance @ rotation**2).mean(0), rtol=1e-5
            )
            np.testing.assert_allclose(column(whole, "active_unit", group), (mean @ rotation).var(axis=0), rtol=1e-5)
            # What is said of posteriors alone knows nothing of other groups.
            alone = model.get_factor_stats(indices=inside)
            for name in OF_POSTERIORS:
                np.testing.assert_allclose(
                    column(whole, name, group), column(alone, name), rtol=1e-4, atol=1e-6, err_msg=name
                )
        explained = model.get_explained_deviance("type").set_index(["group", "factor"])["explained_deviance"]
        got = whole.factors.set_index(["group", "factor"])["explained_deviance"]
        np.testing.assert_allclose(got, explained[got.index], rtol=1e-9)

    def test_batches_are_groups_too_and_names_may_have_slashes(self, model):
        stats = model.get_factor_stats("batch")
        assert stats.totals["group"].tolist() == ["CD4+/CD25 T", "b1", "b2"]
        cells = model.ablate()
        for batch in ("CD4+/CD25 T", "b1", "b2"):
            inside = (cells.obs["batch"] == batch).to_numpy()
            np.testing.assert_allclose(column(stats, "ablation_zero", batch), cells.X[inside].mean(axis=0), rtol=1e-9)

    def test_cells_without_a_group_are_left_out(self, model):
        stats = model.get_factor_stats("type")
        counted = stats.totals["n_cells"].sum()
        assert counted == 148
        known = model.adata.obs["type"].notna().to_numpy()
        alone = model.get_factor_stats("type", indices=known)
        for name in [*OF_POSTERIORS, "ablation_zero", "ablation_mean", "ablation_permute"]:
            np.testing.assert_allclose(stats.factors[name], alone.factors[name], rtol=1e-4, atol=1e-5, err_msg=name)

    def test_indices_choose_cells_and_donors_and_means_are_of_all(self, model):
        indices = [140, 3, 77, 21, 6, 9]
        got = model.get_factor_stats(indices=indices, seed=1)
        assert got.totals["n_cells"].tolist() == [6]
        for mode in ("zero", "mean", "permute"):
            drawn = {"seed": 1} if mode == "permute" else {}
            expected = model.ablate(indices=indices, mode=mode, **drawn).X.mean(axis=0)
            np.testing.assert_allclose(column(got, f"ablation_{mode}"), expected, rtol=1e-6)
        mask = np.isin(np.arange(150), indices)
        of_mask = model.get_factor_stats(indices=mask, seed=1).factors
        for name in MEASURES:
            if name != "total_correlation":  # whose draws go by the order of the cells
                np.testing.assert_allclose(got.factors[name], of_mask[name], rtol=1e-5, atol=1e-6, err_msg=name)
        some = model.get_factor_stats("type", indices=(model.adata.obs["type"] == "NK").to_numpy())
        assert some.totals["group"].tolist() == ["NK"]

    def test_unseen_cells_are_encoded_and_left_alone(self, model):
        other = cells(40, seed=5)[:, ::-1].copy()
        before = other.copy()
        stats = model.get_factor_stats("type", other)
        assert stats.factors["n_cells"].groupby(stats.factors["group"]).first().sum() == 38
        expected = model.ablate(other)
        for group in GROUPS:
            inside = (other.obs["type"] == group).to_numpy()
            np.testing.assert_allclose(column(stats, "ablation_zero", group), expected.X[inside].mean(0), rtol=1e-6)
        assert list(other.obs) == list(before.obs)
        assert list(other.uns) == list(before.uns)

    @pytest.mark.parametrize("batch_size", [11, 64])
    def test_numbers_do_not_depend_on_minibatches(self, model, batch_size):
        whole, cut = model.get_factor_stats("type"), model.get_factor_stats("type", batch_size=batch_size)
        for name in MEASURES:
            np.testing.assert_allclose(cut.factors[name], whole.factors[name], rtol=1e-4, atol=1e-5, err_msg=name)

    def test_the_split_of_many_cells_is_that_of_some_of_them(self, model):
        stats, whole = model.get_factor_stats(max_cells=60, seed=2), model.get_factor_stats(seed=2)
        assert stats.totals["n_cells"].tolist() == [60]
        assert set(stats.factors["n_cells"]) == {150}
        for name in ("kl", "kl_bits", "active_unit", *OF_COUNTS):
            np.testing.assert_array_equal(stats.factors[name], whole.factors[name], err_msg=name)
        some = np.sort(np.random.default_rng(2).choice(150, 60, replace=False))
        mean, variance = posterior(model, some)
        ledger = information_ledger(mean, variance, axes_of(model), seed=2)
        np.testing.assert_allclose(column(stats, "mutual_information"), ledger.mutual_information_k, atol=1e-5)
        np.testing.assert_allclose(stats.totals["kl"], ledger.kl, rtol=1e-6)
        other = model.get_factor_stats(max_cells=60, seed=3)
        assert not np.allclose(other.factors["mutual_information"], stats.factors["mutual_information"])
        again = model.get_factor_stats(max_cells=60, seed=2)
        pd.testing.assert_frame_equal(again.factors, stats.factors)

    def test_the_seed_is_scvi_tools_setting_unless_one_is_given(self, model):
        scvi.settings.seed = 5
        default = model.get_factor_stats()
        pd.testing.assert_frame_equal(default.factors, model.get_factor_stats(seed=5).factors)
        assert not np.allclose(
            default.factors["ablation_permute"], model.get_factor_stats(seed=6).factors["ablation_permute"]
        )
        scvi.settings._seed = None
        pd.testing.assert_frame_equal(model.get_factor_stats().factors, model.get_factor_stats(seed=0).factors)

    def test_random_states_are_left_alone(self, model):
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        model.get_factor_stats(max_cells=50)
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002

    def test_bad_input_is_named(self, trained):
        with pytest.raises(KeyError, match="`groupby`: 'cluster' is not a column"):
            trained.get_factor_stats("cluster")
        with pytest.raises(ValueError, match="There are no cells to look at"):
            trained.get_factor_stats(indices=[])
        with pytest.raises(ValueError, match="There are no cells to look at"):
            trained.get_factor_stats("type", indices=[3, 20])
        with pytest.raises(ValueError, match="`max_cells` must be an integer of at least 1"):
            trained.get_factor_stats(max_cells=0)


@pytest.mark.parametrize("rotated", [False, True])
def test_without_counts_what_needs_them_is_nan_with_one_warning(rotated, recwarn):
    adata = cells(60)
    model = untrained(adata)
    if rotated:
        model.rotate()
    expected = model.get_factor_stats("type")
    model.minify_adata()
    recwarn.clear()
    with pytest.warns(UserWarning, match="explained deviance and the effects of ablation are NaN") as said:
        got = model.get_factor_stats("type")
    assert len(said) == 1
    assert said[0].filename == __file__
    assert got.factors[OF_COUNTS].isna().all(axis=None)
    for name in ["kl_bits", *OF_POSTERIORS]:
        np.testing.assert_allclose(got.factors[name], expected.factors[name], rtol=1e-4, atol=1e-5, err_msg=name)
    pd.testing.assert_frame_equal(got.totals, expected.totals, rtol=1e-4)
    assert got.ranks("NK")[OF_COUNTS].isna().all(axis=None)
    assert got.agreement("NK").loc["kl", OF_COUNTS].isna().all()
    assert got.agreement("NK").loc["kl", "kl"] == 1


def test_minified_data_with_counts_have_all_measures():
    adata = cells(60)
    model = untrained(adata)
    expected = model.get_factor_stats()
    model.minify_adata("latent_posterior_parameters_with_counts")
    got = model.get_factor_stats()
    np.testing.assert_allclose(got.factors[list(MEASURES)], expected.factors[list(MEASURES)], rtol=1e-4, atol=1e-4)


def test_under_ln_the_measures_of_posteriors_are_those_of_u():
    adata = cells(60)
    model = untrained(adata, latent_distribution="ln")
    stats = model.get_factor_stats("type", seed=1)
    np.testing.assert_allclose(model.get_factor_stats().table()["kl"], model.get_latent_kl().mean(), rtol=1e-6)
    with model.adata_manager and torch.no_grad(), model.module.evaluating():
        tensors = next(iter(model._make_data_loader(adata, batch_size=60)))
        out = model.module.posterior(tensors)
    mean, variance = out.mean.numpy().astype(float), out.variance.numpy().astype(float)
    for group in GROUPS:
        inside = (adata.obs["type"] == group).to_numpy()
        np.testing.assert_allclose(column(stats, "active_unit", group), mean[inside].var(axis=0), rtol=1e-5)
        ledger = information_ledger(mean[inside], variance[inside], seed=1)
        for name in ("mutual_information", "dimension_wise_kl"):
            np.testing.assert_allclose(
                column(stats, name, group), getattr(ledger, f"{name}_k"), rtol=1e-4, atol=1e-4, err_msg=name
            )
        np.testing.assert_allclose(
            column(stats, "ablation_mean", group), model.ablate(mode="mean").X[inside].mean(axis=0), rtol=1e-6
        )


def test_an_instance_without_data_needs_cells(trained, tmp_path):
    trained.save(tmp_path / "m")
    bare = LDVAE.load(tmp_path / "m", adata=False, accelerator="cpu")
    with pytest.raises(ValueError, match="loaded without data: give `adata`"):
        bare.get_factor_stats()
    adata = ad.AnnData(
        trained.adata.X.copy(), trained.adata.obs[["batch", "type"]].copy(), trained.adata.var[[]].copy()
    )
    pd.testing.assert_frame_equal(
        bare.get_factor_stats("type", adata).factors, trained.get_factor_stats("type").factors
    )


@cache
def stats_with_gaps():
    """Ties, a measure that is constant and one that is not known."""
    rng = np.random.default_rng(0)
    values = pd.DataFrame(rng.normal(size=(10, 9)).round(0), columns=list(MEASURES))
    values["explained_deviance"] = np.nan
    values["ablation_zero"] = 3.0
    factors = values.assign(group=np.repeat(["a/b", "c"], 5), factor=[f"F_{k}" for k in range(5)] * 2, n_cells=9)
    return FactorStats(factors, pd.DataFrame({"group": ["a/b", "c"], "kl": [1.0, 2.0]}))


class TestTables:
    @pytest.mark.parametrize("group", ["a/b", "c"])
    def test_ranks_and_agreement_are_scipys(self, group):
        stats = stats_with_gaps()
        table, ranks, agreement = stats.table(group), stats.ranks(group), stats.agreement(group)
        assert table.columns.tolist() == ranks.columns.tolist() == agreement.index.tolist() == list(MEASURES)
        assert table.index.tolist() == ranks.index.tolist() == [f"F_{k}" for k in range(5)]
        for name in MEASURES:
            if name == "explained_deviance":
                assert ranks[name].isna().all()
                continue
            np.testing.assert_array_equal(ranks[name], rankdata(-table[name]), err_msg=name)
        for a in MEASURES:
            for b in MEASURES:
                if {"explained_deviance", "ablation_zero"} & {a, b}:
                    assert np.isnan(agreement.loc[a, b]), (a, b)
                    continue
                np.testing.assert_allclose(agreement.loc[a, b], spearmanr(table[a], table[b]).statistic, atol=1e-12)

    def test_rank_one_is_the_largest(self):
        stats = stats_with_gaps()
        table, ranks = stats.table("c"), stats.ranks("c")
        assert table.loc[ranks["kl"].idxmin(), "kl"] == table["kl"].max()

    def test_a_group_is_named_unless_it_is_the_only_one(self, trained):
        stats = stats_with_gaps()
        for method in (stats.table, stats.ranks, stats.agreement):
            with pytest.raises(ValueError, match=r"`group` must be one of \['a/b', 'c'\]; got None"):
                method()
            with pytest.raises(ValueError, match="got 'd'"):
                method("d")
        one = trained.get_factor_stats()
        pd.testing.assert_frame_equal(one.table(), one.table("all"))
        assert one.ranks().shape == (4, 9)
        assert ((one.agreement().to_numpy() >= -1 - 1e-12) & (one.agreement().to_numpy() <= 1 + 1e-12)).all()
