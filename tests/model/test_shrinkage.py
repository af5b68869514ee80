"""Shrunken loadings of a model, their standard errors in an export, and the penalty on loadings in training."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch

from ldvae_ext import datasets, get
from ldvae_ext.core.shrinkage import shrink
from ldvae_ext.model import LDVAE, fit_ensemble
from tests.core.decoders import full_decoder
from tests.helpers import TRAIN, counts, untrained
from tests.rotated import fresh, grouped_model

KINDS = ("loading", "information", "regression")

# The model of these tests is trained for 15 epochs.
pytestmark = pytest.mark.filterwarnings("ignore:All loadings of .* are shrunk to 0:UserWarning")


@pytest.fixture(params=["none", "varimax", "promax"])
def model(request):
    trained = grouped_model()
    trained.rotate(request.param)
    yield trained
    trained.rotate("none")


def errors_by_regression(model):
    """Standard errors of each gene's loadings in a negative binomial regression on the factors, with batch intercepts."""
    z = model.get_latent_representation().astype(float)
    if model.rotation is not None:
        z = z @ model.rotation.matrix_kk
    decoder = model.get_decoder(rotated=model.rotation is not None)
    batch = model.adata.obs["batch"].astype(str).to_numpy()
    exported = fresh(model)
    model.export_to_anndata(exported)
    library = exported.obs["ldvae_library"].to_numpy()
    mu = decoder.scale(z, batch) * library[:, None]
    weight = mu / (1 + mu / decoder.theta(batch, len(mu)))
    design = np.column_stack([z, batch[:, None] == np.unique(batch)])
    covariances = [np.linalg.inv((design * w[:, None]).T @ design) for w in weight.T]
    return np.sqrt([np.diag(c)[: z.shape[1]] for c in covariances])


class TestShrunkenLoadings:
    def test_are_the_shrinkage_of_loadings_by_errors_of_a_regression(self, model):
        got = model.get_shrunken_loadings()
        expected = errors_by_regression(model)
        assert got.errors.columns.tolist() == model.factor_names
        # A ridge of a thousandth of a count is added.
        np.testing.assert_allclose(got.errors, expected, rtol=0.02)
        weight = model.get_decoder(rotated=model.rotation is not None).weight_gk
        mean = (weight / expected**2).sum(axis=0) / (1 / expected**2).sum(axis=0)
        np.testing.assert_allclose(got.loadings, weight - mean, atol=0.02 * np.abs(weight).max())
        posterior = shrink(got.loadings.to_numpy(), got.errors.to_numpy())
        for table, value in zip((got.mean, got.sd, got.lower, got.upper, got.false_sign_rate), posterior, strict=True):
            np.testing.assert_array_equal(table, value)
        np.testing.assert_array_equal(got.decoder.weight_gk, got.mean)
        np.testing.assert_array_equal(got.decoder.intercept_bg, model.get_decoder().intercept_bg)
        assert "4 factors" in repr(got)

    def test_the_model_and_the_random_state_stay(self, model):
        before = model.get_loadings().to_numpy(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        model.get_shrunken_loadings(max_cells=30)
        np.testing.assert_array_equal(model.get_loadings(), before[0])
        assert torch.equal(torch.get_rng_state(), before[1])
        np.testing.assert_array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002

    def test_intervals_hold_the_truth_and_shrinking_comes_nearer_to_it(self):
        adata, truth = datasets.simulate(1500, 150, 2, kind="log-linear", median_library=600.0, seed=0)
        LDVAE.setup_anndata(adata)
        scvi.settings.seed = 0
        model = LDVAE(adata, n_latent=2, use_batch_norm="encoder", bias="auto", use_observed_lib_size=True)
        model.train(120, kl_warmup="auto", plan_kwargs={"lr": 1e-2}, **TRAIN)
        # Axes of the truth, so that loadings can be compared gene by gene.
        true_gk = truth.weight_gk - truth.weight_gk.mean(axis=0)
        found_gk = model.get_decoder().centered().weight_gk
        left, _, right = np.linalg.svd(found_gk.T @ true_gk)
        model.rotation_ = {"matrix": left @ right, "method": "varimax"}
        got = model.get_shrunken_loadings()
        weight = got.errors.to_numpy() ** -2
        true_gk = true_gk - (true_gk * weight).sum(axis=0) / weight.sum(axis=0)
        # A posterior mean of z is nearer to 0 than z, and loadings are larger for it.
        scale_k = (got.loadings * true_gk * weight).sum(axis=0) / (true_gk**2 * weight).sum(axis=0)
        true_gk = true_gk * scale_k.to_numpy()
        rare = np.asarray(adata.X.mean(axis=0)).ravel() < 0.5

        def error(table):
            return float(np.square(table - true_gk)[rare].to_numpy().mean())

        assert rare.sum() > 20
        assert error(got.mean) < 0.9 * error(got.loadings)
        inside = (got.lower <= true_gk) & (true_gk <= got.upper)
        assert inside.to_numpy().mean() > 0.8

    def test_fewer_cells_give_nearly_the_same_errors(self):
        model = grouped_model()
        model.rotate("none")
        every, some = model.get_shrunken_loadings().errors, model.get_shrunken_loadings(max_cells=80).errors
        assert not np.array_equal(every, some)
        assert np.median(np.abs(np.log(some / every))) < 0.1
        np.testing.assert_array_equal(model.get_shrunken_loadings(max_cells=80, seed=0).errors, some)
        assert not np.array_equal(model.get_shrunken_loadings(max_cells=80, seed=1).errors, some)

    @pytest.mark.filterwarnings("default:All loadings of")
    def test_factors_that_are_all_noise_are_named(self):
        model = grouped_model()
        model.rotate("none")
        with pytest.warns(UserWarning, match="All loadings of .*'Z_0'.* are shrunk to 0"):
            model.get_shrunken_loadings()

    def test_what_cannot_be_shrunk_is_refused(self):
        model = grouped_model()
        with pytest.raises(ValueError, match="`level` must lie between 0 and 1; got 1"):
            model.get_shrunken_loadings(level=1)
        with pytest.raises(ValueError, match="`max_cells` must be"):
            model.get_shrunken_loadings(max_cells=0)
        with pytest.raises(ValueError, match="no cells"):
            model.get_shrunken_loadings(indices=[])
        logistic = untrained(counts(), n_latent=3, latent_distribution="ln")
        with pytest.raises(ValueError, match="logistic-normal"):
            logistic.get_shrunken_loadings()


class TestExport:
    def test_errors_are_those_of_the_exported_factors(self, model):
        adata = fresh(model)
        model.export_to_anndata(adata)
        shrunken = model.get_shrunken_loadings()
        got = get.gene_scores(adata, kind="loading", statistic="error")
        np.testing.assert_allclose(got, shrunken.errors[got.columns], rtol=1e-5)
        pooled = get.gene_scores(adata, kind="information", statistic="error")
        decoder = get.decoder(adata)
        np.testing.assert_allclose(pooled, decoder.gene_information_error(got.to_numpy()), rtol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_has_scores_and_errors_of_the_same_genes_and_factors(self, model, kind):
        adata = fresh(model)
        model.export_to_anndata(adata)
        score, error = (get.gene_scores(adata, kind=kind, statistic=s) for s in ("score", "error"))
        assert score.index.equals(error.index)
        assert score.columns.equals(error.columns)
        assert ((error.to_numpy() >= 0) | (score.to_numpy() == 0)).all()

    def test_a_later_export_without_errors_takes_them_away(self):
        model = grouped_model()
        adata = fresh(model)
        model.export_to_anndata(adata)
        assert "ldvae_loadings_error" in adata.varm
        logistic = untrained(adata, n_latent=4, setup={"batch_key": "batch"}, latent_distribution="ln")
        logistic.export_to_anndata(adata)
        assert "ldvae_loadings_error" not in adata.varm
        with pytest.raises(KeyError, match="ldvae_loadings_error"):
            get.gene_scores(adata, kind="loading", statistic="error")


@pytest.mark.parametrize("link", ["softmax", "softplus"])
def test_errors_of_shares_are_those_of_a_difference(link):
    decoder = full_decoder(n_genes=7, n_factors=3, link=link)
    error = np.random.default_rng(0).uniform(0.1, 1, size=(7, 3))
    got, step = decoder.gene_information_error(error), 1e-6
    for gene in range(7):
        for factor in range(3):
            up, down = decoder.weight_gk.copy(), decoder.weight_gk.copy()
            up[gene, factor] += step
            down[gene, factor] -= step
            change = (
                decoder._with(weight_gk=up).gene_information() - decoder._with(weight_gk=down).gene_information()
            )[gene, factor]
            np.testing.assert_allclose(
                got[gene, factor], np.abs(change) / (2 * step) * error[gene, factor], rtol=1e-4, atol=1e-7
            )


OPTIONS = {"default": {}, "no batch norm": {"use_batch_norm": "encoder", "bias": True}}


def trained(penalty, options, backend="auto", max_epochs=3, **kwargs):
    adata = counts(90, seed=1)
    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=3, **options)
    arguments = {"kl_warmup": 1, "backend": backend, "decoder_penalty": penalty, "plan_kwargs": {"lr": 1e-2}}
    model.train(max_epochs, **arguments, **TRAIN, **kwargs)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
class TestPenalty:
    def test_is_that_of_the_folded_loadings_with_its_gradient(self, options):
        module = trained(None, options).module
        loading = module.get_loadings().astype(float)
        got = module.decoder_penalty(l1=0.3, l2=0.7)
        np.testing.assert_allclose(got.item(), 0.3 * np.abs(loading).sum() + 0.35 * (loading**2).sum(), rtol=1e-5)
        parameters = [p for p in module.decoder.factor_regressor.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(got, parameters, allow_unused=True)
        weight = module.decoder.factor_regressor.fc_layers[0][0].weight
        at = next(i for i, p in enumerate(parameters) if p is weight)
        with torch.no_grad():
            values = []
            for step in (1e-2, -1e-2):
                weight[4, 1] += step
                values.append(module.decoder_penalty(l1=0.3, l2=0.7).item())
                weight[4, 1] -= step
        np.testing.assert_allclose(gradients[at][4, 1].item(), (values[0] - values[1]) / 2e-2, rtol=0.05)

    @pytest.mark.parametrize("penalty", [0.5, {"l1": 0.3}, {"l1": 0.1, "l2": 0.1}], ids=str)
    def test_shrinks_the_loadings_alike_with_every_backend(self, options, penalty):
        free = np.square(trained(None, options, max_epochs=20).module.get_loadings()).sum()
        results = [trained(penalty, options, backend, max_epochs=20) for backend in ("numba", "torch", "scvi")]
        for model in results:
            assert np.square(model.module.get_loadings()).sum() < 0.9 * free
            np.testing.assert_allclose(model.module.get_loadings(), results[-1].module.get_loadings(), atol=2e-3)

    def test_history_is_that_of_the_elbo(self, options):
        free, held = trained(None, options), trained({"l2": 100.0}, options)
        assert free.history.keys() == held.history.keys()
        # The first epoch is one minibatch: its loss is that of the same initial network.
        first, other = (model.history["train_loss"].to_numpy().ravel() for model in (free, held))
        np.testing.assert_allclose(other[0], first[0], rtol=1e-6)
        assert other[-1] != first[-1]

    def test_a_weight_of_zero_changes_nothing(self, options):
        none, zero = trained(None, options), trained(0, options)
        np.testing.assert_array_equal(zero.module.get_loadings(), none.module.get_loadings())


@pytest.mark.parametrize("penalty", [-1, np.nan, np.inf, True, "1", {"l1": -1.0}, [1.0]], ids=str)
def test_a_penalty_that_is_no_number_is_refused(penalty):
    with pytest.raises(ValueError, match="`decoder_penalty` must be a finite number of at least 0"):
        trained(penalty, {})


def test_an_unknown_penalty_is_named():
    adata = counts(90, seed=1)
    LDVAE.setup_anndata(adata)
    for train in (
        lambda: trained({"elastic": 1.0}, {}),
        # Before the first run.
        lambda: fit_ensemble(adata, 2, train_kwargs={"decoder_penalty": {"elastic": 1.0}}),
    ):
        with pytest.raises(ValueError, match="`decoder_penalty` must be one of 'l1', 'l2'; got 'elastic'"):
            train()
