"""Covariates, size factors and every dispersion against scvi-tools' network."""

from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pytest
import torch
from scipy.special import softmax

from ldvae_ext import get
from ldvae_ext.model import LDVAE
from tests.helpers import counts, untrained
from tests.reference import (
    CATEGORICAL,
    CONTINUOUS,
    brute_force,
    covariate_counts,
    covariates_of,
    network64,
    setup_arguments,
)

OPTIONS = {
    "n_batches": (1, 3),
    "covariates": ("none", "categorical", "continuous", "both"),
    "gene_likelihood": ("nb", "zinb", "poisson", "normal"),
    "latent_distribution": ("normal", "ln"),
    "dispersion": ("gene", "gene-batch", "gene-label", "gene-cell"),
    "size_factor": (False, True),
    "batch_representation": ("one-hot", "embedding"),
    "use_batch_norm": ("both", "encoder", "decoder", "none"),
    "encode_covariates": (False, True),
    "use_observed_lib_size": (False, True),
}
# A seed with which all pairs of values occur; a test below checks it.
RNG = np.random.default_rng(1)
CASES = [{name: values[RNG.integers(len(values))] for name, values in OPTIONS.items()} for _ in range(72)]


def case_id(case):
    return "-".join(str(value) for value in case.values())


def build(case, adata, **kwargs):
    options = {name: value for name, value in case.items() if name not in ("n_batches", "covariates", "size_factor")}
    setup = setup_arguments(case["covariates"], size_factor=case["size_factor"], labels=True)
    return untrained(adata, setup=setup, **options, **kwargs)


def parts_of(decoder, z, obs, covariates, library):
    """Everything that the decoder says of cells, in the network's terms."""
    batch, design = obs["batch"], covariates_of(obs, covariates)
    out = {"scale": decoder.scale(z, batch, design), "rate": decoder.rate(z, batch, design, library=library)}
    if decoder.likelihood != "poisson":
        theta = decoder.theta(batch, len(z), label=obs["type"], z_nk=z, covariates=design)
        out["theta"] = np.broadcast_to(theta, out["rate"].shape)
    if decoder.likelihood == "zinb":
        out["dropout"] = decoder.dropout_logits(z, batch, design)
    return out


def latents(model, n, bound, seed=0):
    rng = np.random.default_rng(seed)
    if model.module.latent_distribution == "ln":
        return rng.dirichlet(np.ones(model.n_latent), n)
    return rng.uniform(-bound, bound, (n, model.n_latent))


def test_the_cases_cover_every_pair_of_options():
    for a, b in itertools.combinations(OPTIONS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(OPTIONS[a], OPTIONS[b])), (a, b)


@pytest.mark.grid
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_decoder_is_the_network(case):
    adata = covariate_counts(n_batches=case["n_batches"])
    model = build(case, adata)
    decoder, obs, module = model.get_decoder(), adata.obs, model.module
    library = obs["size"].to_numpy()

    z = latents(model, adata.n_obs, 5.0).astype(np.float32)
    (tensors,) = model._make_data_loader(adata, batch_size=100)
    with torch.no_grad():
        given = module._get_generative_input(
            tensors, {"z": torch.as_tensor(z), "library": torch.as_tensor(np.log(library)).float().reshape(-1, 1)}
        )
        px = module.generative(**given)["px"]
    scale = px.normal_mu if case["gene_likelihood"] == "normal" else px.scale
    got = parts_of(decoder, z, obs, case["covariates"], library)
    # A softplus has no bound of 1, so that float32's error there is relative.
    np.testing.assert_allclose(got["scale"], scale, atol=1e-6, rtol=1e-5 if case["size_factor"] else 0)

    for bound in (5.0, 50.0):
        z = latents(model, adata.n_obs, bound)
        expected = network64(model, z, obs, case["covariates"], library).parts
        got = parts_of(decoder, z, obs, case["covariates"], library)
        assert got.keys() == {name for name, value in expected.items() if value is not None} - {"logits"}
        for name, value in got.items():
            want = np.broadcast_to(expected[name].numpy(), value.shape)
            np.testing.assert_allclose(value, want, rtol=1e-10, atol=1e-12, err_msg=name)
        assert np.ptp(got["scale"]) > 0


def test_the_references_agree_with_each_other():
    """`network64` is the module's own pass, so that both paths of the test above say the same."""
    case = {**CASES[0], "n_batches": 3, "covariates": "both", "gene_likelihood": "zinb", "dispersion": "gene-cell"}
    adata = covariate_counts(n_batches=3)
    model = build(case, adata)
    (tensors,) = model._make_data_loader(adata, batch_size=100)
    z = latents(model, 60, 2.0)
    with torch.no_grad():
        inference = {"z": torch.as_tensor(z).float(), "library": torch.zeros(60, 1)}
        px = model.module.generative(**model.module._get_generative_input(tensors, inference))["px"]
    size = adata.obs["size"].to_numpy() if case["size_factor"] else 1.0
    expected = network64(model, z, adata.obs, "both", size)
    for name in ("mu", "theta", "zi_logits"):
        np.testing.assert_allclose(getattr(px, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("case", CASES[::3], ids=case_id)
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablation_equals_brute_force(case, mode):
    adata = covariate_counts(n_batches=case["n_batches"])
    model = build(case, adata)
    mean, _ = model.get_latent_representation(return_dist=True)
    expected = brute_force(model, adata, case["covariates"], mean.mean(0) if mode == "mean" else np.zeros(4))
    got = model.ablate(mode=mode, batch_size=23)
    assert np.abs(expected).max() > 1e-3
    assert np.abs(got.X - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_ablated_cases_cover_every_value():
    for name, values in OPTIONS.items():
        assert {case[name] for case in CASES[::3]} == set(values), name
    with_factors = {(case["gene_likelihood"], case["size_factor"]) for case in CASES[::3]}
    assert len(with_factors) == 8


@pytest.mark.parametrize("case", CASES[:12], ids=case_id)
def test_decoded_posterior_means_use_the_cells_own_covariates(case):
    adata = covariate_counts(n_batches=case["n_batches"])
    model = build(case, adata)
    mean, _ = model.get_latent_representation(return_dist=True)
    z = softmax(mean, axis=1) if case["latent_distribution"] == "ln" else mean
    expected = network64(model, z, adata.obs, case["covariates"], 1.0).parts["scale"].numpy()
    decoded = model.get_normalized_expression(use_posterior_mean=True)
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-6)
    shuffled = adata[::-1].copy()
    del shuffled.uns
    np.testing.assert_allclose(
        model.get_normalized_expression(shuffled, use_posterior_mean=True), expected[::-1], rtol=1e-5, atol=1e-6
    )
    if case["size_factor"]:
        scaled = model.get_normalized_expression(use_posterior_mean=True, library_size="latent")
        np.testing.assert_allclose(scaled, decoded * adata.obs[["size"]].to_numpy(), rtol=1e-5)


@pytest.mark.grid(1)
@pytest.mark.parametrize("case", CASES[:12:2], ids=case_id)
@pytest.mark.parametrize("form", [None, "h5ad", "zarr"])
def test_exported_decoders_decode_exported_latents(case, form, tmp_path):
    adata, back = covariate_counts(n_batches=case["n_batches"]), covariate_counts(n_batches=case["n_batches"])
    model = build(case, adata)
    model.export_to_anndata(back)
    if form == "h5ad":
        back.write_h5ad(tmp_path / "out.h5ad")
        back = ad.read_h5ad(tmp_path / "out.h5ad")
    if form == "zarr":
        back.write_zarr(tmp_path / "out.zarr")
        back = ad.read_zarr(tmp_path / "out.zarr")
    exported, z = get.decoder(back), back.obsm["X_ldvae"].astype(float)
    if case["latent_distribution"] == "ln":
        z /= z.sum(axis=1, keepdims=True)  # a point of the simplex to more digits than float32 has
    got = parts_of(exported, z, back.obs, case["covariates"], 2.0)
    unturned = np.empty(z.shape)
    unturned[:, back.uns["ldvae"]["order"]] = z * back.uns["ldvae"]["signs"]
    expected = network64(model, unturned, adata.obs, case["covariates"], 2.0).parts
    assert len(got) >= 2
    for name, value in got.items():
        np.testing.assert_allclose(
            value, np.broadcast_to(expected[name], value.shape), rtol=1e-9, atol=1e-12, err_msg=name
        )


class TestUnseenCells:
    @pytest.mark.parametrize("size_factor", [False, True])
    def test_levels_keep_their_codes_whichever_of_them_are_there(self, size_factor):
        adata = covariate_counts(n_cells=90, n_batches=3)
        setup = setup_arguments("both", size_factor=size_factor, labels=True)
        model = untrained(adata, setup=setup, dispersion="gene-label", encode_covariates=True)
        keep = ((adata.obs["lane"] != "L 3") & (adata.obs["batch"] == "b2") & (adata.obs["type"] == "B")).to_numpy()
        assert keep.sum() > 3
        unseen = covariate_counts(n_cells=90, n_batches=3)[keep].copy()[:, ::-1].copy()
        unseen.obs_names = [f"new{i}" for i in range(keep.sum())]
        for name in ("lane", "batch", "type"):
            unseen.obs[name] = unseen.obs[name].astype(str)
        before = unseen.obs.copy()
        np.testing.assert_allclose(model.ablate(unseen).X, model.ablate().X[keep], rtol=1e-4, atol=1e-4)
        whole = model.get_normalized_expression(use_posterior_mean=True, return_numpy=True)
        got = model.get_normalized_expression(unseen, use_posterior_mean=True, return_numpy=True)
        np.testing.assert_allclose(got, whole[keep], rtol=1e-4, atol=1e-6)
        assert unseen.obs.equals(before)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"lane": "L/9"}, ValueError, "the model has not seen 'L/9'.*it knows 'L 3', 'L/1', 'L/2'"),
            (
                {"age": np.nan},
                ValueError,
                r"`continuous_covariate_keys`: `adata.obs\['age'\]` must hold finite numbers",
            ),
            ({"size": 0.0}, ValueError, r"`size_factor_key`: `adata.obs\['size'\]` must hold positive numbers"),
            ({"lane": None}, KeyError, "`categorical_covariate_keys`: 'lane' is not a column"),
            ({"dose": None}, KeyError, "`continuous_covariate_keys`: 'dose' is not a column"),
        ],
    )
    def test_what_they_lack_is_named(self, change, error, message):
        model = untrained(covariate_counts(), setup=setup_arguments("both", size_factor=True))
        unseen = covariate_counts(n_cells=9, seed=4)
        for name, value in change.items():
            if value is None:
                del unseen.obs[name]
            else:
                unseen.obs[name] = value
        with pytest.raises(error, match=message):
            model.ablate(unseen)


def test_decode_takes_names_codes_scalars_and_frames():
    adata = covariate_counts(n_batches=3)
    model = untrained(adata, setup=setup_arguments("both"))
    z = latents(model, 60, 2.0)
    frame = adata.obs[[*CATEGORICAL, *CONTINUOUS]]
    expected = model.decode(z, batch=adata.obs["batch"], covariates=frame, return_numpy=True)
    by_name = {name: frame[name].to_numpy() for name in frame}
    codes = {**by_name, "lane": frame["lane"].astype("category").cat.codes.to_numpy(), "site": 0}
    for given in (by_name, codes, frame[frame.columns[::-1]]):
        np.testing.assert_array_equal(model.decode(z, batch=adata.obs["batch"], covariates=given), expected)
    fixed = {"lane": "L/2", "site": "here/there", "age": 0.5, "dose": 2}
    constant = adata.obs.assign(**fixed)[list(fixed)]
    np.testing.assert_array_equal(
        model.decode(z, batch="b1", covariates=fixed), model.decode(z, batch="b1", covariates=constant)
    )
    with pytest.raises(ValueError, match="`covariates` must hold 'age', 'dose', 'lane', 'site': missing 'age', 'dose'"):
        model.decode(z, batch="b1")
    with pytest.raises(ValueError, match="`covariates` must hold nothing: missing none, unknown 'age'"):
        untrained(counts()).decode(np.zeros((1, 4)), covariates={"age": 1})


def test_a_model_with_everything_comes_back_from_its_directory(tmp_path):
    adata = covariate_counts(n_batches=3)
    model = untrained(
        adata,
        setup=setup_arguments("both", size_factor=True, labels=True),
        dispersion="gene-label",
        batch_representation="embedding",
        batch_embedding_kwargs={"embedding_dim": 2},
        use_layer_norm="encoder",
        encode_covariates=True,
        bias="auto",
        use_batch_norm="none",
    )
    expected = model.get_normalized_expression(use_posterior_mean=True, library_size="latent")
    model.save(tmp_path / "m", save_anndata=True)
    back = LDVAE.load(tmp_path / "m")
    np.testing.assert_array_equal(
        back.get_normalized_expression(use_posterior_mean=True, library_size="latent"), expected
    )
    np.testing.assert_array_equal(back.ablate().X, model.ablate().X)
    bare = LDVAE.load(tmp_path / "m", adata=False)
    assert repr(bare.get_decoder()) == repr(model.get_decoder())
    np.testing.assert_array_equal(bare.ablate(covariate_counts(n_batches=3)).X, model.ablate().X)
