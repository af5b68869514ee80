"""The main job: from counts to factors that other trainings confirm, exported, named and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext import get, tl
from ldvae_ext._annotation import best_gene_sets, check_gene_sets, marked_populations, read_gmt
from ldvae_ext._groups import groups_of
from ldvae_ext._keys import export_keys
from ldvae_ext._run_counts import check_raw_counts
from ldvae_ext._run_training import (
    LEARNING_RATE,
    MAX_EPOCHS,
    REPRODUCIBILITY,
    random_states_kept,
    reproducibility,
    stops_early,
    torch_threads_kept,
    train_models,
)
from ldvae_ext._validate import check_column, check_one_of, check_positive_int
from ldvae_ext._writing import add_statistic, check_can_write

if TYPE_CHECKING:
    from ldvae_ext.model import LDVAE, Ensemble

# With more genes than MANY_GENES, N_TOP_GENES of them are selected.
MANY_GENES, N_TOP_GENES = 5000, 2000
ROTATIONS = ("varimax", "promax", "none")
# One cell to train on, one to validate on, and one more; a gene at each end of a factor.
MIN_CELLS, MIN_GENES = 3, 2
N_SUMMARY_GENES, N_TABLE_GENES = 5, 20
# With more cells no UMAP is computed.
MAX_UMAP = 50_000
UMAP = "X_umap"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of :func:`run`."""

    layer: str | None = None
    batch_key: str | None = None
    covariates: Sequence[str] = ()
    size_factor_key: str | None = None
    groupby: str | None = None
    gene_sets: Mapping[str, Sequence[str]] | None = None
    n_top_genes: int | None = None
    n_latent: int = 10
    n_runs: int = 3
    rotation: Any = "varimax"
    max_epochs: int | None = None
    umap: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_one_of("rotation", self.rotation, ROTATIONS)
        check_gene_sets(self.gene_sets)
        if isinstance(self.covariates, str):
            msg = f"`covariates` must be several columns of `adata.obs`; got {self.covariates!r}."
            raise TypeError(msg)
        for name in ("n_latent", "n_runs"):
            check_positive_int(name, getattr(self, name))
        check_positive_int("seed", self.seed, least=0)
        if self.n_top_genes is not None:
            check_positive_int("n_top_genes", self.n_top_genes, least=0)
        if self.max_epochs is not None:
            check_positive_int("max_epochs", self.max_epochs)


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """Result of :func:`ldvae_ext.run`.

    Examples
    --------
    >>> result
    Run of 700 cells: 5 factors, ... stable
    >>> result.factors().index.tolist()
    ['F_...', 'F_...', 'F_...', 'F_...', 'F_...']
    """

    adata: AnnData
    """The cells, with the export."""
    model: LDVAE
    """The model whose factors were exported: of several runs the one that is nearest to their consensus."""
    ensemble: Ensemble | None
    """All runs; None with a single one."""
    options: Options

    def __repr__(self) -> str:
        table = get.factors(self.adata)
        stable = f", {(table['flag'] == 'stable').sum()} stable" if "flag" in table else ""
        return f"Run of {self.adata.n_obs} cells: {len(table)} factors{stable}"

    @cached_property
    def ablation(self) -> AnnData:
        """Effect of each factor in each cell, cells x factors, in the exported order; see :meth:`LDVAE.ablate`."""
        return tl.ablate(self.adata)

    def factors(self) -> pd.DataFrame:
        """The table of factors, annotated.

        Returns
        -------
        :func:`ldvae_ext.get.factors`, and with ``groupby`` ``population`` and ``auroc``: the population that high values of the factor
        mark best, by the area under the ROC curve, ``low_population`` and ``low_auroc``: that of low values, ``most_affected``: the
        population that loses most without the factor; ``gene_set`` and
        ``gene_set_auroc``: the gene set that fits best (with ``gene_sets``); ``up`` and ``down``: genes.
        """
        table, groupby = get.factors(self.adata), self.options.groupby
        if groupby is not None:
            latent_nk = np.asarray(self.adata.obsm[export_keys().latent], dtype=np.float64)
            groups, code_n = groups_of(self.adata.obs, groupby)
            marks = marked_populations(latent_nk, groups, code_n)
            if marks:
                table["population"], table["auroc"], table["low_population"], table["low_auroc"] = zip(
                    *marks, strict=True
                )
            means = self.ablation.to_df()[code_n >= 0].groupby(code_n[code_n >= 0]).mean()
            table["most_affected"] = [groups[p] for p in means.idxmax()]
        if self.options.gene_sets:
            sets = best_gene_sets(get.gene_scores(self.adata, kind="regression"), self.options.gene_sets)
            table["gene_set"] = [sets[name].name if name in sets else "" for name in table.index]
            table["gene_set_auroc"] = [sets[name].auroc if name in sets else np.nan for name in table.index]
        top = get.top_genes(self.adata, n=N_SUMMARY_GENES, rank_by="regression")
        for direction in ("up", "down"):
            genes = top[top["direction"] == direction].groupby("factor")["gene"].agg(", ".join)
            table[direction] = genes.reindex(table.index).fillna("")
        return table

    def report(self, path: str | Path, *, reproduce: str | None = None) -> Path:
        """Write the report, see :func:`ldvae_ext.report`.

        Parameters
        ----------
        path
            File to write.
        reproduce
            Code or a command with which the result can be computed again; the call of :func:`ldvae_ext.run` if None.
        """
        from ldvae_ext._report._build import write_report

        return write_report(
            self.adata,
            path,
            notes=self.notes,
            groupby=self.options.groupby,
            gene_sets=self.options.gene_sets,
            ablation=self.ablation,
            history=self.model.history,
            settings=self.settings,
            reproduce=_call(self.options) if reproduce is None else reproduce,
        )

    @property
    def notes(self) -> list[str]:
        """What to know of the trainings, in words: that some might have gone on; empty if there is nothing."""
        most = MAX_EPOCHS if self.options.max_epochs is None else self.options.max_epochs
        lengths = self._n_epochs()
        n_ended = sum(length >= most for length in lengths)
        if not n_ended or not stops_early(self.adata):
            return []
        return [
            f"The largest number of epochs, {most}, ended {n_ended} of {len(lengths)} trainings while the ELBO of held-out cells may "
            "still have improved; allow more with `max_epochs` (`--max-epochs`)."
        ]

    def _n_epochs(self) -> list[int]:
        """Number of epochs of each training."""
        models = [self.model] if self.ensemble is None else self.ensemble.models
        return [len(model.history["elbo_train"]) for model in models]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the training, and what the encoder loses, for the report."""
        lengths = self._n_epochs()
        return {
            "genes trained on": f"{len(self.model.get_var_names()):,} of {self.adata.n_vars:,}",
            "latent dimensions": self.options.n_latent,
            "rotation": self.options.rotation,
            "runs": len(lengths),
            "seeds": ", ".join(str(self.options.seed + i) for i in range(self.options.n_runs)),
            "epochs": ", ".join(map(str, lengths)),
            "learning rate": LEARNING_RATE,
            "amortization gap": f"{self._gap():.1f} nats of ELBO per cell that the encoder loses",
        }

    def _gap(self) -> float:
        """Mean amortization gap of up to 500 cells."""
        n_cells = self.adata.n_obs
        some = np.sort(np.random.default_rng(0).permutation(n_cells)[:500])
        return float(self.model.get_amortization_gap(indices=some, seed=0)["gap"].mean())


def run(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    covariates: Sequence[str] = (),
    size_factor_key: str | None = None,
    groupby: str | None = None,
    gene_sets: Mapping[str, Sequence[str]] | str | Path | None = None,
    n_top_genes: int | None = None,
    n_latent: int = 10,
    n_runs: int = 3,
    rotation: Literal["varimax", "promax", "none"] = "varimax",
    max_epochs: int | None = None,
    umap: bool = True,
    seed: int = 0,
    silent: bool = False,
) -> Run:
    """From counts to factors: train an LDVAE several times, keep what the trainings agree on, and write it to ``adata``.

    The same as ``ldvae-ext run``. Highly variable genes are selected, the model is trained ``n_runs`` times with other seeds until the
    ELBO of held-out cells no longer improves, and the run that is nearest to the consensus is exported
    (:func:`ldvae_ext.model.fit_ensemble`).

    Parameters
    ----------
    adata
        Cells with raw counts.
    layer
        Layer with the counts; ``X`` if None.
    batch_key, covariates, size_factor_key
        Columns of ``obs``, as in :meth:`ldvae_ext.model.LDVAE.setup_anndata`. Covariates with numbers are continuous, others categorical.
    groupby
        Column of ``obs`` with populations, for annotations and the report. The model does not see it.
    gene_sets
        Names of genes by gene set, or the path of a GMT file, for annotations.
    n_top_genes
        Number of highly variable genes (``flavor="seurat_v3"``, in each batch); 0 keeps all. None: 2,000 if there are over 5,000.
    n_latent
        Number of factors.
    n_runs
        Number of trainings; 1 to be quick, without knowing which factors come back.
    rotation
        ``"varimax"``: consensus of the runs on varimax axes. ``"promax"``: oblique factors of the run that is nearest to it. ``"none"``: the network's
        own latents, in order of information, which differ from training to training.
    max_epochs
        Largest number of epochs of a training; 400 if None.
    umap
        True to compute a UMAP from the factors, unless ``obsm["X_umap"]`` exists or there are more than 50,000 cells.
    seed
        Seed of the first run; the others count on from it.
    silent
        True to hide the progress bar.

    Returns
    -------
    A :class:`Run`, with the model, the table of factors, the ablation and :meth:`Run.report`.

    Raises
    ------
    KeyError
        If there is no such layer or column.
    TypeError
        If ``adata`` is no AnnData.
    ValueError
        If the matrix has values that are no counts, such as logarithms or fractions, or an option is unknown. Nothing is written.

    Notes
    -----
    Writes what :meth:`ldvae_ext.model.LDVAE.export_to_anndata` (``stats=True``) writes; with several runs
    ``uns["ldvae"]["statistics"]["reproducibility"]``, which :func:`ldvae_ext.get.factors` shows with a flag, and what
    :meth:`ldvae_ext.model.Ensemble.export_to_anndata` writes; ``obsm["X_umap"]``.

    Examples
    --------
    >>> cells = ldvae_ext.datasets.pbmc68k()
    >>> ldvae_ext.run(cells, n_latent=5, n_runs=1, max_epochs=5, umap=False)
    Run of 700 cells: 5 factors
    >>> cells.obsm["X_ldvae"].shape
    (700, 5)
    """
    options = Options(
        layer=layer,
        batch_key=batch_key,
        covariates=covariates if isinstance(covariates, str) else tuple(covariates),
        size_factor_key=size_factor_key,
        groupby=groupby,
        gene_sets=read_gmt(Path(gene_sets)) if isinstance(gene_sets, (str, Path)) else gene_sets,
        n_top_genes=n_top_genes,
        n_latent=n_latent,
        n_runs=n_runs,
        rotation=rotation,
        max_epochs=max_epochs,
        umap=umap,
        seed=seed,
    )
    with random_states_kept():
        return train_and_export(adata, prepare(adata, options), options, silent=silent)


def prepare(adata: AnnData, options: Options) -> AnnData:
    """Cells with the selected genes, registered. Counts are checked before genes are selected by them."""
    import scanpy as sc

    from ldvae_ext.model import LDVAE

    if not isinstance(adata, AnnData):
        hint = "; pass one modality, such as `mdata['rna']`" if type(adata).__name__ == "MuData" else ""
        msg = f"`adata` must be an AnnData; got {type(adata).__name__}{hint}."
        raise TypeError(msg)
    if adata.n_obs < MIN_CELLS or adata.n_vars < MIN_GENES:
        msg = f"`adata` must have at least {MIN_CELLS} cells and {MIN_GENES} genes; it has {adata.n_obs} cells and {adata.n_vars} genes."
        raise ValueError(msg)
    if options.n_top_genes is not None and 0 < options.n_top_genes < MIN_GENES:
        msg = f"`n_top_genes` must be 0 or at least {MIN_GENES}; got {options.n_top_genes}."
        raise ValueError(msg)
    check_can_write(adata, None, overwrite=False)
    check_raw_counts(adata, options.layer)
    columns = {"batch_key": options.batch_key, "size_factor_key": options.size_factor_key, "groupby": options.groupby}
    for name, column in (*columns.items(), *(("covariates", column) for column in options.covariates)):
        if column is not None:
            check_column(adata.obs.columns, name, column)
    if options.groupby is not None:
        groups_of(adata.obs, options.groupby)
    n_top = options.n_top_genes
    if n_top is None:
        n_top = N_TOP_GENES if adata.n_vars > MANY_GENES else 0
    chosen = np.ones(adata.n_vars, dtype=bool)
    if 0 < n_top < adata.n_vars:
        with torch_threads_kept():
            table = sc.pp.highly_variable_genes(
                adata,
                flavor="seurat_v3",
                n_top_genes=n_top,
                layer=options.layer,
                batch_key=options.batch_key,
                inplace=False,
            )
        chosen = table["highly_variable"].to_numpy()
    selected = adata[:, chosen].copy()
    numbers = [name for name in options.covariates if pd.api.types.is_numeric_dtype(pd.Series(adata.obs[name]))]
    LDVAE.setup_anndata(
        selected,
        layer=options.layer,
        batch_key=options.batch_key,
        size_factor_key=options.size_factor_key,
        continuous_covariate_keys=numbers or None,
        categorical_covariate_keys=[name for name in options.covariates if name not in numbers] or None,
    )
    return selected


def train_and_export(adata: AnnData, selected: AnnData, options: Options, *, silent: bool = False) -> Run:
    """Train on the selected genes, and write the result to all cells."""
    model, ensemble = train_models(selected, options, silent=silent)
    model.export_to_anndata(adata, stats=True)
    result = Run(adata, model, ensemble, options)
    if ensemble is not None:
        ensemble.export_to_anndata(adata, overwrite=True)
        names = get.factors(adata).index
        add_statistic(adata, export_keys(), REPRODUCIBILITY, reproducibility(model, ensemble)[names].to_numpy())
    if options.umap and UMAP not in adata.obsm and 3 < adata.n_obs <= MAX_UMAP:
        adata.obsm[UMAP] = _umap(adata, options.seed)
    return result


def _umap(adata: AnnData, seed: int) -> np.ndarray:
    import scanpy as sc

    light = AnnData(obs=pd.DataFrame(index=adata.obs_names))
    light.obsm["X"] = np.asarray(adata.obsm[export_keys().latent])
    with torch_threads_kept():
        sc.pp.neighbors(light, n_neighbors=min(15, adata.n_obs - 1), use_rep="X", random_state=seed)
        sc.tl.umap(light, random_state=seed)
    return np.asarray(light.obsm["X_umap"])


def _call(options: Options) -> str:
    """The call of :func:`run` with these options."""
    default, given = Options(), []
    for name in Options.__dataclass_fields__:
        value = getattr(options, name)
        if value != getattr(default, name):
            given.append(f"{name}=..." if name == "gene_sets" else f"{name}={value!r}")
    return f"ldvae_ext.run(adata{''.join(f', {part}' for part in given)})"
