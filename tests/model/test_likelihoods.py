"""Every likelihood with every dispersion: training, gradients, and the getters that sample."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scvi
import torch

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts, untrained
from tests.reference import covariate_counts, setup_arguments

LIKELIHOODS, DISPERSIONS = ("nb", "zinb", "poisson", "normal"), ("gene", "gene-batch", "gene-label", "gene-cell")
PAIRS = list(itertools.product(LIKELIHOODS, DISPERSIONS))


def fresh(covariates="both", *, size_factor=False, n_cells=60, **kwargs):
    adata = covariate_counts(n_cells=n_cells, n_batches=3)
    LDVAE.setup_anndata(adata, **setup_arguments(covariates, size_factor=size_factor, labels=True))
    scvi.settings.seed = 0
    return LDVAE(adata, **{"n_latent": 3, "n_hidden": 16, **kwargs})


@pytest.mark.grid(1)
@pytest.mark.parametrize(("gene_likelihood", "dispersion"), PAIRS)
def test_trains_and_samples(gene_likelihood, dispersion):
    odd = PAIRS.index((gene_likelihood, dispersion)) % 2 == 1
    model = fresh(
        size_factor=odd,
        gene_likelihood=gene_likelihood,
        dispersion=dispersion,
        batch_representation="embedding" if odd else "one-hot",
        encode_covariates=odd,
        use_observed_lib_size=not odd,
    )
    before = {name: value.detach().clone() for name, value in model.module.named_parameters()}
    model.train(2, kl_warmup=1, train_size=0.8, batch_size=16, check_val_every_n_epoch=1, **TRAIN)
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
    moved = {name for name, value in model.module.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in model.module.named_parameters() if value.requires_grad}

    for n_samples in (1, 3):
        expression = model.get_normalized_expression(n_samples=n_samples, library_size="latent", return_numpy=True)
        assert expression.shape == (60, 20)
        assert np.isfinite(expression).all()
        drawn = model.posterior_predictive_sample(n_samples=n_samples)
        assert drawn.shape == ((60, 20) if n_samples == 1 else (60, 20, 3))
    one, other = (
        model.get_normalized_expression(transform_batch=batch, use_posterior_mean=True, return_numpy=True)
        for batch in ("b1", "b2")
    )
    assert not np.allclose(one, other, rtol=1e-6)
    assert np.isfinite(float(model.get_elbo()))
    assert np.isfinite(float(np.mean(model.get_marginal_ll(n_mc_samples=4, n_mc_samples_per_pass=2))))
    assert all(np.isfinite(float(value)) for value in model.get_reconstruction_error().values())
    parameters = model.get_likelihood_parameters(n_samples=2)
    assert parameters["mean"].shape == (2, 60, 20)
    assert ("dispersions" in parameters) == (gene_likelihood != "poisson")
    assert np.isfinite(model.ablate().X).all()


def minibatch(model):
    (tensors,) = model._make_data_loader(model.adata, batch_size=1000)
    return tensors


@pytest.mark.grid
@pytest.mark.parametrize(("gene_likelihood", "dispersion"), PAIRS)
@pytest.mark.parametrize("size_factor", [False, True])
@pytest.mark.parametrize("use_observed_lib_size", [False, True])
def test_what_needs_a_gradient_gets_one_and_nothing_else(
    gene_likelihood, dispersion, size_factor, use_observed_lib_size
):
    model = fresh(
        size_factor=size_factor,
        gene_likelihood=gene_likelihood,
        dispersion=dispersion,
        use_observed_lib_size=use_observed_lib_size,
    )
    model.module.train()
    _, _, losses = model.module(minibatch(model))
    losses.loss.backward()
    for name, value in model.module.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name
    unused = {name.split(".")[0] for name, value in model.module.named_parameters() if not value.requires_grad}
    expected = {"decoder"} if gene_likelihood != "zinb" else set()
    expected |= {"l_encoder"} if size_factor or use_observed_lib_size else set()
    expected |= {"px_r"} if gene_likelihood == "poisson" and dispersion != "gene-cell" else set()
    assert unused == expected


@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
@pytest.mark.parametrize("use_observed_lib_size", [False, True])
def test_heads_that_nobody_needs_are_never_computed(gene_likelihood, use_observed_lib_size):
    model = fresh(gene_likelihood=gene_likelihood, use_observed_lib_size=use_observed_lib_size)
    ran = set()
    heads = {
        "dropout": model.module.decoder.px_dropout_decoder,
        "library": model.module.l_encoder,
        "loadings": model.module.decoder.factor_regressor,
    }
    for name, layer in heads.items():
        layer.register_forward_hook(lambda *_args, name=name: ran.add(name))
    model.train(2, kl_warmup=1, **TRAIN)
    model.get_normalized_expression()
    model.ablate()
    expected = {"loadings"} | ({"dropout"} if gene_likelihood == "zinb" else set())
    assert ran == expected | (set() if use_observed_lib_size else {"library"})


def test_a_poisson_has_no_dispersion_whatever_was_asked_for():
    for dispersion in DISPERSIONS:
        model = fresh(gene_likelihood="poisson", dispersion=dispersion)
        assert model.get_decoder().theta_bg is None
        assert not hasattr(model.module.decoder, "px_r_decoder")


@pytest.mark.slow
@pytest.mark.parametrize("size_factor", [False, True])
def test_an_informative_covariate_beats_a_permuted_one(size_factor):
    """The covariate doubles some genes; encoders do not see it."""
    rng = np.random.default_rng(0)
    elbo = {}
    for kind in ("own", "permuted"):
        adata = covariate_counts(n_cells=300, n_genes=30)
        dose = np.random.default_rng(1).integers(0, 2, 300)
        rate = np.full((300, 30), 5.0)
        rate[:, :15] *= np.where(dose == 1, 6.0, 1.0)[:, None]
        adata.X = np.random.default_rng(2).poisson(rate).astype(np.float32)
        adata.obs["dose"] = dose if kind == "own" else rng.permutation(dose)
        adata.obs["age"] = 0.0
        adata.obs["size"] = 1.0
        LDVAE.setup_anndata(adata, **setup_arguments("continuous", size_factor=size_factor, batch=False))
        scvi.settings.seed = 0
        model = LDVAE(
            adata,
            n_latent=1,
            n_hidden=2,
            gene_likelihood="poisson",
            use_observed_lib_size=True,
            use_batch_norm="encoder",
            bias="auto",
        )
        model.train(30, kl_warmup=1, train_size=0.8, plan_kwargs={"lr": 3e-2}, check_val_every_n_epoch=30, **TRAIN)
        elbo[kind] = float(model.history["elbo_validation"].iloc[-1, 0])
    assert elbo["own"] < elbo["permuted"] - 5, elbo


def test_size_factors_scale_the_rate_and_the_library_does_not():
    model = fresh(size_factor=True)
    module, tensors = model.module.eval(), minibatch(model)
    z, library = torch.zeros(60, 3), torch.full((60, 1), 7.0)

    def rate(tensors, library):
        given = module._get_generative_input(tensors, {"z": z, "library": library})
        with torch.no_grad():
            return module.generative(**given)["px"].mu

    doubled = {**tensors, "size_factor": 2 * tensors["size_factor"]}
    torch.testing.assert_close(rate(doubled, library), 2 * rate(tensors, library))
    assert torch.equal(rate(tensors, library + 5), rate(tensors, library))


@pytest.mark.parametrize("encode_covariates", [False, True])
@pytest.mark.parametrize("representation", ["one-hot", "embedding"])
def test_only_encoders_that_see_covariates_change_with_them(encode_covariates, representation):
    model = fresh(encode_covariates=encode_covariates, batch_representation=representation, n_layers=2)
    model.is_trained_ = True
    base = model.get_latent_representation(give_mean=True)
    library = model.get_latent_library_size()
    cells = {name: model.adata.copy() for name in ("age", "lane", "batch")}
    cells["age"].obs["age"] += 1.0
    for name in ("lane", "batch"):
        column = cells[name].obs[name].astype(str)
        cells[name].obs[name] = np.roll(sorted(column.unique()), 1)[np.searchsorted(sorted(column.unique()), column)]
    for name, changed in cells.items():
        del changed.uns
        same = np.isclose(model.get_latent_representation(changed), base, atol=1e-6).all(axis=1)
        assert (not same.any()) if encode_covariates else same.all(), name
        same = np.isclose(model.get_latent_library_size(changed), library, rtol=1e-6).all(axis=1)
        assert (not same.any()) if encode_covariates else same.all(), name


@pytest.mark.parametrize("use_batch_norm", ["both", "none"])
def test_a_covariate_moves_the_logits_by_its_slope(use_batch_norm):
    """By a difference of two passes through the network, one unit or one level apart."""
    model = fresh(use_batch_norm=use_batch_norm, n_cells=90)
    model.train(2, kl_warmup=1, **TRAIN)
    decoder, module = model.get_decoder(), model.module.eval()
    columns = {"age": 0, "dose": 1, "L 3": 2, "L/1": 3, "L/2": 4}
    tensors, z = minibatch(model), torch.zeros(90, 3)

    def log_scale(tensors):
        given = module._get_generative_input(tensors, {"z": z, "library": torch.zeros(90, 1)})
        with torch.no_grad():
            scale = module.generative(**given)["px"].scale.double()
        logits = torch.log(scale)
        return (logits - logits.mean(1, keepdim=True)).numpy()

    effect = decoder.centered().covariate_cg
    assert np.abs(effect[list(columns.values())]).max() > 1e-3
    for name in ("age", "dose"):
        moved = tensors["extra_continuous_covs"].clone()
        moved[:, columns[name]] += 1.0
        change = log_scale({**tensors, "extra_continuous_covs": moved}) - log_scale(tensors)
        np.testing.assert_allclose(change, np.broadcast_to(effect[columns[name]], change.shape), atol=1e-4)
    levels = []
    for code in range(3):
        moved = tensors["extra_categorical_covs"].clone()
        moved[:, 0] = code
        levels.append(log_scale({**tensors, "extra_categorical_covs": moved}))
    for code, name in ((1, "L/1"), (2, "L/2")):
        expected = effect[columns[name]] - effect[columns["L 3"]]
        np.testing.assert_allclose(levels[code] - levels[0], np.broadcast_to(expected, (90, 20)), atol=1e-4)
    np.testing.assert_array_equal(effect[5], 0, err_msg="a level without company has no effect")


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_a_library_beyond_float32_is_an_error_that_names_a_cell(likelihood):
    model = untrained(counts(), gene_likelihood=likelihood)
    with torch.no_grad():
        model.module.l_encoder.mean_encoder.bias.fill_(300.0)
        model.module.l_encoder.mean_encoder.weight.zero_()
    for method, arguments in (
        ("get_elbo", {}),
        ("get_latent_library_size", {}),
        ("get_normalized_expression", {"use_posterior_mean": True, "library_size": "latent"}),
    ):
        with pytest.raises(ValueError, match=rf"`{method}` is not finite: .* of 60 cells .* exp\(300\) for 'cell0'"):
            getattr(model, method)(**arguments)
    for table in (model.ablate().X, model.get_factor_stats().factors, model.get_explained_deviance()):
        values = table if isinstance(table, np.ndarray) else table.select_dtypes("number").to_numpy(dtype=float)
        assert np.isfinite(values).all()
