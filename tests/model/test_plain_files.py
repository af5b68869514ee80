"""Models without pickle: the same model, no code that runs, and a reason where it cannot be read."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from ldvae_ext.model._plain_files import DESCRIPTION, WEIGHTS
from tests.helpers import TRAIN, counts

pytestmark = pytest.mark.filterwarnings("ignore:Training ended with a KL weight")
COVARIATES = {"continuous_covariate_keys": ["depth"], "categorical_covariate_keys": ["donor"]}
CASES = {
    "default": ({}, {}),
    "batches and covariates": ({"batch_key": "batch", **COVARIATES}, {"encode_covariates": True}),
    "zinb, ln": ({}, {"gene_likelihood": "zinb", "latent_distribution": "ln"}),
    "gene-batch": ({"batch_key": "batch"}, {"dispersion": "gene-batch", "use_observed_lib_size": True}),
}


def cells():
    adata = counts(80, 20)
    rng = np.random.default_rng(0)
    adata.obs["depth"] = rng.normal(size=80)
    adata.obs["donor"] = pd.Categorical(rng.choice(["CD4+/CD25 T Reg", "$x$", "<b>"], 80))
    return adata


def trained(case="default"):
    setup, options = CASES[case]
    adata = cells()
    LDVAE.setup_anndata(adata, **setup)
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=3, **options)
    model.train(2, **TRAIN)
    if model.module.latent_distribution == "normal":
        model.rotate()
    return model


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_that_was_saved(tmp_path, case, with_data):
    model = trained(case)
    model.save(tmp_path / "model", save_anndata=with_data)
    opened = [
        LDVAE.load(tmp_path / "model", None if with_data else cells(), trusted=trusted, accelerator="cpu")
        for trusted in (True, False)
    ]
    for name, value in model.module.state_dict().items():
        assert torch.equal(opened[1].module.state_dict()[name], value), name
    known, found = (dict(each._get_user_attributes()) for each in opened)
    assert {name for name in known if name.endswith("_")} == {name for name in found if name.endswith("_")}
    for key, values in model.history.items():
        pd.testing.assert_frame_equal(
            opened[1].history[key].astype(float), values.astype(float), check_index_type=False
        )
    np.testing.assert_array_equal(opened[1].train_indices, model.train_indices)
    np.testing.assert_array_equal(
        opened[1].get_latent_representation(use_posterior_mean=True),
        opened[0].get_latent_representation(use_posterior_mean=True),
    )
    np.testing.assert_array_equal(opened[1].ablate(latents=[0]).X, opened[0].ablate(latents=[0]).X)
    if model.rotation is not None:
        np.testing.assert_array_equal(opened[1].rotation.matrix_kk, model.rotation.matrix_kk)
    assert opened[1].init_params_ == opened[0].init_params_
    opened[1].save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).stat().st_size == (tmp_path / "model" / WEIGHTS).stat().st_size


def test_without_data_it_decodes(tmp_path):
    model = trained()
    model.save(tmp_path / "model")
    opened = LDVAE.load(tmp_path / "model", False, trusted=False, accelerator="cpu")
    np.testing.assert_array_equal(opened.get_decoder().weight_gk, model.get_decoder().weight_gk)


def test_the_random_state_of_the_caller_stays(tmp_path):
    trained().save(tmp_path / "model")
    torch.manual_seed(1)
    LDVAE.load(tmp_path / "model", False, trusted=False, accelerator="cpu")
    after = torch.rand(1)
    torch.manual_seed(1)
    assert after == torch.rand(1)


class Harmful:
    """A pickle that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_opened(tmp_path):
    model = trained()
    model.save(tmp_path / "model")
    (tmp_path / "model" / "model.pt").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    LDVAE.load(tmp_path / "model", cells(), trusted=False, accelerator="cpu")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "model" / WEIGHTS).write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with pytest.raises(ValueError, match="no model that can be read"):
        LDVAE.load(tmp_path / "model", cells(), trusted=False)
    assert not (tmp_path / "harm").exists()


def test_a_pickle_alone_is_refused_with_the_reason(tmp_path):
    adata = cells()
    LinearSCVI.setup_anndata(adata)
    linear = LinearSCVI(adata, n_latent=2)
    linear.is_trained_ = True
    linear.save(tmp_path / "linear")
    with pytest.raises(ValueError, match="opening a pickle runs code"):
        LDVAE.load(tmp_path / "linear", cells(), trusted=False)
    with pytest.raises(ValueError, match="opening a pickle runs code"):
        LDVAE.load(tmp_path / "nothing", cells(), trusted=False)
    with pytest.raises(ValueError, match="backup_url"):
        LDVAE.load(tmp_path / "linear", cells(), trusted=False, backup_url="there")


def test_what_only_a_pickle_can_hold_is_saved_as_one(tmp_path):
    adata = cells()
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=2, var_activation=torch.nn.functional.softplus)
    model.is_trained_ = True
    model.save(tmp_path / "model")
    assert not (tmp_path / "model" / DESCRIPTION).exists()
    assert isinstance(LDVAE.load(tmp_path / "model", cells()), LDVAE)
    with pytest.raises(ValueError, match="trusted=True"):
        LDVAE.load(tmp_path / "model", cells(), trusted=False)


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS])
def test_damaged_files_raise_one_error(tmp_path, name):
    """Files that are cut or have other bytes: a ValueError, a warning of other genes, or the right model."""
    trained().save(tmp_path / "model")
    path = tmp_path / "model" / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    n_refused = 0
    for i in range(60):
        damaged = bytearray(whole)
        if i % 2:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            # Most of the bytes that say what the others mean are at the beginning.
            for at in rng.integers(min(len(whole), 4000), size=3):
                damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            LDVAE.load(tmp_path / "model", False, trusted=False, accelerator="cpu")
        except ValueError:
            n_refused += 1
    assert n_refused > 30


@pytest.mark.parametrize(
    ("old", "new"),
    [("init_params_", "init_params"), ("n_hidden", "n_hiden"), ("non_kwargs", "kwargs"), ("setup_args", "setup_arg")],
)
def test_a_description_of_something_else_raises_the_same_error(tmp_path, old, new):
    trained().save(tmp_path / "model")
    path = tmp_path / "model" / DESCRIPTION
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(f'"{old}"', f'"{new}"'))
    with pytest.raises(ValueError, match="holds no model that can be read"):
        LDVAE.load(tmp_path / "model", cells(), trusted=False, accelerator="cpu")


def test_weights_of_another_network_raise_the_same_error(tmp_path):
    trained().save(tmp_path / "model")
    other = trained("zinb, ln")
    other.module.px_r = torch.nn.Parameter(torch.zeros(7))
    other.save(tmp_path / "other")
    (tmp_path / "model" / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="holds no model that can be read"):
        LDVAE.load(tmp_path / "model", cells(), trusted=False, accelerator="cpu")
