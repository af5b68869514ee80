"""Trainings that were killed or stopped go on as if nothing had happened, and folders of other trainings are refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback

from ldvae_ext.model import LDVAE, _resuming
from ldvae_ext.model._descriptions import described
from ldvae_ext.model._resuming import CHECKPOINT
from tests.datamodule import CountsDataModule
from tests.helpers import TRAIN, counts

pytestmark = pytest.mark.slow
QUICK = {**TRAIN, "batch_size": 32, "kl_warmup": 3}


class StoppedError(Exception):
    """What stands for the end of a process in tests without one."""


class Stop(Callback):
    """Ends a training inside of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, plan, minibatch, number):
        if trainer.current_epoch == self.epoch and number == 2:
            raise StoppedError


@pytest.fixture(autouse=True)
def _a_checkpoint_after_each_epoch(monkeypatch):
    monkeypatch.setattr(_resuming, "_SHARE", 1.0)


@pytest.fixture(scope="module")
def cells():
    adata = counts(150, 30, 2)
    LDVAE.setup_anndata(adata, batch_key="batch")
    return adata


def new(cells, seed=0, **options):
    scvi.settings.seed = seed
    return LDVAE(cells, n_latent=3, **options)


def trained(cells, max_epochs=6, seed=0, **options):
    model = new(cells, seed)
    model.train(max_epochs, **{**QUICK, **options})
    return model


def stopped(cells, folder, epoch, max_epochs=6, **options):
    model = new(cells)
    with pytest.raises(StoppedError):
        model.train(max_epochs, **{**QUICK, **options, "resume": folder, "callbacks": [Stop(epoch)]})


def assert_same(model, other):
    for value, expected in zip(model.module.state_dict().values(), other.module.state_dict().values(), strict=True):
        assert torch.equal(value, expected)
    assert set(model.history) == set(other.history)
    for name, table in other.history.items():
        pd.testing.assert_frame_equal(model.history[name], table)
    for name in ("train_indices", "validation_indices"):
        np.testing.assert_array_equal(getattr(model, name), getattr(other, name))
    assert model.kl_weight_ == other.kl_weight_


def test_a_training_whose_process_is_killed_ends_as_if_it_had_not_been(tmp_path):
    code = """
        import os, signal, sys
        from pathlib import Path
        import scvi
        from lightning.pytorch import Callback
        from ldvae_ext.model import LDVAE, _resuming
        from tests.helpers import counts

        class Kill(Callback):
            def on_train_batch_end(self, trainer, plan, outputs, minibatch, number):
                if trainer.current_epoch == 3 and number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        _resuming._SHARE = 1.0
        adata = counts(150, 30, 2)
        LDVAE.setup_anndata(adata, batch_key="batch")
        scvi.settings.seed = 0
        LDVAE(adata, n_latent=3).train(
            6, resume=sys.argv[1], batch_size=32, kl_warmup=3, check_val_every_n_epoch=1, accelerator="cpu",
            enable_progress_bar=False, callbacks=[Kill()],
        )
    """
    folder = tmp_path / "training"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert torch.load(folder / CHECKPOINT, weights_only=True)["epoch"] == 3
    adata = counts(150, 30, 2)
    LDVAE.setup_anndata(adata, batch_key="batch")
    resumed = trained(adata, seed=5, resume=folder, check_val_every_n_epoch=1)
    assert_same(resumed, trained(adata, check_val_every_n_epoch=1))
    assert len(resumed.history["elbo_validation"]) == 6
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "torch"},
        {"backend": "scvi", "check_val_every_n_epoch": 2},
        {"evaluation_mode": True, "decoder_penalty": 1e-3},
        {"kl_warmup": None, "plan_kwargs": {"n_epochs_kl_warmup": None, "n_steps_kl_warmup": 20, "optimizer": "AdamW"}},
    ],
    ids=["torch", "scvi", "evaluation", "steps"],
)
def test_a_stopped_training_goes_on_with_the_minibatches_and_draws_of_one_that_was_not(cells, tmp_path, options):
    stopped(cells, tmp_path, 4, **options)
    assert_same(trained(cells, seed=5, resume=tmp_path, **options), trained(cells, **options))


def test_early_stopping_and_learning_rates_go_on(cells, tmp_path):
    options = {
        "max_epochs": 30,
        "early_stopping": True,
        "early_stopping_patience": 3,
        # The first check after the warm-up is the best one, so that the training ends three epochs after it.
        "early_stopping_min_delta": 1e6,
        "early_stopping_warmup_epochs": 6,
        "plan_kwargs": {"lr": 1e-2, "reduce_lr_on_plateau": True, "lr_patience": 1, "lr_min": 1e-5},
    }
    stopped(cells, tmp_path, 4, **options)
    whole = trained(cells, **options)
    assert len(whole.history["elbo_train"]) == 6 + 1 + 3
    assert_same(trained(cells, seed=5, resume=tmp_path, **options), whole)
    # A training that has stopped early is complete.
    assert_same(trained(cells, seed=6, resume=tmp_path, **{**options, "max_epochs": 40}), whole)


def test_a_complete_training_is_restored_without_a_step(cells, tmp_path):
    whole = trained(cells, resume=tmp_path)
    written = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    again = trained(cells, seed=5, resume=tmp_path, callbacks=[Stop(0)])
    assert_same(again, whole)
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == written
    assert again.trainer.global_step == whole.trainer.global_step
    assert again.is_trained_
    assert not again.module.training


def test_more_epochs_continue_a_complete_training(cells, tmp_path):
    trained(cells, resume=tmp_path)
    assert_same(trained(cells, 9, seed=5, resume=tmp_path), trained(cells, 9))
    with pytest.raises(ValueError, match="has 9 epochs, more than `max_epochs`"):
        trained(cells, 6, resume=tmp_path)


def test_a_checkpoint_is_continued_without_being_written_to(cells, tmp_path):
    stopped(cells, tmp_path / "folder", 3)
    before = (tmp_path / "folder" / CHECKPOINT).read_bytes()
    model = trained(cells, seed=5, resume=tmp_path / "folder" / CHECKPOINT)
    assert_same(model, trained(cells))
    assert (tmp_path / "folder" / CHECKPOINT).read_bytes() == before


def test_a_second_training_continues_after_the_history_of_the_first(cells, tmp_path):
    whole = trained(cells, 2, kl_warmup=1)
    whole.train(4, **QUICK)
    model = trained(cells, 2, kl_warmup=1)
    with pytest.raises(StoppedError):
        model.train(4, **QUICK, resume=tmp_path, callbacks=[Stop(2)])
    # The same session goes on.
    model.train(4, **QUICK, resume=tmp_path)
    assert_same(model, whole)
    assert len(model.history["elbo_train"]) == 6


def test_ctrl_c_leaves_the_checkpoint_before_it(cells, tmp_path):
    press = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: trainer.global_step == 17 and signal.raise_signal(signal.SIGINT)
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = new(cells)
    try:
        with pytest.raises(KeyboardInterrupt, match="can be used"):
            model.train(6, **QUICK, resume=tmp_path, callbacks=[press])
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["epoch"] == 3
    assert model.is_trained_
    model.train(6, **QUICK, resume=tmp_path)
    assert_same(model, trained(cells))


def test_checkpoints_are_not_written_more_often_than_they_cost(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(_resuming, "_SHARE", 1e-9)
    written = []
    own = _resuming.Resumption._write
    monkeypatch.setattr(
        _resuming.Resumption,
        "_write",
        lambda self, trainer: written.append(trainer.current_epoch) or own(self, trainer),
    )
    trained(cells, resume=tmp_path)
    assert written == [1, 6]


def test_a_diverged_training_does_not_replace_its_checkpoint(cells, tmp_path):
    class Diverge(Callback):
        def on_train_epoch_end(self, trainer, plan):
            if trainer.current_epoch == 2:
                with torch.no_grad():
                    plan.module.px_r.fill_(np.nan)

    with pytest.raises(Exception):  # noqa: B017, PT011 - which one is not the point
        trained(cells, resume=tmp_path, callbacks=[Diverge()])
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["epoch"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 64}, "`batch_size` was 32 and is 64"),
        ({"plan_kwargs": {"lr": 0.5}}, "`plan_kwargs.lr` was not given and is 0.5"),
        ({"kl_warmup": 4}, "`plan_kwargs.n_epochs_kl_warmup` was 3 and is 4"),
        ({"train_size": 0.5}, "`train_size` was not given and is 0.5"),
        ({"early_stopping": True}, "`early_stopping` was False and is True"),
    ],
)
def test_other_arguments_are_refused_with_what_differs(cells, tmp_path, options, said):
    stopped(cells, tmp_path, 2)
    with pytest.raises(ValueError, match=said):
        trained(cells, resume=tmp_path, **options)


def test_another_model_and_other_data_are_refused_with_what_differs(cells, tmp_path):
    stopped(cells, tmp_path, 2)

    def refused(match, adata=None, **options):
        if adata is not None:
            LDVAE.setup_anndata(adata, batch_key="batch")
        model = LDVAE(cells if adata is None else adata, **{"n_latent": 3, **options})
        before = {name: value.clone() for name, value in model.module.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            model.train(6, **QUICK, resume=tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())

    refused("`model.n_latent` was 3 and is 4", n_latent=4)
    refused("`model.gene_likelihood` was 'nb' and is 'zinb'", gene_likelihood="zinb")
    other = counts(150, 30, 2)
    other.X[5, 0] += 1
    refused("the counts of the data are others", other)
    # The same cells in another order.
    refused("counts.*batch|batch.*counts", counts(150, 30, 2)[::-1].copy())
    refused(r"the cells of the data are others \(150 then, 149 now\)", counts(150, 30, 2)[1:].copy())
    renamed = counts(150, 30, 2)
    renamed.var_names = [f"other{name}" for name in renamed.var_names]
    refused("the genes of the data are others", renamed)


def test_files_that_are_no_checkpoint_are_refused(cells, tmp_path):
    model = new(cells)

    def refused(match):
        with pytest.raises(ValueError, match=match):
            model.train(6, **QUICK, resume=tmp_path)

    class Code:
        def __reduce__(self):
            return print, ("this must not be printed",)

    torch.save({"callbacks": Code()}, tmp_path / CHECKPOINT)
    refused("no checkpoint that can be read")
    (tmp_path / CHECKPOINT).write_bytes(b"half")
    refused("no checkpoint that can be read")
    torch.save({"epoch": 3}, tmp_path / CHECKPOINT)
    refused("was not written by `train")
    torch.save({"epoch": 3, "ldvae_ext": {"format": 2}}, tmp_path / CHECKPOINT)
    refused("has format 2.*newer version wrote it")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        model.train(6, **QUICK, resume=tmp_path / "missing.ckpt")
    with pytest.raises(ValueError, match="either `resume` or `ckpt_path`"):
        model.train(6, **QUICK, resume=tmp_path / "new", ckpt_path="x")


def test_another_class_or_function_in_an_argument_is_refused(cells, tmp_path):
    new(cells, extra_encoder_kwargs={"activation_fn": torch.nn.ReLU}).train(6, **QUICK, resume=tmp_path)
    with pytest.raises(ValueError, match=r"activation_fn` was .*\.ReLU and is .*\.Tanh"):
        new(cells, extra_encoder_kwargs={"activation_fn": torch.nn.Tanh}).train(6, **QUICK, resume=tmp_path)
    words = [
        described({"one": value})["one"]
        for value in (np.mean, np.sum, partial(np.sum, axis=0), partial(np.sum, axis=1))
    ]
    assert len(set(words)) == 4


def test_a_data_module_with_other_cells_or_genes_is_refused(tmp_path):
    def train(adata, path=None):
        data = CountsDataModule(adata, batch_size=32, train_size=0.8)
        if path is not None:
            data.collection_path = path
        model = LDVAE(registry=data.registry, n_latent=3)
        model.train(2, datamodule=data, **{**QUICK, "kl_warmup": 1}, resume=tmp_path / "training")

    adata = counts(150, 30, 2)
    train(adata, tmp_path / "cells.zarr")
    train(adata, str(tmp_path / "cells.zarr"))
    with pytest.raises(ValueError, match="the genes of the data are others"):
        train(adata[:, ::-1].copy(), tmp_path / "cells.zarr")
    with pytest.raises(ValueError, match=r"the cells of the data are others \(150 then, 149 now\)"):
        train(adata[1:].copy(), tmp_path / "cells.zarr")
    with pytest.raises(ValueError, match=r"`datamodule.collection_path` was .*cells.zarr' and is .*other.zarr'"):
        train(adata, tmp_path / "other.zarr")


def test_an_error_before_the_training_leaves_no_folder(cells, tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(TypeError, match="wrong_name"):
        trained(cells, resume=folder, wrong_name=1)
    with pytest.raises(ValueError, match="either `resume` or `ckpt_path`"):
        trained(cells, resume=folder, ckpt_path="x")
    assert not folder.exists()
    with pytest.raises(TypeError, match=r"`resume` must be a path, as text or a `pathlib.Path`; got 3"):
        trained(cells, resume=3)


def test_checkpoints_of_other_callbacks_stay_as_they_are(cells, tmp_path):
    def write(name):
        path = tmp_path / name
        return LambdaCallback(on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(path))

    trained(cells, resume=tmp_path / "training", callbacks=[write("with.ckpt")])
    trained(cells, callbacks=[write("without.ckpt")])
    found, expected = (torch.load(tmp_path / name, weights_only=False) for name in ("with.ckpt", "without.ckpt"))
    assert found.keys() == expected.keys()
    assert found["loops"]["fit_loop"]["epoch_progress"] == expected["loops"]["fit_loop"]["epoch_progress"]
