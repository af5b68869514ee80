"""Agreement of factors between trainings: single runs and consensus, other seeds and other cells.

Run `python benchmarks/stability.py --help`; benchmarks/README.md describes what is measured.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import anndata
import numpy as np
import scvi
from intercept import quiet, variable_genes

from ldvae_ext.core.matching import consensus_loadings, consensus_of, cosines, match_columns
from ldvae_ext.core.rotation import score_varimax, varimax
from ldvae_ext.model import LDVAE, fit_ensemble

DATA = ("pbmc3k", "kang_muscat")
N_GENES = 1000
DECODERS = {"batch norm": {}, "off, auto": {"use_batch_norm": "encoder", "bias": "auto"}}


def read(name: str, folder: Path) -> anndata.AnnData:
    adata = anndata.read_h5ad(folder / f"{name}.h5ad")
    return variable_genes(adata, N_GENES) if adata.n_vars > N_GENES else adata


def file_of(out: Path, data: str, decoder: str, resample: str) -> Path:
    return out / f"{data}-{decoder.replace(', ', '_').replace(' ', '_')}-{resample}.npz"


def fit(args: argparse.Namespace, data: str, decoder: str, resample: str) -> None:
    """Train the runs; keep loadings and latents on the network's own axes."""
    adata = read(data, args.folder)
    LDVAE.setup_anndata(adata)
    ensemble = fit_ensemble(
        adata,
        args.runs,
        n_latent=10,
        resample=None if resample == "seeds" else resample,
        max_epochs=args.epochs,
        model_kwargs={"use_observed_lib_size": True, **DECODERS[decoder]},
        train_kwargs={"plan_kwargs": {"lr": 5e-3}, "check_val_every_n_epoch": None, "accelerator": "cpu"},
    )
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        file_of(args.out, data, decoder, resample),
        loadings=np.stack([model.get_decoder().centered().weight_gk for model in ensemble.models]),
        latents=np.stack([model.get_latent_representation() for model in ensemble.models]),
        seeds=np.array(ensemble.seeds),
    )


def median_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.median(match_columns(cosines(a, b)).cosine))


def summary_of(path: Path, *, are_halves: bool) -> dict[str, str]:
    """One row of the table."""
    stored = np.load(path)
    raw, latents = stored["loadings"], stored["latents"] - stored["latents"].mean(axis=1, keepdims=True)
    turned = [loading_gk @ varimax(loading_gk) for loading_gk in raw]
    scores = [latent_nk @ score_varimax(latent_nk) for latent_nk in latents]
    runs = np.arange(len(raw))
    if are_halves:
        pairs = [(a, b) for a, b in itertools.combinations(runs, 2) if (a - b) % 2]
        splits = [(runs[::2], runs[1::2])]
    else:
        pairs = list(itertools.combinations(runs, 2))
        rng = np.random.default_rng(0)
        splits = [np.split(rng.permutation(runs), 2) for _ in range(10)]
    single = [[median_cosine(values[a], values[b]) for a, b in pairs] for values in (raw, turned, scores)]
    high = [(match_columns(cosines(turned[a], turned[b])).cosine >= 0.9).sum() for a, b in pairs]
    agreed, n_high, n_stable, n_replicated, n_lost = [], [], 0, 0, 0
    for mine, theirs in splits:
        consensus = [consensus_loadings([turned[m] for m in part]) for part in (mine, theirs)]
        matched = match_columns(cosines(*consensus)).cosine
        agreed.append(np.median(matched))
        n_high.append((matched >= 0.9).sum())
        for part, other in ((mine, theirs), (theirs, mine)):
            own = consensus_of([turned[m] for m in part])
            found = match_columns(cosines(own.loading_gk, consensus_loadings([turned[m] for m in other]))).cosine
            is_stable = own.reproducibility_k >= 0.8
            n_stable += is_stable.sum()
            n_replicated += (found[is_stable] >= 0.9).sum()
            n_lost += (found[is_stable] < 0.7).sum()
    half_rows = f"{n_stable / (2 * len(splits)):.1f}"
    return {
        "raw": f"{np.median(single[0]):.2f}",
        "varimax": f"{np.median(single[1]):.2f}",
        "consensus": f"{np.mean(agreed):.2f} ({min(agreed):.2f} to {max(agreed):.2f})"
        if len(agreed) > 1
        else f"{agreed[0]:.2f}",
        "single >= 0.9": f"{np.mean(high):.1f}",
        "consensus >= 0.9": f"{np.mean(n_high):.1f}",
        "stable": half_rows,
        "of these >= 0.9": f"{n_replicated / max(1, n_stable):.2f}",
        "of these < 0.7": f"{n_lost / max(1, n_stable):.2f}",
        "scores": f"{np.median(single[2]):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("stability"))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS)[:1])
    parser.add_argument("--resample", nargs="+", choices=("seeds", "halves"), default=["seeds", "halves"])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--summary", action="store_true", help="only print the table of what was run")
    args = parser.parse_args()
    quiet()
    scvi.settings.seed = 0
    cases = list(itertools.product(args.data, args.decoders, args.resample))
    if not args.summary:
        for case in cases:
            if not file_of(args.out, *case).exists():
                fit(args, *case)
    rows = [
        {
            "data": data,
            "decoder": decoder,
            "runs differ in": resample,
            **summary_of(path, are_halves=resample == "halves"),
        }
        for data, decoder, resample in itertools.product(DATA, DECODERS, ("seeds", "halves"))
        if (path := file_of(args.out, data, decoder, resample)).exists()
    ]
    if rows:
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
