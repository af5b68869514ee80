"""What compiled loops may not do to those who bring other data, other networks or other machines."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scvi.train import TrainingPlan

from ldvae_ext.backends.choose import choose_backend
from ldvae_ext.model import LDVAE
from tests.helpers import counts

BACKENDS = ["numba", "torch"]
# torch says so of the first sparse tensor of a process; here it is the tests that make it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Training ended with a KL weight"),
]


def fresh(**kwargs):
    adata = counts(n_cells=60, n_batches=3)
    adata.obs["label"] = np.resize(["a", "b"], 60)
    LDVAE.setup_anndata(adata, batch_key="batch", labels_key="label")
    return LDVAE(adata, n_latent=3, **kwargs)


def minibatch(model):
    return next(iter(model._make_data_loader(model.adata, batch_size=20)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_minibatch_of_other_genes_is_refused(backend, is_sparse):
    model = fresh()
    tensors = minibatch(model)
    wider = torch.cat([tensors["X"], tensors["X"]], dim=1)
    tensors["X"] = wider.to_sparse_csr() if is_sparse else wider
    model.module.train()
    with pytest.raises(ValueError, match="must have the 20 genes of the network; got 40"):
        choose_backend(model.module, backend).loss(model.module, tensors, 1.0)
    model.is_trained_ = True
    with pytest.raises(ValueError, match="must have the 20 genes of the network; got 40"):
        model.ablate(dataloader=[tensors])


@pytest.mark.parametrize("dispersion", ["gene-label", "gene-batch"])
def test_a_code_without_a_dispersion_is_refused(dispersion):
    model = fresh(dispersion=dispersion)
    tensors = minibatch(model)
    tensors["labels" if dispersion == "gene-label" else "batch"][3] = 7
    model.module.train()
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"Codes must be|Class values|out of"):
        choose_backend(model.module, "numba").loss(model.module, tensors, 1.0)


def test_columns_beyond_the_genes_are_refused():
    model = fresh()
    tensors = minibatch(model)
    x = tensors["X"].to_sparse_csr()
    tensors["X"] = torch.sparse_csr_tensor(
        x.crow_indices(), x.col_indices() + 5, x.values(), size=x.shape, check_invariants=False
    )
    model.module.train()
    with pytest.raises(ValueError, match="columns of sparse counts must be 0 to 19"):
        choose_backend(model.module, "numba").loss(model.module, tensors, 1.0)


def test_mixed_precision_is_scvi_tools_own():
    model = fresh()
    model.train(1, precision="bf16-mixed", accelerator="cpu", enable_progress_bar=False)
    assert np.isfinite(model.history["elbo_train"].iloc[-1, 0])
    with pytest.raises(ValueError, match="does not go with `precision='bf16-mixed'`"):
        model.train(1, precision="bf16-mixed", backend="numba")


def test_a_plan_of_ones_own_finds_latents_with_a_graph_and_distributions():
    seen = []

    class Plan(TrainingPlan):
        def training_step(self, batch, batch_idx):
            inferred, generated, losses = self.forward(batch, loss_kwargs=self.loss_kwargs)
            seen.append((inferred["z"].requires_grad, sorted(generated)))
            return losses.loss

    class Model(LDVAE):
        _training_plan_cls = Plan

    adata = counts(n_cells=60, n_batches=3)
    Model.setup_anndata(adata, batch_key="batch")
    model = Model(adata, n_latent=3)
    model.train(1, accelerator="cpu", enable_progress_bar=False)
    assert seen[0] == (True, ["pl", "px", "pz"])
    with pytest.raises(ValueError, match="does not go with the training plan `Plan`"):
        model.train(1, backend="numba")


def test_an_encoder_that_was_replaced_is_the_one_that_is_read():
    class Shifted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.z_transformation = inner, inner.z_transformation

        def forward(self, *args):
            posterior, sample = self.inner(*args)
            return type(posterior)(posterior.loc + 1, posterior.scale), sample

    model = fresh()
    model.train(1, accelerator="cpu", enable_progress_bar=False)
    model.module.z_encoder = Shifted(model.module.z_encoder)
    model.module.eval()
    model.export_to_anndata(key_added="shifted")
    names = list(model.adata.uns["shifted"]["names"])
    order = [int(name.split("_")[1]) for name in names]
    sign = np.sign((model.get_latent_representation()[:, order] * model.adata.obsm["X_shifted"]).sum(axis=0))
    np.testing.assert_allclose(
        model.adata.obsm["X_shifted"] * sign, model.get_latent_representation()[:, order], atol=1e-5
    )


def test_where_nothing_can_be_kept_loops_are_compiled_all_the_same(tmp_path):
    script = """
import numba.core.caching as caching
class Nowhere:
    @classmethod
    def from_function(cls, *_):
        return None
caching.CacheImpl._locator_classes = [Nowhere]
import numpy as np
import ldvae_ext.kernels.jit
assert ldvae_ext.kernels.jit.CACHE is False
from ldvae_ext.kernels.vector_math import exp
assert abs(exp(np.float32(1)) - np.e) < 1e-6
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_readers_call_the_hooks_of_encoders_and_need_none_of_what_comes_later():
    model = fresh(latent_distribution="ln")
    model.train(2, accelerator="cpu", enable_progress_bar=False)
    module, called = model.module, []
    before = model.get_latent_kl()
    later = (module.z_encoder.z_transformation, module.decoder.factor_regressor)
    for layer in later:
        layer.register_forward_pre_hook(lambda *_: called.append(1))
    pd.testing.assert_frame_equal(model.get_latent_kl(), before, check_exact=True)
    assert not called
    module.z_encoder.mean_encoder.register_forward_pre_hook(lambda *_: called.append(1))
    pd.testing.assert_frame_equal(model.get_latent_kl(), before, rtol=1e-4)
    assert called


def test_an_encoder_of_the_library_needs_no_more_than_a_forward():
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args)

    model = fresh()
    model.train(1, accelerator="cpu", enable_progress_bar=False)
    before = model.get_latent_kl()
    model.module.l_encoder = Wrapped(model.module.l_encoder)
    pd.testing.assert_frame_equal(model.get_latent_kl(), before, rtol=1e-4)


class Half(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class HalfNorm(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("layer", "kind"),
    [("mean_encoder", Half), ("var_encoder", Half), ("encoder.fc_layers.Layer 0.0", Half),
     ("encoder.fc_layers.Layer 0.1", HalfNorm), ("encoder.fc_layers.Layer 0.3", None)],
)  # fmt: skip
def test_a_layer_of_another_kind_is_the_one_that_is_read(layer, kind):
    model = fresh()
    model.train(2, accelerator="cpu", enable_progress_bar=False)
    before, replaced = model.get_latent_kl(), model.module.z_encoder.get_submodule(layer)
    if kind is None:
        replaced.forward = lambda x: torch.relu(x) / 2
    else:
        replaced.__class__ = kind
    mean, variance = model.get_latent_representation(return_dist=True)
    expected = (variance + mean**2 - 1 - np.log(variance)) / 2
    np.testing.assert_allclose(model.get_latent_kl(), expected, rtol=1e-3, atol=1e-6)
    assert not np.allclose(before, expected, rtol=1e-2)


@pytest.mark.parametrize("is_per_cell", [True, False])
def test_a_weight_of_the_divergence_may_be_another_for_each_cell_and_may_learn(is_per_cell):
    model = fresh()
    tensors, losses, gradients = minibatch(model), [], []
    for backend in ("scvi", *BACKENDS):
        weight = torch.linspace(0, 1, 20) if is_per_cell else torch.tensor(0.3, requires_grad=True)
        torch.manual_seed(0)
        loss = choose_backend(model.module.train(), backend).loss(model.module, tensors, weight)
        losses.append(float(loss.loss.detach()))
        if not is_per_cell:
            loss.loss.backward()
            gradients.append(float(weight.grad))
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-5)
    np.testing.assert_allclose(gradients[1:], gradients[:1] * len(gradients[1:]), rtol=1e-4)
