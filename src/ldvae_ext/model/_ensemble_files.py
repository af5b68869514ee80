"""An ensemble in files that hold no code: a folder for each run, and what was computed from all runs."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldvae_ext._files import completing, replacing
from ldvae_ext._formats import ENSEMBLE, check_format
from ldvae_ext._scvi import parse_device_args
from ldvae_ext._validate import listed
from ldvae_ext.model._counts import check_given_anndata
from ldvae_ext.model._descriptions import described, differences, of_data
from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model._linear_scvi import saved_arguments
from ldvae_ext.model._plain_files import CannotBeWritten, PlainModel, decoded, encoded
from ldvae_ext.model._resuming import arguments_of_training
from ldvae_ext.model._runs import RunPlan, seeded

# Names in a folder. The first says which of the other files are its ensemble, and is written last.
_ENSEMBLE, _ARGUMENTS = "ensemble.json", "arguments.json"
_CPU = torch.device("cpu")


def save_ensemble(folder: Path, models: Mapping[int, LDVAE], results: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write an ensemble to a folder. Until it is complete, the one that was there can be loaded.

    Parameters
    ----------
    folder
        The folder.
    models
        Runs by seed.
    results
        Everything else.
    overwrite
        True to replace an ensemble.

    Raises
    ------
    ValueError
        If the folder is not empty, and has no ensemble that is to be replaced.
    CannotBeWritten
        If only a pickle can hold an argument of a model.
    """
    _check_can_be_written(folder, overwrite=overwrite)
    for model in models.values():
        _check_can_be_held(model)
    before = _saved(folder).get("runs")
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[str] = []
    try:
        for seed, model in models.items():
            runs.append(_write_run(folder, f"run-{seed}", model))
        _write_results(folder, runs, results)
    except BaseException:
        if _saved(folder).get("runs") != runs:
            for name in runs:
                shutil.rmtree(folder / name, ignore_errors=True)
        raise
    # Those of the ensemble that was replaced; other folders may be the user's.
    for name in before if isinstance(before, list) else ():
        if name not in runs and _is_name(name, "run-") and (folder / name).is_dir():
            shutil.rmtree(folder / name)


def _write_results(folder: Path, runs: list[str], results: Mapping[str, Any]) -> None:
    arrays: dict[str, torch.Tensor] = {}
    value = encoded(dict(results), "ensemble", arrays)
    before = _saved(folder).get("arrays", "")
    name = _free(folder, "consensus", ".safetensors")
    with replacing(folder / name) as work:
        save_file(arrays, work)
    description = {"format": ENSEMBLE, "runs": runs, "arrays": name, "results": value}
    try:
        with replacing(folder / _ENSEMBLE) as work:
            work.write_text(json.dumps(description, indent=1))
    except BaseException:
        if _saved(folder).get("arrays") != name:
            (folder / name).unlink(missing_ok=True)
        raise
    if before != name and _is_name(before, "consensus"):
        (folder / before).unlink(missing_ok=True)


def load_ensemble(folder: Path, adata: AnnData | None) -> tuple[list[LDVAE], dict[str, Any]]:
    """The runs of a saved ensemble, and everything else.

    Parameters
    ----------
    folder
        The folder.
    adata
        Cells, which are set up as those of the runs were; None to open the runs without data.

    Raises
    ------
    ValueError
        If a file is missing, damaged or of a newer version.
    """
    if adata is not None:
        check_given_anndata(adata)
    path = folder / _ENSEMBLE
    if not path.is_file():
        msg = f"{folder} holds no ensemble: {_ENSEMBLE} is missing."
        if (folder / _ARGUMENTS).is_file():
            n_done = len(list(folder.glob("run-*")))
            msg = f"{folder} holds an ensemble that is not complete, with {n_done} of its runs; the same `fit_ensemble(folder=...)` trains the others."
        raise ValueError(msg)
    try:
        description = json.loads(path.read_text())
        check_format(str(path), description["format"], ENSEMBLE)
        names = [Path(name).name for name in description["runs"]]
        arrays = load_file(folder / Path(description["arrays"]).name)
        results = decoded(description["results"], arrays)
    except (
        OSError,
        SafetensorError,
        KeyError,
        TypeError,
        AttributeError,
        json.JSONDecodeError,
        RecursionError,
    ) as error:
        msg = f"{folder} holds no ensemble that can be read: {error}."
        raise ValueError(msg) from error
    if not names:
        msg = f"{folder} holds no ensemble that can be read: {_ENSEMBLE} names no runs."
        raise ValueError(msg)
    saved = [PlainModel.read(folder / name) for name in names]
    if adata is not None:
        LDVAE._register_as(saved[0], adata)
    models = [
        LDVAE._of_plain(plain, False if adata is None else adata, _CPU, folder / name)
        for plain, name in zip(saved, names, strict=True)
    ]
    return models, results


class RunFolder:
    """A folder with the runs of an ensemble that are done.

    Parameters
    ----------
    folder
        The folder.
    plan
        What the runs have in common.
    adata
        Registered cells.

    Raises
    ------
    ValueError
        If the folder belongs to another ensemble, with what differs, or has other files.
    CannotBeWritten
        If only a pickle can hold an argument of the models.
    """

    def __init__(self, folder: Path, plan: RunPlan, adata: AnnData) -> None:
        self._folder, self._plan, self._adata = folder, plan, adata
        with seeded(plan.seed):
            model = plan.model(adata)
        _check_can_be_held(model)
        path, description = folder / _ARGUMENTS, _description(plan, model)
        if path.is_file():
            try:
                saved = json.loads(path.read_text())
                check_format(str(path), saved["format"], ENSEMBLE)
                differ = differences(saved["arguments"], description)
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                msg = f"`folder`: {path} cannot be read: {error}."
                raise ValueError(msg) from error
            if differ:
                msg = f"`folder`: {folder} has the runs of another ensemble: {differ}. Give the same arguments and data, or another folder."
                raise ValueError(msg)
            return
        others = _others(folder)
        if others:
            msg = f"`folder`: {folder} has other files ({listed(others)}) and no runs of an ensemble; give a new or an empty folder."
            raise ValueError(msg)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as work:
            work.write_text(json.dumps({"format": ENSEMBLE, "arguments": description}, indent=1))

    def done(self, n_runs: int) -> dict[int, LDVAE]:
        """Models of the runs that are done, by number.

        Parameters
        ----------
        n_runs
            Number of runs.
        """
        options = self._plan.train_kwargs
        device = parse_device_args(
            accelerator=options.get("accelerator", "auto"),
            devices=options.get("devices", "auto"),
            return_device="torch",
        )[-1]
        paths = {m: self._folder / self._name(m) for m in range(n_runs)}
        return {
            m: LDVAE._of_plain(PlainModel.read(path), self._adata, device, path)
            for m, path in paths.items()
            if path.is_dir()
        }

    def keep(self, m: int, model: LDVAE) -> None:
        """Write a run that is done.

        Parameters
        ----------
        m, model
            Its number and its model.
        """
        _write_run(self._folder, self._name(m), model)

    def keep_results(self, seeds: list[int], results: Mapping[str, Any]) -> None:
        """Write what was computed from all runs, so that the folder holds an ensemble that can be loaded.

        Parameters
        ----------
        seeds
            Seeds of the runs.
        results
            As in :func:`save_ensemble`.
        """
        _write_results(self._folder, [self._name(int(seed) - self._plan.seed) for seed in seeds], results)

    def _name(self, m: int) -> str:
        return f"run-{self._plan.seed + m}"


def _description(plan: RunPlan, model: LDVAE) -> dict[str, str]:
    """Arguments and data of an ensemble, without the number of runs: a run does not depend on it."""
    options = arguments_of_training(plan.train_kwargs, plan.train_kwargs.get("plan_kwargs") or {})
    own = {field.name: getattr(plan, field.name) for field in fields(plan) if field.name != "train_kwargs"}
    return {**described(own | {"train_kwargs": options}), **of_data(model.adata_manager)}


def _check_can_be_held(model: LDVAE) -> None:
    """Raise on an argument of a model that files without a pickle cannot hold."""
    for name, value in saved_arguments(model.init_params_).items():
        try:
            encoded(value, name, {})
        except CannotBeWritten as error:
            msg = (
                f"{error}, which only a pickle can hold, and the files of an ensemble have none. Fit it without `folder`, and save its "
                "models one by one."
            )
            raise CannotBeWritten(msg) from error


def _saved(folder: Path) -> dict[str, Any]:
    """Description of the ensemble in a folder; empty if there is none, or it cannot be read."""
    try:
        saved = json.loads((folder / _ENSEMBLE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _is_name(name: Any, prefix: str) -> bool:
    """True for the name of a file or folder of an ensemble, which is no path to another folder."""
    return isinstance(name, str) and name.startswith(prefix) and Path(name).name == name


def _check_can_be_written(folder: Path, *, overwrite: bool) -> None:
    others = _others(folder)
    if not others:
        return
    if _ARGUMENTS in others:
        msg = f"{folder} is the folder of a `fit_ensemble(folder=...)`, which keeps its runs there; choose another one."
        raise ValueError(msg)
    if _ENSEMBLE not in others:
        msg = f"{folder} has other files ({listed(others)}); choose a new or an empty folder."
        raise ValueError(msg)
    if not overwrite:
        msg = f"{folder} has an ensemble; `overwrite=True` replaces it."
        raise ValueError(msg)


def _others(folder: Path) -> list[str]:
    """Names of what is in a folder, without temporary files."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".ldvae-ext-"))


def _write_run(folder: Path, name: str, model: LDVAE) -> str:
    """Write a run to a folder, which is there when it is complete; the name of the folder."""
    name = _free(folder, name)
    with completing(folder / name) as work:
        PlainModel.of(model).write(work)
    return name


def _free(folder: Path, name: str, suffix: str = "") -> str:
    """A name that nothing in the folder has."""
    candidates = itertools.chain([f"{name}{suffix}"], (f"{name}-{n}{suffix}" for n in itertools.count(1)))
    return next(each for each in candidates if not (folder / each).exists())
