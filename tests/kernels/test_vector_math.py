"""Exponentials and logarithms of the compiled loops against numpy in float64."""

from __future__ import annotations

import numpy as np

from ldvae_ext.kernels import vector_math

LARGE = np.linspace(-86.9, 87.9, 4001)
SMALL = np.concatenate([sign * np.logspace(-30, 0, 601) for sign in (1, -1)])


def relative_error(function, of, argument):
    argument = argument.astype(np.float32)
    expected = of(argument.astype(np.float64))
    got = np.array([function(x) for x in argument], dtype=np.float64)
    return np.abs(got / expected - 1).max()


def test_exponentials_are_right_to_a_millionth_also_of_tiny_arguments():
    for argument in (LARGE, SMALL):
        assert relative_error(vector_math.exp, np.exp, argument) < 1e-6
        assert relative_error(vector_math.expm1, np.expm1, argument) < 1e-6
        assert (
            relative_error(lambda x: sum(vector_math.parts_of_exp(x)[:1]), np.expm1, argument[np.abs(argument) < 0.3])
            < 1e-6
        )
    assert vector_math.expm1(np.float32(0)) == 0

    def by_parts(x):
        p, power = vector_math.parts_of_exp(x)
        return p * power + power

    assert relative_error(by_parts, np.exp, LARGE) < 1e-6


def test_exponentials_beyond_float32_are_the_outermost_ones():
    assert vector_math.exp(np.float32(-1e4)) < 1e-37
    assert 1e38 < vector_math.exp(np.float32(1e4)) < np.inf


def test_logarithms_are_right_to_a_millionth_also_of_tiny_arguments():
    above = np.concatenate([SMALL[SMALL > -0.99], np.logspace(0, 37, 401), -1 + np.logspace(-6, -0.01, 301)])
    assert relative_error(vector_math.log1p, np.log1p, above) < 1e-6
    ratio = np.float32(np.concatenate([np.logspace(-37, 37, 1001), 1 + SMALL[np.abs(SMALL) > 1e-3] * 0.5]))
    ratio = ratio[ratio != 1].astype(np.float64)
    assert relative_error(lambda y: vector_math.log_of_ratio(np.float32(y - 1), y), np.log, ratio) < 1e-6


def test_the_exponential_of_float64_is_right_to_1e_14():
    argument = np.concatenate([np.linspace(-707.9, 708.9, 3001), SMALL])
    got = np.array([vector_math.exp64(x) for x in argument])
    assert np.abs(got / np.exp(argument) - 1).max() < 1e-14
    assert vector_math.exp64(-1e9) < 1e-300


def test_the_logarithm_of_float64_is_right_to_1e_15():
    argument = np.concatenate([np.logspace(-300, 300, 4001), 1 + SMALL[np.abs(SMALL) < 0.5].astype(np.float64)])
    got, expected = np.array([vector_math.log64(x) for x in argument]), np.log(argument)
    assert (np.abs(got - expected) / np.maximum(np.abs(expected), 1)).max() < 1e-15
