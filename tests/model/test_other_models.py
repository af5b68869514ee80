"""Other models of scvi-tools that take a trained model, and models that are opened with latents instead of counts."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
from scipy import sparse
from scvi.external import SOLO
from scvi.model import SCANVI, SCVI

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*KL weight|.*writable|.*Sparse CSR tensor support|.*fewer than 3 cells|.*has not been trained"
)


def cells():
    adata = counts(120, 30, n_batches=2)
    adata.obs["type"] = np.resize(["A", "B", "Unknown"], 120)
    return adata


def trained(cls=LDVAE, **options):
    cls.setup_anndata(adata := cells(), batch_key="batch", labels_key="type")
    scvi.settings.seed = 0
    model = cls(adata, n_latent=3, **options)
    model.train(2, **TRAIN)
    return model


def test_unused_fields_are_registered_as_scvi_registers_them():
    ours, theirs = (trained(cls).registry["field_registries"] for cls in (LDVAE, SCVI))
    assert ours.keys() == theirs.keys()
    for name in ("size_factor", "extra_categorical_covs", "extra_continuous_covs"):
        assert ours[name] == theirs[name]


@pytest.mark.filterwarnings("ignore:.*unnormalized count data|Prior to scvi-tools")
def test_solo_finds_doublets_on_the_latents():
    model = trained()
    solo = SOLO.from_scvi_model(model, restrict_to_batch="b1")
    solo.train(2, **TRAIN)
    assert set(solo.predict(soft=False)) <= {"singlet", "doublet"}
    adata = cells()
    adata.obs["age"] = np.linspace(-1, 1, 120)
    LDVAE.setup_anndata(adata, continuous_covariate_keys=["age"])
    model = LDVAE(adata)
    with pytest.raises(ValueError, match="continuous covariates is currently unsupported"):
        SOLO.from_scvi_model(model)


def test_scanvi_starts_with_the_encoder():
    model = trained()
    scanvi = SCANVI.from_scvi_model(model, "Unknown")
    own = model.module.state_dict()
    shared = [name for name in scanvi.module.state_dict() if name in own and name.startswith("z_encoder")]
    assert shared
    for name in shared:
        np.testing.assert_array_equal(scanvi.module.state_dict()[name], own[name])
    scanvi.train(1, **TRAIN)
    assert set(scanvi.predict()) <= {"A", "B"}


class TestWithoutCounts:
    """A model opened with posteriors in obsm and no counts, as from the CELLxGENE census, and then minified."""

    def opened(self, tmp_path, **options):
        model = trained(**options)
        posterior = model.get_latent_representation(return_dist=True)
        model.save(tmp_path / "model")
        adata = cells()
        adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
        adata.obsm["_scvi_latent_qzm"], adata.obsm["_scvi_latent_qzv"] = posterior
        with pytest.warns(
            UserWarning, match=r"`adata.X` has no counts. `minify_adata` makes the model read the posteriors"
        ):
            back = LDVAE.load(tmp_path / "model", adata, accelerator="cpu")
        return model, back, posterior

    def test_latents_and_expression_are_those_of_the_counts(self, tmp_path):
        model, back, (mean, _) = self.opened(tmp_path)
        with pytest.warns(UserWarning, match="library size of each cell is the mean of its batch"):
            back.minify_adata(use_latent_qzm_key="_scvi_latent_qzm", use_latent_qzv_key="_scvi_latent_qzv")
        np.testing.assert_allclose(back.get_latent_representation(), mean, atol=1e-6)
        expected = model.get_normalized_expression(use_posterior_mean=True)
        np.testing.assert_allclose(back.get_normalized_expression(use_posterior_mean=True), expected, rtol=1e-4)
        np.testing.assert_allclose(back.get_latent_kl(), model.get_latent_kl(), rtol=1e-4)
        with pytest.raises(ValueError, match="needs counts"):
            back.get_elbo()

    def test_an_observed_library_needs_no_warning(self, tmp_path):
        _, back, (mean, _) = self.opened(tmp_path, use_observed_lib_size=True)
        back.minify_adata(use_latent_qzm_key="_scvi_latent_qzm", use_latent_qzv_key="_scvi_latent_qzv")
        np.testing.assert_allclose(back.get_latent_representation(), mean, atol=1e-6)

    def test_a_query_needs_counts(self, tmp_path):
        query = cells()
        query.X = sparse.csr_matrix(query.shape, dtype=np.float32)
        with pytest.raises(ValueError, match=r"`adata.X` has no counts"):
            LDVAE.load_query_data(query, trained())
