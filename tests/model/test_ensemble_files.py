"""Ensembles in files: saved and loaded without a pickle, continued after a kill, refused for other arguments and data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from ldvae_ext import _files
from ldvae_ext.model import LDVAE, Ensemble, fit_ensemble
from tests.helpers import counts

TRAINING = {"accelerator": "cpu", "check_val_every_n_epoch": None}
# A class, which only a pickle can hold.
TANH = {"extra_encoder_kwargs": {"activation_fn": torch.nn.Tanh}}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Last batch will have a small size")]


@pytest.fixture(scope="module")
def cells():
    adata = counts(150, 30, 2)
    LDVAE.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.fixture(scope="module")
def whole(cells):
    return fitted(cells)


def fitted(cells, n_runs=3, **kwargs):
    options = {"n_latent": 3, "max_epochs": 3, "train_kwargs": TRAINING, "silent": True, "resample": "halves", **kwargs}
    return fit_ensemble(cells, n_runs, **options)


def counting(seen):
    return {**TRAINING, "callbacks": [LambdaCallback(on_train_start=lambda *_: seen.append(1))]}


def assert_same(ensemble, expected):
    assert ensemble.seeds == expected.seeds
    assert ensemble.cells_of_run == expected.cells_of_run
    assert ensemble.failures == expected.failures
    np.testing.assert_array_equal(ensemble.genes, expected.genes)
    for name in ("stats", "loadings", "spread", "agreement", "replication"):
        pd.testing.assert_frame_equal(getattr(ensemble, name), getattr(expected, name))
    for model, own in zip(ensemble.models, expected.models, strict=True):
        pd.testing.assert_frame_equal(model.get_loadings(), own.get_loadings())
        np.testing.assert_array_equal(model.rotation.matrix_kk, own.rotation.matrix_kk)
        np.testing.assert_array_equal(model.train_indices, own.train_indices)
        pd.testing.assert_frame_equal(model.history["elbo_train"], own.history["elbo_train"], check_dtype=False)


def test_a_saved_ensemble_is_the_same_when_it_is_loaded_and_needs_no_pickle(cells, whole, tmp_path, monkeypatch):
    whole.save(tmp_path / "ensemble")
    names = {path.name for path in (tmp_path / "ensemble").rglob("*") if path.is_file()}
    assert names == {"ensemble.json", "consensus.safetensors", "model.json", "weights.safetensors"}
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    random = torch.get_rng_state()
    other = counts(150, 30, 2)
    loaded = Ensemble.load(tmp_path / "ensemble", other)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(loaded, whole)
    assert all(model.adata is other for model in loaded.models)
    np.testing.assert_array_equal(
        loaded.representative().get_latent_representation(), whole.representative().get_latent_representation()
    )
    pd.testing.assert_frame_equal(loaded.compare_readouts(), whole.compare_readouts())
    without = Ensemble.load(tmp_path / "ensemble")
    assert_same(without, whole)
    assert without.models[0].adata is None


def test_an_ensemble_is_replaced_as_a_whole_or_not_at_all(cells, whole, tmp_path, monkeypatch):
    folder = tmp_path / "ensemble"
    whole.save(folder)
    with pytest.raises(ValueError, match="overwrite=True"):
        whole.save(folder)
    other = fitted(cells, 2, seed=7, resample=None)
    own = _files.replacing

    def full(path):
        if path.name == "ensemble.json":
            raise OSError(28, "No space left on device")
        return own(path)

    with monkeypatch.context() as patched:
        patched.setattr("ldvae_ext.model._ensemble_files.replacing", full)
        with pytest.raises(OSError, match="space"):
            other.save(folder, overwrite=True)
    assert_same(Ensemble.load(folder, cells), whole)
    assert {path.name for path in folder.iterdir()} == {
        "ensemble.json",
        "consensus.safetensors",
        "run-0",
        "run-1",
        "run-2",
    }
    other.save(folder, overwrite=True)
    assert Ensemble.load(folder).seeds == [7, 8]
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"other files \('mine.txt'\)"):
        whole.save(tmp_path / "notes", overwrite=True)


def test_damaged_files_and_newer_ones_are_refused(whole, tmp_path):
    folder = tmp_path / "ensemble"
    with pytest.raises(ValueError, match="no ensemble"):
        Ensemble.load(tmp_path)
    whole.save(folder)
    path = folder / "ensemble.json"
    text = path.read_text()

    def refused(match, **changed):
        path.write_text(json.dumps({**json.loads(text), **changed}))
        with pytest.raises(ValueError, match=match):
            Ensemble.load(folder)

    refused("newer version wrote it", format=2)
    refused("cannot|can be read", results={"dict": []})
    refused("no model.json|has no", runs=["run-9"])
    refused("can be read", arrays="missing.safetensors")
    # A path does not lead out of the folder.
    shutil.copy(folder / "consensus.safetensors", tmp_path / "outside.safetensors")
    refused("can be read", arrays="../outside.safetensors")
    shutil.copytree(folder / "run-0", tmp_path / "run-9")
    refused("has no", runs=["../run-9"])
    path.write_text(text[:100])
    with pytest.raises(ValueError, match="can be read"):
        Ensemble.load(folder)


def test_an_ensemble_whose_process_is_killed_trains_only_what_is_missing(cells, whole, tmp_path):
    folder = tmp_path / "runs"
    code = """
        import os, signal, sys
        from lightning.pytorch.callbacks import LambdaCallback
        from ldvae_ext.model import LDVAE, fit_ensemble
        from tests.helpers import counts

        starts = []

        def kill(trainer, plan):
            starts.append(1)
            if len(starts) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        adata = counts(150, 30, 2)
        LDVAE.setup_anndata(adata, batch_key="batch")
        training = {"accelerator": "cpu", "check_val_every_n_epoch": None}
        fit_ensemble(
            adata, 3, n_latent=3, max_epochs=3, silent=True, resample="halves", folder=sys.argv[1],
            train_kwargs={**training, "callbacks": [LambdaCallback(on_train_epoch_start=lambda *_: None, on_train_end=kill)]},
        )
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert [path.name for path in sorted(folder.iterdir())] == ["arguments.json", "run-0"]
    with pytest.raises(ValueError, match="not complete, with 1 of its runs; the same `fit_ensemble"):
        Ensemble.load(folder)
    seen = []
    resumed = fitted(cells, folder=folder, train_kwargs=counting(seen))
    assert len(seen) == 2
    assert_same(resumed, whole)
    again = fitted(cells, folder=folder, train_kwargs=counting(seen))
    assert len(seen) == 2, "all runs were done"
    assert_same(again, whole)
    assert_same(Ensemble.load(folder, counts(150, 30, 2)), whole)
    # Without an argument that keeps trainings here.
    assert_same(fitted(cells, folder=folder), whole)


def test_more_runs_are_added(cells, whole, tmp_path):
    seen = []
    fitted(cells, 2, folder=tmp_path, train_kwargs=counting(seen))
    assert_same(fitted(cells, 3, folder=tmp_path, train_kwargs=counting(seen)), whole)
    assert len(seen) == 3
    assert fitted(cells, 2, folder=tmp_path, train_kwargs=counting(seen)).seeds == [0, 1]
    assert len(seen) == 3
    assert (tmp_path / "run-2").is_dir()


def test_a_failed_run_is_tried_again(cells, whole, tmp_path):
    starts = []

    def fail(*_):
        starts.append(1)
        if len(starts) == 2:
            msg = "no luck"
            raise RuntimeError(msg)

    options = {**TRAINING, "callbacks": [LambdaCallback(on_train_start=fail)]}
    with pytest.warns(UserWarning, match="no luck"):
        fitted(cells, 4, folder=tmp_path, train_kwargs=options)
    assert not (tmp_path / "run-1").exists()
    assert_same(fitted(cells, folder=tmp_path), whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_latent": 4}, "`n_latent` was 3 and is 4"),
        ({"max_epochs": 4}, "`max_epochs` was 3 and is 4"),
        ({"seed": 1}, "`seed` was 0 and is 1"),
        ({"resample": "bootstrap"}, "`resample` was 'halves' and is 'bootstrap'"),
        ({"model_kwargs": {"gene_likelihood": "zinb"}}, "`model_kwargs.gene_likelihood` was not given and is 'zinb'"),
        ({"train_kwargs": {**TRAINING, "plan_kwargs": {"lr": 0.5}}}, "`train_kwargs.plan_kwargs.lr` was not given and is 0.5"),
        ({"train_kwargs": {**TRAINING, "batch_size": 32}}, "`train_kwargs.batch_size` was not given and is 32"),
    ],
)  # fmt: skip
def test_a_folder_of_other_arguments_is_refused_with_what_differs(cells, kept, options, said):
    with pytest.raises(ValueError, match=said):
        fitted(cells, folder=kept, **options)


@pytest.fixture(scope="module")
def kept(cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    fitted(cells, 2, folder=folder)
    return folder


def test_other_data_and_other_folders_are_refused(cells, whole, kept, tmp_path):
    other = counts(150, 30, 2)
    other.X[5, 0] += 1
    LDVAE.setup_anndata(other, batch_key="batch")
    with pytest.raises(ValueError, match="the counts of the data are others"):
        fitted(other, folder=kept)
    LDVAE.setup_anndata(swapped := counts(150, 30, 2)[::-1].copy(), batch_key="batch")
    with pytest.raises(ValueError, match="of the data are others"):
        fitted(swapped, folder=kept)
    whole.save(tmp_path / "ensemble")
    with pytest.raises(ValueError, match="no runs of an ensemble"):
        fitted(cells, folder=tmp_path / "ensemble")
    with pytest.raises(ValueError, match="keeps its runs there"):
        whole.save(kept, overwrite=True)
    with pytest.raises(ValueError, match="one checkpoint for all runs"):
        fitted(cells, train_kwargs={**TRAINING, "resume": tmp_path})
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "arguments.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        fitted(cells, folder=tmp_path / "half")


def test_files_of_the_user_stay_when_an_ensemble_is_replaced(whole, tmp_path):
    whole.save(tmp_path)
    (tmp_path / "run-data").mkdir()
    (tmp_path / "run-data" / "mine.txt").touch()
    for name in ("run-notes.txt", "consensus-mine.safetensors"):
        (tmp_path / name).touch()
    whole.save(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ensemble.json", "consensus-1.safetensors", "run-0-1", "run-1-1", "run-2-1",
        "run-data", "run-notes.txt", "consensus-mine.safetensors",
    }  # fmt: skip
    assert (tmp_path / "run-data" / "mine.txt").exists()
    assert_same(Ensemble.load(tmp_path), whole)


def test_a_description_without_runs_is_refused(whole, tmp_path):
    whole.save(tmp_path)
    path = tmp_path / "ensemble.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "runs": []}))
    with pytest.raises(ValueError, match=r"ensemble.json names no runs"):
        Ensemble.load(tmp_path)


def test_what_cannot_be_done_is_said_before_a_folder_is_made(cells, tmp_path):
    folder = tmp_path / "runs"
    seen = []
    with pytest.raises(TypeError, match="activation_fn` is a type, which only a pickle can hold"):
        fitted(cells, folder=folder, model_kwargs=TANH, train_kwargs=counting(seen))
    assert seen == []
    counts(150, 30, 2).write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    LDVAE.setup_anndata(backed, batch_key="batch")
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="`client` needs counts in memory"):
        fitted(backed, folder=folder, client=executor)
    with pytest.raises(TypeError, match=r"`folder` must be a path, as text or a `pathlib.Path`; got 3"):
        fitted(cells, folder=3)
    with pytest.raises(ValueError, match="`train_size` must be above 0 and at most 1; got 'a'"):
        fitted(cells, folder=folder, resample=None, train_kwargs={**TRAINING, "train_size": "a"})
    assert not folder.exists()
    other = fitted(cells, 2, model_kwargs=TANH)
    with pytest.raises(TypeError, match="only a pickle can hold"):
        other.save(folder)
    assert not folder.exists()
