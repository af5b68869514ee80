"""The latents of any scvi-tools model with a Gaussian posterior, in order of information."""

from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi
import torch
from scipy.special import softmax
from scvi.model import MULTIVI, PEAKVI, SCANVI, SCVI, TOTALVI, AmortizedLDA, LinearSCVI
from torch.distributions import Normal, VonMises, kl_divergence

from ldvae_ext.model import LDVAE, order_latents
from tests.helpers import TRAIN, counts

pytestmark = [
    # scvi-tools prefers MuData; AnnData is still what most people have.
    pytest.mark.filterwarnings("ignore:We recommend using setup_mudata:DeprecationWarning"),
    # TOTALVI's and MULTIVI's training plan steps its scheduler by hand.
    pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key:RuntimeWarning"),
    # MULTIVI builds a decoder of no proteins where there are none.
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op"),
    # mudata with this pandas, and scvi-tools with this mudata.
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.drop is deprecated"),
    pytest.mark.filterwarnings("ignore:The method mod_names is deprecated:FutureWarning"),
]

SMALL = {"n_latent": 6, "n_hidden": 8}


def proteins(n_cells=60, seed=1):
    return np.random.default_rng(seed).poisson(5.0, (n_cells, 4)).astype(np.float32)


def cells(kind, n_cells=60, seed=0):
    """Data of a kind of model, not yet registered."""
    adata = counts(n_cells=n_cells, n_batches=3, seed=seed)
    adata.obs["label"] = pd.Categorical(["A", "B"] * (n_cells // 2))
    if kind == "TOTALVI":
        adata.obsm["protein"] = proteins(n_cells)
    if kind == "TOTALVI of MuData":
        return mudata.MuData({"rna": adata, "protein": ad.AnnData(proteins(n_cells), obs=adata.obs[[]].copy())})
    if kind == "MULTIVI":
        return mudata.MuData({"rna": adata[:, :12].copy(), "atac": adata[:, 12:].copy()})
    return adata


def setup(kind, data):
    if kind == "SCANVI":
        SCANVI.setup_anndata(data, labels_key="label", unlabeled_category="unknown", batch_key="batch")
    elif kind == "TOTALVI":
        TOTALVI.setup_anndata(data, protein_expression_obsm_key="protein", batch_key="batch")
    elif kind == "TOTALVI of MuData":
        modalities = {"rna_layer": "rna", "protein_layer": "protein", "batch_key": "rna"}
        TOTALVI.setup_mudata(data, rna_layer=None, protein_layer=None, batch_key="batch", modalities=modalities)
    elif kind == "MULTIVI":
        MULTIVI.setup_mudata(
            data, batch_key="batch", modalities={"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"}
        )
    else:
        CLASSES[kind].setup_anndata(data, batch_key="batch")


CLASSES = {
    "SCVI": SCVI,
    "SCVI, ln": SCVI,
    "SCANVI": SCANVI,
    "TOTALVI": TOTALVI,
    "TOTALVI of MuData": TOTALVI,
    "PEAKVI": PEAKVI,
    "MULTIVI": MULTIVI,
    "LinearSCVI": LinearSCVI,
    "LDVAE": LDVAE,
}


def build(kind, data):
    """A model of this kind, trained for two epochs."""
    setup(kind, data)
    if CLASSES[kind] is TOTALVI:
        arguments = {"n_latent": 6, "empirical_protein_background_prior": False}
    elif kind == "MULTIVI":
        arguments = {**SMALL, "modality_weights": "cell"}
    else:
        arguments = dict(SMALL)
    if kind == "SCVI, ln":
        arguments["latent_distribution"] = "ln"
    scvi.settings.seed = 0
    model = CLASSES[kind](data, **arguments)
    # LDVAE warns where the weight of the KL term did not reach 1.
    model.train(2, **TRAIN, **({"kl_warmup": "auto"} if kind == "LDVAE" else {}))
    return model


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(kind):
        if kind not in built:
            built[kind] = build(kind, cells(kind))
        return built[kind]

    return get


@pytest.fixture
def model(models):
    """An SCVI model; what earlier tests wrote to its data is taken away."""
    model = models("SCVI")
    for slot in (model.adata.obsm, model.adata.uns):
        for key in [key for key in slot if not key.startswith("_scvi")]:
            del slot[key]
    return model


def posterior(model, data=None):
    """The posterior of the cells from the model's own network."""
    model.module.eval()
    model._validate_anndata(data)
    loader = model._make_data_loader(model.adata if data is None else data, batch_size=13)
    with torch.no_grad():
        outputs = [model.module.inference(**model.module._get_inference_input(tensors)) for tensors in loader]
    if "qz" in outputs[0]:
        assert all(isinstance(out["qz"], Normal) for out in outputs)
        return Normal(*(torch.cat([getattr(out["qz"], name) for out in outputs]) for name in ("mean", "stddev")))
    return Normal(torch.cat([out["qz_m"] for out in outputs]), torch.cat([out["qz_v"] for out in outputs]).sqrt())


@pytest.mark.parametrize("kind", CLASSES)
class TestEveryClass:
    def test_mean_variance_and_kl_are_those_of_the_network(self, models, kind):
        model = models(kind)
        table = order_latents(model)
        qz = posterior(model)
        order = table["dimension"].to_numpy()
        obsm = model.adata.obsm
        # The spread of the variances must be seen, or a standard deviation would pass for one.
        assert (qz.variance - qz.stddev).abs().max() > 0.01
        np.testing.assert_allclose(obsm["X_ordered_latent_var"], qz.variance.numpy()[:, order], rtol=1e-5)
        mean = softmax(qz.mean.numpy(), axis=1) if kind == "SCVI, ln" else qz.mean.numpy()
        np.testing.assert_allclose(obsm["X_ordered_latent"], mean[:, order], atol=1e-6)
        kl = kl_divergence(qz, Normal(0.0, 1.0)).double().mean(0).numpy()
        np.testing.assert_allclose(table["kl"], kl[order], rtol=1e-4)
        np.testing.assert_allclose(table["active_unit"], qz.mean.numpy().var(0)[order], rtol=1e-4)
        for key in ("X_ordered_latent", "X_ordered_latent_var"):
            assert type(obsm[key]) is np.ndarray
            assert obsm[key].dtype == np.float32
            assert obsm[key].shape == (60, 6)

    def test_order_is_descending_and_each_column_is_the_latent_that_it_is_named_after(self, models, kind):
        model = models(kind)
        table = order_latents(model)
        info = model.adata.uns["ordered_latent"]
        assert (np.diff(info["statistics"]["kl"]) <= 0).all()
        assert sorted(info["order"]) == list(range(6))
        assert table.index.tolist() == info["names"].tolist() == [f"Z_{k}" for k in info["order"]]
        assert info["model_class"] == CLASSES[kind].__name__
        if kind != "SCVI, ln":  # there the latent of scvi-tools is an average over draws
            latent = model.get_latent_representation()
            for j, k in enumerate(info["order"]):
                np.testing.assert_allclose(model.adata.obsm["X_ordered_latent"][:, j], latent[:, k], atol=1e-6)


def test_the_table_is_what_was_written(model):
    table = order_latents(model)
    assert table.index.name == "latent"
    assert table.columns.tolist() == ["dimension", "kl", "kl_share", "active_unit"]
    info = model.adata.uns["ordered_latent"]
    for name in ("kl", "kl_share", "active_unit"):
        np.testing.assert_array_equal(table[name], info["statistics"][name])
    np.testing.assert_allclose(table["kl_share"], table["kl"] / table["kl"].sum())
    assert info["n_cells"] == 60
    assert info["latent_distribution"] == "normal"
    assert set(info["versions"]) == {"ldvae_ext", "scvi-tools"}


def test_a_latent_that_is_blown_up_comes_first_and_one_that_is_the_prior_last(models):
    model = build("SCVI", cells("SCVI"))
    with torch.no_grad():
        encoder = model.module.z_encoder
        for layer in (encoder.mean_encoder, encoder.var_encoder):
            layer.weight[2] = 0
            layer.bias[2] = 0
        encoder.mean_encoder.bias[4] = 30.0
    table = order_latents(model)
    assert table.index[0] == "Z_4"
    assert table.index[-1] == "Z_2"
    assert table["kl"].iloc[0] > 100
    assert table["kl"].iloc[-1] < 1e-6
    assert table["active_unit"].iloc[-1] == 0


def test_logistic_normal_kl_is_that_of_u_and_the_latent_is_deterministic(models):
    model = models("SCVI, ln")
    order_latents(model)
    first = model.adata.obsm["X_ordered_latent"]
    assert model.adata.uns["ordered_latent"]["latent_distribution"] == "ln"
    np.testing.assert_allclose(first.sum(1), 1, rtol=1e-5)
    order_latents(model)
    np.testing.assert_array_equal(model.adata.obsm["X_ordered_latent"], first)


class TestWhatIsWritten:
    @pytest.mark.parametrize("store", ["h5ad", "zarr"])
    def test_files_bring_it_back(self, tmp_path, model, store):
        adata = model.adata.copy()
        table = order_latents(model, adata)
        getattr(adata, f"write_{store}")(tmp_path / f"x.{store}")
        back = getattr(ad, f"read_{store}")(tmp_path / f"x.{store}")
        for key in ("X_ordered_latent", "X_ordered_latent_var"):
            np.testing.assert_array_equal(back.obsm[key], adata.obsm[key])
        info = back.uns["ordered_latent"]
        assert [str(name) for name in info["names"]] == table.index.tolist()
        np.testing.assert_array_equal(info["order"], table["dimension"])
        for name, values in info["statistics"].items():
            np.testing.assert_array_equal(values, table[name])
        assert info["model_class"] == "SCVI"
        assert info["n_cells"] == 60
        order_latents(model, back)  # and what came from a file is still its own to overwrite

    def test_files_of_mudata_bring_it_back(self, tmp_path, models):
        model = models("TOTALVI of MuData")
        table = order_latents(model)
        assert not [key for modality in model.adata.mod.values() for key in modality.obsm if "ordered" in key]
        model.adata.write(tmp_path / "x.h5mu")
        back = mudata.read(tmp_path / "x.h5mu")
        np.testing.assert_array_equal(back.obsm["X_ordered_latent"], model.adata.obsm["X_ordered_latent"])
        assert [str(name) for name in back.uns["ordered_latent"]["names"]] == table.index.tolist()

    def test_the_first_latents_make_a_neighbour_graph(self, model):
        adata = model.adata.copy()
        order_latents(model, adata)
        # Without umap, which takes 20 seconds to compile.
        how = {"n_neighbors": 5, "method": "gauss", "transformer": "sklearn"}
        sc.pp.neighbors(adata, use_rep="X_ordered_latent", n_pcs=5, **how)
        alone = ad.AnnData(adata.obsm["X_ordered_latent"][:, :5])
        sc.pp.neighbors(alone, use_rep="X", **how)
        np.testing.assert_allclose(adata.obsp["distances"].toarray(), alone.obsp["distances"].toarray(), rtol=1e-5)

    def test_nothing_else_is_written(self, model):
        adata = model.adata
        before = adata.copy()
        order_latents(model)
        assert set(adata.obsm) - set(before.obsm) == {"X_ordered_latent", "X_ordered_latent_var"}
        assert set(adata.uns) - set(before.uns) == {"ordered_latent"}
        assert set(adata.varm) == set(before.varm)
        pd.testing.assert_frame_equal(adata.obs, before.obs)
        pd.testing.assert_frame_equal(adata.var, before.var)

    def test_key_added_renames_all_together(self, model):
        order_latents(model, key_added="mine")
        assert {"X_mine", "X_mine_var"} <= set(model.adata.obsm)
        assert "mine" in model.adata.uns
        assert "ordered_latent" not in model.adata.uns

    def test_it_overwrites_its_own_result(self, model):
        order_latents(model)
        expected = model.adata.obsm["X_ordered_latent"].copy()
        model.adata.obsm["X_ordered_latent"] = np.zeros((60, 6), dtype=np.float32)
        order_latents(model)
        np.testing.assert_array_equal(model.adata.obsm["X_ordered_latent"], expected)

    def test_it_does_not_overwrite_what_others_wrote(self, model):
        adata = model.adata
        adata.obsm["X_scVI"] = latent = model.get_latent_representation()
        with pytest.raises(ValueError, match=r"'X_scVI' .* choose another `key_added`"):
            order_latents(model, key_added="scVI")
        assert adata.obsm["X_scVI"] is latent
        assert "X_scVI_var" not in adata.obsm
        adata.uns["pca"] = {"variance": np.ones(2)}
        with pytest.raises(ValueError, match="'pca'"):
            order_latents(model, key_added="pca")

    def test_it_does_not_overwrite_an_export(self, models):
        model = models("LDVAE")
        model.export_to_anndata()
        before = model.adata.obsm["X_ldvae"].copy()
        table = order_latents(model)
        with pytest.raises(ValueError, match="'X_ldvae', 'X_ldvae_var', 'ldvae'"):
            order_latents(model, key_added="ldvae")
        np.testing.assert_array_equal(model.adata.obsm["X_ldvae"], before)
        # The same numbers but for the signs, which belong to loadings.
        assert table.index.tolist() == model.adata.uns["ldvae"]["names"].tolist()
        np.testing.assert_allclose(table["kl"], model.adata.uns["ldvae"]["statistics"]["kl"], rtol=1e-5)
        signs = model.adata.uns["ldvae"]["signs"]
        np.testing.assert_allclose(model.adata.obsm["X_ordered_latent"] * signs, before, atol=1e-6)


class TestCells:
    @pytest.mark.parametrize("kind", ["SCVI", "SCANVI", "TOTALVI", "PEAKVI", "LDVAE"])
    def test_other_cells_are_encoded_and_get_the_result(self, models, kind):
        model = models(kind)
        own = set(model.adata.uns)
        other = cells(kind, n_cells=30, seed=5)
        table = order_latents(model, other, key_added="there")
        assert set(model.adata.uns) == own
        qz = posterior(model, other)
        order = table["dimension"].to_numpy()
        np.testing.assert_allclose(other.obsm["X_there"], qz.mean.numpy()[:, order], atol=1e-6)
        np.testing.assert_allclose(other.obsm["X_there_var"], qz.variance.numpy()[:, order], rtol=1e-5)
        kl = kl_divergence(qz, Normal(0.0, 1.0)).mean(0).numpy()
        np.testing.assert_allclose(table["kl"], kl[order], rtol=1e-4)
        assert other.uns["there"]["n_cells"] == 30

    def test_a_view_gets_the_result_too(self, model):
        view = cells("SCVI")[:20]
        order_latents(model, view)
        assert view.obsm["X_ordered_latent"].shape == (20, 6)

    def test_a_model_without_data_asks_for_it(self, tmp_path, model):
        expected = order_latents(model)
        model.save(tmp_path / "m")
        bare = SCVI.load(tmp_path / "m", adata=False, accelerator="cpu")
        with pytest.raises(ValueError, match="no data of its own: give `adata`"):
            order_latents(bare)
        adata = cells("SCVI")
        pd.testing.assert_frame_equal(order_latents(bare, adata), expected)
        np.testing.assert_array_equal(adata.obsm["X_ordered_latent"], model.adata.obsm["X_ordered_latent"])

    def test_batch_size_does_not_matter(self, model):
        pd.testing.assert_frame_equal(order_latents(model, batch_size=7), order_latents(model), rtol=1e-5)

    @pytest.mark.parametrize("kind", ["SCVI", "TOTALVI of MuData"])
    def test_minified_cells_have_the_variance_that_was_stored(self, models, kind):
        """A minified TOTALVI takes the stored variance for a standard deviation, and gives its square."""
        model = build(kind, cells(kind))
        full = posterior(model)
        model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = model.get_latent_representation(
            return_dist=True
        )
        expected = order_latents(model)
        model.minify_adata() if kind == "SCVI" else model.minify_mudata()
        pd.testing.assert_frame_equal(order_latents(model, key_added="mini"), expected)
        variance = full.variance.numpy()[:, expected["dimension"]]
        np.testing.assert_allclose(model.adata.obsm["X_mini_var"], variance, rtol=1e-5)


class TestGlobalState:
    def test_random_states_stay(self, model):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - scvi-tools draws from it
        expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        order_latents(model)
        order_latents(model, cells("SCVI", seed=3))
        np.testing.assert_array_equal(torch.rand(3), expected[0])
        np.testing.assert_array_equal(np.random.rand(3), expected[1])  # noqa: NPY002

    def test_training_mode_stays_and_does_not_matter(self, model):
        expected = order_latents(model)
        model.module.train()
        model.module.decoder.eval()
        modes = [layer.training for layer in model.module.modules()]
        try:
            pd.testing.assert_frame_equal(order_latents(model), expected)
            assert [layer.training for layer in model.module.modules()] == modes
        finally:
            model.module.eval()


class TestErrors:
    def test_a_model_without_gaussian_posterior_is_named(self):
        adata = counts()
        AmortizedLDA.setup_anndata(adata)
        with pytest.raises(TypeError, match=r"`return_dist`, as SCVI, .* have; got AmortizedLDA"):
            order_latents(AmortizedLDA(adata, n_topics=3))
        assert len(adata.obsm) == 0

    @pytest.mark.parametrize("given", [None, "a folder", counts()], ids=["None", "str", "AnnData"])
    def test_what_is_no_model_is_named(self, given):
        with pytest.raises(TypeError, match=f"`model` must be .* got {type(given).__name__}"):
            order_latents(given)

    def test_what_is_no_anndata_is_named(self, model):
        with pytest.raises(TypeError, match="`adata` must be an AnnData or a MuData; got str"):
            order_latents(model, "my_key")

    def test_a_class_is_no_model(self):
        with pytest.raises(TypeError, match="got the class SCVI"):
            order_latents(SCVI)

    def test_a_latent_on_the_circle_is_an_error(self, model, monkeypatch):
        zeros = torch.zeros(60, 6)
        monkeypatch.setattr(model.module, "inference", lambda **_: {"qz": VonMises(zeros, zeros + 1)})
        with pytest.raises(TypeError, match=r"SCVI gave no mean and variance of each cell.*no attribute 'scale'"):
            order_latents(model)
        assert "ordered_latent" not in model.adata.uns

    def test_one_scale_for_all_latents_is_an_error(self, model, monkeypatch):
        class Spherical:
            loc, scale = torch.zeros(60, 6), torch.ones(60, 1)

        monkeypatch.setattr(model.module, "inference", lambda **_: {"qz": Spherical})
        with pytest.raises(TypeError, match=r"shapes \(60, 6\) and \(60, 1\) for 60 cells"):
            order_latents(model)

    def test_a_network_that_has_diverged_is_an_error(self):
        model = build("SCVI", cells("SCVI"))
        with torch.no_grad():
            model.module.z_encoder.mean_encoder.bias[1] = np.nan
        with pytest.raises(ValueError, match="found invalid values"):
            order_latents(model)
        assert len(model.adata.obsm) == 0

    def test_an_untrained_model_is_an_error_as_in_scvi(self, monkeypatch):
        adata = cells("SCVI")
        setup("SCVI", adata)
        model = SCVI(adata, **SMALL)
        with pytest.raises(RuntimeError, match="from an untrained model"):
            model.get_latent_representation()
        # Not every class asks for itself (RESOLVI does not).
        monkeypatch.setattr(SCVI, "get_latent_representation", lambda _, return_dist: pytest.fail("was asked"))
        with pytest.raises(RuntimeError, match="from an untrained model"):
            order_latents(model)

    def test_no_cells_are_an_error(self, model):
        with pytest.raises(ValueError, match="no cells"):
            order_latents(model, cells("SCVI")[:0].copy())

    @pytest.mark.parametrize("key", ["a/b", ""])
    def test_a_bad_key_is_an_error(self, model, key):
        with pytest.raises(ValueError, match="`key_added` must be a non-empty string without '/'"):
            order_latents(model, key_added=key)
