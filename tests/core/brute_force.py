"""An ablation from its definition: one cell, one draw, one batch and one set of latents at a time, in float64.

Nothing is shared with the package but the random draws, which have tests of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.special import gammaln, xlogy

from ldvae_ext.core import LinearDecoder
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.draws import POSTERIOR, PRIOR, donors, normal_draws

# scvi-tools' own, inside the logarithms of its negative binomials.
EPS = 1e-8


class Cell:
    """What a cell's likelihood needs besides its latent."""

    def __init__(self, decoder: LinearDecoder, cells: EncodedCells, n: int, batch: int | None) -> None:
        self.decoder, self.x_g, self.library = decoder, np.asarray(cells.counts[n], dtype=float), cells.library[n]
        self.batch, self.label = cells.batch[n] if batch is None else batch, cells.label[n]
        self.design: list[float] = []
        for covariate in decoder.covariates:
            value = cells.covariates[covariate.name][n]
            self.design += [value] if covariate.levels is None else [float(value == name) for name in covariate.levels]

    def head(self, name: str, z_k: np.ndarray) -> np.ndarray:
        weight_gk, intercept_bg = (getattr(self.decoder, f"{name}{part}") for part in ("weight_gk", "intercept_bg"))
        out_g = weight_gk @ z_k + intercept_bg[self.batch]
        for value, effect_g in zip(self.design, getattr(self.decoder, f"{name}covariate_cg") if self.design else []):
            out_g = out_g + value * effect_g
        return out_g

    def theta(self, z_k: np.ndarray) -> np.ndarray:
        d = self.decoder
        if d.dispersion == "gene-cell":
            return np.exp(self.head("dispersion_", z_k))
        return d.theta_bg[{"gene": 0, "gene-batch": self.batch, "gene-label": self.label}[d.dispersion]]

    def nll(self, latent_k: np.ndarray, of_heads_k: np.ndarray) -> np.ndarray:
        """Negative log-likelihood of each count; the second latent decides on dispersion and dropout."""
        d, x = self.decoder, self.x_g
        z_k, of_heads_k = (simplex(u) if d.latent_distribution == "ln" else u for u in (latent_k, of_heads_k))
        logits = self.head("", z_k)
        if d.link == "softmax":
            mu = self.library * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        else:
            # torch's softplus is the identity beyond 20.
            mu = self.library * np.array([eta if eta > 20 else np.log1p(np.exp(eta)) for eta in logits])
        if d.likelihood == "poisson":
            return -(xlogy(x, mu) - mu - gammaln(x + 1))
        theta = self.theta(of_heads_k)
        if d.likelihood == "normal":
            return 0.5 * ((x - mu) / theta) ** 2 + np.log(theta) + 0.5 * np.log(2 * np.pi)
        # log of the binomial coefficient, then theta log p0 + x log (1 - p0), where p0 = theta / (theta + mu)
        choose = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
        no_count = theta * (np.log(theta + EPS) - np.log(theta + mu + EPS))
        nb = choose + no_count + x * (np.log(mu + EPS) - np.log(theta + mu + EPS))
        if d.likelihood == "nb":
            return -nb
        # A count is zero by dropout, with probability pi = 1 / (1 + exp(-logit)), or by the negative binomial.
        logit = self.head("dropout_", of_heads_k)
        log_pi, log_rest = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
        return -np.where(x == 0, np.logaddexp(log_pi, log_rest + no_count), log_rest + nb)


def simplex(u_k: np.ndarray) -> np.ndarray:
    return np.exp(u_k - u_k.max()) / np.exp(u_k - u_k.max()).sum()


def replaced_sets(
    names: list[str], mean_nk: np.ndarray, variance_nk: np.ndarray, latents: Any, scheme: str, mode: str
) -> dict[str, list[int]]:
    """Name of each column, and the latents that are replaced in it."""
    whole = range(len(names))
    if latents is not None and not isinstance(latents, (dict, list)):
        latents = [latents]

    def position(latent: Any) -> int:
        return names.index(latent) if isinstance(latent, str) else int(latent)

    if scheme == "keep_top":
        mean, variance = np.asarray(mean_nk, dtype=float), np.asarray(variance_nk, dtype=float)
        kl_k = (0.5 * (mean**2 + variance - 1 - np.log(variance))).mean(axis=0)
        order = sorted(whole, key=lambda k: -kl_k[k]) if latents is None else list(map(position, latents))
        first = 1 if mode == "drop" else 0
        return {f"top_{j}": [k for k in whole if k not in order[:j]] for j in range(first, len(order) + 1)}
    if not isinstance(latents, dict):
        chosen = sorted(set(whole if latents is None else map(position, latents)))
        latents = {names[k]: [k] for k in chosen}
    sets = {name: sorted({position(latent) for latent in members}) for name, members in latents.items()}
    if scheme == "leave_in":
        sets = {name: [k for k in whole if k not in members] for name, members in sets.items()}
    return sets


def own_and_new(
    mean_nk: np.ndarray,
    variance_nk: np.ndarray,
    mode: str,
    *,
    group_n: np.ndarray | None = None,
    value_k: np.ndarray | None = None,
    n_samples: int = 0,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each draw the latents of all cells, and what they are replaced by; NaN without a group."""
    mean, sd = np.asarray(mean_nk, dtype=float), np.sqrt(np.asarray(variance_nk, dtype=float))
    n_cells, n_latent = mean.shape
    for sample in range(max(1, n_samples)):
        own, new = mean.copy(), np.zeros_like(mean)
        for n in range(n_cells):
            if n_samples:
                own[n] += sd[n] * normal_draws(seed, POSTERIOR, np.array([n]), n_latent, n_samples)[sample, 0]
        for n in range(n_cells):
            if mode == "mean":
                new[n] = mean.mean(axis=0)
            elif mode == "group_mean":
                new[n] = mean[group_n == group_n[n]].mean(axis=0) if group_n[n] >= 0 else np.nan
            elif mode == "permute":
                new[n] = own[donors(seed, n_cells)[n]]
            elif mode == "prior":
                new[n] = normal_draws(seed, PRIOR, np.array([n]), n_latent, sample + 1)[sample, 0]
            else:
                new[n] = {"zero": 0.0, "value": value_k, "drop": -np.inf}[mode]
        yield own, new


def brute_force(
    decoder: LinearDecoder,
    cells: EncodedCells,
    *,
    mode: str,
    latents: Any = None,
    scheme: str = "leave_out",
    refit_heads: bool = False,
    batches: tuple[int | None, ...] = (None,),
    **values: Any,
) -> tuple[list[str], np.ndarray]:
    """Names of the sets, and the change of the NLL of each count, shape (cells, genes, sets); NaN without a group mean."""
    sets = replaced_sets(decoder.factors.tolist(), cells.mean, cells.variance, latents, scheme, mode)
    out_ngs = np.zeros((len(cells.mean), len(decoder.genes), len(sets)))
    pairs = list(own_and_new(cells.mean, cells.variance, mode, **values))
    for own_nk, new_nk in pairs:
        for n, (own, new) in enumerate(zip(own_nk, new_nk, strict=True)):
            if np.isnan(new).any():
                out_ngs[n] = np.nan
                continue
            for batch in batches:
                cell = Cell(decoder, cells, n, batch)
                before = cell.nll(own, own)
                for s, members in enumerate(sets.values()):
                    moved = own.copy()
                    moved[members] = new[members]
                    after = cell.nll(moved, moved if refit_heads else own)
                    out_ngs[n, :, s] += (after - before) / (len(pairs) * len(batches))
    return list(sets), out_ngs
