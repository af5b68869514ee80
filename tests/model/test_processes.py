"""Runs of an ensemble in processes of their own: the same models as in one process, on the data of this one."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

import anndata as ad
import h5py
import joblib
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import LambdaCallback

from ldvae_ext import _files, datasets
from ldvae_ext._progress import Progress
from ldvae_ext.model import LDVAE, _processes, _workers, ensemble, fit_ensemble
from ldvae_ext.model._processes import n_processes

TRAINING = {"accelerator": "cpu", "check_val_every_n_epoch": None}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Last batch will have a small size")]


@pytest.fixture(scope="module")
def cells() -> Any:
    adata, _ = datasets.simulate(n_cells=150, n_genes=30, n_latent=2, n_batches=2, seed=0)
    adata.layers["counts"] = adata.X
    adata.obs["depth"] = np.log(np.asarray(adata.X.sum(axis=1, dtype=np.float64)).ravel())
    LDVAE.setup_anndata(adata, layer="counts", batch_key="batch", continuous_covariate_keys=["depth"])
    return adata


def fitted(cells, n_jobs: int | None, n_runs: int = 3, **kwargs: Any) -> Any:
    options = {"n_latent": 3, "max_epochs": 3, "train_kwargs": TRAINING, "silent": True, **kwargs}
    return fit_ensemble(cells, n_runs, n_jobs=n_jobs, **options)


@pytest.fixture(scope="module")
def both(cells):
    """The same runs here and in processes, and what was seen of the latter; processes take long to start."""
    cells.obs["lock"] = [threading.Lock() for _ in range(cells.n_obs)]
    # A warm-up that is never complete, which each run warns about.
    training = {**TRAINING, "kl_warmup": None, "plan_kwargs": {"n_epochs_kl_warmup": 400}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            here = fitted(cells, 1, resample="halves", train_kwargs=training)
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        with warnings.catch_warnings(record=True) as caught, Progress(3, 3, silent=True) as progress:
            warnings.simplefilter("always")
            callbacks = [progress.callback()]
            beside = fitted(cells, 2, resample="halves", train_kwargs={**training, "callbacks": callbacks})
            progress.show()
            events = progress._events.read_bytes()
        draws = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    finally:
        torch.set_num_threads(threads)
        del cells.obs["lock"]
    return SimpleNamespace(here=here, beside=beside, warned=caught, events=events, draws=draws)


def test_processes_give_the_models_that_one_process_gives(cells, both):
    here, beside = both.here, both.beside
    assert beside.seeds == here.seeds
    for own, other in zip(here.models, beside.models, strict=True):
        assert other.adata is cells
        np.testing.assert_array_equal(other.get_latent_representation(), own.get_latent_representation())
        np.testing.assert_array_equal(other.rotation.matrix_kk, own.rotation.matrix_kk)
        np.testing.assert_array_equal(other.train_indices, own.train_indices)
        pd.testing.assert_frame_equal(other.history["elbo_train"], own.history["elbo_train"])
        own_attributes, other_attributes = dict(own._get_user_attributes()), dict(other._get_user_attributes())
        # Lightning's trainer stays in its process, as it does when a model is saved.
        assert set(own_attributes) - set(other_attributes) <= {"trainer"}
        assert not other.module.training
    pd.testing.assert_frame_equal(beside.stats, here.stats)


def test_warnings_of_a_process_are_given_here(both):
    assert [w for w in both.warned if issubclass(w.category, UserWarning) and "KL" in str(w.message)]


def test_the_bar_counts_epochs_of_other_processes(both):
    # Halves of the cells are trained on for each of three seeds.
    assert both.events.count(b"e") == 3 * len(both.beside.models)
    assert both.events.count(b"s") == len(both.beside.models)


def test_random_states_and_columns_that_are_not_registered_stay_here(both):
    # A lock, which was a column of obs, cannot be sent to a process.
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert both.draws == (torch.rand(1).item(), np.random.rand())  # noqa: NPY002


def test_a_model_from_another_process_trains_on(both):
    model = both.beside.models[-1]
    model.rotate("none")
    before = model.get_loadings().to_numpy()
    model.train(2, kl_warmup=1, **TRAINING)
    assert not np.array_equal(before, model.get_loadings().to_numpy())


def test_large_counts_are_read_from_mapped_files(tmp_path):
    adata, _ = datasets.simulate(n_cells=2500, n_genes=800, n_latent=2, seed=0)
    LDVAE.setup_anndata(adata)
    parent = os.getpid()

    def look(trainer: Any, _: Any) -> None:
        counts = trainer.datamodule.train_dataloader().dataset._reader._matrix
        (tmp_path / f"{os.getpid() == parent}-{isinstance(counts.data, np.memmap)}-{time.monotonic_ns()}").touch()

    fitted(adata, 2, max_epochs=2, train_kwargs={**TRAINING, "callbacks": [LambdaCallback(on_train_start=look)]})
    where = [path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()]
    assert len(where) == 3
    assert set(where) == {"True-False", "False-True"}, "mapped in the other process alone"


class OddError(Exception):
    """An error that pickle writes and cannot read."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_runs_that_fail_here_and_in_a_process_are_left_out(cells, tmp_path):
    parent = os.getpid()

    def two_fail(*_: Any) -> None:
        error = RuntimeError("no luck") if os.getpid() == parent else OddError("no", "luck")
        try:
            (tmp_path / type(error).__name__).touch(exist_ok=False)
        except FileExistsError:
            return
        raise error

    callbacks = [LambdaCallback(on_train_start=two_fail)]
    with pytest.warns(UserWarning, match="RuntimeError: no luck"), pytest.warns(UserWarning, match="OddError: no luck"):
        found = fitted(cells, 2, n_runs=4, train_kwargs={**TRAINING, "callbacks": callbacks})
    assert len(found.models) == len(found.failures) == 2
    assert sorted([*found.seeds, *found.failures]) == [0, 1, 2, 3]


def test_an_unknown_argument_of_training_is_raised(cells):
    with pytest.raises(TypeError, match="wrong_name"):
        fitted(cells, 2, train_kwargs={**TRAINING, "wrong_name": 1})
    with pytest.raises(ValueError, match="dispersion"):
        fitted(cells, 2, model_kwargs={"dispersion": "wrong"})


def test_processes_are_started_only_for_long_trainings_on_a_cpu(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    # The test itself may be in a process of pytest-xdist.
    monkeypatch.setattr(_processes.multiprocessing, "parent_process", lambda: None)
    long, short = (
        SimpleNamespace(n_obs=7000, n_vars=2000),
        SimpleNamespace(n_obs=700, n_vars=300),
    )
    assert n_processes(long, 5, 100, accelerator="cpu") == 2
    assert n_processes(long, 5, None, accelerator="cpu") == 2
    assert n_processes(short, 5, 20, accelerator="cpu") == 1
    assert n_processes(long, 5, 100, accelerator="gpu") == 1
    monkeypatch.setattr(_processes.multiprocessing, "parent_process", lambda: object())
    assert n_processes(long, 5, 100, accelerator="cpu") == 1


def test_runs_of_a_killed_process_are_trained_here(cells, tmp_path):
    parent = os.getpid()

    def first_is_killed(*_: Any) -> None:
        if os.getpid() == parent:
            return
        try:
            (tmp_path / "taken").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [LambdaCallback(on_train_start=first_is_killed)]
    with pytest.warns(UserWarning, match="ended from outside"):
        found = fitted(cells, 2, train_kwargs={**TRAINING, "callbacks": callbacks})
    assert found.seeds == [0, 1, 2]
    for here, model in zip(fitted(cells, 1).models, found.models, strict=True):
        np.testing.assert_allclose(model.get_loadings(), here.get_loadings(), rtol=1e-4, atol=1e-5)


class Executor:
    """In place of processes: a run ends when the test says so."""

    def __init__(self, n_others: int, env: dict[str, str]) -> None:
        self.futures: dict[int, Future] = {}
        self.is_broken = False

    def submit(self, _: Any, *arguments: Any) -> Future:
        if self.is_broken:
            raise BrokenProcessPool
        self.futures[arguments[-1]] = future = Future()
        future.set_running_or_notify_cancel()
        return future

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.fixture
def others(monkeypatch) -> Any:
    monkeypatch.setattr(_workers, "ProcessPoolExecutor", Executor)
    return _workers.Workers(2, range(6), lambda _: None, n_threads=1)


def test_a_process_gets_the_next_run_when_it_has_ended_one(others):
    futures = others._executor.futures
    assert list(futures) == [0, 1]
    assert others.next_run() == 2
    futures[1].set_result("one")
    assert list(futures) == [0, 1, 3]
    assert list(others.ended(wait=False)) == [(1, "one")]
    assert list(others.ended(wait=False)) == []
    futures[0].set_result("none")
    futures[3].set_result("three")
    assert list(others.ended(wait=True)) == [(0, "none"), (3, "three")]
    assert list(futures) == [0, 1, 3, 4, 5]
    assert others.next_run() is None


def test_runs_that_a_killed_process_would_have_trained_are_left(others):
    executor = others._executor
    executor.is_broken = True
    for m in (0, 1):
        executor.futures[m].set_exception(BrokenProcessPool())
    with pytest.warns(UserWarning, match="ended from outside") as warned:
        assert list(others.ended(wait=True)) == []
    assert len(warned) == 1
    assert sorted(others.next_run() for _ in range(6)) == list(range(6))
    assert others.next_run() is None


def test_a_process_that_cannot_be_given_a_run_wakes_who_waits(others):
    executor = others._executor
    while others.next_run() != 5:
        pass
    others._left.append(5)
    executor.futures[0].set_result("none")
    assert list(others.ended(wait=True)) == [(0, "none")]
    assert list(executor.futures) == [0, 1, 5]
    others._left.append(5)
    executor.is_broken = True
    others._begin()
    assert list(others.ended(wait=True)) == [], "and does not block"
    assert others.next_run() == 5


def test_no_run_is_begun_after_the_end(others):
    others.stop()
    others._executor.futures[0].set_result("none")
    assert list(others._executor.futures) == [0, 1]


def plan_with(train: Any) -> Any:
    return SimpleNamespace(seed=0, model=lambda adata: LDVAE(adata, n_latent=3), train=train)


def test_ctrl_c_here_keeps_the_runs_that_ended_elsewhere(cells, monkeypatch):
    class Ended(Executor):
        def submit(self, _: Any, *arguments: Any) -> Future:
            future = super().submit(_, *arguments)
            if arguments[-1] == 0:
                future.set_result("model")
            return future

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_workers, "ProcessPoolExecutor", Ended)
    monkeypatch.setattr(_processes, "_restored", lambda *arguments: arguments[-1])
    outcomes = _processes.train_in_processes(cells, range(4), plan_with(interrupted), 2)
    assert next(outcomes) == (0, "model")
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)


def test_what_cannot_be_sent_is_raised_before_any_training(cells):
    lock, seen = threading.Lock(), []

    def start(*_: Any) -> None:
        seen.append(lock)

    with pytest.raises(TypeError, match="pickle"):
        fitted(cells, 2, train_kwargs={**TRAINING, "callbacks": [LambdaCallback(on_train_start=start)]})
    assert not seen


def test_counts_that_a_killed_process_left_are_removed(cells, tmp_path, monkeypatch):
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path))
    left = tmp_path / f".ldvae-ext-{_files._host()}-999999999-x" / "cells"
    left.parent.mkdir()
    left.touch()
    monkeypatch.setattr(_workers, "ProcessPoolExecutor", Executor)
    monkeypatch.setattr(_processes, "_restored", lambda *arguments: arguments[-1])
    outcomes = _processes.train_in_processes(cells, range(2), plan_with(lambda *_: "trained here"), 2)
    assert next(outcomes)[0] == 1
    (folder,) = tmp_path.iterdir()
    assert folder != left.parent
    assert (folder / "cells").stat().st_size > 0
    outcomes.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("obstacle", ["daemon", "disk"])
def test_without_other_processes_all_runs_are_trained_here(cells, monkeypatch, recwarn, obstacle):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if obstacle == "daemon":
        monkeypatch.setattr(_processes.multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    else:
        monkeypatch.setattr(_processes.joblib, "dump", full)
    monkeypatch.setattr(_workers, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("started"))
    assert fitted(cells, 2).seeds == [0, 1, 2]
    assert any("No space left on device" in str(w.message) for w in recwarn) == (obstacle == "disk")


def test_objects_of_the_caller_keep_trainings_here(monkeypatch):
    cells, _ = datasets.simulate(n_cells=150, n_genes=30, n_latent=2, seed=0)
    LDVAE.setup_anndata(cells)
    monkeypatch.setattr(ensemble, "n_processes", lambda *_, **__: pytest.fail("asked for processes"))
    seen: list[int] = []
    callbacks = [LambdaCallback(on_train_start=lambda *_: seen.append(os.getpid()))]
    fitted(cells, None, train_kwargs={**TRAINING, "trainer_config": {"callbacks": callbacks}})
    assert seen == [os.getpid()] * 3


def test_settings_of_a_process_are_those_of_the_caller_and_end_with_the_run(monkeypatch):
    settings = _processes._Settings.now(1)
    before = _processes._Settings.now(torch.get_num_threads())
    scvi.settings.batch_size = 77
    try:
        with settings.in_force():
            assert scvi.settings.batch_size == settings.of_scvi["batch_size"]
            assert torch.get_num_threads() == 1
        assert scvi.settings.batch_size == 77
        assert torch.get_num_threads() == before.n_threads
    finally:
        scvi.settings.batch_size = before.of_scvi["batch_size"]


def test_counts_on_disk_are_refused(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    LDVAE.setup_anndata(backed, batch_key="batch")
    with pytest.raises(ValueError, match="`n_jobs=2` needs counts in memory"):
        fitted(backed, 2)


def test_sparse_counts_on_disk_are_neither_sent_nor_copied(cells, tmp_path, monkeypatch):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    with h5py.File(path) as file:
        lazy = ad.AnnData(
            ad.io.sparse_dataset(file["X"]), obs=cells.obs[["batch"]], var=pd.DataFrame(index=cells.var_names)
        )
        LDVAE.setup_anndata(lazy, batch_key="batch")
        assert not lazy.isbacked
        with pytest.raises(ValueError, match="`n_jobs=2` needs counts in memory"):
            fitted(lazy, 2)
        monkeypatch.setattr(ensemble, "n_processes", lambda *_, **__: pytest.fail("asked for processes"))
        assert len(fitted(lazy, None).models) == 3
