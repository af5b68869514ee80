"""The job of ``ldvae-ext run``: from a file of counts to a folder of results."""

from __future__ import annotations

import shlex
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext import datasets, get, pl
from ldvae_ext._annotation import LEAST_AUROC, read_gmt
from ldvae_ext._command import (
    InputError,
    check_names,
    check_out,
    data_errors_as_input_errors,
    read_as_native_float,
    read_cells,
)
from ldvae_ext._files import scratch_folder
from ldvae_ext._folder import (
    FolderError,
    check_anndata_can_be_written,
    discard,
    keep_incomplete,
    put_in_place,
    temporary_beside,
    write_marker,
)
from ldvae_ext._run import MIN_CELLS, MIN_GENES, N_TABLE_GENES, UMAP, Options, Run, prepare, train_and_export
from ldvae_ext._run_counts import check_raw_counts
from ldvae_ext._run_training import random_states_kept
from ldvae_ext._validate import check_column, listed, printable

MANY_GROUPS = 100
N_FIGURE_GENES = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the command."""

    source: Path | None
    gene_sets: Path | None
    out: Path
    overwrite: bool
    silent: bool
    options: Options


def run_command(job: Job, echo: Callable[[str], None]) -> None:
    """Run the job. Results appear in ``job.out`` when all of them are complete, or not at all.

    Parameters
    ----------
    job
        Options of the command.
    echo
        Function that prints a line for the user.

    Raises
    ------
    InputError
        If the input or the folder is not usable. Nothing is written then.
    """
    out = job.out.absolute()
    check_out(out, job.source, job.gene_sets, overwrite=job.overwrite)
    options = job.options
    if job.gene_sets is not None:
        options = replace(options, gene_sets=_gene_sets(job.gene_sets))
    if job.source is None and options.groupby is None:
        options = replace(options, groupby="bulk_labels")
    adata = _read(job, options)
    with data_errors_as_input_errors():
        check_raw_counts(adata, options.layer, "--layer")
        selected = prepare(adata, options)
    echo(
        f"{adata.n_obs:,} cells, {selected.n_vars:,} of {adata.n_vars:,} genes, {options.n_latent} factors, "
        f"{options.n_runs} {'run' if options.n_runs == 1 else 'runs'}"
    )
    if job.source is not None:
        _rehearse(adata, options)
    # Training writes nothing: it takes long, and an interruption may leave no time to clean up.
    with data_errors_as_input_errors():
        result = train_and_export(adata, selected, options, silent=job.silent)
    work = temporary_beside(out)
    try:
        result.model.save(str(work / "model"))
        written = _write_results(result, work, reproduce=_command(job))
        summary = _summary(result)
        write_marker(work, version("ldvae-ext"))
        work.chmod(0o755)
        put_in_place(work, out, overwrite=job.overwrite)
    except Exception as error:
        (work / "error.txt").write_text("".join(traceback.format_exception(error)))
        kept = keep_incomplete(work, out)
        reason = str(error) if isinstance(error, FolderError) else f"{type(error).__name__}: {error}"
        msg = f"The results could not be written ({reason}). The trained model is in {kept / 'model'}."
        raise InputError(msg) from error
    except BaseException:
        discard(work)
        raise
    echo(f"\nReport: {job.out / 'report.html'}\n")
    echo(summary)
    for description, name in written:
        echo(f"{description:<18}{job.out / name}")


def _gene_sets(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        msg = f"There is no file {path}; `--gene-sets` takes a GMT file."
        raise InputError(msg)
    try:
        return read_gmt(path)
    except ValueError as error:
        msg = f"`--gene-sets`: {error}"
        raise InputError(msg) from error


def _read(job: Job, options: Options) -> AnnData:
    """Read and check the input or the bundled example, without loading scvi-tools."""
    adata = datasets.pbmc68k() if job.source is None else read_cells(job.source)
    if adata.n_obs < MIN_CELLS or adata.n_vars < MIN_GENES:
        msg = f"The input has {adata.n_obs} cells and {adata.n_vars} genes; at least {MIN_CELLS} and {MIN_GENES} are needed."
        raise InputError(msg)
    if options.n_top_genes is not None and 0 < options.n_top_genes < MIN_GENES:
        msg = f"`--n-top-genes` must be 0 or at least {MIN_GENES}; got {options.n_top_genes}."
        raise InputError(msg)
    if options.layer is not None and options.layer not in adata.layers:
        # anndata lists X among the layers, with the name None.
        known = listed(filter(None, adata.layers.keys())) or "none"
        msg = f"`--layer`: {options.layer!r} is not a layer of the input, which has {known}."
        raise InputError(msg)
    read_as_native_float(adata, options.layer)
    check_names(adata)
    named = {"--batch-key": options.batch_key, "--size-factor": options.size_factor_key, "--groupby": options.groupby}
    for option, key in (*named.items(), *(("--covariates", key) for key in options.covariates)):
        if key is not None:
            with data_errors_as_input_errors():
                check_column(adata.obs.columns, option, key)
    if job.options.groupby is not None:
        n_groups = adata.obs[job.options.groupby].nunique()
        if not 1 <= n_groups <= MANY_GROUPS:
            msg = f"`--groupby`: {job.options.groupby!r} has {n_groups} different values; name a column of 1 to {MANY_GROUPS} groups."
            raise InputError(msg)
    return adata


def _rehearse(adata: AnnData, options: Options) -> None:
    """Write the results of a few cells before the training, so that a problem of the input does not cost the training."""
    with data_errors_as_input_errors():
        check_anndata_can_be_written(adata)
    from ldvae_ext.model._counts import counts_of, totals_of

    codes = np.zeros(adata.n_obs) if options.groupby is None else pd.factorize(pd.Series(adata.obs[options.groupby]))[0]
    candidates = pd.Series(codes, index=np.arange(len(codes)))[totals_of(counts_of(adata, options.layer)) > 0]
    few = candidates.groupby(candidates.to_numpy()).head(5).index.to_numpy()
    quick = replace(options, n_top_genes=0, n_runs=1, max_epochs=1, umap=False)
    with scratch_folder() as folder, warnings.catch_warnings(), random_states_kept():
        warnings.simplefilter("ignore")
        try:
            small = adata[few].copy()
            result = train_and_export(small, prepare(small, quick), quick, silent=True)
            _write_results(result, folder)
            _summary(result)
        except Exception as error:
            reason = error.args[0] if error.args else error
            msg = (
                f"The results for this input cannot be written ({type(error).__name__}: {reason}). Nothing was trained."
            )
            raise InputError(msg) from error


def _write_results(result: Run, folder: Path, *, reproduce: str | None = None) -> list[tuple[str, str]]:
    """Write all results; return a description and the path, relative to the folder, of each."""
    import matplotlib.pyplot as plt

    adata, groupby = result.adata, result.options.groupby
    result.report(folder / "report.html", reproduce=reproduce)
    ablation, population = result.ablation.copy(), groupby
    if population is None:
        population = "population"
        ablation.obs = pd.DataFrame({population: "all cells"}, index=ablation.obs_names)
    adata.write_h5ad(folder / "adata.h5ad", compression="gzip")
    tables = {
        "factors": result.factors(),
        "loadings": get.loadings(adata),
        "top_genes": get.top_genes(adata, n=N_TABLE_GENES, rank_by="regression").set_index("gene"),
        "ablation_cells": ablation.to_df(),
        "ablation_groups": get.ablation_df(ablation, population).set_index("group"),
    }
    (folder / "tables").mkdir()
    for name, table in tables.items():
        table.to_csv(folder / "tables" / f"{name}.csv", float_format="%.6g")
    figures: dict[str, Any] = {
        "factor_scree": pl.factor_scree(adata, return_fig=True, show=False),
        "loadings": pl.loadings(
            adata,
            n_genes=min(N_FIGURE_GENES, len(get.loadings(adata)) // 2),
            rank_by="information",
            return_fig=True,
            show=False,
        ),
        "ablation": pl.ablation(ablation, population, factors=list(ablation.var_names), return_fig=True, show=False),
        "training_curves": pl.training_curves(result.model.history, return_fig=True, show=False),
    }
    if UMAP in adata.obsm:
        figures["embedding_factors"] = pl.embedding_factors(adata, return_fig=True, show=False)
    if ablation.n_vars > 1:
        figures["latent_pairs"] = pl.latent_pairs(adata, color=groupby, return_fig=True, show=False)
    (folder / "figures").mkdir()
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)
        plt.close(figure)
    return [
        ("annotated AnnData", "adata.h5ad"),
        ("model", "model"),
        ("tables", "tables"),
        ("figures", "figures"),
    ]


def _summary(result: Run) -> str:
    """A line for each factor: how reproducible it is, what it marks, and its genes; stable ones first."""
    table = result.factors()
    if "flag" in table:
        table = table.assign(rank=table["flag"].map({"stable": 0, "uncertain": 1, "unstable": 2}))
        table = table.sort_values("rank", kind="stable")
    shown, width = table.head(15), max(len(str(name)) for name in table.index) + 2
    marks = shown["population"] if "population" in shown else pd.Series("", index=shown.index)
    wide = min(28, max((len(str(mark)) for mark in marks), default=0) + 7)
    lines = []
    for name, row in shown.iterrows():
        flag = f"{row['flag']:<11}" if "flag" in shown else ""
        mark = ""
        if "population" in shown:
            is_clear = row["auroc"] >= LEAST_AUROC
            mark = f"{printable(row['population'])[: wide - 7]} {row['auroc']:.2f}" if is_clear else "-"
            mark = f"{mark:<{wide}}"
        fitting = f"  [{row['gene_set']}]" if row.get("gene_set") else ""
        lines.append(f"  {name:<{width}}{flag}{mark}{printable(row['up'])}{printable(fitting)}")
    if len(table) > len(shown):
        lines.append(f"  ... and {len(table) - len(shown)} more, in the report")
    head = "Factors" + (" (stable: other seeds give them, on the same cells)" if "flag" in table else "")
    head += (
        ", the population that each marks best and its AUROC" if "population" in table else ""
    ) + ", and the genes that rise:"
    return "\n".join([head, *lines, *(f"Note: {note}" for note in result.notes), ""])


def _command(job: Job) -> str:
    """The command with these options."""
    options, parts = job.options, ["ldvae-ext run"]
    if job.source is not None:
        parts.append(shlex.quote(str(job.source)))
    given = {
        "--layer": options.layer,
        "--batch-key": options.batch_key,
        "--size-factor": options.size_factor_key,
        "--groupby": options.groupby,
        "--gene-sets": job.gene_sets,
        "--n-top-genes": options.n_top_genes,
        "--n-latent": options.n_latent,
        "--runs": options.n_runs,
        "--rotation": options.rotation,
        "--max-epochs": options.max_epochs,
        "--seed": options.seed,
    }
    parts += [f"--covariates {shlex.quote(name)}" for name in options.covariates]
    parts += [f"{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return " ".join(parts)
