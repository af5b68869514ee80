"""What the report shows, as plain numbers and strings, from an AnnData with an export."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext import get, tl
from ldvae_ext._annotation import GeneSet, Marks, best_gene_sets, check_gene_sets, marked_populations
from ldvae_ext._groups import groups_of
from ldvae_ext._keys import CONSENSUS_KEY, export_keys
from ldvae_ext._report._scatter import columns_of, scatter
from ldvae_ext._validate import listed
from ldvae_ext.core import Rotation
from ldvae_ext.get._export import export_of, latents_of

# Genes of each end on a card, and of a gene set in the table.
N_GENES, N_TABLE_GENES, N_POPULATION_GENES = 10, 5, 6
# Populations in the tables, at most.
MAX_GROUPS = 60
# A factor with a smaller KL is called unused.
UNUSED = 0.1
FEW_CELLS, FEW_OF_POPULATION = 200, 30
# A factor matters most to a population that loses so many nats per cell without it, and so many times as much as the second.
LEAST_EFFECT, LEAST_RATIO = 2.0, 1.2
_ADVICE = {
    "unstable": (
        "Do not read",
        "other trainings on the same cells have no similar factor, or a weakly similar one (below 0.6).",
    ),
    "uncertain": (
        "Read with care",
        "other trainings on the same cells have only a partly similar factor (0.6 to 0.8).",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Population:
    """A population as a factor sees it."""

    name: str
    n_cells: int
    low: float
    """Lower quartile of the factor."""
    median: float
    high: float
    effect: float | None
    """Mean effect of the ablation in nats per cell; None without counts."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """All that a card shows of one factor."""

    name: str
    kl: float
    kl_share: float
    explained_deviance: float | None
    reproducibility: float | None
    flag: str | None
    up: list[tuple[str, float]]
    """Genes that rise with the factor, and their loadings."""
    down: list[tuple[str, float]]
    marks: Marks | None
    gene_set: GeneSet | None
    populations: list[Population]
    lost_genes: list[tuple[str, float]]
    """Genes that lose most without the factor, in nats per cell."""
    runs: list[float]
    """Agreement with each run."""
    lowest: float | None
    """The smallest of these, if the export is of a consensus."""

    @property
    def most_affected(self) -> Population | None:
        """The population that clearly loses most without the factor; None if there is none, and without counts or populations."""
        effects = sorted((p.effect for p in self.populations if p.effect is not None), reverse=True)
        if len(effects) < 2 or effects[0] < max(LEAST_EFFECT, LEAST_RATIO * effects[1]):
            return None
        return self.first_affected

    @property
    def first_affected(self) -> Population | None:
        """The population with the largest effect, clear or not; None without counts."""
        known = [p for p in self.populations if p.effect is not None]
        return max(known, key=lambda p: p.effect or 0.0, default=None)


@dataclass(frozen=True, kw_only=True)
class Content:
    """Content of the report."""

    title: str
    n_cells: int
    n_genes: int
    groupby: str | None
    factors: list[Factor]
    order_by: str
    """``"consensus"``, or the measure whose order the factors are in."""
    notes: list[str]
    """Warnings in words."""
    settings: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    curves: dict[str, list[tuple[float, float]]]
    scatter: dict[str, Any] = field(default_factory=dict)
    """Numbers of the scatter plot, for the script of the page."""
    in_population: dict[str, Any] = field(default_factory=dict)
    """Genes of each factor in each population, for the script of the page."""


def content_of(
    adata: AnnData,
    *,
    groupby: str | None = None,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    ablation: AnnData | None = None,
    history: Any = None,
    settings: Mapping[str, Any] | None = None,
    title: str | None = None,
    key: str = "ldvae",
) -> Content:
    """Content of the report of an export."""
    check_gene_sets(gene_sets)
    keys, info = export_of(adata, key)
    table = get.factors(adata, key=key)
    latent_nk, names = latents_of(adata, key).astype(np.float64), table.index.tolist()
    groups, code_n = ([], None) if groupby is None else groups_of(adata.obs, groupby)
    notes: list[str] = []
    if ablation is not None and (
        ablation.var_names.tolist() != names or not ablation.obs_names.equals(adata.obs_names)
    ):
        msg = f"`ablation` must have the {adata.n_obs} cells of `adata` and the factors {listed(names)}, in this order."
        raise ValueError(msg)
    if code_n is not None and len(groups) > MAX_GROUPS:
        notes.append(f"`{groupby}` has {len(groups)} populations; the {MAX_GROUPS} largest are shown.")
        largest = np.sort(np.argsort(-np.bincount(code_n[code_n >= 0]))[:MAX_GROUPS])
        position = np.full(len(groups) + 1, -1)
        position[largest] = np.arange(MAX_GROUPS)
        groups, code_n = [groups[p] for p in largest], position[code_n]
    effects, lost = _ablations(adata, ablation, groups, code_n, key, notes)
    flags = table.get("flag")
    notes += _notes(table, flags, info, adata.n_obs)
    if code_n is not None:
        notes += _note_on_small(groups, code_n)
    runs, lowest_k = _agreement(adata, info, len(names))
    populations = _populations(latent_nk, groups, code_n, effects)
    marked = [] if code_n is None else marked_populations(latent_nk, groups, code_n)
    sets = best_gene_sets(get.gene_scores(adata, kind=_ranking(adata, keys), key=key), gene_sets)
    ends = _ends(adata, keys, key)
    factors = [
        Factor(
            name=name,
            kl=float(table["kl"].iloc[k]),
            kl_share=float(table["kl_share"].iloc[k]),
            explained_deviance=_optional(table, "explained_deviance", k),
            reproducibility=_optional(table, "reproducibility", k),
            flag=None if flags is None else flags.iloc[k],
            up=ends[name]["up"],
            down=ends[name]["down"],
            marks=marked[k] if marked else None,
            gene_set=sets.get(name),
            populations=populations[k] if populations else [],
            lost_genes=lost[k] if lost else [],
            runs=runs[k] if runs else [],
            lowest=None if lowest_k is None else float(lowest_k[k]),
        )
        for k, name in enumerate(names)
    ]
    return Content(
        title=title or "Factors of a linearly decoded VAE",
        n_cells=adata.n_obs,
        n_genes=int(np.asarray(adata.var[keys.genes], dtype=bool).sum()),
        groupby=groupby,
        factors=factors,
        order_by="consensus" if _is_consensus(info) else str(info.get("order_by", "kl")),
        notes=notes,
        settings=[(str(name), str(value)) for name, value in (settings or {}).items()],
        versions=[(str(name), str(value)) for name, value in dict(info.get("versions", {})).items()],
        curves=_curves(history),
        scatter=scatter(adata, latent_nk, names, columns_of(adata, groups, code_n, groupby, info)),
        in_population=_in_population(adata, groups, groupby, names, key),
    )


def _optional(table: pd.DataFrame, column: str, k: int) -> float | None:
    value = float(table[column].iloc[k]) if column in table else np.nan
    return value if np.isfinite(value) else None


def _ranking(adata: AnnData, keys: Any) -> Any:
    """Gene scores that replicate best where there are any: slopes of expression, which need counts."""
    return "regression" if keys.scores in adata.varm else "information"


def _ends(adata: AnnData, keys: Any, key: str) -> dict[str, dict[str, list[tuple[str, float]]]]:
    top = get.top_genes(adata, n=3 * N_GENES, rank_by=_ranking(adata, keys), key=key)
    # A gene can rise with a factor because of others; its bar would point the other way.
    top = top[(top["loading"] > 0) == (top["direction"] == "up")].groupby(["factor", "direction"]).head(N_GENES)
    out: dict[str, dict[str, list[tuple[str, float]]]] = {
        name: {"up": [], "down": []} for name in get.factors(adata, key=key).index
    }
    for factor, direction, gene, loading in zip(
        top["factor"], top["direction"], top["gene"], top["loading"], strict=True
    ):
        out[factor][direction].append((str(gene), float(loading)))
    return out


def _ablations(
    adata: AnnData,
    ablation: AnnData | None,
    groups: list[str],
    code_n: np.ndarray | None,
    key: str,
    notes: list[str],
) -> tuple[np.ndarray | None, list[list[tuple[str, float]]] | None]:
    """Mean effect of each factor in each population, and the genes that lose most; None without counts."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            effect_nk = np.asarray((tl.ablate(adata, key=key) if ablation is None else ablation).X)
            by_gene = tl.ablate_genes(adata, key=key)
        notes += dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning)
    except (KeyError, ValueError) as error:
        notes.append(f"There are no results of ablation, which needs the raw counts: {error.args[0]}")
        return None, None
    lost = []
    for k in range(effect_nk.shape[1]):
        loss_g = np.asarray(by_gene.X)[:, k]
        most = np.argsort(-loss_g, kind="stable")[:N_POPULATION_GENES]
        lost.append([(str(by_gene.obs["gene"].iloc[g]), float(loss_g[g])) for g in most])
    if code_n is None:
        return effect_nk.mean(axis=0)[None], lost
    return np.stack([effect_nk[code_n == p].mean(axis=0) for p in range(len(groups))]), lost


def _populations(
    latent_nk: np.ndarray, groups: list[str], code_n: np.ndarray | None, effects: np.ndarray | None
) -> list[list[Population]]:
    members = (
        [np.arange(len(latent_nk))] if code_n is None else [np.flatnonzero(code_n == p) for p in range(len(groups))]
    )
    names = groups or ["all cells"]
    quartiles = [np.quantile(latent_nk[at], [0.25, 0.5, 0.75], axis=0) for at in members]
    return [
        [
            Population(
                name=names[p],
                n_cells=len(members[p]),
                low=float(quartiles[p][0, k]),
                median=float(quartiles[p][1, k]),
                high=float(quartiles[p][2, k]),
                effect=None if effects is None else float(effects[p, k]),
            )
            for p in range(len(names))
        ]
        for k in range(latent_nk.shape[1])
    ]


def _notes(table: pd.DataFrame, flags: pd.Series | None, info: Any, n_cells: int) -> list[str]:
    notes = []
    if n_cells < FEW_CELLS:
        notes.append(
            f"These are {n_cells} cells only: factors may describe single cells, and numbers of small populations mean little."
        )
    if flags is None:
        notes.append(
            "How reproducible the factors are is not known: a single model was trained. Another training may give other factors."
        )
    else:
        for flag, advice in _ADVICE.items():
            if (flags == flag).any():
                notes.append(f"{advice[0]} {listed(flags.index[flags == flag])}: {advice[1]}")
    unused = table.index[table["kl"] < UNUSED]
    if len(unused):
        notes.append(f"The model does not use {listed(unused)}: the KL is below {UNUSED} nats.")
    weight = float(info.get("kl_weight", np.nan))
    if np.isfinite(weight) and weight < 1:
        notes.append(
            f"Training ended with a KL weight of {weight:g}, so that the KL of the factors is larger than at the weight 1 of the ELBO."
        )
    if "rotation" in info:
        matrix_kk = np.asarray(info["rotation"]["matrix"], dtype=np.float64)
        if not Rotation(matrix_kk=matrix_kk, method=str(info["rotation"]["method"])).is_orthogonal:
            notes.append("The factors are oblique: they are correlated under the prior.")
    return notes


def _note_on_small(groups: list[str], code_n: np.ndarray) -> list[str]:
    """A note on populations with few cells, if there are some."""
    n_p = np.bincount(code_n[code_n >= 0], minlength=len(groups))
    small = [f"{group!r} ({n} cells)" for group, n in zip(groups, n_p, strict=True) if n < FEW_OF_POPULATION]
    if not small:
        return []
    shown = ", ".join(small[:10]) + (f" and {len(small) - 10} more" if len(small) > 10 else "")
    return [f"{shown}: with fewer than {FEW_OF_POPULATION} cells, their means and AUROCs are uncertain."]


def _is_consensus(info: Any) -> bool:
    """True if the exported factors are those of a consensus, in its order."""
    return "rotation" in info and str(info["rotation"]["method"]) == "consensus"


def _agreement(adata: AnnData, info: Any, n_factors: int) -> tuple[list[list[float]], np.ndarray | None]:
    """Agreement of each factor with each run, and the smallest, if the export is of a consensus."""
    consensus = adata.uns.get(CONSENSUS_KEY)
    if consensus is None or not _is_consensus(info):
        return [], None
    cosine_mk = np.asarray(consensus["cosine"])
    if cosine_mk.shape[1] != n_factors:
        return [], None
    return cosine_mk.T.tolist(), np.asarray(consensus["statistics"]["lowest"])


def _curves(history: Any) -> dict[str, list[tuple[float, float]]]:
    """Training and validation ELBO by epoch."""
    out = {}
    for name, label in (("elbo_train", "training"), ("elbo_validation", "held-out cells")):
        if history is not None and name in history:
            series = pd.DataFrame(history[name]).iloc[:, 0].dropna()
            out[label] = [(float(x), float(y)) for x, y in zip(series.index, series, strict=True)]
    return out


def _in_population(
    adata: AnnData, groups: list[str], groupby: str | None, names: list[str], key: str
) -> dict[str, Any]:
    """Genes that change most with each factor in each population, with the change of their share of expression."""
    if not groups or groupby is None:
        return {}
    keys = export_keys(key)
    # A light object, since the result would be written to the AnnData of the user.
    obs = pd.DataFrame({groupby: pd.Series(adata.obs[groupby]), keys.library: pd.Series(adata.obs[keys.library])})
    columns = [c for c in dict(adata.uns[keys.info].get("setup", {})).values() if c in adata.obs]
    covariates = [c.name for c in get.decoder(adata, key=key).covariates]
    for name in (*columns, *covariates):
        obs[name] = pd.Series(adata.obs[name])
    result = AnnData(obs=obs, var=pd.DataFrame({keys.genes: pd.Series(adata.var[keys.genes])}))
    result.uns[keys.info] = adata.uns[keys.info]
    for slot, names_of in (
        ("obsm", (keys.latent, keys.variance, keys.logits, keys.network_variance)),
        ("varm", (keys.loadings,)),
    ):
        for name in names_of:
            if name in getattr(adata, slot):
                getattr(result, slot)[name] = getattr(adata, slot)[name]
    tl.population_loadings(result, groupby, key=key)
    out: dict[str, Any] = {}
    for group in groups:
        long = get.top_genes(result, group=group, n=N_POPULATION_GENES, key="ldvae_population_loadings")
        by_factor = {name: long[long["factor"] == name] for name in names}
        out[group] = [
            [[str(gene), float(value)] for gene, value in zip(part["gene"], part["value"], strict=True)]
            for part in by_factor.values()
        ]
    return out
