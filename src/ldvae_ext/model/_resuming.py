"""Trainings that may be killed: a checkpoint between epochs, from which another process continues as if nothing had happened."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback

from ldvae_ext._files import check_is_path, replacing
from ldvae_ext._formats import CHECKPOINT as FORMAT
from ldvae_ext._formats import check_format
from ldvae_ext._scvi import checks_of, set_checks_of
from ldvae_ext._steps import as_between_epochs, continue_between_epochs, end_training
from ldvae_ext.model._descriptions import described, differences, of_datamodule, of_model

CHECKPOINT = "training.ckpt"
_KEY = "ldvae_ext"
# Largest share of the time that writing checkpoints may take.
_SHARE = 0.05
_CELLS = ("train_idx", "val_idx", "test_idx")
# Arguments of the trainer without effect on the result, or with which another process may well continue.
_FREE = (
    "accelerator", "barebones", "callbacks", "default_root_dir", "devices", "enable_checkpointing", "enable_model_summary",
    "enable_progress_bar", "log_every_n_steps", "log_save_dir", "logger", "max_epochs", "max_steps", "max_time", "num_nodes", "profiler",
    "progress_bar_refresh_rate", "simple_progress_bar", "strategy",
)  # fmt: skip
# Arguments of the training plan that are no choice of the caller.
_OF_PROCESS = ("backend", "is_interrupted")


class Resumption(Callback):
    """Writes checkpoints of a training, and continues one.

    A checkpoint is written between two epochs, where the state of a training is smallest: Lightning's own state, the cells, the
    random states, and the history. Minibatches and draws after it are those of the training that was not interrupted.

    Parameters
    ----------
    model
        The model.
    resume
        A folder, or a checkpoint of one, which is not written to.
    arguments
        Arguments of the training on which its result depends.
    max_epochs
        Number of epochs, which may be larger than before.
    is_interrupted
        Function that returns True if the training ends inside of an epoch.

    Raises
    ------
    TypeError
        If ``resume`` is no path.
    ValueError
        If a checkpoint cannot be read, or is of another training, with what differs.
    """

    def __init__(
        self,
        model: Any,
        resume: str | Path,
        arguments: Mapping[str, Any],
        max_epochs: int,
        is_interrupted: Callable[[], bool],
    ) -> None:
        check_is_path("resume", resume)
        path = Path(resume)
        if path.suffix == ".ckpt" and not path.exists():
            msg = f"`resume`: there is no checkpoint {path}."
            raise ValueError(msg)
        is_file = path.is_file()
        of_folder = path / CHECKPOINT
        self._model, self._is_interrupted = model, is_interrupted
        self._written = None if is_file else of_folder
        self._description = {
            **of_model(model),
            **of_datamodule(arguments.get("datamodule")),
            **described(arguments),
        }
        self._history = model.history_ if model.is_trained_ and isinstance(model.history_, dict) else None
        self._was_trained = bool(model.is_trained_)
        self._next_time = 0.0
        self._is_writing = False
        self._randomness: list[dict[str, Any]] | None = None
        self.checkpoint = path if is_file else of_folder if of_folder.is_file() else None
        """Checkpoint to continue from; None to start."""
        if self.checkpoint is not None:
            self._check(_read(self.checkpoint), max_epochs)

    def added_to(self, trainer_options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a trainer with which it continues from the checkpoint and writes the next.

        Parameters
        ----------
        trainer_options
            Arguments of the trainer.

        Raises
        ------
        ValueError
            If they have a checkpoint of their own.
        """
        if trainer_options.get("ckpt_path") is not None:
            msg = f"Give either `resume` or `ckpt_path` ({trainer_options['ckpt_path']!r})."
            raise ValueError(msg)
        callbacks = [*(trainer_options.get("callbacks") or ()), self]
        path = None if self.checkpoint is None else str(self.checkpoint)
        return {**trainer_options, "callbacks": callbacks, "ckpt_path": path}

    def _check(self, checkpoint: dict[str, Any], max_epochs: int) -> None:
        state = checkpoint[_KEY]
        differ = differences(state["description"], self._description)
        if differ:
            msg = (
                f"`resume`: {self.checkpoint} is a checkpoint of another training: {differ}. Give the same arguments and data, or "
                "another folder for another training."
            )
            raise ValueError(msg)
        if checkpoint["epoch"] > max_epochs:
            msg = (
                f"`resume`: {self.checkpoint} has {checkpoint['epoch']} epochs, more than `max_epochs` ({max_epochs})."
            )
            raise ValueError(msg)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the folder, after all arguments have been checked."""
        if self._written is not None:
            self._written.parent.mkdir(parents=True, exist_ok=True)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not store to a checkpoint of this class; those of other callbacks stay as they are."""
        if not self._is_writing:
            return
        as_between_epochs(checkpoint)
        weight = getattr(pl_module, "loss_kwargs", {}).get("kl_weight")
        cells = {name: getattr(trainer.datamodule, name, None) for name in _CELLS}
        checkpoint[_KEY] = {
            "format": FORMAT,
            "description": self._description,
            "randomness": _of_all_processes(trainer, _random_states()),
            "cells": {name: torch.as_tensor(value) for name, value in cells.items() if value is not None},
            "kl_weight": None if weight is None else float(weight),
            "stopped_early": _has_stopped_early(trainer),
            "n_checks": checks_of(trainer.early_stopping_callback),
            "history": _plain(_logged(trainer)),
            "history_before": _plain(self._history),
            "was_trained": self._was_trained,
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore it, before cells are loaded."""
        state = checkpoint[_KEY]
        if len(state["randomness"]) != trainer.world_size:
            msg = f"`resume`: the checkpoint is of {len(state['randomness'])} processes, and this training has {trainer.world_size}."
            raise ValueError(msg)
        self._randomness = state["randomness"]
        for name, value in state["cells"].items():
            setattr(trainer.datamodule, name, value.numpy())
        if state["kl_weight"] is not None:
            pl_module.loss_kwargs["kl_weight"] = state["kl_weight"]
        set_checks_of(trainer.early_stopping_callback, state["n_checks"])
        logged = _logged(trainer)
        if logged is not None:
            logged.update(_frames(state["history"]) or {})
        # The history of this training follows the one of trainings before it.
        self._was_trained = self._model.is_trained_ = state["was_trained"]
        self._history = self._model.history_ = _frames(state["history_before"])
        if state["stopped_early"]:
            end_training(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue at the beginning of an epoch."""
        if self._randomness is not None:
            continue_between_epochs(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Write a checkpoint of the epochs before; in the first epoch that is continued, restore random states."""
        if self._randomness is not None:
            _put_random_states(self._randomness[trainer.global_rank])
            self._randomness = None
        elif trainer.current_epoch > 0 and trainer.strategy.broadcast(time.monotonic() >= self._next_time):
            self._write(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the trained network, unless the training was ended inside of an epoch."""
        is_complete = trainer.current_epoch >= trainer.max_epochs or _has_stopped_early(trainer)
        if is_complete and not self._is_interrupted():
            self._write(trainer)

    def _write(self, trainer: Any) -> None:
        is_finite = all(bool(value.isfinite().all()) for value in trainer.lightning_module.parameters())
        # A training that has diverged is better continued from before.
        if self._written is None or not is_finite:
            return
        start = time.monotonic()
        # Lightning collects the state in all processes, and writes it in the first.
        with replacing(self._written) if trainer.is_global_zero else nullcontext(self._written) as work:
            self._is_writing = True
            try:
                trainer.save_checkpoint(work, weights_only=False)
            finally:
                self._is_writing = False
        now = time.monotonic()
        self._next_time = now + (now - start) * (1 / _SHARE - 1)


def arguments_of_training(
    trainer_options: Mapping[str, Any], plan_kwargs: Mapping[str, Any], **arguments: Any
) -> dict[str, Any]:
    """Arguments of a training on which its result depends.

    Parameters
    ----------
    trainer_options, plan_kwargs
        Arguments of the trainer and of the training plan.
    **arguments
        Others.
    """
    kept = {name: value for name, value in trainer_options.items() if name not in (*_FREE, "ckpt_path")}
    of_plan = {name: value for name, value in plan_kwargs.items() if name not in _OF_PROCESS}
    return {**arguments, **kept, "plan_kwargs": of_plan}


def _read(path: Path) -> dict[str, Any]:
    try:
        # Only numbers and containers: no code that the file could hold is run.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, LookupError, ValueError, EOFError) as error:
        msg = f"`resume`: {path} is no checkpoint that can be read: {error}"
        raise ValueError(msg) from error
    state = checkpoint.get(_KEY) if isinstance(checkpoint, dict) else None
    if state is None:
        msg = f"`resume`: {path} was not written by `train(resume=...)`. `train(ckpt_path=...)` passes a checkpoint to Lightning as it is."
        raise ValueError(msg)
    check_format(str(path), state["format"], FORMAT)
    return checkpoint


def _has_stopped_early(trainer: Any) -> bool:
    stopping = trainer.early_stopping_callback
    return stopping is not None and stopping.stopped_epoch > 0


def _logged(trainer: Any) -> dict[str, pd.DataFrame] | None:
    """The history that scvi-tools' own logger collects, in the first process."""
    experiment = getattr(trainer.logger, "experiment", None) if trainer.is_global_zero else None
    data = getattr(experiment, "data", None)
    return data if isinstance(data, dict) else None


def _plain(history: dict[str, pd.DataFrame] | None) -> dict[str, Any] | None:
    """Tables with one column as lists."""
    if history is None:
        return None
    return {
        name: {
            "values": table[name].tolist(),
            "index": table.index.tolist(),
            "axis": table.index.name,
            "kinds": (str(table[name].dtype), str(table.index.dtype)),
        }
        for name, table in history.items()
    }


def _frames(history: dict[str, Any] | None) -> dict[str, pd.DataFrame] | None:
    if history is None:
        return None
    frames = {}
    for name, table in history.items():
        of_values, of_index = table["kinds"]
        index = pd.Index(table["index"], name=table["axis"], dtype=of_index)
        frames[name] = pd.DataFrame({name: pd.Series(table["values"], index=index, dtype=of_values)})
    return frames


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - what scvi-tools draws from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
    }


def _put_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _of_all_processes(trainer: Any, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
