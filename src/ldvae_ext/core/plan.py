"""Sets of latents that an ablation replaces, and the values that replace them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ldvae_ext._formats import ABLATION
from ldvae_ext._validate import check_one_of, check_positive_int, factor_indices, listed
from ldvae_ext.core._arrays import strings
from ldvae_ext.core._changes import ablation_changes
from ldvae_ext.core._sets import latent_order, named_sets
from ldvae_ext.core.ablation import set_effects
from ldvae_ext.core.cells import EncodedCells, PosteriorAxes, indicator
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.draws import POSTERIOR, PRIOR, donors, normal_draws
from ldvae_ext.core.posterior import kl_per_dimension

Mode = Literal["zero", "mean", "group_mean", "permute", "prior", "value", "drop"]
Scheme = Literal["leave_out", "leave_in", "keep_top"]
MODES, SCHEMES = get_args(Mode), get_args(Scheme)
RANDOM_MODES = ("permute", "prior")
POSTERIORS = ("mean", "samples")
N_SAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class AblationRequest:
    """Arguments of an ablation, checked against the decoder before any cell is read."""

    decoder: LinearDecoder
    latents: Any = None
    mode: str = "zero"
    value: Any = None
    scheme: str = "leave_out"
    has_groups: bool = False
    refit_heads: bool = False
    use_posterior: str = "mean"
    n_samples: int | None = None
    seed: int | None = None
    batches: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        check_one_of("mode", self.mode, MODES)
        check_one_of("scheme", self.scheme, SCHEMES)
        check_one_of("use_posterior", self.use_posterior, POSTERIORS)
        decoder, is_sampled = self.decoder, self.use_posterior == "samples"
        if self.latents is None and hasattr(self.value, "keys") and self.scheme == "leave_out":
            object.__setattr__(self, "latents", list(self.value.keys()))
        if isinstance(self.latents, Iterator):
            object.__setattr__(self, "latents", list(self.latents))
        if self.n_samples is not None:
            check_positive_int("n_samples", self.n_samples)
        problems = {
            "`mode='drop'` takes a latent out of the simplex; `latent_distribution='normal'` has none. `mode='zero'` "
            "sets it to the prior mean.": self.mode == "drop" and decoder.latent_distribution != "ln",
            "`mode='drop'` needs at least two latents.": self.mode == "drop" and len(decoder.factors) == 1,
            "`mode='group_mean'` needs `groupby`.": self.mode == "group_mean" and not self.has_groups,
            "`mode='value'` needs `value`.": self.mode == "value" and self.value is None,
            f"`value` belongs to `mode='value'`; got mode {self.mode!r}.": self.mode != "value"
            and self.value is not None,
            "`n_samples` belongs to `use_posterior='samples'`.": not is_sampled and self.n_samples is not None,
            f"`seed` has no effect: `mode={self.mode!r}` with `use_posterior='mean'` draws no random numbers.": not is_sampled
            and self.mode not in RANDOM_MODES
            and self.seed is not None,
            "`refit_heads`: neither dropout nor dispersion of this decoder depends on the latent.": self.refit_heads
            and decoder.likelihood != "zinb"
            and (decoder.dispersion != "gene-cell" or decoder.likelihood == "poisson"),
            "`scheme='keep_top'` takes latents in order, not sets of them.": self.scheme == "keep_top"
            and isinstance(self.latents, Mapping),
        }
        for msg, is_wrong in problems.items():
            if is_wrong:
                raise ValueError(msg)
        is_int = isinstance(self.seed, (int, np.integer)) and not isinstance(self.seed, bool)
        if self.seed is not None and (not is_int or not 0 <= self.seed < 2**64):
            msg = f"`seed` must be a non-negative integer below 2**64; got {self.seed!r}."
            raise ValueError(msg)
        value_k = value_of_each(decoder, self.value)[0]
        for name, replaced in named_sets(decoder, self.latents, self.scheme, self.mode, None):
            if np.isnan(value_k[replaced]).any():
                missing = decoder.factors[replaced[np.isnan(value_k[replaced])]]
                msg = f"`value` has none for {listed(missing)}, which {name!r} replaces."
                raise ValueError(msg)

    def reject_unused_groups(self) -> None:
        """Raise if groups are given in a mode that does not use them."""
        if self.has_groups and self.mode != "group_mean":
            msg = f"`groupby` belongs to `mode='group_mean'`; got mode {self.mode!r}. `get.ablation_df` summarises by group."
            raise ValueError(msg)

    @property
    def needs_latents(self) -> bool:
        """True if the latents of all cells are needed first."""
        by_kl = self.scheme == "keep_top" and self.latents is None
        return by_kl or self.mode in ("mean", "group_mean", "permute")

    def plan(self, seen: LatentSummary | None = None, *, default_seed: int = 0) -> AblationPlan:
        """Plan of the replacements, from a summary of the latents of all cells if one is needed."""
        order = None if seen is None else np.argsort(-seen.kl_k, kind="stable")
        value_pk = np.zeros((1, len(self.decoder.factors)))
        if self.mode == "value":
            value_pk = value_of_each(self.decoder, self.value)
        elif self.mode == "drop":
            value_pk = np.full_like(value_pk, -np.inf)
        elif self.mode == "mean" and seen is not None:
            value_pk = seen.mean_k[None]
        elif self.mode == "group_mean" and seen is not None:
            value_pk = seen.mean_pk
        sets = named_sets(self.decoder, self.latents, self.scheme, self.mode, order)
        seed, donated = default_seed if self.seed is None else int(self.seed), None
        if self.mode == "permute" and seen is not None:
            mean_nk, axes = seen.latents()
            donated = Donated(donors(seed, len(mean_nk)), mean_nk, axes)
        return AblationPlan(
            mode=self.mode,
            order=latent_order(self.decoder, self.latents, order),
            names=[name for name, _ in sets],
            sets=[positions for _, positions in sets],
            value_pk=value_pk,
            donated=donated,
            refit_heads=self.refit_heads,
            n_samples=(N_SAMPLES if self.n_samples is None else self.n_samples)
            if self.use_posterior == "samples"
            else 0,
            seed=seed,
            batches=self.batches,
        )

    def description(self, plan: AblationPlan, groupby: str | None = None) -> dict[str, Any]:
        """Description of the ablation, for ``uns``."""
        info: dict[str, Any] = {"format": ABLATION, "mode": self.mode, "scheme": self.scheme}
        info["use_posterior"] = self.use_posterior
        if groupby is not None:
            info["groupby"] = groupby
        if self.scheme == "keep_top":
            info["order"] = self.decoder.factors[plan.order]
        if isinstance(self.latents, Mapping):
            members = named_sets(self.decoder, self.latents, "leave_out", "zero", None)
            info["sets"] = strings([name for name, latents in members for _ in latents])
            info["latents"] = self.decoder.factors[np.concatenate([latents for _, latents in members])]
        if self.use_posterior == "samples":
            info["n_samples"] = plan.n_samples
        if self.use_posterior == "samples" or self.mode in RANDOM_MODES:
            info["seed"] = plan.seed
        if self.mode == "value":
            info["value"] = plan.value_pk[0]
            info["value_of"] = self.decoder.factors
        if self.batches != (None,):
            info["transform_batch"] = strings(
                ["each cell's own" if b is None else self.decoder.batches[b] for b in self.batches]
            )
        return {**info, "refit_heads": self.refit_heads, "unit": "nats"}


class LatentSummary:
    """Summary of the latents of all cells that an ablation may need: running sums, which can be merged.

    Parameters
    ----------
    n_latent, n_groups
        Sizes.
    keep
        True to keep the latents, which a permutation needs.
    """

    def __init__(self, n_latent: int, n_groups: int = 0, *, keep: bool = False) -> None:
        self._total_pk = np.zeros((n_groups, n_latent))
        self._n_p = np.zeros(n_groups)
        self._total_k, self._kl_k, self._n = np.zeros(n_latent), np.zeros(n_latent), 0
        self._kept: list[tuple[np.ndarray, PosteriorAxes]] | None = [] if keep else None

    def add(
        self,
        mean_nk: np.ndarray,
        variance_nk: np.ndarray,
        group_n: np.ndarray | None = None,
        axes: PosteriorAxes | None = None,
    ) -> None:
        """Count some cells in; a group of -1 is none."""
        mean_nk = np.asarray(mean_nk, dtype=np.float64)
        self._n += len(mean_nk)
        self._total_k += mean_nk.sum(axis=0)
        self._kl_k += kl_per_dimension(mean_nk, variance_nk).sum(axis=0)
        if group_n is not None:
            self._total_pk += indicator(group_n, len(self._n_p)) @ mean_nk
            self._n_p += np.bincount(group_n[group_n >= 0], minlength=len(self._n_p))
        if self._kept is not None:
            self._kept.append((mean_nk, PosteriorAxes.of(variance_nk, axes)))

    @property
    def mean_k(self) -> np.ndarray:
        """Mean latent of all cells."""
        return self._total_k / max(1, self._n)

    @property
    def mean_pk(self) -> np.ndarray:
        """Mean latent of each group; NaN for an empty one."""
        return np.divide(
            self._total_pk, self._n_p[:, None], where=self._n_p[:, None] > 0, out=np.full_like(self._total_pk, np.nan)
        )

    @property
    def kl_k(self) -> np.ndarray:
        """Mean KL of each latent, in nats."""
        return self._kl_k / max(1, self._n)

    def latents(self) -> tuple[np.ndarray, PosteriorAxes]:
        """Posteriors of all cells, if they were kept."""
        n_latent = len(self._total_k)
        if not self._kept:
            return np.empty((0, n_latent)), PosteriorAxes(np.empty((0, n_latent)), np.eye(n_latent))
        means, axes = zip(*self._kept, strict=True)
        variance_nk = np.concatenate([part.variance_nk for part in axes]).astype(np.float64)
        return np.concatenate(means), PosteriorAxes(variance_nk, axes[0].rotation_kk)


class Donated(NamedTuple):
    """Latents that cells are given instead of their own."""

    donor_n: np.ndarray
    """Source cell of each cell."""
    mean_nk: np.ndarray
    """Posterior means of all cells."""
    axes: PosteriorAxes
    """Variances and rotation that make up the posterior covariances of all cells; None without a rotation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AblationPlan:
    """Sets of latents, and the values that replace them in each cell."""

    mode: str
    order: np.ndarray
    names: list[str]
    sets: list[np.ndarray]
    value_pk: np.ndarray
    donated: Donated | None
    refit_heads: bool
    n_samples: int
    seed: int
    batches: tuple[int | None, ...]

    def effects(
        self, decoder: LinearDecoder, cells: EncodedCells, position_n: np.ndarray, group_n: np.ndarray
    ) -> np.ndarray:
        """Change of each cell's negative log-likelihood, shape (cells, sets), in nats."""
        out_ns = np.zeros((len(cells.mean), len(self.sets)))
        for latent_nk, value_nk, batch_n in self._pairs_in_batches(cells, position_n, group_n):
            out_ns += set_effects(
                decoder,
                cells.counts,
                latent_nk,
                cells.library,
                batch_n,
                value_nk,
                self.sets,
                covariates=cells.covariates,
                label_n=cells.label,
                refit_heads=self.refit_heads,
            )
        out_ns /= self._n_terms
        out_ns[self._without_value(group_n)] = np.nan
        return out_ns

    def add_gene_effects(
        self,
        total_pgs: np.ndarray,
        decoder: LinearDecoder,
        cells: EncodedCells,
        position_n: np.ndarray,
        group_n: np.ndarray,
    ) -> None:
        """Add the contributions of each gene, summed over the cells of each group, to shape (groups, genes, sets)."""
        indicator_pn = indicator(group_n, len(total_pgs))
        for s, change_ng in self._changes(decoder, cells, position_n, group_n):
            total_pgs[:, :, s] += (indicator_pn @ change_ng) / self._n_terms

    def replaced(self, cells: EncodedCells, position_n: np.ndarray, group_n: np.ndarray) -> np.ndarray:
        """Latents of cells (u under ``"ln"``) with those of the first set replaced, shape (cells, latents)."""
        ((latent_nk, value_nk),) = self._pairs(cells, position_n, group_n)
        latent_nk = latent_nk.copy()
        replaced = self.sets[0]
        latent_nk[:, replaced] = np.broadcast_to(value_nk, latent_nk.shape)[:, replaced]
        latent_nk[self._without_value(group_n)] = np.nan
        return latent_nk

    @property
    def _n_terms(self) -> int:
        return max(1, self.n_samples) * len(self.batches)

    def _changes(
        self, decoder: LinearDecoder, cells: EncodedCells, position_n: np.ndarray, group_n: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        label = None if decoder.labels is None else decoder.labels[cells.label]
        for latent_nk, value_nk, batch_n in self._pairs_in_batches(cells, position_n, group_n):
            yield from enumerate(
                ablation_changes(
                    decoder,
                    cells.counts,
                    latent_nk,
                    cells.library,
                    decoder.batches[batch_n],
                    value_nk,
                    self.sets,
                    covariates=cells.covariates,
                    label=label,
                    refit_heads=self.refit_heads,
                )
            )

    def _pairs_in_batches(
        self, cells: EncodedCells, position_n: np.ndarray, group_n: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Any, np.ndarray]]:
        """See :meth:`_pairs`, for each batch that cells are decoded in."""
        for latent_nk, value_nk in self._pairs(cells, position_n, group_n):
            for batch in self.batches:
                yield latent_nk, value_nk, cells.batch if batch is None else np.full(len(latent_nk), batch)

    def _pairs(
        self, cells: EncodedCells, position_n: np.ndarray, group_n: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Latents of the cells, and the values that replace them, for each sample."""
        mean_nk = np.asarray(cells.mean, dtype=np.float64)
        n_latent, n_draws = mean_nk.shape[1], max(1, self.n_samples)
        own = [mean_nk] if self.n_samples == 0 else self._samples(mean_nk, cells.spread, position_n)
        new: Iterable[Any]
        if self.mode == "prior":
            new = normal_draws(self.seed, PRIOR, position_n, n_latent, n_draws)
        elif self.donated is not None:
            donor_n = self.donated.donor_n[position_n]
            new = [self.donated.mean_nk[donor_n]]
            if self.n_samples > 0:
                spread = PosteriorAxes(self.donated.axes.variance_nk[donor_n], self.donated.axes.rotation_kk)
                new = self._samples(new[0], spread, donor_n)
        elif self.mode == "group_mean":
            value_nk = np.where(self._without_value(group_n)[:, None], mean_nk, self.value_pk[group_n])
            new = [value_nk] * n_draws
        else:
            new = [self.value_pk[0]] * n_draws
        yield from zip(own, new, strict=True)

    def _without_value(self, group_n: np.ndarray) -> np.ndarray:
        """Cells without a group, which have no group mean to be set to and so no effect."""
        return group_n < 0 if self.mode == "group_mean" else np.zeros(len(group_n), dtype=bool)

    def _samples(self, mean_nk: np.ndarray, axes: PosteriorAxes, position_n: np.ndarray) -> np.ndarray:
        draws = normal_draws(self.seed, POSTERIOR, position_n, mean_nk.shape[1], self.n_samples)
        return mean_nk + (np.sqrt(np.asarray(axes.variance_nk, dtype=np.float64)) * draws) @ axes.rotation_kk


def value_of_each(decoder: LinearDecoder, value: Any) -> np.ndarray:
    """Values of latents, shape (1, latents), from a number, one number for each latent, or a mapping; NaN if not in it."""
    names, out_k = decoder.factors.tolist(), np.full(len(decoder.factors), np.nan)
    at: Any = slice(None)
    given: Any
    if hasattr(value, "keys"):
        keys = list(value.keys())
        at = [factor_indices([name], names, argument="value")[0] for name in keys]
        given = [value[name] for name in keys]
    else:
        given = 0.0 if value is None else value
    try:
        out_k[at] = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        is_good = False
    else:
        is_good = bool(np.isfinite(out_k[at]).all())
    if not is_good:
        msg = f"`value` must be a finite number, one for each of {len(names)} latents, or a mapping from their names; got {value!r}."
        raise ValueError(msg)
    return out_k[None]
