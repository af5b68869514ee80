"""The decoder in hand against scvi-tools' network."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from ldvae_ext.core import LinearDecoder
from ldvae_ext.model import LDVAE
from tests.helpers import GRID, TRAIN, counts, grid_id, network, untrained


def latents(model, n, bound=5.0, seed=0):
    rng = np.random.default_rng(seed)
    if model.module.latent_distribution == "ln":
        return rng.dirichlet(np.ones(model.n_latent), n)
    return rng.uniform(-bound, bound, (n, model.n_latent))


def generative(model, z, batch):
    """``px`` of the module's own generative pass, in float32."""
    with torch.no_grad():
        z = torch.as_tensor(z, dtype=torch.float32)
        return model.module.generative(z, torch.zeros((len(z), 1)), torch.as_tensor(batch).reshape(-1, 1))["px"]


@pytest.mark.grid
@pytest.mark.parametrize("case", GRID, ids=grid_id)
def test_the_decoder_is_the_network(case):
    kwargs = dict(case)
    n_batches = kwargs.pop("n_batches")
    model = untrained(counts(n_batches=n_batches), **kwargs)
    decoder = model.get_decoder()
    batch = np.arange(30) % n_batches
    names = decoder.batches[batch]
    z = latents(model, 30)
    px = generative(model, z, batch)
    np.testing.assert_allclose(decoder.scale(z.astype(np.float32), names), px.scale, atol=1e-6)
    np.testing.assert_array_equal(decoder.scale(z, names), decoder.scale(z, batch))
    for far in (latents(model, 30), latents(model, 30, bound=50.0)):
        px = network(model, far, batch, 3.0)
        np.testing.assert_allclose(decoder.scale(far, batch), px.scale, atol=1e-12)
        rate = px.rate if case["gene_likelihood"] == "poisson" else px.mu
        np.testing.assert_allclose(decoder.rate(far, batch, library=3.0), rate, atol=1e-11)
        if case["gene_likelihood"] != "poisson":
            np.testing.assert_allclose(np.broadcast_to(decoder.theta(batch, 30), px.theta.shape), px.theta, rtol=1e-12)
        if case["gene_likelihood"] == "zinb":
            np.testing.assert_allclose(decoder.dropout_logits(far, batch), px.zi_logits, rtol=1e-10, atol=1e-10)


def test_the_trained_decoder_is_the_network(pbmc_trained):
    z = pbmc_trained.get_latent_representation()
    assert np.abs(z).max() <= 5
    px = generative(pbmc_trained, z, np.zeros(len(z), dtype=int))
    decoder = pbmc_trained.get_decoder()
    np.testing.assert_allclose(decoder.scale(z), px.scale, atol=1e-6)
    px = network(pbmc_trained, z, np.zeros(len(z), dtype=int), 1.0)
    np.testing.assert_allclose(decoder.scale(z), px.scale, atol=1e-12)


def test_folded_weights_are_the_loadings_and_raw_parts_are_the_layers(pbmc_trained):
    decoder = pbmc_trained.get_decoder()
    np.testing.assert_allclose(decoder.weight_gk, pbmc_trained.get_loadings(), atol=1e-6)
    assert decoder.factors.tolist() == pbmc_trained.get_loadings().columns.tolist()
    linear, batch_norm = pbmc_trained.module.decoder.factor_regressor.fc_layers[0][:2]
    np.testing.assert_array_equal(decoder.raw.weight, linear.weight.detach())
    np.testing.assert_array_equal(decoder.raw.batch_norm.running_var, batch_norm.running_var)
    assert decoder.raw.bias is None
    assert decoder.raw.batch_norm.eps == 1e-3


def test_decoders_of_models_come_back_from_npz(tmp_path, pbmc_trained):
    decoder = pbmc_trained.get_decoder()
    decoder.save(tmp_path / "d.npz")
    z = latents(pbmc_trained, 5)
    np.testing.assert_array_equal(LinearDecoder.load(tmp_path / "d.npz").scale(z), decoder.scale(z))


@pytest.fixture(scope="module")
def model():
    return untrained(counts(n_batches=3))


class TestDecode:
    def test_array_and_frame_give_the_same_in_any_column_order(self, model):
        z = latents(model, 4)
        frame = pd.DataFrame(z, columns=model.latent_names, index=list("abcd"))[["Z_2", "Z_0", "Z_3", "Z_1"]]
        out = model.decode(frame, batch="b1")
        assert out.index.tolist() == list("abcd")
        assert out.columns.tolist() == model.adata.var_names.tolist()
        np.testing.assert_array_equal(out, model.decode(z, batch=1, return_numpy=True))
        np.testing.assert_array_equal(out, model.get_decoder().scale(z, 1))

    def test_library_and_genes(self, model):
        z = latents(model, 4)
        out = model.decode(z, batch=[0, 1, 2, 0], library_size=np.arange(1, 5), gene_list=["gene7", "gene2"])
        assert out.columns.tolist() == ["gene2", "gene7"]
        np.testing.assert_allclose(
            out, (model.get_decoder().scale(z, [0, 1, 2, 0]) * np.arange(1, 5)[:, None])[:, [2, 7]]
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"z": np.zeros((2, 3)), "batch": 0}, r"`z` must have shape \(cells, 4\); got \(2, 3\)"),
            ({"z": np.zeros((2, 4))}, "`batch` is needed"),
            ({"z": np.zeros((2, 4)), "batch": "unseen"}, "'unseen' is no batch"),
            (
                {"z": pd.DataFrame(np.zeros((2, 3)), columns=["Z_0", "Z_1", "Z_9"]), "batch": 0},
                "missing or unknown: 'Z_2', 'Z_3', 'Z_9'",
            ),
            ({"z": np.zeros((2, 4)), "batch": 0, "gene_list": ["nope"]}, "`gene_list`: 'nope' not among the 20 genes"),
        ],
    )
    def test_bad_input_is_named(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            model.decode(**arguments)


class TestPosteriorMean:
    @pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
    @pytest.mark.parametrize("use_observed_lib_size", [True, False])
    def test_is_the_decoded_posterior_mean(self, latent_distribution, use_observed_lib_size):
        adata = counts(n_batches=3)
        model = untrained(adata, latent_distribution=latent_distribution, use_observed_lib_size=use_observed_lib_size)
        mean, _ = model.get_latent_representation(return_dist=True)
        z = softmax(mean, axis=1) if latent_distribution == "ln" else mean
        batch = adata.obs["batch"].cat.codes.to_numpy().astype(int)
        got = model.get_normalized_expression(use_posterior_mean=True)
        # Latents of this untrained network go up to 30, where float32 is known to 2e-6.
        np.testing.assert_allclose(got, generative(model, z, batch).scale, atol=2e-6)
        assert got.index.equals(adata.obs_names)
        assert got.columns.equals(adata.var_names)
        with torch.no_grad():
            out = model.module.inference(torch.as_tensor(adata.X.toarray()), torch.as_tensor(batch).reshape(-1, 1))
        library = adata.X.sum(1) if use_observed_lib_size else np.exp(out["ql"].loc.numpy())
        latent = model.get_normalized_expression(use_posterior_mean=True, library_size="latent")
        np.testing.assert_allclose(latent, np.asarray(library) * got.to_numpy(), rtol=1e-4)

    def test_repeats_to_the_bit_and_leaves_the_random_state_alone(self, pbmc_trained):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = pbmc_trained.get_normalized_expression(use_posterior_mean=True)
        assert torch.equal(torch.get_rng_state(), state)
        pd.testing.assert_frame_equal(first, pbmc_trained.get_normalized_expression(use_posterior_mean=True))
        assert not first.equals(pbmc_trained.get_normalized_expression()), "scvi's default is a draw"

    def test_leaves_the_modes_of_the_layers_alone(self):
        model = untrained(counts())
        expected = model.get_normalized_expression(use_posterior_mean=True)
        model.module.train()
        model.module.decoder.eval()
        pd.testing.assert_frame_equal(model.get_normalized_expression(use_posterior_mean=True), expected)
        assert model.module.training
        assert model.module.z_encoder.training
        assert not model.module.decoder.training

    def test_takes_the_arguments_of_scvi(self):
        adata = counts(n_batches=3)
        model = untrained(adata)
        whole = model.get_normalized_expression(use_posterior_mean=True)
        some = model.get_normalized_expression(
            indices=[7, 3], gene_list=["gene4", "gene1"], library_size=1e4, batch_size=1, use_posterior_mean=True
        )
        assert some.columns.tolist() == ["gene1", "gene4"]
        np.testing.assert_allclose(some, whole.iloc[[7, 3], [1, 4]] * 1e4, rtol=1e-5)
        mask = np.arange(60) == 5
        np.testing.assert_allclose(
            model.get_normalized_expression(indices=mask, use_posterior_mean=True), whole.iloc[[5]], rtol=1e-5
        )
        per_batch = [model.get_normalized_expression(transform_batch=b, use_posterior_mean=True) for b in ("b1", "b2")]
        both = model.get_normalized_expression(transform_batch=["b1", "b2"], use_posterior_mean=True, return_numpy=True)
        np.testing.assert_allclose(both, (per_batch[0] + per_batch[1]) / 2, atol=1e-7)
        loader = model._make_data_loader(adata, batch_size=7)
        np.testing.assert_allclose(
            model.get_normalized_expression(dataloader=loader, use_posterior_mean=True), whole, atol=1e-6
        )

    def test_batches_named_by_integers_are_not_taken_for_codes(self):
        adata = counts(n_batches=3)
        adata.obs["batch"] = adata.obs["batch"].cat.codes.to_numpy().astype(int) + 1
        named = untrained(adata)
        strings = adata.copy()
        strings.obs["batch"] = strings.obs["batch"].astype(str)
        expected = untrained(strings).get_normalized_expression(use_posterior_mean=True, transform_batch="2")
        pd.testing.assert_frame_equal(
            named.get_normalized_expression(use_posterior_mean=True, transform_batch=2), expected
        )
        z = named.get_latent_representation()
        np.testing.assert_allclose(named.decode(z, batch="2"), expected, atol=1e-6)
        np.testing.assert_allclose(
            named.decode(z, batch=adata.obs["batch"].astype("category")),
            named.get_normalized_expression(use_posterior_mean=True),
            atol=1e-6,
        )
        assert named.ablate().X.shape == (60, 4)

    def test_is_what_many_samples_converge_to_up_to_the_curvature_of_softmax(self, pbmc_trained):
        sampled = pbmc_trained.get_normalized_expression(indices=range(20), n_samples=300)
        mean = pbmc_trained.get_normalized_expression(indices=range(20), use_posterior_mean=True)
        assert np.corrcoef(sampled.to_numpy().ravel(), mean.to_numpy().ravel())[0, 1] > 0.99

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n_samples": 2}, "`n_samples` belongs to sampling"),
            ({"n_samples_overall": 5}, "`n_samples_overall` belongs to sampling"),
            ({"weights": "uniform"}, "`weights` belongs to sampling"),
            ({"n_mc_samples": 5}, "`n_mc_samples` belongs to sampling"),
            ({"transform_batch": "unseen"}, "`transform_batch`: 'unseen' is no batch of this model"),
            ({"gene_list": ["nope"]}, "'nope' not among"),
            ({"library_size": np.ones(700)}, "`library_size` must be a number or 'latent'"),
            ({"transform_batch": []}, "`transform_batch` must name at least one batch"),
            ({"library_size": "observed"}, "`library_size` must be a number or 'latent'; got 'observed'"),
        ],
    )
    def test_bad_input_is_named(self, pbmc_trained, arguments, message):
        with pytest.raises(ValueError, match=message):
            pbmc_trained.get_normalized_expression(use_posterior_mean=True, **arguments)


def test_forum_question_loadings_alone_are_no_decoder():
    """The script of https://discourse.scverse.org/t/ablating-latent-variables-in-linearscvi/3476, and its answer."""
    rng = np.random.default_rng(0)
    adata = counts(n_cells=300, n_genes=50, n_batches=3)
    adata.X = rng.negative_binomial(5, 0.3, (300, 50)).astype(np.float32)
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(adata, n_latent=10)
    model.train(20, kl_warmup="auto", **TRAIN)
    z, loadings = model.get_latent_representation(), model.get_loadings()
    asked = softmax(z @ loadings.to_numpy().T, axis=1)
    expression = model.get_normalized_expression().to_numpy()
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(asked, expression, strict=True)]
    assert max(correlation) < 0.99, "what the question found"
    decoded = model.get_decoder().scale(z, adata.obs["batch"])
    same_z = generative(model, z, adata.obs["batch"].cat.codes.to_numpy().astype(int)).scale.numpy()
    assert np.abs(decoded - same_z).max() < 1e-6
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(decoded, same_z, strict=True)) > 1 - 1e-6
    np.testing.assert_allclose(decoded, model.get_normalized_expression(use_posterior_mean=True), atol=1e-6)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_expression_does_not_depend_on_the_threads_of_torch(n_threads):
    model = untrained(counts(n_batches=3))
    expected = model.get_normalized_expression(use_posterior_mean=True, return_numpy=True)
    effects = model.ablate().X
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        got = model.get_normalized_expression(use_posterior_mean=True, return_numpy=True)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        np.testing.assert_allclose(model.ablate().X, effects, rtol=0, atol=1e-6 * np.abs(effects).max())
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
