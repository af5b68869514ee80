"""Number of latents: reproducible factors, and a scree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._stats import MIN_SCORES, MIN_USAGES
from ldvae_ext.core.matching import STABLE
from ldvae_ext.model._ensemble import Ensemble
from ldvae_ext.model.ensemble import fit_ensemble


@dataclass(frozen=True, eq=False, repr=False)
class NLatentSuggestion:
    """Estimate of the number of factors in the data, from :func:`suggest_n_latent`.

    Examples
    --------
    >>> from ldvae_ext.model import LDVAE, suggest_n_latent
    >>> cells, _ = ldvae_ext.datasets.simulate(200, 50, n_latent=2)
    >>> LDVAE.setup_anndata(cells)
    >>> suggestion = suggest_n_latent(cells, n_latent=4, n_runs=2, max_epochs=10)
    >>> print("Suggestion:", suggestion.message)
    Suggestion: ... of 4 factors replicate between halves of the cells ...
    """

    n_factors: int
    """Number of factors that replicate between halves of the cells or, of other ensembles, are stable: the answer."""
    n_scree: int
    """Median over runs of the number of rotated factors that add more than ``min_increment`` of the total explained deviance."""
    n_latent: int
    """Number of latents that the runs had."""
    increments: pd.DataFrame
    """Share of each rotated factor in the deviance that all explain, runs (by seed) x factors."""
    ensemble: Ensemble
    min_increment: float = 0.05

    @property
    def agree(self) -> bool:
        """True if the two counts are the same."""
        return self.n_factors == self.n_scree

    @property
    def message(self) -> str:
        """The suggestion in words."""
        share = f"more than {self.min_increment:.0%} of the explained deviance"
        text = (
            f"{self.n_factors} of {self.n_latent} factors are stable (mean |cosine| between runs of at least {STABLE})"
            if self.ensemble.replication is None
            else f"{self.n_factors} of {self.n_latent} factors replicate between halves of the cells (|cosine| of gene scores of at "
            f"least {MIN_SCORES}, |correlation| of usages of at least {MIN_USAGES})"
        )
        if self.agree:
            text += f", and as many add {share}."
        else:
            why = (
                "so some that matter to the fit do not come back: they may be mixtures, or noise"
                if self.n_factors < self.n_scree
                else "so some that come back matter to few cells or genes"
            )
            text += f", but {self.n_scree} add {share}: the two differ, {why}."
        if self.n_factors == self.n_latent:
            text += (
                f" All that there were came back: there may be more than {self.n_latent}; try again with more latents."
            )
        if self.ensemble.resample is None:
            text += " The runs share their cells; use `resample='halves'` to count factors that recur with other cells."
        return text

    def __repr__(self) -> str:
        return f"NLatentSuggestion({self.n_factors}): {self.message}"


def suggest_n_latent(
    adata: AnnData | None = None,
    *,
    n_latent: int | None = None,
    n_runs: int | None = None,
    ensemble: Ensemble | None = None,
    min_increment: float = 0.05,
    **kwargs: Any,
) -> NLatentSuggestion:
    """Count the factors that come back when a model with too many latents is trained on disjoint halves of the cells.

    On simulated data the count was exact, or off by one: too small if the weakest program was not recoverable, too large if
    the model used another factor for the size of cells. The second count is from a scree: the increments of explained deviance by the factors of
    ``rotate("deviance")``. Active units (latents whose posterior mean varies) are not used: they overcount by four to six.

    Parameters
    ----------
    adata
        AnnData registered by :meth:`LDVAE.setup_anndata`.
    n_latent
        Number of latents of the runs, more than are expected; 12 if None.
    n_runs
        Number of runs; 6 if None.
    **kwargs
        As in :func:`fit_ensemble`; ``resample`` is ``"halves"`` unless given. With None, the runs share their cells, and
        the stable factors are counted, which can be noise of these cells.
    ensemble
        An ensemble with enough latents, instead of ``adata``.
    min_increment
        Share of the explained deviance that a factor of the scree must add.

    Returns
    -------
    A :class:`NLatentSuggestion`: ``n_factors``, ``n_scree``, ``increments``, ``message``.

    Raises
    ------
    ValueError
        If both or neither of ``adata`` and ``ensemble`` are given; as :func:`fit_ensemble`.

    Examples
    --------
    >>> from ldvae_ext.model import LDVAE, suggest_n_latent
    >>> cells, _ = ldvae_ext.datasets.simulate(200, 50, n_latent=2)
    >>> LDVAE.setup_anndata(cells)
    >>> suggestion = suggest_n_latent(cells, n_latent=4, n_runs=2, max_epochs=10)
    >>> suggestion.increments.shape  # runs, factors
    (2, 4)
    """
    is_fitted = ensemble is not None
    if (adata is None) != is_fitted or (is_fitted and (kwargs or n_latent is not None or n_runs is not None)):
        msg = "`suggest_n_latent` takes either `adata`, with arguments of `fit_ensemble`, or a finished `ensemble`."
        raise ValueError(msg)
    if not 0 < min_increment < 1:
        msg = f"`min_increment` must lie between 0 and 1; got {min_increment!r}."
        raise ValueError(msg)
    if ensemble is not None and not isinstance(ensemble, Ensemble):
        msg = f"`ensemble` must be a result of `fit_ensemble`; got {type(ensemble).__name__}."
        raise TypeError(msg)
    if ensemble is None:
        sizes: dict[str, Any] = {
            "n_runs": 6 if n_runs is None else n_runs,
            "n_latent": 12 if n_latent is None else n_latent,
        }
        ensemble = fit_ensemble(adata, **sizes, **{"resample": "halves", **kwargs})  # type: ignore[arg-type]
    increments = pd.DataFrame([_increments(model) for model in ensemble.models], index=ensemble.seeds)
    n_scree = int(np.median((increments > min_increment).sum(axis=1)))
    n_factors = ensemble.n_stable if ensemble.replication is None else ensemble.n_replicated
    return NLatentSuggestion(n_factors, n_scree, increments.shape[1], increments, ensemble, min_increment)


def _increments(model: Any) -> dict[str, float]:
    """Share of each factor of the deviance rotation in the total explained deviance, in order."""
    in_force = model.rotation_
    try:
        model.rotate("deviance")
        names = model.factor_names
        table = model.get_explained_deviance(latents=names)
    finally:
        model.rotation_ = in_force
    explained = np.concatenate([table["without_latents"].to_numpy()[:1], table["cumulative"].to_numpy()])
    return dict(zip(names, np.diff(explained) / (explained[-1] - explained[0]), strict=True))
