"""Additive gene programs of what one or several models decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from scipy.special import softmax

from ldvae_ext._formats import PROGRAMS
from ldvae_ext._groups import codes_at
from ldvae_ext._keys import PROGRAMS_KEY, program_keys
from ldvae_ext._validate import cell_positions, check_positive_int, listed, warn
from ldvae_ext.core._arrays import at_positions
from ldvae_ext.core.cells import EncodedCells, indicator
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.matching import STABLE
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.core.programs import ADDITIVE, AdditivePrograms, Expression, fit_programs, program_direction
from ldvae_ext.core.scores import SlopeSums
from ldvae_ext.model._axes import factor_decoder, network_decoder
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells, stream_cells, with_positions
from ldvae_ext.model._collection import as_anndata
from ldvae_ext.model._counts import check_given_anndata
from ldvae_ext.model._requests import groups_of_cells
from ldvae_ext.model._threads import with_torch_threads

# Cells from which the stability of programs is computed, at most, and numbers of programs that are compared.
_STABILITY_CELLS, _N_CANDIDATES = 2000, 8
# Share of the variance that programs may leave if fewer are to be chosen over more.
_SMALL_ERROR = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class Programs:
    """Additive gene programs, their usages and what supports them; from :meth:`LDVAE.get_programs` or :meth:`Ensemble.programs`.

    Decoded expression of a cell, without its library size and batch, is written as ``sum_k usage_k profile_k``, where profiles
    and usages are not negative and sum to one.

    Examples
    --------
    >>> programs = model.get_programs(n_programs=5)
    >>> programs.usages.shape, programs.profiles.shape
    ((700, 5), (765, 5))
    >>> programs.top_genes(3).shape
    (3, 5)
    """

    profiles: pd.DataFrame
    """Share of each gene in the expression of a program, genes x programs; columns sum to one."""
    usages: pd.DataFrame
    """Share of each program in the expression of a cell, cells x programs; rows sum to one."""
    residual: pd.Series
    """Share of each cell's squared scaled expression that the programs leave."""
    scores: pd.DataFrame
    """Slope of each gene's standardised log-normalised counts on the standardised usage, genes x programs, in [-1, 1]."""
    errors: pd.DataFrame
    """Standard errors of the scores."""
    stats: pd.DataFrame
    """One row for each program: ``usage`` (mean over cells), ``stability`` (mean cosine of its scaled profile with the programs of
    the single runs or, of a single model, of two halves of the cells) and ``lowest`` of these cosines."""
    relations: pd.DataFrame
    """One row for each program and group: ``angle`` in degrees between the program and what latents can change there, and
    the ``factor`` that is nearest to the program, with its ``cosine``; see :func:`ldvae_ext.core.program_direction`."""
    curve: pd.DataFrame
    """For each number of programs that was tried: mean ``stability`` and ``error``, the share of the variance of scaled decoded
    expression that is not reproduced."""
    explained: float
    """Share of the variance of scaled decoded expression that the programs reproduce."""
    additive: AdditivePrograms
    """The programs as arrays, with the scales of genes: ``additive.usages(expression)`` gives the usages of other cells."""
    compared: str
    """What the stability compares: ``"runs"`` or ``"halves of the cells"``."""

    @property
    def names(self) -> list[str]:
        """``P_0``, ``P_1``, ...: programs by descending mean usage."""
        return self.profiles.columns.tolist()

    @property
    def is_additive(self) -> bool:
        """False if an additive description fits badly: then read factors."""
        return self.explained >= ADDITIVE

    def __repr__(self) -> str:
        n_stable = int((self.stats["stability"] >= STABLE).sum())
        advice = "" if self.is_additive else "; an additive description fits badly: read factors instead"
        return (
            f"Programs: {len(self.names)} of {len(self.usages)} cells, {n_stable} stable between {self.compared}; they reproduce "
            f"{self.explained:.0%} of the variance of decoded expression{advice}"
        )

    def top_genes(self, n: int = 10) -> pd.DataFrame:
        """Genes with the largest scores, one column for each program."""
        check_positive_int("n", n)
        return pd.DataFrame({name: self.scores[name].nlargest(n).index for name in self.names})

    def export_to_anndata(self, adata: AnnData, key_added: str | None = None, *, overwrite: bool = False) -> None:
        """Write programs and usages to an AnnData.

        Parameters
        ----------
        adata
            AnnData to write to. Cells and genes are matched by name; others get NaN.
        key_added
            Replaces ``ldvae_programs`` in all keys together.
        overwrite
            True to replace entries under these keys that are no programs.

        Raises
        ------
        ValueError
            If ``adata`` has none of the genes or cells, or one name twice, or something else would be replaced. Nothing is written.

        Notes
        -----
        Writes

        * ``obsm["X_ldvae_programs"]``: usages, cells x programs, float32;
        * ``varm["ldvae_programs"]``: profiles, genes x programs, float32;
        * ``varm["ldvae_programs_scores"]`` and ``varm["ldvae_programs_scores_error"]``: gene scores and their standard errors, float32;
        * ``obs["ldvae_programs_residual"]``: residual of each cell;
        * ``uns["ldvae_programs"]``: ``format`` (2), ``names``, ``usage``, ``stability``, ``lowest``, ``explained``, ``compared``, ``relations``
          and ``curve``, column by column.

        Examples
        --------
        >>> model.get_programs(n_programs=5).export_to_anndata(adata)
        >>> adata.obsm["X_ldvae_programs"].shape
        (700, 5)
        """
        check_given_anndata(adata)
        keys = program_keys(PROGRAMS_KEY if key_added is None else key_added)
        taken = [name for name in (keys.usages,) if name in adata.obsm]
        taken += [name for name in (keys.profiles, keys.scores, keys.errors) if name in adata.varm]
        taken += [name for name in (keys.residual,) if name in adata.obs] + (
            [keys.info] if keys.info in adata.uns else []
        )
        is_ours = hasattr(adata.uns.get(keys.info), "keys") and "relations" in adata.uns[keys.info]
        if taken and not is_ours and not overwrite:
            msg = f"{listed(taken)} of `adata` would be replaced and is of no programs; choose another `key_added`, or `overwrite=True`."
            raise ValueError(msg)
        gene_g = _positions(self.profiles.index, adata.var_names, "genes")
        cell_n = _positions(self.usages.index, adata.obs_names, "cells")
        for key, table in ((keys.profiles, self.profiles), (keys.scores, self.scores), (keys.errors, self.errors)):
            adata.varm[key] = at_positions(table.to_numpy(), gene_g, adata.n_vars)
        adata.obsm[keys.usages] = at_positions(self.usages.to_numpy(), cell_n, adata.n_obs)
        adata.obs[keys.residual] = at_positions(self.residual.to_numpy(), cell_n, adata.n_obs)
        adata.uns[keys.info] = {
            "format": PROGRAMS,
            "names": np.array(self.names),
            **{name: self.stats[name].to_numpy() for name in ("usage", "stability", "lowest")},
            "explained": self.explained,
            "compared": self.compared,
            "relations": _columns(self.relations),
            "curve": _columns(self.curve),
        }


def _positions(wanted: pd.Index, names: pd.Index, what: str) -> np.ndarray:
    """Position of each wanted name in the names of an AnnData, -1 if it is not there."""
    if not names.is_unique:
        msg = f"Names of {what} of `adata` must be unique; {names[names.duplicated()][0]!r} occurs more than once."
        raise ValueError(msg)
    position = pd.Index(names.astype(str)).get_indexer(wanted.astype(str))
    if not (position >= 0).any():
        msg = f"`adata` has none of the {len(wanted)} {what}, such as {listed(wanted[:3])}."
        raise ValueError(msg)
    return position


def _columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {
        str(name): np.array(column.astype(str).tolist()) if column.dtype.kind not in "fiu" else column.to_numpy()
        for name, column in table.items()
    }


@with_torch_threads
def additive_programs(
    models: Sequence[LDVAEBase],
    n_programs: int | Sequence[int] | None = None,
    groupby: str | None = None,
    adata: AnnData | None = None,
    indices: Any = None,
    *,
    max_cells: int = 5000,
    seed: int | None = None,
    batch_size: int | None = None,
    representative: LDVAEBase | None = None,
) -> Programs:
    """Programs of the mean expression that some models of the same genes decode; see :meth:`LDVAE.get_programs`."""
    check_positive_int("max_cells", max_cells)
    first = models[0] if representative is None else representative
    candidates = _candidates(n_programs, first.n_latent)
    groups, code_n = groups_of_cells(first, adata, groupby)
    adata, source = as_anndata(adata), given_cells(first, adata)
    for model in models:
        model._check_has_counts("get_programs")
    positions = cell_positions(indices, source.n_obs)
    if len(positions) < 2 * max(candidates):
        msg = (
            f"`n_programs`: {max(candidates)} programs need at least {2 * max(candidates)} cells; got {len(positions)}."
        )
        raise ValueError(msg)
    seed = (0 if scvi.settings.seed is None else scvi.settings.seed) if seed is None else seed
    rng, some = np.random.default_rng(seed), positions
    if len(some) > max_cells:
        some = np.sort(rng.choice(some, max_cells, replace=False))
    kept = rng.permutation(len(some))[:_STABILITY_CELLS]
    n_genes = len(first.get_var_names())
    mean_ng, parts, deviation = np.zeros((len(some), n_genes)), [], Expression(n_genes)
    for m, model in enumerate(models):
        start = 0
        own_ng = np.empty_like(mean_ng)
        for cells, at, expression_ng in decoded_expression([model], adata, some, batch_size):
            own_ng[start : start + len(at)] = expression_ng
            start += len(at)
            if m == 0:
                deviation.add(cells.counts)
        mean_ng += own_ng / len(models)
        parts.append(own_ng[kept])
    scale_g = deviation.deviation_g()
    if len(models) == 1:
        parts = [parts[0][::2], parts[0][1::2]]
    fits, rows = {}, []
    for n in candidates:
        whole = fit_programs(mean_ng, scale_g, n)
        matches = [whole.match(fit_programs(part, scale_g, n, whole.cap)) for part in parts]
        fits[n] = whole, np.stack([match.cosine for match in matches])
        rows.append({"n_programs": n, "stability": fits[n][1].mean(), "error": 1 - whole.explained})
    curve = pd.DataFrame(rows)
    chosen = _chosen(curve)
    additive, cosine_mk = fits[chosen]
    if additive.explained < ADDITIVE:
        warn(
            f"{chosen} additive programs reproduce {additive.explained:.0%} of the variance of decoded expression, less than "
            f"{ADDITIVE:.0%}: an additive description fits badly. Read factors (`rotate`, `get.top_genes`) instead."
        )
    return _described(models, first, additive, cosine_mk, curve, groups, code_n, adata, source, positions, batch_size)


def _candidates(n_programs: int | Sequence[int] | None, n_latent: int) -> list[int]:
    if n_programs is None:
        return np.unique(np.linspace(2, max(3, n_latent + 2), _N_CANDIDATES).astype(int)).tolist()
    wanted = (
        list(n_programs)
        if isinstance(n_programs, (Sequence, np.ndarray, range)) and not isinstance(n_programs, str)
        else [n_programs]
    )
    for n in wanted:
        check_positive_int("n_programs", n, least=2)
    if not wanted:
        msg = "`n_programs` must be a number of programs, or several; got none."
        raise ValueError(msg)
    return sorted({int(n) for n in wanted})


def _chosen(curve: pd.DataFrame) -> int:
    """The fewest stable programs with a small error; else as many as are stable; else the most stable ones."""
    n = curve["n_programs"].to_numpy()
    is_stable = curve["stability"].to_numpy() >= STABLE
    is_good = is_stable & (curve["error"].to_numpy() <= _SMALL_ERROR)
    if is_good.any():
        return int(n[is_good].min())
    return int(n[is_stable].max() if is_stable.any() else n[curve["stability"].to_numpy().argmax()])


def _described(
    models: Sequence[LDVAEBase],
    first: LDVAEBase,
    additive: AdditivePrograms,
    cosine_mk: np.ndarray,
    curve: pd.DataFrame,
    groups: list[str],
    code_n: np.ndarray | None,
    adata: AnnData | None,
    source: AnnData,
    positions: np.ndarray,
    batch_size: int | None,
) -> Programs:
    """Usages, scores and relations of programs, from all cells, in one pass."""
    n_genes, n_programs = additive.profile_gk.shape
    usage_nk, residual_n = np.zeros((len(positions), n_programs)), np.zeros(len(positions))
    slopes, mean_pg, n_p = SlopeSums(n_genes, n_programs), np.zeros((len(groups), n_genes)), np.zeros(len(groups))
    start = 0
    for cells, at, expression_ng in decoded_expression(models, adata, positions, batch_size):
        stop = start + len(at)
        usage_nk[start:stop], residual_n[start:stop] = additive.usages(expression_ng)
        slopes.add(cells.counts, usage_nk[start:stop])
        indicator_pn = indicator(codes_at(code_n, at), len(groups))
        mean_pg += indicator_pn @ expression_ng
        n_p += indicator_pn.sum(axis=1)
        start = stop
    order = np.argsort(-usage_nk.mean(axis=0), kind="stable")
    additive, usage_nk, cosine_mk = additive.arranged(order), usage_nk[:, order], cosine_mk[:, order]
    names, genes = [f"P_{k}" for k in range(n_programs)], pd.Index(np.asarray(first.get_var_names()).astype(str))
    scores = slopes.scores()
    decoder, relations = factor_decoder(first), []
    for p in np.flatnonzero(n_p):
        for k, name in enumerate(names):
            found = program_direction(decoder, additive.profile_gk[:, k], mean_pg[p] / n_p[p])
            nearest = int(np.argmax(np.abs(found.cosine_k)))
            relations.append(
                {
                    "program": name,
                    "group": groups[p],
                    "angle": found.angle,
                    "factor": first.factor_names[nearest],
                    "cosine": found.cosine_k[nearest],
                }
            )
    cell_names = pd.Index(source.obs_names[positions])
    return Programs(
        profiles=pd.DataFrame(additive.profile_gk, index=genes, columns=names),
        usages=pd.DataFrame(usage_nk, index=cell_names, columns=names),
        residual=pd.Series(residual_n, index=cell_names, name="residual"),
        scores=pd.DataFrame(scores.score_gk[:, order], index=genes, columns=names),
        errors=pd.DataFrame(scores.error_gk[:, order], index=genes, columns=names),
        stats=pd.DataFrame(
            {"usage": usage_nk.mean(axis=0), "stability": cosine_mk.mean(axis=0), "lowest": cosine_mk.min(axis=0)},
            index=pd.Index(names, name="program"),
        ),
        relations=pd.DataFrame(relations),
        curve=curve,
        explained=additive.explained,
        additive=additive,
        compared="runs" if len(models) > 1 else "halves of the cells",
    )


def decoded_expression(
    models: Sequence[LDVAEBase], adata: AnnData | None, positions: np.ndarray, batch_size: int | None
) -> Iterator[tuple[EncodedCells, np.ndarray, np.ndarray]]:
    """Cells of the first model, their positions, and the mean over models of the expression that they decode."""
    decoders = [network_decoder(model) for model in models]
    with ExitStack() as stack:
        streams = [stack.enter_context(stream_cells(model, adata, positions, batch_size)) for model in models]
        for (cells, at), *others in zip(
            with_positions(streams[0].chunks, streams[0].positions),
            *(stream.chunks for stream in streams[1:]),
            strict=True,
        ):
            expression_ng = _expression(decoders[0], cells)
            for decoder, other in zip(decoders[1:], others, strict=True):
                expression_ng += _expression(decoder, other)
            yield cells, at, expression_ng / len(models)


def _expression(decoder: LinearDecoder, cells: EncodedCells) -> np.ndarray:
    """Share of each gene in the expression of cells in an average batch, shape (cells, genes).

    Its intercepts are the means over batches: effects of batches on log-rates are averaged.
    """
    z_nk = deterministic_latent(np.asarray(cells.mean, dtype=np.float64), decoder.latent_distribution)
    logits_ng = decoder.logits(z_nk, decoder.batches[np.zeros(len(z_nk), dtype=np.int64)], cells.covariates)
    logits_ng += decoder.intercept_bg.mean(axis=0) - decoder.intercept_bg[0]
    if decoder.link == "softmax":
        return softmax(logits_ng, axis=1)
    expression_ng = np.logaddexp(0.0, logits_ng)
    return expression_ng / expression_ng.sum(axis=1, keepdims=True)
