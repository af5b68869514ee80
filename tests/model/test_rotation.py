"""A model seen through rotated axes: what changes, and all that must not."""

from __future__ import annotations

import inspect
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.special import softmax
from scipy.stats import ortho_group
from scvi.model import LinearSCVI

from ldvae_ext import get, tl
from ldvae_ext._stats import MEASURES
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.rotation import Rotation, varimax
from ldvae_ext.model import LDVAE
from tests.core.brute_force import own_and_new
from tests.helpers import TRAIN, counts, untrained
from tests.network_ablation import counts_distribution, encoded
from tests.query import FAST, map_query
from tests.query import cells as query_cells
from tests.query import trained as trained_reference
from tests.reference import covariate_counts, setup_arguments

METHODS = ("varimax", "score-varimax", "deviance")
GROUPS = ["B", "CD4+/CD25 T", "NK"]


def grouped(n_cells=120, seed=0):
    adata = counts(n_cells, n_batches=3, seed=seed)
    rng = np.random.default_rng(seed + 7)
    codes = rng.permutation(np.arange(n_cells) % 3)
    # Populations differ in some genes, so that the latents carry something.
    x = adata.X.toarray()
    for p in range(3):
        x[np.ix_(codes == p, np.arange(4 * p + 1, 4 * p + 5))] *= 4
    adata.X = type(adata.X)(x)
    adata.obs["type"] = pd.Categorical.from_codes(codes, GROUPS)
    adata.obs.loc["cell3", "type"] = np.nan
    return adata


@pytest.fixture(scope="module")
def trained():
    adata = grouped()
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=4)
    model.train(15, kl_warmup="auto", batch_size=32, plan_kwargs={"lr": 1e-2}, **TRAIN)
    return model


@pytest.fixture
def model(trained):
    """The trained model on its own axes; tests may rotate it, and nothing else."""
    trained.rotate("none")
    yield trained
    trained.rotate("none")


def fresh(model):
    """The model's cells without anything that scvi-tools or an export left there."""
    return ad.AnnData(
        X=model.adata.X.copy(),
        obs=model.adata.obs[["batch", "type"]].copy(),
        var=pd.DataFrame(index=model.adata.var_names),
    )


def turn_at_random(model, seed=3):
    """Axes that no rule would choose, in force; some point to their shorter tail."""
    matrix = ortho_group.rvs(model.n_latent, random_state=seed) * np.resize([-1, 1], model.n_latent)
    model.rotation_ = {"matrix": matrix, "method": "varimax"}
    return matrix


def warnings_of(action, *args, **kwargs):
    """What was said, but for what is not ours to mend."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        action(*args, **kwargs)
    return [str(w.message) for w in said if issubclass(w.category, UserWarning) and "rotation" in str(w.message)]


def seeded(method, *args, **kwargs):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - scvi-tools' own generator
    return method(*args, **kwargs)


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


def full_kl(mean_nk, variance_nk, rotation_kk):
    """Mean divergence of N(R'm, R'diag(v)R) from the prior, from the full covariance matrix."""
    total = 0.0
    for mean_k, variance_k in zip(mean_nk.astype(float), variance_nk.astype(float)):
        covariance = rotation_kk.T @ np.diag(variance_k) @ rotation_kk
        center = rotation_kk.T @ mean_k
        _, log_det = np.linalg.slogdet(covariance)
        total += 0.5 * (center @ center + np.trace(covariance) - len(mean_k) - log_det)
    return total / len(mean_nk)


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
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(4), atol=1e-10)
        mean, variance = model.get_latent_representation(return_dist=True)
        expected = model.get_normalized_expression(use_posterior_mean=True).to_numpy()
        decoder = model.get_decoder(rotated=True)
        batch = model.adata.obs["batch"].astype(str)
        np.testing.assert_allclose(decoder.scale(mean @ rotation, batch), expected, atol=1e-6)
        total = kl_per_dimension(mean, variance).sum(axis=1).mean()
        np.testing.assert_allclose(full_kl(mean, variance, rotation), total, rtol=1e-4)
        np.testing.assert_allclose(model.get_latent_kl().sum(axis=1).mean(), total, rtol=1e-4)
        assert np.abs(rotation - np.eye(4)).max() > 0.05, "there is something to see"

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
            with pytest.raises(ValueError, match=r"cannot be rotated: z = softmax\(u\) lies on the simplex"):
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
            ValueError, match="`method` must be one of 'varimax', 'score-varimax', 'deviance', 'none'; got 'oblimin'"
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
        rotation = model.rotation.matrix_kk
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
        back = LDVAE.from_linear_scvi(stock)
        np.testing.assert_array_equal(back.rotation.matrix_kk, model.rotation.matrix_kk)
        assert back.rotation.matrix_kk is not model.rotation.matrix_kk

    def test_another_training_ends_it_with_a_warning(self):
        adata = counts(60, n_batches=3)
        LDVAE.setup_anndata(adata, "batch")
        model = LDVAE(adata, n_latent=3)
        model.train(2, kl_warmup=1, **TRAIN)
        model.rotate()
        (said,) = warnings_of(model.train, 1, kl_warmup=1, **TRAIN)
        assert said.startswith("The rotation that was in force belongs to the network before this training")
        assert model.rotation is None
        assert model.factor_names == ["Z_0", "Z_1", "Z_2"]
        assert warnings_of(model.train, 1, kl_warmup=1, **TRAIN) == []

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


def as_stock(model):
    """The same network as a LinearSCVI of a copy of its cells."""
    adata = ad.AnnData(
        X=model.adata.X.copy(), obs=model.adata.obs[["batch"]].copy(), var=pd.DataFrame(index=model.adata.var_names)
    )
    LinearSCVI.setup_anndata(adata, batch_key="batch")
    stock = LinearSCVI(adata, n_latent=model.n_latent)
    stock.module.load_state_dict(model.module.state_dict())
    stock.module.eval()
    stock.is_trained_ = True
    return stock


class TestExport:
    @pytest.mark.parametrize("method", METHODS)
    def test_factors_in_order_decode_to_the_expression(self, model, method):
        model.rotate(method)
        adata = fresh(model)
        model.export_to_anndata(adata)
        table, rotation = get.factors(adata), model.rotation.matrix_kk
        mean, variance = (v.astype(float) for v in model.get_latent_representation(return_dist=True))
        f, f_var = mean @ rotation, variance @ rotation**2
        kl = kl_per_dimension(f, f_var).mean(axis=0)
        if method == "deviance":
            assert table.index.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        assert [f"F_{d}" for d in table["dimension"]] == table.index.tolist()
        np.testing.assert_allclose(table["kl"], kl[table["dimension"]], rtol=1e-5)
        if method != "deviance":
            assert (np.diff(table["kl"]) <= 0).all()
            assert table["dimension"].tolist() == [0, 1, 2, 3], "the cells are those that numbered them"
        np.testing.assert_allclose(table["active_unit"], f.var(axis=0)[table["dimension"]], rtol=1e-4)
        np.testing.assert_allclose(
            adata.obsm["X_ldvae"], f[:, table["dimension"]] * table["sign"].to_numpy(), atol=1e-5
        )
        np.testing.assert_allclose(adata.obsm["X_ldvae_var"], f_var[:, table["dimension"]], rtol=1e-5)
        np.testing.assert_array_equal(adata.obsm["X_ldvae_network_var"], variance.astype(np.float32))
        assert {adata.obsm[name].dtype for name in adata.obsm} == {np.dtype(np.float32)}
        expected = model.get_normalized_expression(use_posterior_mean=True).to_numpy()
        decoder, codes = get.decoder(adata), adata.obs["batch"].cat.codes
        by_hand = adata.obsm["X_ldvae"] @ adata.varm["ldvae_loadings"].T + decoder.intercept_bg[codes]
        np.testing.assert_allclose(softmax(by_hand, axis=1), expected, atol=1e-6)
        scale = decoder.scale(adata.obsm["X_ldvae"], adata.obs["batch"].astype(str))
        np.testing.assert_allclose(scale, expected, atol=1e-6)
        assert decoder.factors.tolist() == table.index.tolist() == get.loadings(adata).columns.tolist()
        np.testing.assert_allclose(get.loadings(adata), decoder.weight_gk, atol=1e-6)
        np.testing.assert_allclose(
            get.loadings(adata), model.get_loadings(canonical=True)[table.index], atol=1e-6, err_msg="canonical"
        )

    def test_the_order_is_by_the_exported_cells(self, model):
        model.rotate()
        some = fresh(model)
        some = some[some.obs["type"] == "NK"].copy()
        model.export_to_anndata(some)
        mean, variance = model.get_latent_representation(
            indices=(model.adata.obs["type"] == "NK").to_numpy().nonzero()[0], return_dist=True
        )
        rotation = model.rotation.matrix_kk
        kl = kl_per_dimension(mean.astype(float) @ rotation, variance.astype(float) @ rotation**2).mean(axis=0)
        assert get.factors(some).index.tolist() == [f"F_{k}" for k in np.argsort(-kl)]
        model.export_to_anndata(some, order_by="network")
        assert get.factors(some).index.tolist() == ["F_0", "F_1", "F_2", "F_3"]

    def test_the_rotation_and_the_networks_variances_give_everything_back(self, model):
        matrix = turn_at_random(model)
        adata = fresh(model)
        model.export_to_anndata(adata)
        rotation, table = get.rotation(adata), get.factors(adata)
        assert rotation.index.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
        assert rotation.columns.tolist() == table.index.tolist()
        np.testing.assert_allclose(rotation, matrix[:, table["dimension"]] * table["sign"].to_numpy())
        assert (table["sign"] < 0).any(), "a random rotation turns some"
        mean = model.get_latent_representation()
        np.testing.assert_allclose(adata.obsm["X_ldvae"], mean @ rotation.to_numpy(), atol=1e-5)
        np.testing.assert_allclose(adata.obsm["X_ldvae"] @ rotation.to_numpy().T, mean, atol=1e-5)
        np.testing.assert_allclose(
            adata.obsm["X_ldvae_var"], adata.obsm["X_ldvae_network_var"] @ rotation.to_numpy() ** 2, rtol=1e-5
        )
        kl = full_kl(mean, adata.obsm["X_ldvae_network_var"], rotation.to_numpy())
        np.testing.assert_allclose(kl, model.get_latent_kl().sum(axis=1).mean(), rtol=1e-4)
        assert adata.uns["ldvae"]["rotation"]["method"] == "varimax"

    def test_an_export_without_a_rotation_takes_its_traces_away(self, model):
        adata = fresh(model)
        model.rotate()
        model.export_to_anndata(adata)
        assert "X_ldvae_network_var" in adata.obsm
        model.rotate("none")
        model.export_to_anndata(adata)
        assert set(adata.obsm) == {"X_ldvae", "X_ldvae_var"}
        assert "rotation" not in adata.uns["ldvae"]
        assert get.factors(adata).index.str.startswith("Z_").all()
        with pytest.raises(KeyError, match="export 'ldvae' was made on the network's own axes"):
            get.rotation(adata)
        with pytest.raises(KeyError, match="No export 'other'"):
            get.rotation(adata, key="other")

    def test_key_added_renames_all_of_it(self, model):
        adata = fresh(model)
        model.rotate()
        model.export_to_anndata(adata, key_added="mine")
        assert set(adata.obsm) == {"X_mine", "X_mine_var", "X_mine_network_var"}
        assert get.rotation(adata, key="mine").shape == (4, 4)
        np.testing.assert_allclose(tl.ablate(adata, key="mine").X, model.ablate().X, atol=1e-4)

    @pytest.mark.parametrize("store", ["h5ad", "zarr"])
    def test_files_bring_it_back(self, model, tmp_path, store):
        adata = fresh(model)
        model.rotate("deviance")
        model.export_to_anndata(adata, stats=True, as_pca=True)
        getattr(adata, f"write_{store}")(tmp_path / "x")
        back = getattr(ad, f"read_{store}")(tmp_path / "x")
        relaxed = {"check_index_type": False, "check_column_type": False, "check_names": False}
        pd.testing.assert_frame_equal(get.rotation(back), get.rotation(adata), **relaxed)
        pd.testing.assert_frame_equal(get.factors(back), get.factors(adata), **relaxed)
        pd.testing.assert_frame_equal(get.factor_ranks(back), get.factor_ranks(adata), **relaxed)
        pd.testing.assert_frame_equal(get.loadings(back), get.loadings(adata), **relaxed)
        assert str(back.uns["ldvae"]["rotation"]["method"]) == "deviance"
        for name, value in get.decoder(adata).to_arrays().items():
            np.testing.assert_array_equal(get.decoder(back).to_arrays()[name], value, err_msg=name)
        np.testing.assert_array_equal(tl.ablate(back, mode="permute").X, tl.ablate(adata, mode="permute").X)

    @pytest.mark.parametrize("order_by", MEASURES)
    @pytest.mark.parametrize("rotated", [False, True])
    def test_any_measure_orders_and_is_stored(self, model, order_by, rotated):
        if rotated:
            model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata, order_by=order_by)
        table, stats = get.factors(adata), model.get_factor_stats().table()
        assert table.index.tolist() == stats[order_by].sort_values(ascending=False).index.tolist()
        assert adata.uns["ldvae"]["order_by"] == order_by
        stored = [name for name in MEASURES if name in table]
        for name in stored:
            np.testing.assert_allclose(table[name], stats.loc[table.index, name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert stored == (["kl", "active_unit"] if order_by in ("kl", "active_unit") else list(MEASURES))

    def test_stats_are_stored_beside_any_order_and_ranked(self, model):
        model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata, order_by="network", stats=True)
        ranks, table = get.factor_ranks(adata), get.factors(adata)
        assert ranks.columns.tolist() == list(MEASURES)
        assert ranks.index.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        for name in MEASURES:
            np.testing.assert_array_equal(ranks[name], table[name].rank(ascending=False))
        model.export_to_anndata(adata)
        assert get.factor_ranks(adata).columns.tolist() == ["kl", "active_unit"]

    def test_statistics_of_other_cells_are_theirs(self, model):
        model.rotate()
        other = grouped(40, seed=5)
        other.obs_names = [f"new{i}" for i in range(40)]
        model.export_to_anndata(other, stats=True)
        stats, table = model.get_factor_stats(None, other).table(), get.factors(other)
        for name in MEASURES:
            np.testing.assert_allclose(table[name], stats.loc[table.index, name], rtol=1e-4, atol=1e-5, err_msg=name)
        some = fresh(model)[[7, 3, 50, 21, 90]].copy()
        model.export_to_anndata(some, stats=True)
        stats, table = model.get_factor_stats(indices=[7, 3, 50, 21, 90]).table(), get.factors(some)
        for name in MEASURES:
            np.testing.assert_allclose(table[name], stats.loc[table.index, name], rtol=1e-4, atol=1e-5, err_msg=name)

    def test_an_order_that_needs_counts_is_refused_without_them(self):
        model = untrained(counts(60, n_batches=3))
        model.minify_adata()
        with (
            pytest.warns(UserWarning, match="minified without counts"),
            pytest.raises(ValueError, match="`order_by='explained_deviance'` needs counts"),
        ):
            model.export_to_anndata(order_by="explained_deviance")
        assert "ldvae" not in model.adata.uns

    def test_a_lost_network_variance_is_named(self, model):
        model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata)
        del adata.obsm["X_ldvae_network_var"]
        with pytest.raises(KeyError, match=r"lacks `adata.obsm\['X_ldvae_network_var'\]`"):
            tl.ablate(adata)


VALUE = np.array([0.3, -1.0, 0.0, 2.0])
NEEDED = {"group_mean": {"groupby": "type"}, "permute": {"seed": 3}, "prior": {"seed": 3}, "value": {"value": VALUE}}
WAYS = [
    ("zero", "mean"),
    ("mean", "mean"),
    ("group_mean", "mean"),
    ("permute", "mean"),
    ("prior", "mean"),
    ("value", "mean"),
    ("zero", "samples"),
    ("permute", "samples"),
    ("prior", "samples"),
    ("mean", "samples"),
]


def ablation_through_the_network(model, mode, rotation, sets, *, n_samples=0, seed=0, refit=False):
    """z to factors, some of them replaced, and back to z, which scvi-tools' own network decodes in float64."""
    adata, cells = model.adata, encoded(model, model.adata)
    codes = adata.obs["type"].cat.codes.to_numpy() if "type" in adata.obs else None
    x, out = torch.as_tensor(cells.x), np.zeros((*cells.x.shape, len(sets)))
    pairs = list(
        own_and_new(cells.mean, cells.variance, mode, group_n=codes, value_k=VALUE, n_samples=n_samples, seed=seed)
    )
    for own, new in pairs:
        factors = own @ rotation
        # What a factor is set to, or drawn for it, is said of the factor; latents of other cells are rotated as well.
        new_factors = new if mode in ("zero", "prior", "value") else new @ rotation
        full = counts_distribution(model, cells, own)
        for s, members in enumerate(sets):
            moved = factors.copy()
            moved[:, members] = new_factors[:, members]
            px = counts_distribution(model, cells, np.nan_to_num(moved) @ rotation.T)
            if model.module.gene_likelihood == "zinb" and not refit:
                px.zi_logits = full.zi_logits
            out[:, :, s] += (full.log_prob(x) - px.log_prob(x)).numpy() / len(pairs)
    if mode == "group_mean":
        out[codes < 0] = np.nan
    return out


def assert_equal_to(got, expected, tolerance):
    """To a share of the largest effect."""
    largest = np.nanmax(np.abs(expected))
    assert largest > 0
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


ONE_BY_ONE = [[0], [1], [2], [3]]


class TestAblation:
    @pytest.mark.parametrize(("mode", "use_posterior"), WAYS)
    @pytest.mark.parametrize("likelihood", ["nb", "zinb"])
    def test_equals_scvi_tools_network_and_the_export(self, model, mode, use_posterior, likelihood):
        if likelihood == "zinb":
            model = untrained(grouped(40), gene_likelihood="zinb", dispersion="gene-batch")
            with torch.no_grad():  # posteriors as wide as trained ones
                for head in (model.module.z_encoder.mean_encoder, model.module.z_encoder.var_encoder):
                    head.weight *= 0.1
        rotation = turn_at_random(model)
        arguments = {"mode": mode, "use_posterior": use_posterior, **NEEDED.get(mode, {})}
        sampled = {}
        if use_posterior == "samples":
            sampled = {"n_samples": 3, "seed": arguments.setdefault("seed", 3)}
            arguments["n_samples"] = 3
        got = model.ablate(**arguments)
        expected = ablation_through_the_network(
            model, mode, rotation, ONE_BY_ONE, **{"seed": arguments.get("seed", 0), **sampled}
        ).sum(axis=1)
        assert got.var_names.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        assert_equal_to(got.X, expected, 1e-5)
        adata = fresh(model)
        model.export_to_anndata(adata)
        if mode == "value":
            table = get.factors(adata)
            arguments["value"] = dict(zip(table.index, VALUE[table["dimension"]] * table["sign"]))
        of_export = tl.ablate(adata, **arguments)
        assert of_export.var_names.tolist() == get.factors(adata).index.tolist()
        assert_equal_to(of_export[:, got.var_names].X, got.X, 1e-6)

    @pytest.mark.parametrize("scheme", ["leave_in", "keep_top"])
    @pytest.mark.parametrize("mode", ["zero", "permute"])
    def test_schemes_and_sets(self, model, scheme, mode):
        rotation = turn_at_random(model)
        arguments = {"mode": mode, "scheme": scheme, **NEEDED.get(mode, {})}
        seed = arguments.get("seed", 0)
        got = model.ablate(**arguments)
        if scheme == "leave_in":
            sets = [[k for k in range(4) if k != kept] for kept in range(4)]
        else:
            mean, variance = (v.astype(float) for v in model.get_latent_representation(return_dist=True))
            order = np.argsort(-kl_per_dimension(mean @ rotation, variance @ rotation**2).mean(axis=0))
            sets = [sorted(order[j:]) for j in range(5)]
            assert got.uns["ldvae_ablation"]["order"].tolist() == [f"F_{k}" for k in order]
        assert_equal_to(got.X, ablation_through_the_network(model, mode, rotation, sets, seed=seed).sum(axis=1), 1e-5)
        both = model.ablate(latents={"a/b": ["F_3", 0]}, mode=mode, **NEEDED.get(mode, {}))
        expected = ablation_through_the_network(model, mode, rotation, [[0, 3]], seed=seed).sum(axis=1)
        assert_equal_to(both.X, expected, 1e-5)
        # All factors together are all latents together.
        whole = model.ablate(latents={"all": range(4)}, mode=mode, **NEEDED.get(mode, {})).X
        model.rotate("none")
        assert_equal_to(model.ablate(latents={"all": range(4)}, mode=mode, **NEEDED.get(mode, {})).X, whole, 1e-6)

    def test_names_are_those_of_the_factors_alone(self, model):
        model.rotate()
        assert model.ablate(latents="F_2").var_names.tolist() == ["F_2"]
        for method in (model.ablate, model.ablate_genes, model.get_explained_deviance):
            with pytest.raises(ValueError, match="'Z_0' is no latent of this model; allowed are 'F_0', 'F_1'"):
                method(latents=["Z_0"])
        with pytest.raises(ValueError, match="'Z_0' is no latent"):
            model.get_ablated_expression("Z_0")
        with pytest.raises(ValueError, match="`factors`: 'Z_0' is no latent"):
            model.differential_expression(idx1=[0, 1], factors=["Z_0"])

    @pytest.mark.parametrize("mode", ["zero", "permute"])
    def test_numbers_do_not_depend_on_minibatches_or_on_which_cells_are_asked_for(self, model, mode):
        turn_at_random(model)
        arguments = {"mode": mode, "use_posterior": "samples", "seed": 1, "n_samples": 2}
        whole = model.ablate(**arguments, batch_size=120).X
        assert_equal_to(model.ablate(**arguments, batch_size=13).X, whole, 1e-6)
        assert_equal_to(model.ablate(indices=[100, 3], **arguments).X, whole[[100, 3]], 1e-6)
        adata = fresh(model)
        model.export_to_anndata(adata)
        assert_equal_to(
            tl.ablate(adata, indices=[100, 3], chunk_size=1, **arguments)[:, model.factor_names].X,
            whole[[100, 3]],
            1e-6,
        )

    @pytest.mark.parametrize(("mode", "use_posterior"), [("zero", "mean"), ("permute", "samples"), ("mean", "mean")])
    def test_a_data_loader_brings_the_same_cells(self, model, mode, use_posterior):
        turn_at_random(model)
        arguments = {"mode": mode, "use_posterior": use_posterior}
        loader = model._make_data_loader(model.adata, batch_size=33)
        got = model.ablate(dataloader=loader, **arguments)
        assert got.var_names.tolist() == model.factor_names
        assert_equal_to(got.X, model.ablate(**arguments).X, 1e-6)

    def test_genes_add_up_and_equal_the_network(self, model):
        rotation = turn_at_random(model)
        codes = model.adata.obs["type"].cat.codes.to_numpy()
        change = ablation_through_the_network(model, "mean", rotation, ONE_BY_ONE)
        got = model.ablate_genes("type", mode="mean")
        assert_equal_to(got.X, np.concatenate([change[codes == p].mean(axis=0) for p in range(3)]), 1e-5)
        assert got.var_names.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        adata = fresh(model)
        model.export_to_anndata(adata)
        assert_equal_to(tl.ablate_genes(adata, "type", mode="mean")[got.obs_names, got.var_names].X, got.X, 1e-6)

    def test_refitted_heads_follow_the_rotated_factors(self):
        model = untrained(grouped(30), gene_likelihood="zinb")
        rotation = turn_at_random(model)
        expected = ablation_through_the_network(model, "zero", rotation, ONE_BY_ONE, refit=True).sum(axis=1)
        assert_equal_to(model.ablate(refit_heads=True).X, expected, 1e-5)

    def test_the_identity_changes_nothing_but_names(self, model):
        expected = {way: model.ablate(mode=way[0], use_posterior=way[1], **NEEDED.get(way[0], {})).X for way in WAYS}
        model.rotation_ = {"matrix": np.eye(4), "method": "varimax"}
        for (mode, use_posterior), value in expected.items():
            got = model.ablate(mode=mode, use_posterior=use_posterior, **NEEDED.get(mode, {}))
            assert_equal_to(got.X, value, 1e-9)


class TestOtherReadings:
    def test_explained_deviance_is_that_of_the_factors(self, model):
        plain = model.get_explained_deviance()
        rotation = turn_at_random(model)
        table = model.get_explained_deviance(latents=["F_0", "F_1", "F_2", "F_3"])
        assert table["factor"].tolist() == ["F_0", "F_1", "F_2", "F_3"]
        # All of them, and none of them, are what they were.
        np.testing.assert_allclose(table["cumulative"].iloc[-1], plain["cumulative"].iloc[-1], rtol=1e-8)
        np.testing.assert_allclose(table["without_latents"], plain["without_latents"], rtol=1e-8)
        lost = ablation_through_the_network(model, "zero", rotation, [*ONE_BY_ONE, [1, 2, 3], [2, 3], [3], range(4)])
        lost = 2 * lost.sum(axis=(0, 1))
        explained = table["cumulative"].iloc[-1]
        null = -lost[-1] / (table["without_latents"].iloc[0] - explained)
        np.testing.assert_allclose(table["explained_deviance"], lost[:4] / null, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(table["cumulative"].iloc[:3], explained - lost[4:7] / null, rtol=1e-4, atol=1e-7)

    def test_the_deviance_rotation_explains_more_with_the_first_factors(self, model):
        cumulative = {}
        for method in ("deviance", "varimax"):
            model.rotate(method)
            cumulative[method] = model.get_explained_deviance(latents=model.factor_names)["cumulative"].to_numpy()
        assert (cumulative["deviance"] >= cumulative["varimax"] - 1e-3).all()
        assert cumulative["deviance"][0] > cumulative["varimax"][0]

    @pytest.mark.parametrize("mode", ["zero", "mean", "group_mean", "permute", "value"])
    def test_ablated_expression_is_decoded_without_the_factors(self, model, mode):
        rotation = turn_at_random(model)
        got = model.get_ablated_expression(["F_1", 3], mode, **NEEDED.get(mode, {}))
        cells = encoded(model, model.adata)
        codes = model.adata.obs["type"].cat.codes.to_numpy()
        ((own, new),) = own_and_new(
            cells.mean, cells.variance, mode, group_n=codes, value_k=VALUE, seed=NEEDED.get(mode, {}).get("seed", 0)
        )
        new = new if mode in ("zero", "value") else new @ rotation
        moved = own @ rotation
        moved[:, [1, 3]] = new[:, [1, 3]]
        expected = counts_distribution(model, cells, np.nan_to_num(moved) @ rotation.T).scale.numpy()
        known = (codes >= 0) | (mode != "group_mean")
        np.testing.assert_allclose(got.to_numpy()[known], expected[known], atol=1e-6)
        assert np.isnan(got.to_numpy()[~known]).all()
        nothing_lost = model.get_ablated_expression(["F_0", "F_1", "F_2", "F_3"], "zero")
        model.rotate("none")
        np.testing.assert_allclose(nothing_lost, model.get_ablated_expression(range(4), "zero"), atol=1e-6)

    @pytest.mark.parametrize("kind", ["gradient", "contribution", "path", "within"])
    def test_population_loadings_are_those_of_the_factors(self, model, kind):
        options = {"reference": "NK"} if kind in ("contribution", "path") else {}
        plain = model.get_population_loadings("type", kind, **options)
        rotation = turn_at_random(model)
        rotated = model.get_population_loadings("type", kind, **options)
        assert list(rotated) == list(plain)
        z = model.get_latent_representation().astype(float)
        decoder = model.get_decoder(rotated=True)
        for group, table in rotated.items():
            inside = (model.adata.obs["type"] == group).to_numpy()
            if kind == "gradient":
                assert table.columns.tolist() == ["F_0", "F_1", "F_2", "F_3"]
                # A slope along a factor is the sum of slopes along the latents that it is made of.
                np.testing.assert_allclose(table, plain[group].to_numpy() @ rotation, atol=1e-8)
            elif kind == "contribution":
                difference = z[inside].mean(axis=0) - z[(model.adata.obs["type"] == "NK").to_numpy()].mean(axis=0)
                weight = decoder.centered().weight_gk
                np.testing.assert_allclose(table, weight * (difference @ rotation), atol=1e-5)
            elif kind == "path":
                assert table.columns.tolist() == ["F_0", "F_1", "F_2", "F_3", "batch"]
                np.testing.assert_allclose(table.sum(axis=1), plain[group].sum(axis=1), atol=1e-6)
            else:
                # Directions of variation are the cells' own and know no axes.
                np.testing.assert_allclose(np.abs(table), np.abs(plain[group]), atol=1e-5)

    def test_directions_say_which_factors_they_are_made_of(self, model):
        plain = model.get_population_directions("type")
        turn_at_random(model)
        table = model.get_population_directions("type")
        assert set(table["factor"]) == {"F_0", "F_1", "F_2", "F_3"}
        np.testing.assert_allclose(table.groupby(["group", "direction"])["share"].sum(), 1, atol=1e-6)
        for name in ("variance", "variance_share"):
            np.testing.assert_allclose(table[name], plain[name], rtol=1e-4)

    def test_the_tool_says_the_same_of_populations(self, model):
        model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata)
        of_model = model.get_population_loadings("type", "contribution", reference="NK")
        tl.population_loadings(adata, "type", kind="contribution", reference="NK")
        table = get.population_loadings_df(adata)
        for group, expected in of_model.items():
            rows = table[table["group"] == group].pivot_table("value", "gene", "factor")
            np.testing.assert_allclose(rows.loc[expected.index, expected.columns], expected, atol=1e-5)

    def compared(self, model, **options):
        return seeded(
            model.differential_expression,
            groupby="type",
            group1="B",
            group2="NK",
            mode="change",
            silent=True,
            n_samples_overall=300,
            **options,
        )

    def test_differences_through_all_factors_are_those_of_the_whole_model(self, model):
        whole = self.compared(model, batch_correction=True)
        turn_at_random(model)
        pd.testing.assert_frame_equal(self.compared(model, batch_correction=True), whole, check_exact=True)
        through_all = self.compared(model, factors=["F_3", "F_0", "F_1", "F_2"]).loc[whole.index]
        for name in whole.select_dtypes("number"):
            # To the rounding of float32; draws at a threshold may fall to the other side.
            atol = 0.01 if name.startswith("proba") else 0.1 if name == "bayes_factor" else 1e-4
            np.testing.assert_allclose(through_all[name], whole[name], rtol=1e-3, atol=atol, err_msg=name)
        nothing = self.compared(model, factors=[])
        np.testing.assert_allclose(nothing["lfc_mean"], 0, atol=1e-4)

    def test_differences_through_one_factor_are_those_that_the_decoder_gives_it(self, model):
        matrix = turn_at_random(model)
        table = self.compared(model, factors=["F_1"])
        # Expression moves along the loading of the factor, and differently for each of them.
        decoder, z = model.get_decoder(rotated=True), model.get_latent_representation().astype(float)
        f = (z @ matrix)[:, 1]
        inside = {group: f[(model.adata.obs["type"] == group).to_numpy()].mean() for group in ("B", "NK")}
        slope = (inside["B"] - inside["NK"]) * decoder.centered().weight_gk[:, 1]
        got = table["lfc_mean"].loc[model.adata.var_names].to_numpy()
        assert np.corrcoef(got, slope)[0, 1] > 0.95
        model.rotate("none")
        other = self.compared(model, factors=["Z_1"])["lfc_mean"].loc[model.adata.var_names].to_numpy()
        assert not np.allclose(got, other, atol=1e-2)
        # A rotation that is a permutation gives the numbers of the latent itself.
        order = [2, 3, 1, 0]
        model.rotation_ = {"matrix": np.eye(4)[:, order], "method": "varimax"}
        permuted = self.compared(model, factors=["F_2"])["lfc_mean"].loc[model.adata.var_names]
        np.testing.assert_allclose(permuted, other, atol=1e-5)

    def test_a_rotation_object_is_what_is_in_force(self, model):
        matrix = turn_at_random(model)
        assert isinstance(model.rotation, Rotation)
        np.testing.assert_array_equal(model.rotation.matrix_kk, matrix)
        model.rotation_ = {"matrix": matrix * 1.1, "method": "varimax"}
        with pytest.raises(ValueError, match="must be orthogonal"):
            model.ablate()
