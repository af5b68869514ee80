"""Compiled loops: numba is imported in this package and nowhere else.

Arguments and results are arrays; neither torch nor AnnData nor another layer of the package is imported. A file of loops
imports numba, which takes a second, so callers import it in the function that needs it. :mod:`ldvae_ext.kernels.threads` does
not import numba; it has the switch :func:`~ldvae_ext.kernels.threads.compiled` and divides rows among threads.

The letters after the last underscore of a name are the axes of an array:

* ``n`` cells, ``g`` genes, ``k`` latents, ``h`` hidden units of an encoder, ``p`` inputs of the decoder (latents and
  covariates), ``s`` sets of latents;
* ``c`` rows of dispersions, ``x`` counts from 0 to ``N_TABLE``, ``r`` rows of a table, to which cells refer;
* ``t`` threads; ``i`` items of a selection, ``j`` stored counts.

``d_`` before a name is the gradient of the loss in it. Counts are the three arrays of a CSR matrix, cells x genes:
``indptr`` (cells + 1), ``indices`` and ``values`` (stored counts). Annotations give dtypes; a public loop also lists each
argument in its docstring.
"""
