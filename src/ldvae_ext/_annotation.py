"""What factors stand for: the population that each of them marks best, and the gene set that fits best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

# Gene sets with fewer genes in the model are left out. Below this area under the ROC curve, nothing is named.
LEAST_GENES, LEAST_AUROC = 3, 0.7
# One gene of a set is among so many with the largest scores.
N_LEADING = 20


class Marks(NamedTuple):
    """The populations at the two ends of a factor."""

    high: str
    """The population that high values mark best."""
    auroc: float
    """Its area under the ROC curve against all other cells."""
    low: str
    """The population that low values mark best."""
    low_auroc: float

    @property
    def is_clear(self) -> bool:
        """True if high values separate the population at all well."""
        return self.auroc >= LEAST_AUROC


class GeneSet(NamedTuple):
    """The gene set that fits a factor best."""

    name: str
    auroc: float
    """Area under the ROC curve of its genes against all others, by their score."""
    n_genes: int
    """Genes of the set in the model."""


def marked_populations(latent_nk: np.ndarray, groups: Sequence[str], code_n: np.ndarray) -> list[Marks]:
    """The populations that each factor marks best; empty with fewer than two populations.

    Parameters
    ----------
    latent_nk
        Factors, shape (cells, factors).
    groups
        Names of the populations.
    code_n
        Population of each cell; -1 for none.
    """
    known_n = code_n[code_n >= 0]
    n_p = np.bincount(known_n, minlength=len(groups))
    if (n_p > 0).sum() < 2:
        return []
    rank_nk = pd.DataFrame(latent_nk[code_n >= 0]).rank().to_numpy()
    sum_pk = np.stack([rank_nk[known_n == p].sum(axis=0) for p in range(len(groups))])
    pairs_p = n_p * (len(known_n) - n_p)
    auroc_pk = (sum_pk - (n_p * (n_p + 1) / 2)[:, None]) / np.where(pairs_p > 0, pairs_p, np.nan)[:, None]
    marks = []
    for auroc_p in auroc_pk.T:
        high, low = int(np.nanargmax(auroc_p)), int(np.nanargmin(auroc_p))
        marks.append(Marks(groups[high], float(auroc_p[high]), groups[low], float(1 - auroc_p[low])))
    return marks


def check_gene_sets(gene_sets: object) -> None:
    """Raise unless these are gene sets by name, or None."""
    if gene_sets is not None and not isinstance(gene_sets, Mapping):
        msg = f"`gene_sets` must be a mapping from names to genes, or the path of a GMT file; got {type(gene_sets).__name__}."
        raise TypeError(msg)


def best_gene_sets(score_gk: pd.DataFrame, gene_sets: Mapping[str, Sequence[str]] | None) -> dict[str, GeneSet]:
    """The gene set whose genes have the largest scores in each factor.

    It is named if the AUROC is at least 0.7, and one of its genes is among the 20 with the largest scores.

    Parameters
    ----------
    score_gk
        Scores, genes x factors.
    gene_sets
        Names of genes by set; sets with fewer than three genes in the model are left out.
    """
    rank_gk = score_gk.rank()
    best: dict[str, GeneSet] = {}
    for name, genes in (gene_sets or {}).items():
        inside = score_gk.index.isin([str(gene) for gene in genes])
        n = int(inside.sum())
        if n < LEAST_GENES or n == len(inside):
            continue
        auroc_k = (rank_gk[inside].sum() - n * (n + 1) / 2) / (n * (len(inside) - n))
        is_leading = rank_gk[inside].max() > len(inside) - N_LEADING
        for factor, value in auroc_k[is_leading].items():
            known = best.get(str(factor))
            if value >= LEAST_AUROC and (known is None or value > known.auroc):
                best[str(factor)] = GeneSet(str(name), float(value), n)
    return best


def read_gmt(path: Path) -> dict[str, list[str]]:
    """Gene sets of a GMT file: in each line a name, a description and genes, separated by tabs.

    Raises
    ------
    ValueError
        If a line has no genes, or the file has no line.
    """
    sets = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path} is no file of gene sets: it is not text in UTF-8."
        raise ValueError(msg) from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.rstrip("\n").split("\t")
        genes = [gene for gene in rest[1:] if gene]
        if not genes:
            msg = f"Line {number} of {path} is no gene set: a name, a description and genes, separated by tabs, are expected."
            raise ValueError(msg)
        sets[name] = genes
    if not sets:
        msg = f"{path} has no gene sets."
        raise ValueError(msg)
    return sets
