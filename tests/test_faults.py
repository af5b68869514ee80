"""Killed processes and full disks: what was there before stays whole, and nothing half-written is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from ldvae_ext import _files, get, report
from ldvae_ext.backends import plan
from ldvae_ext.core import LinearDecoder
from ldvae_ext.model import LDVAE, _ldvae, fit_ensemble
from tests.helpers import TRAIN, counts, untrained

pytestmark = pytest.mark.slow


@pytest.fixture
def exported():
    adata = counts(60, 30)
    model = untrained(adata)
    model.export_to_anndata()
    return model, adata


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small file system needs the right to mount it: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder):
    """Leave no room on the disk; no file of ours is touched."""
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "filler")


def test_a_full_disk_keeps_a_decoder(small_disk, exported):
    decoder = get.decoder(exported[1])
    path = small_disk / "decoder.npz"
    decoder.save(path)
    before = path.read_bytes()
    fill(small_disk)
    with pytest.raises(OSError, match="space"):
        decoder.save(path)
    assert path.read_bytes() == before
    assert names(small_disk) == ["decoder.npz"]


def test_a_full_disk_keeps_a_report(small_disk, exported):
    path = small_disk / "report.html"
    path.write_text("the report before")
    fill(small_disk)
    with pytest.raises(OSError, match="space"):
        report(exported[1], path)
    assert path.read_text() == "the report before"
    assert names(small_disk) == ["report.html"]


def test_a_full_disk_keeps_a_model(small_disk, exported):
    folder = small_disk / "model"
    folder.mkdir()
    (folder / "model.pt").write_text("the model before")
    fill(small_disk)
    # torch's writer raises an error of its own.
    with pytest.raises((OSError, RuntimeError)):
        exported[0].save(folder, overwrite=True)
    assert (folder / "model.pt").read_text() == "the model before"
    assert names(folder) == ["model.pt"]
    with pytest.raises((OSError, RuntimeError)):
        exported[0].save(small_disk / "new")
    assert names(small_disk) == ["model"]


def killed(code, *arguments):
    """Run code in a process that kills itself."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr


def test_a_process_that_is_killed_while_it_saves_keeps_the_model(tmp_path, exported):
    model, _ = exported
    folder = tmp_path / "model"
    model.save(folder, save_anndata=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    killed(
        """
        import os, signal, sys
        import torch
        from ldvae_ext.model import LDVAE, _ldvae, fit_ensemble

        model = LDVAE.load(sys.argv[1])
        own = torch.save

        def half(value, path, **kwargs):
            own(value, path, **kwargs)
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half
        model.save(sys.argv[1], overwrite=True, save_anndata=True)
        """,
        folder,
    )
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert any(name.startswith(".ldvae-ext-") for name in names(folder)), "the process left something"
    reopened = LDVAE.load(folder)
    np.testing.assert_array_equal(reopened.get_loadings(), model.get_loadings())
    reopened.save(folder, overwrite=True)
    assert names(folder) == sorted(before)


def test_a_process_that_is_killed_while_it_writes_a_decoder_keeps_it(tmp_path, exported):
    path = tmp_path / "decoder.npz"
    get.decoder(exported[1]).save(path)
    before = path.read_bytes()
    killed(
        """
        import os, signal, sys
        import numpy as np
        from ldvae_ext.core import LinearDecoder

        decoder = LinearDecoder.load(sys.argv[1])

        def half(file, **kwargs):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        np.savez_compressed = half
        decoder.save(sys.argv[1])
        """,
        path,
    )
    assert path.read_bytes() == before
    LinearDecoder.load(path).save(path)
    assert names(tmp_path) == ["decoder.npz"]


def test_leftovers_of_running_processes_and_other_machines_stay(tmp_path):
    own = tmp_path / f"{_files._prefix()}own"
    other = tmp_path / ".ldvae-ext-otherhost-999999999-x"
    foreign = tmp_path / ".ldvae-ext-notes"
    dead = tmp_path / f".ldvae-ext-{_files._host()}-999999999-x"
    for path in (own, other, foreign):
        path.touch()
    dead.mkdir()
    _files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([own, other, foreign])


def test_files_have_the_rights_of_the_user_and_a_folder_is_no_file(tmp_path, exported):
    before = os.umask(0o027)
    try:
        get.decoder(exported[1]).save(tmp_path / "decoder.npz")
    finally:
        os.umask(before)
    assert (tmp_path / "decoder.npz").stat().st_mode & 0o777 == 0o640
    with pytest.raises(IsADirectoryError, match="folder"):
        get.decoder(exported[1]).save(tmp_path)


def test_a_model_is_written_inside_of_its_folder_alone(tmp_path, exported, monkeypatch):
    """The folder above may be closed to the user."""
    parents = []
    own = _ldvae.temporary_folder
    monkeypatch.setattr(_ldvae, "temporary_folder", lambda parent: parents.append(parent) or own(parent))
    folder = tmp_path / "model"
    exported[0].save(folder)
    assert parents == [folder]
    assert names(tmp_path) == ["model"]
    assert isinstance(LDVAE.load(folder, exported[1]), LDVAE)


@pytest.fixture
def heeds_ctrl_c():
    """Python's own answer to Ctrl-C, which processes of pytest-xdist ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_in_a_training_leaves_a_model_that_can_be_used(tmp_path):
    adata = counts(150, 30)
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=3)
    before = signal.getsignal(signal.SIGINT)
    press = LambdaCallback(
        on_train_epoch_start=lambda trainer, _: trainer.current_epoch == 2 and signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt, match="can be used"):
        model.train(50, callbacks=[press], batch_size=16, **TRAIN)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(model.history["elbo_train"]) == 3
    assert model.get_latent_representation().shape == (150, 3)
    assert all(value.is_contiguous() for value in model.module.state_dict().values())
    model.save(tmp_path / "model")
    model.train(2, **TRAIN, kl_warmup=1)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_inside_of_an_epoch_ends_the_training_after_the_step(monkeypatch):
    steps, check = [], plan.check_step

    def press(*args):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        check(*args)

    monkeypatch.setattr(plan, "check_step", press)
    adata = counts(160, 30)
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=2)
    with pytest.raises(KeyboardInterrupt, match="can be used"):
        model.train(3, batch_size=16, train_size=1.0, **TRAIN)
    assert len(steps) == 6
    assert np.isfinite(model.get_latent_representation()).all()


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_in_the_first_epoch_ends_it_after_the_step():
    adata = counts(150, 30)
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=3)
    press = LambdaCallback(on_train_epoch_start=lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        model.train(50, callbacks=[press], batch_size=16, **TRAIN)
    assert model.trainer.global_step == 1


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_second_ctrl_c_ends_a_training_at_once():
    adata = counts(150, 30)
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=3)

    def press(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # Lightning ends the program.
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        model.train(50, callbacks=[LambdaCallback(on_train_epoch_start=press)], **TRAIN)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_in_an_ensemble_keeps_the_runs_that_were_done(tmp_path):
    adata = counts(150, 30)
    LDVAE.setup_anndata(adata)
    starts = []

    def press_in(*runs):
        def start(trainer, _):
            starts.append(1)
            if len(starts) - 1 in runs:
                signal.raise_signal(signal.SIGINT)

        starts.clear()
        return {**TRAIN, "callbacks": [LambdaCallback(on_train_start=start)]}

    options = {"n_latent": 3, "max_epochs": 2, "silent": True}
    with pytest.warns(UserWarning, match="has the 2 of 4 runs that were done"):
        ensemble = fit_ensemble(adata, 4, train_kwargs=press_in(2), **options)
    assert ensemble.seeds == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        fit_ensemble(adata, 4, train_kwargs=press_in(1), **options)
    with pytest.raises(KeyboardInterrupt, match="has 1 of 4 runs; the same call trains the others"):
        fit_ensemble(adata, 4, folder=tmp_path, train_kwargs=press_in(1), **options)


def test_machines_with_the_same_letters_and_digits_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr(_files.platform, "node", lambda: "node1-11")
    leftover = tmp_path / f".ldvae-ext-{_files._host()}-999999999-x"
    leftover.touch()
    monkeypatch.setattr(_files.platform, "node", lambda: "node11-1")
    _files.remove_leftovers(tmp_path)
    assert leftover.exists()


def test_nothing_is_removed_under_windows(tmp_path, monkeypatch):
    leftover = tmp_path / f".ldvae-ext-{_files._host()}-999999999-x"
    leftover.touch()
    asked = []
    monkeypatch.setattr(_files, "os", SimpleNamespace(name="nt", kill=lambda *_: asked.append(1)))
    _files.remove_leftovers(tmp_path)
    assert leftover.exists()
    assert asked == []


def test_a_pickle_is_read_once_also_after_an_error(tmp_path, exported, monkeypatch):
    model, adata = exported
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "model.pt"
    read = []
    own = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(1) or own(*args, **kwargs))
    other = adata[:, :-1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="var_names"):
            LDVAE.load(tmp_path / "model", other)
    assert len(read) == 1
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="it is damaged"):
        LDVAE.load(tmp_path / "model", adata)
    assert len(read) == 2
