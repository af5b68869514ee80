"""Options with which loops are compiled."""

from __future__ import annotations

from typing import Any

from numba import njit


def _can_cache() -> bool:
    """True if compiled code can be kept on disk: in the folder of the package, or in the user's cache."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


CACHE = _can_cache()
# Sums may be taken in any order, or they cannot be vectorised; a division by zero is IEEE's.
LOOP: dict[str, Any] = {
    "nogil": True,
    # No C code calls the loops, and a wrapper that is not compiled takes no time.
    "no_cfunc_wrapper": True,
    "cache": CACHE,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}
# Parts of a larger loop, inlined where they are called: a part that is called once or twice is then compiled once.
PART: dict[str, Any] = LOOP | {"inline": "always"}
# The order of operations is kept: the result depends on it to the last digit.
EXACT: dict[str, Any] = {
    "no_cfunc_wrapper": True,
    "cache": CACHE,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
}
