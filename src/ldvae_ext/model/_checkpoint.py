"""The pickle of a saved model: the name of its file, and an error that names it if it is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PICKLE = "model.pt"


def check_prefix(prefix: Any) -> None:
    """Raise unless names of files in a folder can begin like this."""
    if prefix is not None and (not isinstance(prefix, str) or any(sign in prefix for sign in "/\\\0")):
        msg = f"`prefix` must be the beginning of a name, text without slashes; got {prefix!r}."
        raise ValueError(msg)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the file if a model cannot be loaded since its file is damaged.

    Other errors, such as those of data that do not fit the model, stay as they are.
    """
    try:
        yield
    except Exception as error:
        reason = _damage(path) if path.is_file() else None
        if reason is None:
            raise
        msg = f"`dir_path`: {path} is no model that can be read; it is damaged or of another kind ({reason})."
        raise ValueError(msg) from error


def _damage(path: Path) -> str | None:
    """Why the file cannot be read; None if it can."""
    try:
        with path.open("rb") as file:
            torch.load(file, map_location="cpu", weights_only=False)
    except PermissionError:
        return None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises any
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None
