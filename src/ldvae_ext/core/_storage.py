"""A decoder as plain arrays: for ``.npz`` files and for ``adata.uns``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from ldvae_ext._files import replacing
from ldvae_ext._formats import DECODER, NewerFormatError, check_format
from ldvae_ext._validate import listed
from ldvae_ext.core._arrays import read_only
from ldvae_ext.core._design import covariates_from_arrays, covariates_to_arrays
from ldvae_ext.core.fold import RawLinear

_RAW = ("raw", "raw_dropout")
_TEXT = ("likelihood", "dispersion", "latent_distribution", "link")


class FromArrays:
    """Methods that make a decoder immutable, and convert it to arrays and back."""

    def _freeze(self, name: str, shape: tuple[int | None, ...], *, positive: bool = False) -> None:
        if getattr(self, name) is not None:
            object.__setattr__(self, name, read_only(getattr(self, name), shape, name, positive=positive))

    @classmethod
    def _plain(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name not in (*_RAW, "covariates")]  # type: ignore[arg-type]

    def to_arrays(self) -> dict[str, Any]:
        """Flat dictionary of arrays, strings and numbers, without None: values that ``.npz`` and ``adata.uns`` can store.

        ``format`` is the number of the format, 2; earlier releases wrote the same arrays without it.

        Examples
        --------
        >>> arrays = decoder.to_arrays()
        >>> arrays["weight_gk"].shape, arrays["likelihood"]
        ((765, 5), 'nb')
        """
        out: dict[str, Any] = {"format": DECODER}
        out.update({name: getattr(self, name) for name in self._plain() if getattr(self, name) is not None})
        out.update(covariates_to_arrays(self.covariates))  # type: ignore[attr-defined]
        for name in _RAW:
            if getattr(self, name) is not None:
                out.update({f"{name}_{part}": value for part, value in getattr(self, name).to_arrays().items()})
        return out

    @classmethod
    def from_arrays(cls, arrays: Any) -> Self:
        """The decoder that :meth:`to_arrays` took apart, also after h5ad, zarr or ``.npz``.

        Raises
        ------
        ValueError
            If arrays are missing, or a newer version of the package wrote them.

        Examples
        --------
        >>> same = type(decoder).from_arrays(decoder.to_arrays())
        >>> bool((same.weight_gk == decoder.weight_gk).all())
        True
        """
        if not isinstance(arrays, Mapping):
            msg = f"`arrays` must be a mapping, as `to_arrays` returns it; got {type(arrays).__name__}."
            raise TypeError(msg)
        needed = {"weight_gk", "intercept_bg", "genes", "batches", "factors"}
        if "covariate_names" in arrays:
            needed |= {"covariate_levels", "covariate_n_levels"}
        missing = sorted(needed - set(arrays))
        if missing:
            msg = f"These arrays hold no decoder: {listed(missing)} missing."
            raise ValueError(msg)
        check_format("The decoder", arrays.get("format"), DECODER)
        values = {name: str(arrays[name]) if name in _TEXT else arrays[name] for name in cls._plain() if name in arrays}
        raw = {name: RawLinear.from_arrays(arrays, f"{name}_") for name in _RAW}
        return cls(**{**values, **raw, "covariates": covariates_from_arrays(arrays)})

    @classmethod
    def from_loadings(
        cls,
        loadings: Any,
        intercept: Any = None,
        *,
        counts: Any = None,
        genes: Any = None,
        factors: Any = None,
        likelihood: str | None = None,
        rescale: bool = True,
    ) -> Self:
        """A decoder from any table of genes x factors: a published signature, principal components, another model's loadings.

        Loadings are effects on the log of expression: take the logarithm of what is on the scale of expression, such as the
        spectra of cNMF. Intercept and dispersions are fitted to counts by Newton steps, in turn with the cells' posteriors
        (:func:`ldvae_ext.core.posterior_of`). All cells are one batch, under a softmax.

        Parameters
        ----------
        loadings
            Shape (genes, factors). The index and the columns of a DataFrame are the names of genes and factors.
        intercept
            Log-rate of each gene at z = 0, shape (genes,); fitted if None.
        counts
            Raw counts, dense or sparse, shape (cells, genes), columns in the order of ``loadings``. A few thousand cells suffice.
        genes, factors
            Names, where ``loadings`` has none; factors are ``Z_0``, ``Z_1``, ... by default.
        likelihood
            ``"nb"``, the default with counts, or ``"poisson"``.
        rescale
            True to multiply each column by a number such that its factor has a mean square of 1 in these cells, as the prior has.
            Most tables leave this number open. No effect without counts.

        Returns
        -------
        The decoder.

        Raises
        ------
        ValueError
            If shapes do not agree, values are not finite, or neither counts nor an intercept are given.
        TypeError
            If ``counts`` is no matrix.

        Examples
        --------
        >>> from ldvae_ext.core import LinearDecoder
        >>> loadings, counts = [[1], [-1]], np.array([[9, 1], [1, 9], [8, 2], [2, 8]])
        >>> decoder = LinearDecoder.from_loadings(loadings, counts=counts, genes=list("ab"))
        >>> decoder.factors.tolist(), decoder.likelihood
        (['Z_0'], 'nb')
        """
        from ldvae_ext.core.refitting import decoder_from_loadings

        return decoder_from_loadings(  # type: ignore[return-value]
            cls,  # type: ignore[arg-type]
            loadings,
            intercept,
            counts=counts,
            genes=genes,
            factors=factors,
            likelihood=likelihood,
            rescale=rescale,
        )

    def save(self, path: str | Path) -> None:
        """Write the decoder to one ``.npz`` file, without pickle. A file that is there is replaced when the new one is complete.

        Examples
        --------
        >>> decoder.save("decoder.npz")
        >>> ldvae_ext.core.LinearDecoder.load("decoder.npz").factors.tolist()
        ['Z_0', 'Z_1', 'Z_2', 'Z_3', 'Z_4']
        """
        with replacing(path) as work, work.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.to_arrays())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a decoder that :meth:`save` wrote. No pickles are loaded.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged or of another kind.

        Examples
        --------
        >>> decoder.save("decoder.npz")
        >>> ldvae_ext.core.LinearDecoder.load("decoder.npz").genes.shape
        (765,)
        """
        # numpy leaves a file open that it cannot read.
        with Path(path).open("rb") as file:
            arrays = _arrays_of(file, path)
        try:
            return cls.from_arrays(arrays)
        except NewerFormatError:
            raise
        except (TypeError, ValueError) as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from error


def _arrays_of(file: Any, path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file, or a ValueError; a damaged one raises errors of many classes."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:
        msg = f"{path} is no file that `LinearDecoder.save` wrote, or it is damaged ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
