"""Rotations of the network itself, the rotation that truncation wants, and nested dropout."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import scvi
import torch
from scvi.distributions import NegativeBinomial
from torch.distributions import Normal, kl_divergence

from ldvae_ext.module._truncation import (
    bake_rotation,
    kept_latents,
    polish_rotation,
    refine_rotation,
    truncation_loss,
)
from tests.helpers import counts, untrained
from tests.reference import covariate_counts, setup_arguments

CASES = {
    "nb": {},
    "no batch norm": {"use_batch_norm": "none", "bias": True},
    "zinb, batch norm": {"gene_likelihood": "zinb"},
    "gene-cell": {"gene_likelihood": "zinb", "dispersion": "gene-cell"},
    "poisson, observed library": {"gene_likelihood": "poisson", "use_observed_lib_size": True},
    "normal, encoded covariates": {"gene_likelihood": "normal", "encode_covariates": True},
    "embedding": {"batch_representation": "embedding", "dispersion": "gene-batch"},
    "softplus": {"size_factor": True, "n_layers": 2},
}


def build(case, n_latent=4):
    options = dict(CASES[case])
    setup = setup_arguments("both", size_factor=options.pop("size_factor", False), labels=True)
    model = untrained(covariate_counts(n_batches=3), n_latent, setup=setup, **options)
    with torch.no_grad():
        # Latents of a few units: beyond that float32 itself is off.
        for head in (model.module.z_encoder.mean_encoder, model.module.z_encoder.var_encoder):
            head.weight.mul_(0.1)
    return model


def rotation_of(n_latent, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n_latent, n_latent)))[0]


def all_cells(model):
    (tensors,) = model._make_data_loader(model.adata, batch_size=model.adata.n_obs)
    return tensors


def decoded(module, tensors):
    posterior = module.posterior(tensors)
    with torch.no_grad(), module.evaluating():
        outputs = {"z": posterior.mean, "library": posterior.log_library[:, None]}
        px = module.generative(**module._get_generative_input(tensors, outputs))["px"]
    names = ("mu", "rate", "loc", "theta", "zi_logits", "scale")
    return posterior, {name: value.clone() for name in names if (value := getattr(px, name, None)) is not None}


def state_of(module):
    values = {name: value.clone() for name, value in module.state_dict().items()}
    return values, [p.requires_grad for p in module.parameters()], [layer.training for layer in module.modules()]


def assert_same_state(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize("case", CASES)
def test_a_baked_rotation_decodes_to_the_same(case):
    model = build(case)
    tensors, rotation = all_cells(model), rotation_of(4)
    posterior, before = decoded(model.module, tensors)
    statistics = {name: v.clone() for name, v in model.module.state_dict().items() if "running" in name}
    bake_rotation(model.module, rotation)
    rotated, after = decoded(model.module, tensors)
    np.testing.assert_allclose(rotated.mean, posterior.mean.double().numpy() @ rotation, atol=1e-5)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    torch.testing.assert_close(rotated.log_library, posterior.log_library, rtol=0, atol=0)
    for name, value in statistics.items():
        assert torch.equal(model.module.state_dict()[name], value), name


def test_a_baked_rotation_changes_no_share_of_expression_by_more_than_1e6():
    for case in CASES:
        model = build(case)
        tensors = all_cells(model)
        _, before = decoded(model.module, tensors)
        bake_rotation(model.module, rotation_of(4))
        _, after = decoded(model.module, tensors)
        assert (after["scale"] - before["scale"]).abs().max() < 1e-6 * max(1.0, float(before["scale"].max()))


def test_variances_become_weighted_geometric_means():
    model = build("nb")
    tensors, rotation = all_cells(model), rotation_of(4)
    eps = model.module.z_encoder.var_eps
    before = model.module.posterior(tensors).variance.double().numpy() - eps
    bake_rotation(model.module, rotation)
    after = model.module.posterior(tensors).variance.double().numpy() - eps
    np.testing.assert_allclose(after, np.exp(np.log(before) @ rotation**2), rtol=1e-4)


def test_a_permutation_permutes_everything():
    model = build("zinb, batch norm")
    tensors, order = all_cells(model), [2, 0, 3, 1]
    posterior = model.module.posterior(tensors)
    loadings = model.module.get_loadings()
    bake_rotation(model.module, np.eye(4)[:, order])
    rotated = model.module.posterior(tensors)
    np.testing.assert_allclose(rotated.mean, posterior.mean[:, order], rtol=1e-6)
    np.testing.assert_allclose(rotated.variance, posterior.variance[:, order], rtol=1e-6)
    np.testing.assert_allclose(model.module.get_loadings(), loadings[:, order], rtol=1e-6)


def mean_truncation_loss(module, tensors, rotation_kk):
    """Mean over all truncations, exactly."""
    posterior, n_latent = module.posterior(tensors), len(rotation_kk)
    rotation = torch.as_tensor(rotation_kk, dtype=torch.float32)
    losses = []
    with torch.no_grad(), module.evaluating():
        for j in range(1, n_latent + 1):
            kept = (torch.arange(n_latent) < j).expand(len(posterior.mean), -1)
            losses.append(truncation_loss(module, tensors, posterior, rotation, kept).mean())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_a_truncation_is_that_of_the_network_with_the_other_factors_at_zero(case):
    model = build(case)
    tensors, rotation = all_cells(model), rotation_of(4)
    posterior = model.module.posterior(tensors)
    kept = kept_latents(len(posterior.mean), 4, generator=torch.Generator().manual_seed(3))
    assert 0 < kept.float().mean() < 1
    with torch.no_grad(), model.module.evaluating():
        got = truncation_loss(model.module, tensors, posterior, torch.as_tensor(rotation).float(), kept)
    factors = (posterior.mean.double().numpy() @ rotation) * kept.numpy()
    with torch.no_grad(), model.module.evaluating():
        outputs = {"z": torch.as_tensor(factors @ rotation.T).float(), "library": posterior.log_library[:, None]}
        px = model.module.generative(**model.module._get_generative_input(tensors, outputs))["px"]
    np.testing.assert_allclose(got, -px.log_prob(tensors["X"]).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_refinement_lowers_the_loss_of_truncations(case):
    model = build(case)
    tensors, start = all_cells(model), rotation_of(4)
    before = state_of(model.module)
    refined = refine_rotation(model.module, tensors, start, n_steps=40)
    assert_same_state(before, state_of(model.module))
    assert all(p.grad is None for p in model.module.parameters())
    np.testing.assert_allclose(refined.T @ refined, np.eye(4), atol=1e-10)
    assert mean_truncation_loss(model.module, tensors, refined) < mean_truncation_loss(model.module, tensors, start)


def test_refinement_is_deterministic_and_leaves_no_trace():
    model = build("nb")
    model.module.train()
    tensors, start = all_cells(model), rotation_of(4)
    torch.manual_seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = refine_rotation(model.module, tensors, start, n_steps=5)
    with torch.inference_mode():
        second = refine_rotation(model.module, tensors, start, n_steps=5)
    np.testing.assert_array_equal(first, second)
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert model.module.training
    other = refine_rotation(model.module, tensors, start, n_steps=5, seed=1)
    assert np.abs(other - first).max() > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_polishing_lowers_the_loss_of_truncations_and_leaves_no_trace(case):
    model = build(case)
    model.module.train()
    tensors, start = all_cells(model), rotation_of(4)
    before, random = state_of(model.module), torch.get_rng_state()
    polished = polish_rotation(model.module, tensors, start)
    assert_same_state(before, state_of(model.module))
    assert torch.equal(random, torch.get_rng_state())
    np.testing.assert_allclose(polished.T @ polished, np.eye(4), atol=1e-10)
    assert mean_truncation_loss(model.module, tensors, polished) < mean_truncation_loss(model.module, tensors, start)
    np.testing.assert_array_equal(polished, polish_rotation(model.module, tensors, start))
    assert model.module.training


def test_polishing_comes_close_to_the_best_angle_of_a_plane_from_anywhere():
    model = build("nb", n_latent=2)
    tensors = all_cells(model)
    angles = np.linspace(0, np.pi, 361)
    turns = [np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in angles]
    losses = [mean_truncation_loss(model.module, tensors, turn) for turn in turns]
    for start in (turns[0], turns[100], turns[200]):
        polished = polish_rotation(model.module, tensors, start, n_sweeps=8)
        lost = mean_truncation_loss(model.module, tensors, polished) - min(losses)
        # The loss is a cosine of the angle to second order only.
        assert lost < 0.1 * (max(losses) - min(losses))


def test_polishing_puts_factors_in_the_wrong_order_right():
    """Where the gradient is zero: a rotation that is a maximum of the loss is a quarter of a turn from the minimum."""
    model = build("nb", n_latent=2)
    tensors = all_cells(model)
    best = refine_rotation(model.module, tensors, np.eye(2), n_steps=200)
    best = polish_rotation(model.module, tensors, best, n_sweeps=8)
    again = polish_rotation(model.module, tensors, best[:, ::-1], n_sweeps=8)
    assert mean_truncation_loss(model.module, tensors, again) == pytest.approx(
        mean_truncation_loss(model.module, tensors, best), rel=1e-3
    )
    assert abs(best[:, 0] @ again[:, 0]) > 0.95


def test_each_cell_keeps_its_first_latents_and_each_number_is_as_likely():
    kept = kept_latents(40_000, 4, generator=torch.Generator().manual_seed(0))
    number = kept.sum(dim=1)
    assert torch.equal(kept, torch.arange(4) < number[:, None])
    np.testing.assert_allclose(np.bincount(number, minlength=5)[1:] / len(kept), 0.25, atol=0.01)
    assert kept_latents(5, 1).all()


def training_pass(module, tensors, seed=5):
    torch.manual_seed(seed)
    return module(tensors, loss_kwargs={"kl_weight": 0.7})


@pytest.mark.parametrize("use_observed_lib_size", [True, False])
def test_the_loss_in_training_is_that_of_each_cell_with_its_own_latents(use_observed_lib_size):
    options = {"use_batch_norm": "encoder", "bias": True, "use_observed_lib_size": use_observed_lib_size}
    model = untrained(counts(n_batches=3), **options)
    module, tensors = model.module, all_cells(model)
    module.train()
    with module.truncating():
        inference, generative, loss = training_pass(module, tensors)
    kept, x = inference["kept_latents"], tensors["X"]
    number = kept.sum(dim=1)
    assert set(number.tolist()) == {1, 2, 3, 4}
    weight = torch.as_tensor(module.get_loadings())
    full = module.decoder.factor_regressor.fc_layers[0][0]
    total, per_cell_kl = 0.0, []
    for n in range(len(x)):
        j = int(number[n])
        batch = torch.nn.functional.one_hot(tensors["batch"][n, 0], 3).float()
        logits = weight[:, :j] @ inference["z"][n, :j] + full.weight[:, 4:] @ batch + full.bias
        rate = inference["library"][n].exp() * torch.softmax(logits, dim=-1)
        fit = NegativeBinomial(mu=rate, theta=module.px_r.exp()).log_prob(x[n]).sum()
        q = Normal(inference["qz"].loc[n, :j], inference["qz"].scale[n, :j])
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum()
        per_cell_kl.append(kl.detach())
        total = total - fit + 0.7 * kl
        if not use_observed_lib_size:
            total = (
                total
                + kl_divergence(
                    Normal(inference["ql"].loc[n], inference["ql"].scale[n]),
                    Normal(generative["pl"].loc[n], generative["pl"].scale[n]),
                ).squeeze()
            )
    torch.testing.assert_close(loss.loss, total / len(x), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(loss.kl_local["kl_divergence_z"].detach(), per_cell_kl, rtol=1e-5)


def test_latents_that_no_cell_keeps_get_no_gradient(monkeypatch):
    model = untrained(counts(), use_batch_norm="encoder", bias=True)
    module, tensors = model.module, all_cells(model)
    module.train()

    def two(n_cells, n_latent, **_options):
        return (torch.arange(n_latent) < 2).expand(n_cells, -1)

    monkeypatch.setattr("ldvae_ext.module._truncation.kept_latents", two)
    with module.truncating():
        training_pass(module, tensors)[2].loss.backward()
    for values in (
        module.z_encoder.mean_encoder.weight.grad,
        module.z_encoder.var_encoder.weight.grad,
        module.decoder.factor_regressor.fc_layers[0][0].weight.grad[:, :4].T,
    ):
        assert values[:2].abs().min(dim=1).values.max() > 0
        assert (values[2:] == 0).all()


def test_evaluation_is_never_truncated():
    model = untrained(counts(n_batches=3), use_batch_norm="encoder", bias=True)
    module, tensors = model.module, all_cells(model)
    module.eval()
    expected = training_pass(module, tensors)
    with module.truncating():
        got = training_pass(module, tensors)
    assert "kept_latents" not in got[0]
    assert torch.equal(got[2].loss, expected[2].loss)
    assert torch.equal(got[0]["z"], expected[0]["z"])


def test_nothing_is_truncated_afterwards_also_after_an_error():
    model = untrained(counts(n_batches=3), use_batch_norm="encoder", bias=True)
    module, tensors = model.module, all_cells(model)
    names = set(module.state_dict())
    module.train()
    expected = training_pass(module, tensors)

    def fail():
        with module.truncating():
            assert not torch.equal(training_pass(module, tensors)[2].loss, expected[2].loss)
            msg = "on the way"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert torch.equal(training_pass(module, tensors)[2].loss, expected[2].loss)
    assert set(module.state_dict()) == names


def test_without_truncation_the_forward_pass_is_that_of_scvi_tools():
    """To the bit, and with as many random numbers."""
    model = untrained(counts(n_batches=3))
    stock = scvi.model.LinearSCVI
    adata = counts(n_batches=3)
    stock.setup_anndata(adata, batch_key="batch")
    reference = stock(adata, n_latent=4)
    reference.module.load_state_dict(model.module.state_dict())
    tensors = all_cells(model)
    results = []
    for module in (model.module, reference.module):
        module.train()
        loss = training_pass(module, {name: value.clone() for name, value in tensors.items()})[2].loss
        results.append((loss.detach(), torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_loss_keeps_the_signature_that_training_plans_read():
    model = untrained(counts())
    assert "kl_weight" in inspect.signature(model.module.loss).parameters
