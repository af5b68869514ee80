"""Compiled loops: numba is imported in this package and nowhere else.

Arrays in, arrays out: no torch, no AnnData, and nothing of the other layers. Each file of loops imports numba, which takes a
second, so callers import it where they need it. :mod:`ldvae_ext.kernels.threads` does not import numba: it holds the switch
:func:`~ldvae_ext.kernels.threads.compiled` and divides rows among threads.
"""
