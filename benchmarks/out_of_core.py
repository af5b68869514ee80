"""Time and memory of cells on disk: training, ablation, export and the other readers, for 10,000 to 1,000,000 cells.

Counts are simulated on disk (2,000 genes, 5 % of them not zero). Each size and source is a process of its own, whose peak of the
resident memory is taken for each job. Run `python benchmarks/out_of_core.py --help`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from suite.child import forget_peak, of_process

SIZES = (10_000, 100_000, 1_000_000)
SOURCES = {"h5ad": "backed .h5ad", "collection": "annbatch collection"}
JOBS = {
    "set_up": "set-up",
    "train": "training, an epoch",
    "ablate": "ablation, 10 latents, to zarr",
    "export": "export, to zarr",
    "kl": "KL of each cell",
    "populations": "loadings of 20 populations",
    "stats": "statistics of factors",
    "tl": "`tl.ablate` of the export, to zarr",
}
N_GROUPS = 20
CHUNK = 8192


def simulate(path: Path, n_cells: int, n_genes: int = 2000, n_latent: int = 10) -> None:
    """Write Poisson counts of a log-linear model to an ``.h5ad``, a chunk of cells at a time."""
    rng = np.random.default_rng(0)
    weight_gk = rng.normal(size=(n_genes, n_latent), scale=0.5).astype(np.float32)
    intercept_g = rng.normal(size=n_genes).astype(np.float32)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(["a", "b"], n_cells)),
            "group": pd.Categorical(rng.choice([f"type {i}" for i in range(N_GROUPS)], n_cells)),
        },
        index=pd.RangeIndex(n_cells).astype(str),
    )
    var = pd.DataFrame(index=[f"gene {g}" for g in range(n_genes)])
    with h5py.File(path, "w") as file:
        ad.io.write_elem(file, "/", ad.AnnData(obs=obs, var=var))
        file.pop("raw", None)  # scvi-tools takes an empty one for counts
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_genes)})
        parts = {
            name: group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(2**15,))
            for name, dtype in (("data", np.float32), ("indices", np.int32))
        }
        indptr = [np.zeros(1, np.int64)]
        for start in range(0, n_cells, CHUNK):
            z_nk = rng.normal(size=(min(CHUNK, n_cells - start), n_latent)).astype(np.float32)
            rate_ng = np.exp(z_nk @ weight_gk.T + intercept_g)
            library_n1 = rng.lognormal(np.log(140), 0.3, (len(z_nk), 1)).astype(np.float32)
            counts = sparse.csr_matrix(rng.poisson(rate_ng * library_n1 / rate_ng.sum(axis=1, keepdims=True)))
            for name, part in parts.items():
                part.resize((len(part) + counts.nnz,))
                part[-counts.nnz :] = getattr(counts, name)
            indptr.append(indptr[-1][-1] + counts.indptr[1:].astype(np.int64))
        group.create_dataset("indptr", data=np.concatenate(indptr))


def jobs_of(cls: Any, source: str, folder: Path, path: Path, made: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; each leaves what later ones need in ``made``."""
    from ldvae_ext import tl

    training = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": 128, "train_size": 0.9}

    def set_up() -> None:
        if source == "h5ad":
            made["cells"] = ad.read_h5ad(path, backed="r")
            cls.setup_anndata(made["cells"], batch_key="batch")
            made["model"] = cls(made["cells"], n_latent=10)
            return
        made["cells"] = cls.setup_annbatch(
            folder / f"{path.stem}.zarr", [path], batch_key="batch", preload_to_gpu=False, dataset_size="500MB"
        )
        made["model"] = cls(registry=made["cells"].registry, n_latent=10)

    def train() -> None:
        given = {} if source == "h5ad" else {"datamodule": made["cells"]}
        made["model"].train(1, plan_kwargs={"n_epochs_kl_warmup": 1}, **training, **given)

    def exported() -> None:
        made["export"] = made["model"].export_to_anndata(made["cells"], store=folder / "export.zarr")

    def from_export() -> None:
        # The export has no counts; they are on disk beside it.
        export, cells = made["export"], made["cells"]
        export.X = cells.X if source == "h5ad" else cells.adata.X
        tl.ablate(export, store=folder / "effects of export.zarr")

    return {
        "set_up": set_up,
        "train": train,
        "ablate": lambda: made["model"].ablate(made["cells"], store=folder / "effects.zarr"),
        "export": exported,
        "kl": lambda: made["model"].get_latent_kl(made["cells"]),
        "populations": lambda: made["model"].get_population_loadings("group", adata=made["cells"]),
        "stats": lambda: made["model"].get_factor_stats("group", made["cells"], max_cells=1000),
        "tl": from_export,
    }


def child(source: str, folder: Path, path: Path, warm_up: Path, jobs: list[str]) -> dict[str, Any]:
    """Times and peaks of one source, after all jobs were done with few cells."""
    import torch

    from ldvae_ext.model import LDVAE

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for at, is_measured in ((warm_up, False), (path, True)):
        work = folder / f"{source} {at.stem}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name, task in jobs_of(LDVAE, source, work, at, {}).items():
            if name not in jobs:
                continue
            forget_peak()
            base, start = of_process("VmRSS"), time.perf_counter()
            task()
            seconds, peak = time.perf_counter() - start, of_process("VmHWM")
            if is_measured:
                found[name] = {"seconds": seconds, "base_mb": base, "peak_mb": peak}
                print(f"  {name}: {seconds:.1f} s, {peak:.0f} MB", file=sys.stderr, flush=True)
        shutil.rmtree(work)
    return found


def measure(folder: Path, sizes: list[int], jobs: list[str], out: Path, timeout: float) -> None:
    """Add the figures of each size and source to a file; those that are there are not measured again."""
    known = read(out)
    for n_cells in sizes:
        for source in SOURCES:
            if ((known["cells"] == n_cells) & (known["source"] == source)).any():
                continue
            for n in (2000, n_cells):
                if not (folder / f"{n}.h5ad").exists():
                    simulate(folder / f"{n}.h5ad", n)
            print(f"{n_cells:,} cells, {SOURCES[source]}", file=sys.stderr, flush=True)
            arguments = ["--child", source, "--cells", str(n_cells), "--folder", folder, "--jobs", *jobs]
            done = subprocess.run(
                [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, timeout=timeout
            )
            found = json.loads(done.stdout.splitlines()[-1])
            with out.open("a") as file:
                for job, numbers in found.items():
                    file.write(json.dumps({"cells": n_cells, "source": source, "job": job, **numbers}) + "\n")


def read(path: Path) -> pd.DataFrame:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return pd.DataFrame(rows, columns=["cells", "source", "job", "seconds", "base_mb", "peak_mb"])


def summary(table: pd.DataFrame) -> str:
    """A Markdown table: seconds, and the peak of the memory beyond that of the process after the same with 2,000 cells."""
    sizes = sorted(table["cells"].unique())
    lines = []
    for source, title in SOURCES.items():
        mine = table[table["source"] == source]
        if mine.empty:
            continue
        lines += [
            f"| {title} | {' | '.join(f'{n:,} cells' for n in sizes)} |",
            f"|---|{'---|' * len(sizes)}",
        ]
        # What the process held when it began with these cells, and all that it added.
        first = mine.groupby("cells")["base_mb"].first()
        for job, what in JOBS.items():
            cells = []
            for n in sizes:
                one = mine[(mine["job"] == job) & (mine["cells"] == n)]
                cells.append(
                    "" if one.empty else f"{one['seconds'].item():.1f} s, {one['peak_mb'].item() - first[n]:.0f} MB"
                )
            lines.append(f"| {what} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument(
        "--folder", type=Path, default=Path("out_of_core"), help="for the counts; 1 GB for 1,000,000 cells"
    )
    parser.add_argument("--out", type=Path, default=Path("out_of_core.jsonl"), help="file that figures are added to")
    parser.add_argument("--page", type=Path, help="write the table for the documentation to this file, too")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one size and source")
    parser.add_argument("--child", choices=SOURCES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    if args.child:
        path, warm_up = args.folder / f"{args.cells[0]}.h5ad", args.folder / "2000.h5ad"
        print(json.dumps(child(args.child, args.folder, path, warm_up, args.jobs)))
        return
    measure(args.folder, args.cells, args.jobs, args.out, args.timeout)
    text = summary(read(args.out))
    print(text)
    if args.page:
        args.page.write_text(f"<!-- Made by `python benchmarks/out_of_core.py --page`; do not edit. -->\n{text}")


if __name__ == "__main__":
    main()
