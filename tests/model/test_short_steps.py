"""Steps that pass by Lightning's hooks: the same training, and no step of that kind where somebody listens."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback

from ldvae_ext import _steps
from ldvae_ext.model import LDVAE
from ldvae_ext.module._query import QueryTrainingPlan
from tests.helpers import TRAIN, counts

pytestmark = pytest.mark.filterwarnings("ignore:Training ended with a KL weight")
QUIET = {**TRAIN, "batch_size": 16}


def trained(epochs=3, **kwargs):
    adata = counts(150, 30)
    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=3)
    model.train(epochs, **{**QUIET, **kwargs})
    return model


def listener(hook, *, on_class):
    """A callback with one hook, on its class or on itself, as those of LambdaCallback are; and the list of its calls."""
    calls = []

    def listen(*_, **__):
        calls.append(1)

    return (type("Listener", (Callback,), {hook: listen})() if on_class else LambdaCallback(**{hook: listen})), calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"check_val_every_n_epoch": 1},
        {"log_every_n_steps": 1},
        {"log_every_n_steps": 3},
        {"max_steps": 13},
        {"limit_train_batches": 5},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"plan_kwargs": {"reduce_lr_on_plateau": True}, "check_val_every_n_epoch": 1},
        {"plan_kwargs": {"n_steps_kl_warmup": 20}},
        {"early_stopping": True, "early_stopping_patience": 1, "check_val_every_n_epoch": 1},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_training_is_the_same_to_the_bit(monkeypatch, options):
    ours = trained(**options)
    monkeypatch.setattr(_steps.ShortSteps, "fit", staticmethod(lambda _: False))
    lightnings = trained(**options)
    assert ours.history.keys() == lightnings.history.keys()
    for key, values in lightnings.history.items():
        np.testing.assert_array_equal(ours.history[key].to_numpy(), values.to_numpy(), err_msg=key)
    np.testing.assert_array_equal(ours.get_loadings(), lightnings.get_loadings())
    for name, value in lightnings.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], value, rtol=0, atol=0)
    loops = [model.trainer.fit_loop.epoch_loop for model in (ours, lightnings)]
    assert ours.trainer.global_step == lightnings.trainer.global_step > 0
    assert loops[0].batch_progress == loops[1].batch_progress
    progress = [loop.automatic_optimization.optim_progress for loop in loops]
    assert progress[0] == progress[1]
    assert all("advance" not in loop.__dict__ for loop in loops)


def test_steps_inside_of_an_epoch_are_short(monkeypatch):
    """150 cells, 9 minibatches of 16 and one of 6; the logged ones are each tenth."""
    taken = []
    full = _steps.ShortSteps.__call__

    def seen(self, batches):
        before = self._loop.batch_progress.current.ready
        ours = []
        inner, self._advance = self._advance, lambda each: (ours.append(before), inner(each))
        full(self, batches)
        self._advance = inner
        taken.append((before, not ours))

    monkeypatch.setattr(_steps.ShortSteps, "__call__", seen)
    trained(2, train_size=1.0, log_every_n_steps=1000)
    n_batches = len(taken) // 2
    assert n_batches == 10
    assert taken == [(i, 0 < i < n_batches - 1) for _ in range(2) for i in range(n_batches)]


@pytest.mark.parametrize("on_class", [True, False])
@pytest.mark.parametrize("hook", _steps.CALLBACK_HOOKS)
def test_a_callback_is_called_at_each_step(hook, on_class):
    callback, calls = listener(hook, on_class=on_class)
    model = trained(callbacks=[callback])
    assert len(calls) == model.trainer.global_step > 0


@pytest.mark.parametrize(
    "hook", ["optimizer_step", "on_before_zero_grad", "configure_gradient_clipping", "on_before_batch_transfer"]
)
@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer` in `LightningModule`")
def test_a_hook_of_a_training_plan_is_called_at_each_step(monkeypatch, hook):
    n_calls = 0
    own = getattr(QueryTrainingPlan, hook)

    def listen(self, *args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LDVAE, "_training_plan_cls", type("Plan", (QueryTrainingPlan,), {hook: listen}))
    n_steps = trained().trainer.global_step
    assert n_calls == n_steps > 0


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 1.0},
        {"accumulate_grad_batches": 2},
        {"detect_anomaly": True},
        {"profiler": "simple"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_step_leave_it_to_lightning(monkeypatch, options):
    found = []
    fit = _steps.ShortSteps.fit
    monkeypatch.setattr(_steps.ShortSteps, "fit", staticmethod(lambda trainer: found.append(fit(trainer)) or found[-1]))
    trained(1, **options)
    assert found == [False]
    trained(1)
    assert found == [False, True]


def test_weights_are_stored_by_columns_in_training_only(monkeypatch):
    inside = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, plan):
            weight = plan.module.z_encoder.encoder.fc_layers[0][0].weight
            moments = trainer.optimizers[0].state[weight]["exp_avg"]
            inside.append((weight.stride(), moments.stride(), weight.grad.stride(), torch.get_num_threads()))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = trained(callbacks=[Look()])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(inside) == {((1, 128), (1, 128), (1, 128), 1)}
    assert all(value.is_contiguous() for value in model.module.state_dict().values())


def test_weights_are_stored_by_rows_after_an_error():
    class Fails(Callback):
        def on_train_epoch_end(self, trainer, plan):
            raise RuntimeError

    adata = counts(150, 30)
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=3)
    with pytest.raises(RuntimeError):
        model.train(2, **QUIET, callbacks=[Fails()])
    assert all(value.is_contiguous() for value in model.module.state_dict().values())


def test_a_resumed_training_has_its_moments_where_its_weights_are(tmp_path):
    """A checkpoint of Lightning holds moments that were stored by rows, if they come from another backend."""
    adata = counts(150, 30)
    LDVAE.setup_anndata(adata)
    losses = []
    for backend in ("scvi", "numba"):
        scvi.settings.seed = 0
        first = LDVAE(adata, n_latent=3)
        first.train(2, **QUIET, backend="scvi")
        path = tmp_path / f"{backend}.ckpt"
        first.trainer.save_checkpoint(path)
        scvi.settings.seed = 0
        second = LDVAE(adata, n_latent=3)
        second.train(4, **QUIET, backend=backend, ckpt_path=path)
        losses.append(second.history["train_loss"].to_numpy()[-1].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_optimizer_that_takes_several_evaluations_for_a_step_trains(monkeypatch):
    losses = []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(_steps.ShortSteps, "fit", staticmethod(lambda _: False))
        creator = partial(torch.optim.LBFGS, lr=0.01, max_iter=2)
        losses.append(
            trained(1, plan_kwargs={"optimizer": "Custom", "optimizer_creator": creator}).history["train_loss"]
        )
    np.testing.assert_array_equal(losses[0].to_numpy(), losses[1].to_numpy())


def test_a_parameter_that_a_callback_replaces_is_trained():
    class Replaces(Callback):
        def on_train_epoch_start(self, trainer, plan):
            if trainer.current_epoch == 1:
                plan.module.px_r = torch.nn.Parameter(plan.module.px_r.detach().clone() + 1.0)
                trainer.optimizers[0].add_param_group({"params": [plan.module.px_r]})
                self.value = plan.module.px_r.detach().clone()

    replaces = Replaces()
    model = trained(3, callbacks=[replaces])
    assert not torch.equal(model.module.px_r.detach(), replaces.value)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_an_optimizer_are_called_at_each_step(kind):
    calls = []

    class Hooks(Callback):
        def on_train_start(self, trainer, plan):
            register = getattr(trainer.optimizers[0], f"register_step_{kind}_hook")
            register(lambda *_: calls.append(1) or None)

    model = trained(callbacks=[Hooks()])
    assert len(calls) == model.trainer.global_step > 0


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"fused": False}], ids=str)
def test_only_a_plain_fused_adam_is_stepped_here(options):
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([parameter], **{"fused": True, **options})
    assert _steps.FusedAdam.fits(optimizer) == (options == {})


def test_a_fused_adam_by_columns_is_that_of_torch():
    # Sizes without a remainder of vectors, which torch rounds in another way.
    start, gradients = torch.randn(16, 8), torch.randn(6, 16, 8)
    found = []
    for by_columns in (False, True):
        value = start.t().contiguous().t() if by_columns else start.clone()
        parameters = [torch.nn.Parameter(value), torch.nn.Parameter(torch.ones(4))]
        optimizer = torch.optim.Adam(parameters, lr=0.1, weight_decay=1e-3, fused=True)
        ours = _steps.FusedAdam(optimizer)
        for i, gradient in enumerate(gradients):
            parameters[0].grad = gradient.t().contiguous().t() if by_columns else gradient.clone()
            # A parameter without a gradient stays.
            parameters[1].grad = torch.full((4,), float(i)) if i % 2 else None
            (ours if by_columns else optimizer).step()
        found.append([each.detach().clone() for each in parameters])
        assert optimizer.state[parameters[0]]["step"] == 6
        assert optimizer.state[parameters[1]]["step"] == 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_moments_in_another_order_are_left_to_torch():
    start, gradients = torch.randn(16, 8), torch.randn(3, 16, 8)
    found = []
    for is_ours in (False, True):
        value = torch.nn.Parameter(start.t().contiguous().t())
        optimizer = torch.optim.Adam([value], lr=0.1, fused=True)
        for i, gradient in enumerate(gradients):
            value.grad = gradient.t().contiguous().t()
            (_steps.FusedAdam(optimizer) if is_ours else optimizer).step()
            if i == 0:
                # As a callback does that loads the state of another optimizer.
                optimizer.state[value]["exp_avg"] = optimizer.state[value]["exp_avg"].contiguous()
        found.append(value.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
