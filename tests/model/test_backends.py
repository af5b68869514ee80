"""Training by the backends is LinearSCVI's training: minibatches, history, hooks, optimizers, and what is left behind."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from scipy import sparse
from scvi.dataloaders import AnnDataLoader
from scvi.model import LinearSCVI

from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.loader import CountsLoader, counts_loader
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

BACKENDS = ("numba", "torch")
QUIET = pytest.mark.filterwarnings("ignore:Training ended with a KL weight")
pytestmark = QUIET


def built(cls=LDVAE, adata=None, setup=None, **kwargs):
    adata = counts(150, 30) if adata is None else adata.copy()
    cls.setup_anndata(adata, **(setup or {}))
    scvi.settings.seed = 0
    return cls(adata, n_latent=3, **kwargs)


def fitted(backend, adata=None, *, epochs=4, setup=None, options=None, **kwargs):
    """A model after training; a LinearSCVI where ``backend`` is None."""
    cls = LinearSCVI if backend is None else LDVAE
    model = built(cls, adata, setup, **(options or {}))
    scvi.settings.seed = 1
    kwargs = {"batch_size": 32, **kwargs}
    model.train(epochs, **TRAIN, **kwargs, **({} if backend is None else {"backend": backend}))
    return model


def assert_same_history(ours, theirs, rtol=1e-4):
    assert list(ours.history) == list(theirs.history)
    for key, values in theirs.history.items():
        pd.testing.assert_frame_equal(ours.history[key], values, check_dtype=False, rtol=rtol, atol=1e-4)


class Recorder(Callback):
    """The cells of each minibatch, and what a callback is told."""

    def __init__(self):
        self.totals, self.metrics, self.steps = [], [], 0

    def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
        x = batch["X"]
        self.totals.append((x if x.layout is torch.strided else x.to_dense()).sum(1).numpy())
        self.steps += 1

    def on_train_epoch_end(self, trainer, plan):
        self.metrics.append(dict(trainer.callback_metrics))


def _with_layer(adata):
    adata.layers["raw"] = adata.X.copy()
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)


def _int64(adata):
    adata.X = adata.X.astype(np.int64)


def _dense(adata):
    adata.X = adata.X.toarray()


def _dense_int(adata):
    adata.X = adata.X.toarray().astype(np.int32)


def _double(adata):
    adata.X = adata.X.astype(np.float64)


DATA = {
    "CSR": (lambda adata: None, None),
    "dense": (_dense, None),
    "int64": (_int64, None),
    "dense int32": (_dense_int, None),
    "float64": (_double, None),
    "layer": (_with_layer, "raw"),
}


@pytest.mark.grid
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}, {"batch_size": 7}])
@pytest.mark.parametrize("indices", [None, "some", "mask"])
def test_minibatches_are_those_of_scvi_tools(data, options, indices):
    prepare, layer = DATA[data]
    adata = counts(50, 12, n_batches=3)
    adata.obs["age"] = np.linspace(-1, 1, 50)
    prepare(adata)
    setup = {"batch_key": "batch", "continuous_covariate_keys": ["age"], "layer": layer}
    manager = built(adata=adata, setup=setup).adata_manager
    options = {"batch_size": 16, **options}
    if indices is not None:
        chosen = np.random.default_rng(0).permutation(50)[:23]
        options["indices"] = np.isin(np.arange(50), chosen) if indices == "mask" else chosen
    batches = {}
    for make in (AnnDataLoader, counts_loader):
        torch.manual_seed(0)
        loader = make(manager, **options)
        # Twice, since an epoch follows upon an epoch.
        batches[make] = [batch for _ in range(2) for batch in loader], torch.rand(3)
        assert len(loader) * 2 == len(batches[make][0])
    assert isinstance(loader, CountsLoader)
    (theirs, their_draw), (ours, our_draw) = batches.values()
    torch.testing.assert_close(our_draw, their_draw)
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other)
        for name, value in other.items():
            found = one[name].to_dense() if name == "X" else torch.as_tensor(one[name])
            assert found.dtype == value.dtype
            torch.testing.assert_close(found, value, rtol=0, atol=0)


HISTORIES = [
    {},
    {"check_val_every_n_epoch": 1, "train_size": 0.7},
    {"plan_kwargs": {"on_step": True}, "check_val_every_n_epoch": 1},
    {"early_stopping": True, "early_stopping_patience": 2, "train_size": 0.8},
    {"limit_train_batches": 2},
    {"limit_train_batches": 0.5, "check_val_every_n_epoch": 2},
    {"max_steps": 7, "check_val_every_n_epoch": 1},
    {"log_every_n_steps": 1},
    {"log_every_n_steps": 3, "kl": 8},
    {"datasplitter_kwargs": {"drop_last": True}, "batch_size": 40},
    {"datasplitter_kwargs": {"external_indexing": [np.arange(0, 90), np.arange(90, 150)]}},
    {"shuffle_set_split": False, "train_size": 0.5, "validation_size": 0.2},
    {"plan_kwargs": {"reduce_lr_on_plateau": True, "lr_patience": 1, "lr_threshold": 50.0}, "train_size": 0.8,
     "check_val_every_n_epoch": 1},
    {"plan_kwargs": {"optimizer": "AdamW", "lr": 0.01, "weight_decay": 0.1}},
    {"plan_kwargs": {"optimizer": "Custom",
                     "optimizer_creator": lambda values: torch.optim.SGD(values, lr=1e-5, momentum=0.5)}},
    {"gradient_clip_val": 5.0},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"accumulate_grad_batches": 2},
    {"batch_size": 148, "train_size": 1.0},
]  # fmt: skip


@functools.cache
def history_of_linear_scvi(case):
    return fitted(None, **arguments_of(case))


def arguments_of(case):
    arguments = dict(HISTORIES[case])
    if "kl" in arguments:
        arguments["plan_kwargs"] = {"n_steps_kl_warmup": arguments.pop("kl")}
    return arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", range(len(HISTORIES)), ids=lambda case: str(HISTORIES[case]).split(" at 0x")[0])
@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")
@pytest.mark.filterwarnings("ignore:.*last batch.*|.*lr_scheduler.*")
def test_history_is_that_of_linear_scvi(backend, case):
    theirs, ours = history_of_linear_scvi(case), fitted(backend, **arguments_of(case))
    assert_same_history(ours, theirs)
    assert ours.trainer.global_step == theirs.trainer.global_step
    assert ours.trainer.current_epoch == theirs.trainer.current_epoch
    np.testing.assert_array_equal(ours.train_indices, theirs.train_indices)
    for name, value in ours.module.named_parameters():
        assert value.is_contiguous(), name
        expected = theirs.module.get_parameter(name).detach()
        np.testing.assert_allclose(value.detach(), expected, atol=5e-3, err_msg=name)


def test_the_default_backend_is_numba():
    default, numba = (fitted(name) for name in ("auto", "numba"))
    assert_same_history(default, numba, rtol=0)
    for ours, theirs in zip(default.module.parameters(), numba.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"gene_likelihood": "zinb"}, {"gene_likelihood": "poisson"}, {"n_layers": 2}])
def test_likelihoods_train_alike(backend, options):
    theirs = fitted("scvi", options=options, check_val_every_n_epoch=1)
    assert_same_history(fitted(backend, options=options, check_val_every_n_epoch=1), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_elbo_of_fifty_epochs_is_that_of_linear_scvi(backend):
    arguments = {"epochs": 50, "plan_kwargs": {"lr": 5e-3, "n_epochs_kl_warmup": 10}, "check_val_every_n_epoch": 1}
    theirs, ours = (fitted(name, counts(300, 40), **arguments) for name in (None, backend))
    for key in ("elbo_train", "elbo_validation", "reconstruction_loss_train"):
        np.testing.assert_allclose(
            ours.history[key].astype(float), theirs.history[key].astype(float), rtol=1e-3, err_msg=key
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_callbacks_see_the_same_cells_and_metrics(backend):
    recorders = []
    for name in (None, backend):
        recorders.append(Recorder())
        fitted(name, epochs=3, callbacks=[recorders[-1]], check_val_every_n_epoch=1)
    theirs, ours = recorders
    assert ours.steps == theirs.steps
    for one, other in zip(ours.totals, theirs.totals, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert one.keys() == other.keys()
        assert "elbo_train" in one
        for key, value in other.items():
            assert float(one[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_of_parameters_are_called(backend):
    model = built()
    seen = []
    model.module.px_r.register_hook(lambda gradient: seen.append(1) or torch.zeros_like(gradient))
    before = model.module.px_r.detach().clone()
    model.train(2, **TRAIN, backend=backend, batch_size=32, plan_kwargs={"weight_decay": 0.0})
    assert len(seen) == model.trainer.global_step
    torch.testing.assert_close(model.module.px_r.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["numba", "torch", "scvi"])
def test_a_second_training_is_that_of_a_linear_scvi_in_training_mode(backend):
    models = []
    for name in (None, backend):
        models.append(fitted(name, epochs=2))
        if name is None:
            models[-1].module.train()
        scvi.settings.seed = 2
        models[-1].train(2, **TRAIN, batch_size=32, **({} if name is None else {"backend": name}))
    assert_same_history(models[1], models[0])


def has_backend(model):
    """True if the model or its network keeps a backend after a training."""
    return any(isinstance(value, Backend) for each in (model, model.module) for value in vars(each).values())


@pytest.mark.parametrize("backend", ["numba", "torch", "scvi"])
def test_what_it_used_is_given_back(backend):
    model = built()
    model.module.eval()
    before = torch.get_num_threads(), torch.is_grad_enabled()
    attributes = set(model.__dict__) | set(model.module.__dict__)
    model.module.train()
    model.train(2, **TRAIN, backend=backend)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before
    assert not model.module.training
    assert not has_backend(model)
    new = (set(model.__dict__) | set(model.module.__dict__)) - attributes
    assert not {name for name in new if "splitter" in name}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saved_model_is_the_trained_one(backend, tmp_path):
    model = fitted(backend)
    model.save(tmp_path / "model", save_anndata=True)
    loaded = LDVAE.load(tmp_path / "model", accelerator="cpu")
    for name, value in model.module.state_dict().items():
        torch.testing.assert_close(loaded.module.state_dict()[name], value, rtol=0, atol=0)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    elbos = []
    for each in (model, loaded):
        scvi.settings.seed = 0
        elbos.append(float(each.get_elbo()))
    assert elbos[0] == pytest.approx(elbos[1])


def test_a_failed_training_leaves_nothing_behind():
    model = built()
    with torch.no_grad():
        model.module.z_encoder.mean_encoder.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="diverged"):
        model.train(2, **TRAIN, backend="numba")
    assert not has_backend(model)
    assert "_data_splitter_cls" not in model.__dict__
