"""Exponentials and logarithms for compiled loops.

They are polynomials (Cephes, S. L. Moshier, expf.c and logf.c), which the compiler vectorises, unlike calls of a library.
The relative error is 1e-7 for all arguments, also for small ones. Arguments and results are single numbers, float32 unless a
name ends in 64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import EXACT

_F = np.float32
_I = np.int32
_LOG2_E = _F(1.44269504)
# log 2 in two parts, the first of which has few digits, so that its multiples are exact.
_LN2_HIGH, _LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)
LOWEST, HIGHEST = _F(-87.0), _F(88.0)
_BIAS, _MANTISSA, _ROUND = _I(127), _I(23), _F(12582912.0)
_ONE_BITS, _ROOT_HALF_BITS = _I(0x3F800000), _I(0x3F3504F3)
# Mask of the exponent in a float32, and log 2 in units of its lowest bit.
_EXPONENT_BITS, _LN2_OF_BITS = _I(-(2**23)), _F(math.log(2) / 2**23)
_LOG2_E_64, _ROUND_64 = 1.4426950408889634, 6755399441055744.0
_LN2_HIGH_64, _LN2_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# 1 / 12!, then 1 / 11!, ..., 1 / 1!, 1
_TAYLOR_12, *_REST = (1.0 / math.factorial(i) for i in range(12, -1, -1))
_TAYLOR = tuple(_REST)
_ROOT_HALF_BITS_64, _ONE_BITS_64, _MANTISSA_64 = (
    np.int64(0x3FE6A09E667F3BCD),
    np.int64(0x3FF0000000000000),
    np.int64(52),
)
_LN2_64 = math.log(2)
# 2 / 21, then 2 / 19, ..., 2 / 3
_SERIES_21, *_SERIES_REST = (2.0 / i for i in range(21, 1, -2))
_SERIES = tuple(_SERIES_REST)


@njit(**EXACT)
def _exp_near_zero(r: np.float32) -> np.float32:
    """``e^r - 1`` of a float32, -0.35 < r < 0.35."""
    p = _F(1.9875691500e-4)
    p = p * r + _F(1.3981999507e-3)
    p = p * r + _F(8.3334519073e-3)
    p = p * r + _F(4.1665795894e-2)
    p = p * r + _F(1.6666665459e-1)
    p = p * r + _F(5.0000001201e-1)
    return p * (r * r) + r


@njit(**EXACT)
def _parts_of_exp(x: np.float32) -> tuple[np.float32, np.float32]:
    """The p and the power of two of ``e^x = (1 + p) power``; x is clamped so that the power is a normal number."""
    x = min(max(x, LOWEST), HIGHEST)
    n = np.floor(x * _LOG2_E + _F(0.5))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    return _exp_near_zero(r), _I(_I(_I(n) + _BIAS) << _MANTISSA).view(np.float32)


@njit(**EXACT)
def parts_of_exp(x: np.float32) -> tuple[np.float32, np.float32]:
    """See :func:`_parts_of_exp`, for -87 < x < 88."""
    # Adding 1.5 2^23 rounds to an integer, which the lowest bits then hold.
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    return _exp_near_zero(r), _I(_I(_F(shifted).view(np.int32) + _BIAS) << _MANTISSA).view(np.float32)


@njit(**EXACT)
def excess(p: np.float32, power: np.float32) -> np.float32:
    """``(1 + p) power - 1``. A function of its own, so that a loop that may reorder sums keeps this order."""
    return p * power + (power - _F(1))


@njit(**EXACT)
def exp(x: np.float32) -> np.float32:
    """``e^x`` of a float32."""
    p, power = _parts_of_exp(x)
    return p * power + power


@njit(**EXACT)
def expm1(x: np.float32) -> np.float32:
    """``e^x - 1`` of a float32."""
    p, power = _parts_of_exp(x)
    return p * power + (power - _F(1))


@njit(**EXACT)
def _log_near_one(m: np.float32) -> np.float32:
    """``log(1 + m)`` of a float32, -0.3 < m < 0.42."""
    p = _F(7.0376836292e-2)
    p = p * m + _F(-1.1514610310e-1)
    p = p * m + _F(1.1676998740e-1)
    p = p * m + _F(-1.2420140846e-1)
    p = p * m + _F(1.4249322787e-1)
    p = p * m + _F(-1.6668057665e-1)
    p = p * m + _F(2.0000714765e-1)
    p = p * m + _F(-2.4999993993e-1)
    p = p * m + _F(3.3333331174e-1)
    return (p * m - _F(0.5)) * (m * m) + m


@njit(**EXACT)
def _exponent(x: np.float32) -> np.int32:
    """Exponent e of a normal float32 as ``x = m 2^e``, with m between 0.7 and 1.4."""
    return _I(_I(_F(x).view(np.int32) - _ROOT_HALF_BITS) >> _MANTISSA)


@njit(**EXACT)
def log(x: np.float32) -> np.float32:
    """Natural logarithm of a normal float32."""
    exponent = _exponent(x)
    power = _I(_ONE_BITS - _I(exponent << _MANTISSA)).view(np.float32)
    return _log_near_one(x * power - _F(1)) + _F(exponent) * (_LN2_HIGH + _LN2_LOW)


@njit(**EXACT)
def log1p(x: np.float32) -> np.float32:
    """``log(1 + x)`` of a float32, x > -1 and 1 + x a normal number."""
    bits = _I(_I(_F(x + _F(1)).view(np.int32) - _ROOT_HALF_BITS) & _EXPONENT_BITS)
    power = _I(_ONE_BITS - bits).view(np.float32)
    # (1 + x) / 2^exponent - 1, without the rounding of 1 + x.
    return _log_near_one(x * power + (power - _F(1))) + _F(bits) * _LN2_OF_BITS


@njit(**EXACT)
def log_of_ratio(x: np.float32, y: np.float32) -> np.float32:
    """``log(y)`` of a normal float32, ``y = 1 + x``, accurate from x near y = 1 and from y for small y."""
    exponent = _exponent(y)
    power = _I(_ONE_BITS - _I(exponent << _MANTISSA)).view(np.float32)
    m = y * power - _F(1) if y < _F(0.5) else x * power + (power - _F(1))
    return _log_near_one(m) + _F(exponent) * (_LN2_HIGH + _LN2_LOW)


@njit(**EXACT)
def exp64(x: float) -> float:
    """``e^x`` of a float64, to 1e-15; x is clamped so that the result is a normal number."""
    x = min(max(x, -708.0), 709.0)
    # Adding 1.5 2^52 rounds to an integer, which the lowest bits then hold: conversions do not vectorise everywhere.
    shifted = x * _LOG2_E_64 + _ROUND_64
    n = shifted - _ROUND_64
    r = x - n * _LN2_HIGH_64
    r = r - n * _LN2_LOW_64
    p = _TAYLOR_12
    for c in _TAYLOR:
        p = p * r + c
    bits = np.float64(shifted).view(np.int64) + np.int64(1023)
    return p * np.int64(bits << np.int64(52)).view(np.float64)


@njit(**EXACT)
def log64(x: float) -> float:
    """Natural logarithm of a normal, positive float64, to 1e-15 (absolutely where it is near 0)."""
    exponent = np.int64((np.float64(x).view(np.int64) - _ROOT_HALF_BITS_64) >> _MANTISSA_64)
    m = x * np.int64(_ONE_BITS_64 - np.int64(exponent << _MANTISSA_64)).view(np.float64)
    # log m = 2 artanh(s)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    p = _SERIES_21
    for c in _SERIES:
        p = p * square + c
    # The bits of 1.5 2^52 + exponent: conversions of integers do not vectorise everywhere.
    count = np.int64(exponent + np.float64(_ROUND_64).view(np.int64)).view(np.float64) - _ROUND_64
    return count * _LN2_64 + (2.0 * s + s * square * p)
