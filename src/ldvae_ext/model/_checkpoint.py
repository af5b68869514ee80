"""The pickle of a saved model: the name of its file, and an error that names it if it is damaged."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PICKLE = "model.pt"


def check_prefix(prefix: Any) -> None:
    """Raise unless names of files in a folder can begin like this."""
    if prefix is not None and (not isinstance(prefix, str) or any(sign in prefix for sign in "/\\\0")):
        msg = f"`prefix` must be the beginning of a name, text without slashes; got {prefix!r}."
        raise ValueError(msg)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the file if a model cannot be loaded since its file is damaged.

    Other errors, such as those of data that do not fit the model, stay as they are. The file is not read again, since a pickle would
    run its code a second time.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PermissionError) or not path.is_file() or not _is_of_reading(error):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        msg = f"`dir_path`: {path} is no model that can be read; it is damaged or of another kind ({reason})."
        raise ValueError(msg) from error


def _is_of_reading(error: Exception) -> bool:
    """True if torch raised the error, or passed it on, while it read a file."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.serialization" for frame, _ in frames)
