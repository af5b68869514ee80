"""Options with which loops are compiled, and types of their arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
IntegerArray = NDArray[np.integer[Any]]
BooleanArray = NDArray[np.bool_]


def _can_cache() -> bool:
    """True if compiled code can be kept on disk: in the folder of the package, or in the user's cache."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


CACHE = _can_cache()
# Sums in a fixed order could not be vectorised; division by zero follows IEEE.
LOOP: dict[str, Any] = {
    "nogil": True,
    # No C code calls the loops; the wrapper would take time to compile.
    "no_cfunc_wrapper": True,
    "cache": CACHE,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}
# Parts of a larger loop are inlined into it, so that a part with one or two callers is compiled once.
PART: dict[str, Any] = LOOP | {"inline": "always"}
# Operations keep their order, on which the last digits depend.
EXACT: dict[str, Any] = {
    "no_cfunc_wrapper": True,
    "cache": CACHE,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
}
