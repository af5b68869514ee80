"""The main job of ``ldvae-ext run``, from counts to a folder of results."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext import datasets, get, pl
from ldvae_ext._command import (
    InputError,
    check_names,
    check_out,
    data_errors_as_input_errors,
    read_as_native_float,
    read_h5ad_file,
)
from ldvae_ext._folder import (
    FolderError,
    check_anndata_can_be_written,
    discard,
    keep_incomplete,
    put_in_place,
    temporary_beside,
    write_marker,
)
from ldvae_ext._keys import export_keys
from ldvae_ext._validate import check_column

if TYPE_CHECKING:
    from ldvae_ext.model import LDVAE

# With more genes than MANY_GENES, N_TOP_GENES of them are selected.
MANY_GENES, N_TOP_GENES = 5000, 2000
# As in the LDVAE tutorial of scvi-tools.
LEARNING_RATE, EXAMPLE_EPOCHS = 5e-3, 250
MANY_GROUPS = 100
# One cell to train on, one to validate on, and one more; a gene at each end of a factor.
MIN_CELLS, MIN_GENES = 3, 2
N_TABLE_GENES = 20
N_SUMMARY_GENES = 5
N_FIGURE_GENES = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of the command."""

    source: Path | None
    layer: str | None
    batch_key: str | None
    groupby: str | None
    n_top_genes: int | None
    n_latent: int
    max_epochs: int | None
    seed: int
    out: Path
    overwrite: bool


def run(job: Job, echo: Callable[[str], None]) -> None:
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
    check_out(out, job.source, overwrite=job.overwrite)
    adata = _read(job)
    groupby = "bulk_labels" if job.source is None and job.groupby is None else job.groupby
    model = _set_up(adata, job, echo)
    if job.source is not None:
        _rehearse(model, adata, groupby, job.layer)
    # Training writes nothing: it takes long, and an interruption may leave no time to clean up.
    _train(model, job)
    work = temporary_beside(out)
    try:
        model.save(str(work / "model"))
        model.export_to_anndata(adata)
        ablation = model.ablate()[:, get.factors(adata).index].copy()
        written = _write_results(adata, ablation, groupby, work, model.history)
        summary = _summary(adata, ablation, groupby)
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
    echo(summary)
    for description, name in written:
        echo(f"{description:<24}{job.out / name}")


def _read(job: Job) -> AnnData:
    """Read and check the input or the bundled example, without loading scvi-tools."""
    adata = datasets.pbmc68k() if job.source is None else read_h5ad_file(job.source)
    if adata.n_obs < MIN_CELLS or adata.n_vars < MIN_GENES:
        msg = f"The input has {adata.n_obs} cells and {adata.n_vars} genes; at least {MIN_CELLS} and {MIN_GENES} are needed."
        raise InputError(msg)
    read_as_native_float(adata, job.layer)
    check_names(adata)
    for option, key in (("--batch-key", job.batch_key), ("--groupby", job.groupby)):
        if key is not None:
            with data_errors_as_input_errors():
                check_column(adata.obs.columns, option, key)
    if job.groupby is not None:
        n_groups = adata.obs[job.groupby].nunique()
        if not 1 <= n_groups <= MANY_GROUPS:
            msg = f"`--groupby`: {job.groupby!r} has {n_groups} different values; name a column of 1 to {MANY_GROUPS} groups."
            raise InputError(msg)
    return adata


def _set_up(adata: AnnData, job: Job, echo: Callable[[str], None]) -> LDVAE:
    """Untrained model on the selected genes. Counts are checked before genes are selected by them."""
    import scanpy as sc
    import scvi

    from ldvae_ext.model import LDVAE
    from ldvae_ext.model._counts import check_counts

    # Importing Lightning sets a level that lets its notices on accelerators and other products through.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with data_errors_as_input_errors():
        check_counts(adata, job.layer)
    n_top = job.n_top_genes
    if n_top is None:
        n_top = N_TOP_GENES if adata.n_vars > MANY_GENES else 0
    if 0 < n_top < MIN_GENES:
        msg = f"`--n-top-genes` must be 0 or at least {MIN_GENES}; got {n_top}."
        raise InputError(msg)
    chosen = np.ones(adata.n_vars, dtype=bool)
    if 0 < n_top < adata.n_vars:
        try:
            table = sc.pp.highly_variable_genes(
                adata, flavor="seurat_v3", n_top_genes=n_top, layer=job.layer, batch_key=job.batch_key, inplace=False
            )
        except ValueError as error:
            msg = f"Highly variable genes cannot be selected ({error}); use all genes with --n-top-genes 0."
            raise InputError(msg) from error
        chosen = table["highly_variable"].to_numpy()
    echo(f"{adata.n_obs:,} cells, {chosen.sum():,} of {adata.n_vars:,} genes, {job.n_latent} latents")
    scvi.settings.seed = job.seed
    with data_errors_as_input_errors():
        selected = adata[:, chosen].copy()
        LDVAE.setup_anndata(selected, layer=job.layer, batch_key=job.batch_key)
        return LDVAE(selected, n_latent=job.n_latent)


def _rehearse(model: LDVAE, adata: AnnData, groupby: str | None, layer: str | None) -> None:
    """Write the results of a few cells before the training, so that a problem of the input does not cost the training."""
    with data_errors_as_input_errors():
        check_anndata_can_be_written(adata)
    from ldvae_ext.model._counts import counts_of, totals_of

    codes = np.zeros(adata.n_obs) if groupby is None else pd.factorize(pd.Series(adata.obs[groupby]))[0]
    candidates = pd.Series(codes, index=np.arange(len(codes)))[totals_of(counts_of(model.adata, layer)) > 0]
    few = candidates.groupby(candidates.to_numpy()).head(5).index.to_numpy()
    with (
        TemporaryDirectory(prefix="ldvae-ext-") as folder,
        warnings.catch_warnings(),
        _random_states_restored(),
    ):
        warnings.simplefilter("ignore")
        try:
            small = adata[few].copy()
            model.export_to_anndata(small)
            ablation = model.ablate(small)[:, get.factors(small).index].copy()
            _write_results(small, ablation, groupby, Path(folder))
            _summary(small, ablation, groupby)
        except Exception as error:
            reason = error.args[0] if error.args else error
            msg = (
                f"The results for this input cannot be written ({type(error).__name__}: {reason}). Nothing was trained."
            )
            raise InputError(msg) from error


@contextmanager
def _random_states_restored() -> Iterator[None]:
    import torch

    state = np.random.get_state()  # noqa: NPY002 - scvi-tools draws from it
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _train(model: LDVAE, job: Job) -> None:
    import torch

    threads = torch.get_num_threads()
    # Minibatches are small: several threads save little time on an idle machine. On a busy one they wait for each other
    # at every step, which takes ten times as long. The user can set OMP_NUM_THREADS.
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    torch.set_num_threads(int(wanted) if wanted.isdigit() and int(wanted) else 1)
    try:
        max_epochs = EXAMPLE_EPOCHS if job.source is None and job.max_epochs is None else job.max_epochs
        model.train(max_epochs, kl_warmup="auto", plan_kwargs={"lr": LEARNING_RATE}, check_val_every_n_epoch=5)
    finally:
        torch.set_num_threads(threads)


def _write_results(
    adata: AnnData, ablation: AnnData, groupby: str | None, folder: Path, history: Any = None
) -> list[tuple[str, str]]:
    """Write all results; return a description and the path, relative to the folder, of each."""
    import matplotlib.pyplot as plt

    population = groupby
    if population is None:
        population = "population"
        ablation.obs = pd.DataFrame({population: "all cells"}, index=ablation.obs_names)

    adata.write_h5ad(folder / "adata.h5ad", compression="gzip")
    tables = {
        "factors": get.factors(adata),
        "loadings": get.loadings(adata),
        "top_genes": get.top_genes(adata, n=N_TABLE_GENES).set_index("gene"),
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
    }
    if history is not None:
        figures["training_curves"] = pl.training_curves(history, return_fig=True, show=False)
    if ablation.n_vars > 1:
        figures["latent_pairs"] = pl.latent_pairs(adata, color=groupby, return_fig=True, show=False)
    (folder / "figures").mkdir()
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)
        plt.close(figure)
    return [
        ("annotated AnnData", "adata.h5ad"),
        ("model", "model"),
        *((f"table {name}", f"tables/{name}.csv") for name in tables),
        *((f"figure {name}", f"figures/{name}.png") for name in figures),
    ]


def _summary(adata: AnnData, ablation: AnnData, groupby: str | None) -> str:
    """Two short tables: top genes of each factor, and the factor with the largest effect in each population."""
    top = get.top_genes(adata, n=N_SUMMARY_GENES)
    lines = [
        "",
        "Factors in order of information (KL from the prior); up: genes that rise with the factor, down: genes that fall",
    ]
    for name, kl in get.factors(adata)["kl"].items():
        up, down = (", ".join(top[(top["factor"] == name) & (top["direction"] == d)]["gene"]) for d in ("up", "down"))
        lines.append(f"  {name:<6}{kl:>6.2f} nats  up: {up}; down: {down}")
    if groupby is not None:
        lines += [
            "",
            "Factor with the largest effect in each population: change of the negative log-likelihood without it, and the end "
            "of the factor at which the cells lie",
        ]
        by_group = get.ablation_df(ablation, groupby)
        most = by_group.loc[by_group.groupby("group")["mean"].idxmax()]
        latent = pd.DataFrame(adata.obsm[export_keys().latent], columns=ablation.var_names)
        mean = latent.groupby(adata.obs[groupby].astype(str).to_numpy()).mean()
        width = most["group"].str.len().max() + 2
        for group, factor, n_cells, effect in zip(
            most["group"], most["factor"], most["n_cells"], most["mean"], strict=True
        ):
            end = "high" if mean.loc[group, factor] > 0 else "low"
            lines.append(f"  {group:<{width}}{factor:<6}{effect:>+7.1f} nats per cell, {end} end ({n_cells} cells)")
    return "\n".join([*lines, ""])
