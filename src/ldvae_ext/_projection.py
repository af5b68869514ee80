"""The job of ``ldvae-ext project``: cells scored with the factors of a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext import get, tl
from ldvae_ext._command import (
    InputError,
    check_names,
    check_out,
    data_errors_as_input_errors,
    read_as_native_float,
    read_h5ad_file,
)
from ldvae_ext._folder import check_anndata_can_be_written, discard, put_in_place, temporary_beside, write_marker
from ldvae_ext._keys import export_keys
from ldvae_ext.core import LinearDecoder

N_TABLE_GENES = 20


@dataclass(frozen=True, kw_only=True)
class ProjectionJob:
    """Options of the command."""

    source: Path
    reference: Path
    layer: str | None
    batch: str | None
    batch_key: str | None
    size_factor_key: str | None
    min_share: float
    out: Path
    overwrite: bool


def project(job: ProjectionJob, echo: Callable[[str], None]) -> None:
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
    check_out(out, job.source, job.reference, overwrite=job.overwrite)
    adata, reference = read_h5ad_file(job.source), _read_reference(job.reference)
    read_as_native_float(adata, job.layer)
    check_names(adata)
    with data_errors_as_input_errors():
        tl.project(
            adata,
            reference,
            layer=job.layer,
            batch=job.batch,
            batch_key=job.batch_key,
            size_factor_key=job.size_factor_key,
            min_share=job.min_share,
        )
        check_anndata_can_be_written(adata)
    tables = _tables(adata)
    work = temporary_beside(out)
    try:
        adata.write_h5ad(work / "adata.h5ad", compression="gzip")
        (work / "tables").mkdir()
        for name, table in tables.items():
            table.to_csv(work / "tables" / f"{name}.csv", float_format="%.6g")
        write_marker(work, version("ldvae-ext"))
        work.chmod(0o755)
        put_in_place(work, out, overwrite=job.overwrite)
    except Exception as error:
        discard(work)
        msg = f"The results could not be written ({type(error).__name__}: {error})."
        raise InputError(msg) from error
    except BaseException:
        discard(work)
        raise
    for line in _summary(adata):
        echo(line)
    echo(f"{'annotated AnnData':<24}{job.out / 'adata.h5ad'}")
    for name in tables:
        echo(f"{f'table {name}':<24}{job.out / 'tables' / f'{name}.csv'}")


def _read_reference(path: Path) -> AnnData | LinearDecoder:
    if path.suffix != ".npz":
        return read_h5ad_file(path)
    if not path.is_file():
        msg = f"There is no file {path}; give the path of an .h5ad file with an export, or of an .npz file with a decoder."
        raise InputError(msg)
    try:
        return LinearDecoder.load(path)
    except Exception as error:
        msg = f"{path} cannot be read as a decoder ({error}); write it with `LinearDecoder.save`."
        raise InputError(msg) from error


def _tables(adata: AnnData) -> dict[str, pd.DataFrame]:
    keys, factors = export_keys(), get.factors(adata)
    cells = pd.DataFrame(adata.obsm[keys.latent], index=adata.obs_names, columns=factors.index)
    cells[keys.fit] = adata.obs[keys.fit].to_numpy()
    return {
        "factors": factors,
        "cells": cells,
        "top_genes": get.top_genes(adata, n=N_TABLE_GENES).set_index("gene"),
    }


def _summary(adata: AnnData) -> list[str]:
    keys = export_keys()
    info: dict[str, Any] = adata.uns[keys.info]["projection"]
    fit_n = np.asarray(adata.obs[keys.fit], dtype=np.float64)
    lines = [
        f"{adata.n_obs:,} cells, {info['n_genes']:,} of {info['n_reference_genes']:,} genes of the reference, "
        f"{len(get.factors(adata))} factors",
        f"Deviance relative to counts drawn from the decoder: median {np.nanmedian(fit_n):.2f}",
    ]
    if "fit_range" in info:
        low, _, high = info["fit_range"]
        share = np.mean(fit_n[np.isfinite(fit_n)] > high)
        lines[-1] += f"; {low:.2f} to {high:.2f} in 90 % of the reference's cells, above that in {share:.0%} of these"
    return [*lines, ""]
