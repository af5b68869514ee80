"""A model seen through rotated axes: what changes, and all that must not."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ortho_group
from scvi.model import LinearSCVI

from ldvae_ext import get
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.rotation import promax, varimax
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts, untrained
from tests.query import FAST, map_query
from tests.query import cells as query_cells
from tests.query import trained as trained_reference
from tests.reference import covariate_counts, setup_arguments
from tests.rotated import as_stock, fresh, full_kl, grouped, grouped_model, seeded, warnings_of

METHODS = ("varimax", "promax", "fisher-varimax", "score-varimax", "ica", "deviance")
OBLIQUE = ("promax", "ica")


@pytest.fixture
def model():
    """The trained model on its own axes; tests may rotate it, and nothing else."""
    trained = grouped_model()
    trained.rotate("none")
    yield trained
    trained.rotate("none")


def said_by_scvi_tools(model):
    """What the methods that scvi-tools has return, with the same draws."""
    mean, variance = model.get_latent_representation(return_dist=True)
    is_first = np.arange(model.adata.n_obs) < 40
    difference = seeded(model.differential_expression, idx1=is_first, idx2=~is_first, silent=True, mode="change")
    return {
        "loadings": model.get_loadings(),
        "latent": model.get_latent_representation(),
        "sampled latent": seeded(model.get_latent_representation, give_mean=False),
        "mean": mean,
        "variance": variance,
        "library": model.get_latent_library_size(),
        "expression": model.get_normalized_expression(use_posterior_mean=True),
        "sampled expression": seeded(model.get_normalized_expression, n_samples=2),
        "elbo": np.array(float(seeded(model.get_elbo))),
        "error": np.array(float(seeded(model.get_reconstruction_error)["reconstruction_loss"])),
        "marginal": np.array(float(seeded(model.get_marginal_ll, n_mc_samples=3))),
        "parameters": seeded(model.get_likelihood_parameters)["mean"],
        "difference": difference.select_dtypes("number"),
        "kl": model.get_latent_kl(),
        "decoder": model.get_decoder().weight_gk,
        "decoded": model.decode(mean, batch="b1"),
    }


def assert_identical(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(value), err_msg=name)
        if isinstance(value, pd.DataFrame):
            assert got[name].columns.equals(value.columns), name


class TestView:
    @pytest.mark.parametrize("method", METHODS)
    def test_what_scvi_tools_methods_return_stays_to_the_bit(self, model, method):
        before = said_by_scvi_tools(model)
        state = {name: value.clone() for name, value in model.module.state_dict().items()}
        model.rotate(method)
        assert model.rotation.method == method
        assert model.factor_names == ["F_0", "F_1", "F_2", "F_3"]
        assert model.latent_names == ["Z_0", "Z_1", "Z_2", "Z_3"]
        assert_identical(said_by_scvi_tools(model), before)
        for name, value in model.module.state_dict().items():
            assert torch.equal(value, state[name]), name
        model.rotate("none")
        assert model.rotation is None
        assert model.factor_names == model.latent_names
        assert_identical(said_by_scvi_tools(model), before)

    @pytest.mark.parametrize("method", METHODS)
    def test_random_states_and_modes_are_left_alone(self, model, method):
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        learns = [p.requires_grad for p in model.module.parameters()]
        gradients = [None if p.grad is None else p.grad.clone() for p in model.module.parameters()]
        model.rotate(method)
        first = model.rotation.matrix_kk.copy()
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert torch.is_grad_enabled()
        for parameter, gradient in zip(model.module.parameters(), gradients, strict=True):
            assert gradient is None or torch.equal(parameter.grad, gradient)
        assert [p.requires_grad for p in model.module.parameters()] == learns
        assert not model.module.training
        torch.manual_seed(99)
        model.rotate(method)
        np.testing.assert_allclose(model.rotation.matrix_kk, first, atol=1e-10)

    @pytest.mark.parametrize("method", METHODS)
    def test_decoded_expression_and_total_divergence_stay(self, model, method):
        model.rotate(method)
        rotation = model.rotation.matrix_kk
        assert model.rotation.is_orthogonal == (method not in OBLIQUE)
        np.testing.assert_allclose(np.linalg.norm(rotation, axis=0), 1, atol=1e-10)
        mean, variance = model.get_latent_representation(return_dist=True)
        expected = model.get_normalized_expression(use_posterior_mean=True).to_numpy()
        decoder = model.get_decoder(rotated=True)
        batch = model.adata.obs["batch"].astype(str)
        np.testing.assert_allclose(decoder.scale(mean @ rotation, batch), expected, atol=1e-6)
        total = kl_per_dimension(mean, variance).sum(axis=1).mean()
        np.testing.assert_allclose(full_kl(mean, variance, rotation), total, rtol=1e-4)
        np.testing.assert_allclose(model.get_latent_kl().sum(axis=1).mean(), total, rtol=1e-4)
        assert np.abs(rotation - np.eye(4)).max() > 0.05, "there is something to see"

    @pytest.mark.filterwarnings("ignore:FastICA did not converge")
    @pytest.mark.grid(1)
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("options", "setup"),
        [
            ({"gene_likelihood": "zinb", "dispersion": "gene-batch"}, {}),
            ({"gene_likelihood": "zinb", "dispersion": "gene-cell"}, {"covariates": "both"}),
            ({"gene_likelihood": "poisson"}, {"size_factor": True}),
            ({"dispersion": "gene-label"}, {"labels": True, "covariates": "continuous", "size_factor": True}),
            ({"gene_likelihood": "normal"}, {"covariates": "categorical"}),
            ({"use_batch_norm": "encoder", "bias": True}, {}),
        ],
        ids=str,
    )
    def test_every_head_is_rotated(self, options, setup, method):
        adata = covariate_counts(n_batches=2)
        model = untrained(adata, setup=setup_arguments(**setup), **options)
        model.rotate(method)
        z = model.get_latent_representation().astype(float)
        f, plain, decoder = z @ model.rotation.matrix_kk, model.get_decoder(), model.get_decoder(rotated=True)
        covariates = {c.name: adata.obs[c.name].to_numpy() for c in plain.covariates} or None
        given = {"batch": adata.obs["batch"].astype(str), "covariates": covariates}
        np.testing.assert_allclose(decoder.scale(f, **given), plain.scale(z, **given), rtol=1e-8, atol=1e-12)
        expected = model.get_normalized_expression(use_posterior_mean=True)
        np.testing.assert_allclose(decoder.scale(f, **given), expected, rtol=1e-5, atol=1e-6)
        if plain.likelihood == "zinb":
            np.testing.assert_allclose(decoder.dropout_logits(f, **given), plain.dropout_logits(z, **given), atol=1e-8)
        if plain.dispersion == "gene-cell" and plain.likelihood != "poisson":
            np.testing.assert_allclose(decoder.theta(z_nk=f, **given), plain.theta(z_nk=z, **given), rtol=1e-8)

    def test_under_ln_it_is_refused_with_the_reason(self):
        model = untrained(counts(n_batches=3), latent_distribution="ln")
        for method in METHODS:
            with pytest.raises(ValueError, match=r"cannot be rotated: z = softmax\(u\) is on the simplex"):
                model.rotate(method)
        model.rotate("none")
        assert model.rotation is None

    @pytest.mark.parametrize("method", METHODS)
    def test_a_single_latent_can_only_be_turned(self, method):
        model = untrained(counts(n_batches=3), n_latent=1)
        model.rotate(method)
        np.testing.assert_allclose(np.abs(model.rotation.matrix_kk), [[1.0]])
        assert (model.get_loadings(canonical=True)["F_0"] ** 3).sum() > 0
        plain = np.abs(model.get_loadings(rotated=True)["F_0"])
        np.testing.assert_allclose(plain, np.abs(model.get_loadings()["Z_0"]), atol=1e-6)

    def test_an_unknown_method_is_named(self, model):
        model.rotate()
        assert model.rotation.method == "varimax"
        with pytest.raises(
            ValueError, match=r"`method` must be one of 'varimax', 'promax', 'fisher-varimax', .*'none'; got 'oblimin'"
        ):
            model.rotate("oblimin")
        assert model.rotation.method == "varimax"

    def test_what_is_handed_out_is_no_handle_on_the_view(self, model):
        model.rotate()
        before = model.rotation.matrix_kk.copy()
        adata = fresh(model)
        model.export_to_anndata(adata)
        adata.uns["ldvae"]["rotation"]["matrix"][:] = 0
        np.testing.assert_array_equal(model.rotation.matrix_kk, before)


class TestAxes:
    def test_varimax_is_that_of_the_centred_folded_loadings(self, model):
        model.rotate()
        plain = model.get_decoder().weight_gk
        expected = (plain - plain.mean(axis=0)) @ varimax(plain - plain.mean(axis=0))
        got = model.get_loadings(canonical=True).to_numpy()
        best = np.abs(np.corrcoef(got.T, expected.T)[:4, 4:])
        np.testing.assert_allclose(np.sort(best, axis=1)[:, -1], 1, atol=1e-6)
        assert sorted(best.argmax(axis=1)) == [0, 1, 2, 3]

    def test_fisher_varimax_weighs_genes_by_the_information_of_their_counts(self, model):
        model.rotate("fisher-varimax")
        decoder, mean = model.get_decoder(), model.get_latent_representation().astype(float)
        batch = model.adata.obs["batch"].astype(str)
        rate = decoder.rate(mean, batch, library=np.asarray(model.adata.X.sum(axis=1)).ravel())
        library = model.get_latent_library_size(give_mean=False).ravel()
        rate *= (library / np.asarray(model.adata.X.sum(axis=1)).ravel())[:, None]
        weight = (rate / (1 + rate / decoder.theta(batch, len(rate)))).sum(axis=0)
        loading = decoder.weight_gk - weight @ decoder.weight_gk / weight.sum()
        expected = varimax(np.sqrt(weight)[:, None] * loading)
        overlap = np.abs(expected.T @ model.rotation.matrix_kk)
        np.testing.assert_allclose(np.sort(overlap, axis=0)[-1], 1, atol=1e-4)

    def test_promax_and_ica_are_those_of_centred_loadings_and_means(self, model):
        model.rotate("promax")
        loading = model.get_decoder().centered().weight_gk
        overlap = np.abs(promax(loading, varimax(loading)).T @ model.rotation.matrix_kk)
        assert (np.isclose(overlap, 1, atol=1e-6).sum(axis=0) == 1).all()
        model.rotate("ica")
        f = model.get_latent_representation().astype(float) @ model.rotation.matrix_kk
        np.testing.assert_allclose(np.corrcoef(f.T), np.eye(4), atol=1e-4)

    def test_score_varimax_is_that_of_the_centred_means(self, model):
        model.rotate("score-varimax")
        scores = model.get_latent_representation().astype(float)
        scores = scores - scores.mean(axis=0)
        best = np.abs(model.rotation.matrix_kk.T @ varimax(scores))
        np.testing.assert_allclose(np.sort(best, axis=1)[:, -1], 1, atol=1e-6)
        inside = np.arange(model.adata.n_obs) < 50
        model.rotate("score-varimax", indices=inside)
        scores = scores[inside] - scores[inside].mean(axis=0)
        best = np.abs(model.rotation.matrix_kk.T @ varimax(scores))
        np.testing.assert_allclose(np.sort(best, axis=1)[:, -1], 1, atol=1e-6)

    @pytest.mark.parametrize("method", METHODS[:2])
    @pytest.mark.parametrize("cells", ["all", "some", "unseen"])
    def test_factors_are_numbered_by_the_divergence_of_the_given_cells(self, model, method, cells):
        adata = grouped(30, seed=5) if cells == "unseen" else None
        indices = [4, 9, 60, 2] if cells == "some" else None
        model.rotate(method, adata, indices)
        mean, variance = model.get_latent_representation(adata, indices=indices, return_dist=True)
        rotation = model.rotation.matrix_kk
        kl = kl_per_dimension(mean.astype(float) @ rotation, variance.astype(float) @ rotation**2).mean(axis=0)
        assert (np.diff(kl) <= 1e-9).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_factors_point_to_their_longer_tail(self, model, method):
        model.rotate(method)
        assert ((model.get_loadings(canonical=True) ** 3).sum() > 0).all()
        np.testing.assert_array_equal(model.get_decoder(rotated=True).signs(), 1)

    def test_the_axes_that_the_network_ended_on_do_not_matter(self):
        """Two networks that are one another's rotation have the same factors."""
        adata = counts(80, n_batches=3)
        model = untrained(adata, use_batch_norm="encoder", bias=True)
        model.rotate()
        first = model.get_loadings(canonical=True)
        turned = torch.as_tensor(ortho_group.rvs(4, random_state=1), dtype=torch.float32)
        weight = model.module.decoder.factor_regressor.fc_layers[0][0].weight
        with torch.no_grad():
            weight[:, :4] = weight[:, :4] @ turned
        plain = model.get_loadings().to_numpy()
        assert np.abs(np.corrcoef(plain.T, first.T)[:4, 4:]).max() < 0.99
        model.rotate()
        second = model.get_loadings(canonical=True).to_numpy()
        cosine = np.corrcoef(second.T, first.to_numpy().T)[:4, 4:]
        np.testing.assert_allclose(cosine.max(axis=1), 1, atol=1e-5)


class TestLoadings:
    def test_are_linear_scvis_by_default_and_with_and_without_a_rotation(self, model):
        stock = pd.DataFrame(
            model.module.get_loadings(), index=model.adata.var_names, columns=["Z_0", "Z_1", "Z_2", "Z_3"]
        )
        pd.testing.assert_frame_equal(model.get_loadings(), stock, check_exact=True)
        model.rotate()
        pd.testing.assert_frame_equal(model.get_loadings(), stock, check_exact=True)
        pd.testing.assert_frame_equal(model.get_loadings(rotated=False), stock, check_exact=True)
        assert all(
            p.kind is p.KEYWORD_ONLY
            for name, p in inspect.signature(LDVAE.get_loadings).parameters.items()
            if name != "self"
        )

    def test_canonical_ones_are_centred_turned_and_in_order_by_hand(self, model):
        plain = model.get_loadings()
        expected = plain - plain.mean()
        expected = expected * np.where((expected**3).sum() < 0, -1, 1)
        kl = model.get_latent_kl().mean()
        expected = expected[kl.sort_values(ascending=False).index]
        got = model.get_loadings(canonical=True)
        pd.testing.assert_frame_equal(got, expected, atol=1e-5, check_exact=False, check_dtype=False)
        assert got.index.equals(model.get_loadings().index)
        model.rotate()
        pd.testing.assert_frame_equal(model.get_loadings(canonical=True, rotated=False), got)
        adata = fresh(model)
        model.rotate("none")
        model.export_to_anndata(adata)
        np.testing.assert_allclose(get.loadings(adata), got, atol=1e-6)
        assert get.loadings(adata).columns.tolist() == got.columns.tolist()

    @pytest.mark.parametrize("method", METHODS)
    def test_rotated_ones_are_the_folded_ones_times_the_rotation(self, model, method):
        plain = model.get_loadings().to_numpy().astype(float)
        model.rotate(method)
        # Columns of the transposed inverse are the directions along which one factor changes.
        rotation = np.linalg.inv(model.rotation.matrix_kk).T
        got = model.get_loadings(rotated=True)
        assert got.columns.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        np.testing.assert_allclose(got, plain @ rotation, atol=1e-5)
        canonical = model.get_loadings(canonical=True)
        assert canonical.columns.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        np.testing.assert_allclose(canonical, (plain - plain.mean(axis=0)) @ rotation, atol=1e-5)
        decoder = model.get_decoder(canonical=True)
        np.testing.assert_array_equal(decoder.weight_gk, canonical)
        np.testing.assert_allclose(decoder.intercept_bg.sum(axis=1), 0, atol=1e-10)

    def test_of_a_rotation_that_is_not_there_are_refused(self, model):
        for method in (model.get_loadings, model.get_decoder):
            with pytest.raises(ValueError, match=r"no rotation is in force; `rotate\(\)` puts one in force"):
                method(rotated=True)


class TestLife:
    def test_saving_and_loading_keep_the_view(self, model, tmp_path):
        model.rotate("score-varimax")
        model.save(tmp_path / "m")
        again = LDVAE.load(tmp_path / "m", model.adata, accelerator="cpu")
        assert again.rotation.method == "score-varimax"
        np.testing.assert_array_equal(again.rotation.matrix_kk, model.rotation.matrix_kk)
        pd.testing.assert_frame_equal(again.get_loadings(canonical=True), model.get_loadings(canonical=True))
        np.testing.assert_allclose(again.ablate().X, model.ablate().X, rtol=1e-6)
        assert again.ablate().var_names.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        bare = LDVAE.load(tmp_path / "m", adata=False, accelerator="cpu")
        np.testing.assert_array_equal(bare.rotation.matrix_kk, model.rotation.matrix_kk)
        pd.testing.assert_frame_equal(bare.get_loadings(canonical=True), model.get_loadings(canonical=True))
        with pytest.raises(ValueError, match="loaded without data: give `adata`"):
            bare.rotate()
        bare.rotate("varimax", fresh(model))
        assert bare.rotation.method == "varimax"

    def test_no_rotation_is_saved_as_none(self, model, tmp_path):
        model.rotate()
        model.rotate("none")
        model.save(tmp_path / "m")
        assert LDVAE.load(tmp_path / "m", model.adata, accelerator="cpu").rotation is None

    def test_linear_scvi_opens_what_was_saved_with_a_rotation(self, model, tmp_path):
        model.rotate()
        model.save(tmp_path / "m")
        adata = fresh(model)
        LinearSCVI.setup_anndata(adata, batch_key="batch")
        stock = LinearSCVI.load(tmp_path / "m", adata, accelerator="cpu", allowed_classes_names_list=["LDVAE"])
        pd.testing.assert_frame_equal(stock.get_loadings(), model.get_loadings(), check_exact=True)
        np.testing.assert_array_equal(stock.get_latent_representation(), model.get_latent_representation())
        # LinearSCVI may have trained on, and knows of no rotation that would end with that.
        assert LDVAE.from_linear_scvi(stock).rotation is None

    def test_another_training_ends_it_with_a_warning(self):
        adata = counts(60, n_batches=3)
        LDVAE.setup_anndata(adata, "batch")
        model = LDVAE(adata, n_latent=3)
        model.train(2, kl_warmup=1, **TRAIN)
        model.rotate()
        (said,) = warnings_of(model.train, 1, kl_warmup=1, **TRAIN)
        assert said.startswith("The rotation that was in force belonged to the network before this training")
        assert model.rotation is None
        assert model.factor_names == ["Z_0", "Z_1", "Z_2"]
        assert warnings_of(model.train, 1, kl_warmup=1, **TRAIN) == []

    @pytest.mark.parametrize("wrong", [{"nonsense": 1}, {"accelerator": "nonsense"}, {"batch_size": 0}])
    def test_a_training_that_does_not_take_place_ends_nothing(self, wrong):
        adata = counts(60, n_batches=3)
        LDVAE.setup_anndata(adata, "batch")
        model = LDVAE(adata, n_latent=3)
        model.train(2, kl_warmup=1, **TRAIN)
        model.rotate()
        model.is_ordered_ = True
        before = model.rotation.matrix_kk
        with pytest.raises(Exception):  # noqa: B017, PT011 - scvi-tools', lightning's and torch's
            model.train(1, kl_warmup=1, **{**TRAIN, **wrong})
        np.testing.assert_array_equal(model.rotation.matrix_kk, before)
        assert model.is_ordered_

    def test_arguments_that_end_no_training_end_no_rotation(self):
        adata = counts(60, n_batches=3)
        model = untrained(adata)
        model.rotate()
        with pytest.raises(ValueError, match="Give either `kl_warmup`"):
            model.train(1, kl_warmup=1, plan_kwargs={"n_epochs_kl_warmup": 3}, **TRAIN)
        assert model.rotation is not None

    def test_a_query_keeps_the_rotation_of_its_reference(self):
        reference = trained_reference(query_cells(["a", "b"]))
        reference.rotate()
        matrix, canonical = reference.rotation.matrix_kk.copy(), reference.get_loadings(canonical=True)
        query = map_query(reference, query_cells(["c"], seed=1))
        np.testing.assert_array_equal(query.rotation.matrix_kk, matrix)
        assert warnings_of(query.train, 2, **FAST) == []
        np.testing.assert_array_equal(query.rotation.matrix_kk, matrix)
        pd.testing.assert_frame_equal(query.get_loadings(canonical=True), canonical, atol=1e-6)
        query.rotate("none")
        np.testing.assert_array_equal(reference.rotation.matrix_kk, matrix)

    @pytest.mark.parametrize(
        "thawed",
        [
            {"unfrozen": True},
            {"freeze_decoder_first_layer": False},
            {"freeze_batchnorm_decoder": False},
        ],
        ids=str,
    )
    def test_a_query_whose_loadings_learn_loses_it(self, thawed):
        reference = trained_reference(query_cells(["a", "b"]))
        reference.rotate()
        query = map_query(reference, query_cells(["c"], seed=1), **thawed)
        assert query.rotation is not None
        before = query.get_loadings().to_numpy()
        said = warnings_of(query.train, 2, **FAST)
        assert np.abs(query.get_loadings().to_numpy() - before).max() > 1e-4
        assert query.rotation is None
        assert len(said) == 1
        assert reference.rotation is not None

    def test_minified_data_can_be_rotated_but_for_what_needs_counts(self):
        adata = counts(60, n_batches=3)
        model = untrained(adata)
        for method in METHODS[:2]:
            model.rotate(method)
            expected = model.rotation.matrix_kk.copy(), model.get_loadings(canonical=True)
            model.rotate("none")
            small = LDVAE.from_linear_scvi(as_stock(model))
            small.minify_adata()
            small.rotate(method)
            np.testing.assert_allclose(small.rotation.matrix_kk, expected[0], atol=1e-4)
            np.testing.assert_allclose(small.get_loadings(canonical=True), expected[1], atol=1e-3)
            with pytest.raises(ValueError, match=r"`rotate\('deviance'\)` needs counts"):
                small.rotate("deviance")
            assert small.rotation.method == method, "a refusal changes nothing"
            small.export_to_anndata()
            assert get.factors(small.adata).index.str.startswith("F_").all()
