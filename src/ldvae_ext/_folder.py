"""Folder of results that is created whole, and that replaces only a folder with results and nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from anndata import AnnData

from ldvae_ext._files import temporary_folder
from ldvae_ext._formats import RESULTS, NewerFormatError, check_format

MARKER = ".ldvae-ext-run.json"


class FolderError(Exception):
    """Folder that cannot be created or replaced, described in one sentence."""


def check_anndata_can_be_written(adata: AnnData) -> None:
    """Raise if names or columns of an AnnData cannot be written to a file. Counts and other arrays are not written.

    Parameters
    ----------
    adata
        The AnnData.

    Raises
    ------
    ValueError
        If a name has a slash, or a column has values of several types.
    """
    for slot in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
        for name in map(str, getattr(adata, slot)):
            if "/" in name:
                msg = f"`adata.{slot}` has the name {name!r} with a slash, which cannot be written to a file; rename it first."
                raise ValueError(msg)
    obs: Any = adata.obs
    var: Any = adata.var
    with tempfile.TemporaryDirectory(prefix="ldvae-ext-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            AnnData(obs=obs, var=var, uns=adata.uns).write_h5ad(Path(folder) / "names.h5ad")
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            note = next((note.strip() for note in getattr(error, "__notes__", ())), "")
            msg = f"`adata` cannot be written to a file ({reason}; {note}); columns need one type, such as `.astype(str)`."
            raise ValueError(msg) from error


def temporary_beside(out: Path) -> Path:
    """New temporary folder in the same place, which can be renamed to ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return temporary_folder(out.parent)


def check_can_be_written(out: Path, *, overwrite: bool) -> None:
    """Raise unless results can be put at a path; a folder is created for the check and removed again.

    Parameters
    ----------
    out
        Absolute path of the folder.
    overwrite
        True if a folder with results may be replaced.

    Raises
    ------
    FolderError
        If the folder cannot be created, exists, or has something in it that is not a result.
    """
    try:
        is_link, exists = out.is_symlink(), out.exists()
    except OSError as error:
        msg = f"{out} cannot be created ({error.strerror})."
        raise FolderError(msg) from error
    if is_link:
        msg = f"{out} is a link."
        raise FolderError(msg)
    if exists:
        _check_can_be_replaced(out, overwrite=overwrite)
    _check_can_be_created(out)


def _check_can_be_replaced(out: Path, *, overwrite: bool) -> None:
    if not out.is_dir():
        msg = f"{out} is a file."
        raise FolderError(msg)
    if not overwrite:
        msg = f"{out} exists; use --overwrite to replace results."
        raise FolderError(msg)
    foreign = foreign_entry(out)
    if foreign is not None:
        msg = f"{out} cannot be replaced, since `ldvae-ext run` did not write {foreign}, which is in it."
        raise FolderError(msg)


def _check_can_be_created(out: Path) -> None:
    missing = [path for path in (out, *out.parents) if not path.exists()]
    created = []
    try:
        # Another program may create it at the same time; there is a second check before results are put in place.
        with suppress(FileExistsError):
            for path in reversed(missing):
                path.mkdir()
                created.append(path)
            temporary_beside(out).rmdir()
    except OSError as error:
        msg = f"{out} cannot be created ({error.strerror})."
        raise FolderError(msg) from error
    finally:
        for path in reversed(created):
            with suppress(OSError):
                path.rmdir()


def write_marker(folder: Path, version: str) -> None:
    """Write the list of the files in a folder of results, by which the folder can be recognised later.

    Parameters
    ----------
    folder
        Folder with all results.
    version
        Version of the package.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    (folder / MARKER).write_text(json.dumps({"format": RESULTS, "version": version, "files": files}, indent=1) + "\n")


def foreign_entry(folder: Path) -> Path | None:
    """First file or folder in a folder that is not a result according to its marker; None if there is none.

    Without a readable marker, everything in the folder is foreign.
    """
    results = _results(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(result.startswith(f"{name}/") for result in results):
                return path
        elif name not in results:
            return path
    return None


def _results(folder: Path) -> set[str]:
    try:
        marker = json.loads((folder / MARKER).read_text())
        check_format(str(folder), marker["format"], RESULTS)
        return {MARKER, *map(str, marker["files"])}
    except NewerFormatError as error:
        raise FolderError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def put_in_place(work: Path, out: Path, *, overwrite: bool) -> None:
    """Rename a folder of results to its final path, and remove the results that it replaces.

    Only files in the marker of the replaced folder are removed. If several programs do this at once, the folder of one
    of them is put in place whole; the others raise.

    Parameters
    ----------
    work
        Folder with all results and a marker.
    out
        Final path.
    overwrite
        True if a folder with results may be replaced.

    Raises
    ------
    FolderError
        As for :func:`check_can_be_written`. Both folders are unchanged.
    """
    if not out.exists():
        _rename(work, out)
        return
    _check_can_be_replaced(out, overwrite=overwrite)
    old = temporary_beside(out) / "old"
    out.rename(old)
    try:
        # A file may have been added since the first check; nothing can be added by the path of `out` now.
        foreign = foreign_entry(old)
        if foreign is not None:
            msg = f"{out} cannot be replaced, since `ldvae-ext run` did not write {out / foreign.relative_to(old)}."
            raise FolderError(msg)
        _rename(work, out)
    except BaseException:
        if not out.exists():
            old.rename(out)
            old.parent.rmdir()
        raise
    _remove_results(old)
    old.parent.rmdir()


def _rename(work: Path, out: Path) -> None:
    try:
        work.rename(out)
    except OSError as error:
        msg = f"{out} cannot be created ({error.strerror}); another program may have created it."
        raise FolderError(msg) from error


def _remove_results(folder: Path) -> None:
    """Remove the files in the marker of a folder, and the folders that are empty then."""
    results = _results(folder)
    # In descending order, so that the content of a folder comes before the folder. Paths are those in the folder: a marker
    # may be edited, and must not name files elsewhere.
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.relative_to(folder).as_posix() in results:
            path.unlink()
    folder.rmdir()


def keep_incomplete(work: Path, out: Path) -> Path:
    """Give a temporary folder of incomplete results a name next to ``out``; return its path."""
    for number in range(1, 100):
        path = out.with_name(f"{out.name}-incomplete-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError:
            return work
        # An empty folder is replaced, and no other program has this one.
        work.rename(path)
        return path
    return work


def discard(work: Path) -> None:
    """Remove a temporary folder of :func:`temporary_beside` with all that this program wrote to it."""
    shutil.rmtree(work, ignore_errors=True)
