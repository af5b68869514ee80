"""Compiled loops over cells and genes, in float32. The one file of `core` that imports numba; opened on first use.

Exponentials and logarithms are polynomials (Cephes, S. L. Moshier, expf.c and logf.c), which unlike calls of a library the
compiler turns into vector instructions. Both are written for small arguments: the relative error is 1e-7 everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_F = np.float32
_I = np.int32
_LOG2_E = _F(1.44269504)
# log 2 in two parts, the first of which has few digits, so that its multiples are exact.
_LN2_HIGH, _LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)
_LOWEST, _HIGHEST = _F(-87.0), _F(88.0)
_BIAS, _MANTISSA = _I(127), _I(23)
_ONE_BITS, _ROOT_HALF_BITS = _I(0x3F800000), _I(0x3F3504F3)

# Sums may be taken in any order, or they cannot be vectorised; a division by zero is IEEE's.
_LOOP: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}
# Here the order of operations is what makes the result exact.
_EXACT: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}


@njit(**_EXACT)
def _parts_of_exp(x: Any) -> Any:
    """The p and the power of two of ``e^x = (1 + p) power``; x is clamped to where that is a normal number."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(x * _LOG2_E + _F(0.5))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = _F(1.9875691500e-4)
    p = p * r + _F(1.3981999507e-3)
    p = p * r + _F(8.3334519073e-3)
    p = p * r + _F(4.1665795894e-2)
    p = p * r + _F(1.6666665459e-1)
    p = p * r + _F(5.0000001201e-1)
    return p * r * r + r, _I(_I(_I(n) + _BIAS) << _MANTISSA).view(np.float32)


@njit(**_EXACT)
def exp(x: Any) -> Any:
    """``e^x`` of a float32."""
    p, power = _parts_of_exp(x)
    return p * power + power


@njit(**_EXACT)
def expm1(x: Any) -> Any:
    """``e^x - 1`` of a float32."""
    p, power = _parts_of_exp(x)
    return p * power + (power - _F(1))


@njit(**_EXACT)
def log1p(x: Any) -> Any:
    """``log(1 + x)`` of a float32, x > -1 and 1 + x a normal number."""
    exponent = _I(_I(_F(x + _F(1)).view(np.int32) - _ROOT_HALF_BITS) >> _MANTISSA)
    power = _I(_ONE_BITS - _I(exponent << _MANTISSA)).view(np.float32)
    # (1 + x) / 2^exponent - 1, without the rounding of 1 + x.
    m = x * power + (power - _F(1))
    p = _F(7.0376836292e-2)
    p = p * m + _F(-1.1514610310e-1)
    p = p * m + _F(1.1676998740e-1)
    p = p * m + _F(-1.2420140846e-1)
    p = p * m + _F(1.4249322787e-1)
    p = p * m + _F(-1.6668057665e-1)
    p = p * m + _F(2.0000714765e-1)
    p = p * m + _F(-2.4999993993e-1)
    p = p * m + _F(3.3333331174e-1)
    p = p * m * m * m - _F(0.5) * m * m
    return (p + m) + _F(exponent) * (_LN2_HIGH + _LN2_LOW)
