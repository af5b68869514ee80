"""Files and folders that are complete or not there: written beside their place, and renamed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAME = re.compile(r"\.ldvae-ext-(?P<host>[^-]+)-(?P<process>\d+)-.*")


def _host() -> str:
    # A hash of the full name, since `node1-11` and `node11-1` have the same letters and digits.
    return hashlib.sha256(platform.node().encode(errors="surrogateescape")).hexdigest()[:16]


def _prefix() -> str:
    return f".ldvae-ext-{_host()}-{os.getpid()}-"


def check_is_path(name: str, value: Any) -> None:
    """Raise unless the value of an argument can be a path."""
    if not isinstance(value, (str, os.PathLike)):
        msg = f"`{name}` must be a path, as text or a `pathlib.Path`; got {value!r}."
        raise TypeError(msg)


def check_place(path: Path) -> None:
    """Raise unless a file can stand at a path: its folder is there, and the path is no folder."""
    if path.is_dir():
        msg = f"{path} is a folder."
        raise IsADirectoryError(msg)
    if not path.absolute().parent.is_dir():
        msg = f"There is no folder {path.absolute().parent} to write {path.name} to."
        raise FileNotFoundError(msg)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes the place of a file when it is complete.

    An error, a full disk or the end of the process leaves the file at ``path`` as it was. What killed processes left behind is removed.

    Parameters
    ----------
    path
        Path of the file.
    """
    path = Path(path)
    check_place(path)
    remove_leftovers(path.absolute().parent)
    handle, name = tempfile.mkstemp(prefix=_prefix(), suffix=path.suffix, dir=path.absolute().parent)
    os.close(handle)
    work = Path(name)
    try:
        yield work
        with work.open("rb") as file:
            # Else a rename can be on the disk before the content.
            os.fsync(file.fileno())
        # As a file that is opened for writing: temporary files are for the user alone.
        work.chmod(0o666 & ~_umask())
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def temporary_folder(parent: Path) -> Path:
    """A new temporary folder, whose name says which process uses it.

    Parameters
    ----------
    parent
        Folder to create it in.
    """
    remove_leftovers(parent)
    return Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for as long as it is used, among the temporary files of the machine or in joblib's own folder for them.

    What killed processes left behind there is removed.
    """
    work = temporary_folder(Path(os.environ.get("JOBLIB_TEMP_FOLDER") or tempfile.gettempdir()))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def completing(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed when it is complete.

    Parameters
    ----------
    folder
        The folder that it becomes, which is not there yet.
    """
    work = temporary_folder(folder.parent)
    try:
        yield work
        # Temporary folders are for the user alone.
        work.chmod(0o777 & ~_umask())
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes of this machine that are no longer there.

    Under Windows nothing is removed: there is no harmless way to ask if a process is running.

    Parameters
    ----------
    folder
        Folder in which to look.
    """
    if os.name == "nt":
        return
    for path in folder.glob(".ldvae-ext-*"):
        name = _NAME.fullmatch(path.name)
        if name is None or name["host"] != _host() or _is_running(int(name["process"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
