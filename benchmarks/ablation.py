"""How long an ablation of all latents takes, beside what it cannot do without and beside what one would write by hand.

Simulated counts; the things to compare take turns in one process, on one thread. Run `python benchmarks/ablation.py --help`;
see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from intercept import quiet
from scipy.special import softmax
from suite.by_hand import ablation as by_hand
from threadpoolctl import threadpool_limits

from ldvae_ext import datasets
from ldvae_ext.core import LinearDecoder, ablation_effects
from ldvae_ext.model import LDVAE

N_GENES, N_LATENT, CHUNK = 2000, 10, 128


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def medians(tasks: dict[str, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Median seconds of each task, and median over rounds of the ratio to the first task of the round."""
    for task in tasks.values():
        task()
    rounds = pd.DataFrame([{name: seconds(task) for name, task in tasks.items()} for _ in range(repeats)])
    ratio = rounds.div(rounds.iloc[:, 0], axis=0)
    return pd.DataFrame({"seconds": rounds.median(), "ratio": ratio.median(), "from": ratio.min(), "to": ratio.max()})


def from_latents(adata: AnnData, decoder: LinearDecoder, repeats: int) -> pd.DataFrame:
    """Ablation of all latents at given latents, and as many softmaxes over genes."""
    z_nk, counts = adata.obsm["z_true"], adata.X
    library_n = np.asarray(counts.sum(axis=1)).ravel()
    logits_ng = decoder.logits(z_nk, np.zeros(len(z_nk), dtype=np.int64))
    chunks = [slice(start, start + CHUNK) for start in range(0, len(z_nk), CHUNK)]

    def softmaxes() -> None:
        for at in chunks:
            for _ in range(N_LATENT):
                softmax(logits_ng[at], axis=1)

    def effects() -> None:
        for at in chunks:
            batch = np.zeros(len(z_nk[at]), dtype=np.int64)
            ablation_effects(decoder, counts[at], z_nk[at], library_n[at], batch, 0.0, range(N_LATENT))

    return medians({f"{N_LATENT} softmaxes": softmaxes, "core.ablation_effects": effects}, repeats)


def of_a_model(adata: AnnData, repeats: int) -> pd.DataFrame:
    scvi.settings.seed = 0
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=N_LATENT, use_observed_lib_size=True)
    model.train(1, accelerator="cpu", kl_warmup=1, enable_progress_bar=False)
    off = np.abs(by_hand(model, in_one_pass=True) - model.ablate(batch_size=CHUNK).X).max()
    print(f"largest difference from model.ablate(): {off:.1e} nats\n")
    tasks = {
        "model.ablate()": lambda: model.ablate(batch_size=CHUNK),
        f"one pass, {N_LATENT + 1} decodings": lambda: by_hand(model, in_one_pass=True),
        f"{N_LATENT + 1} passes": lambda: by_hand(model, in_one_pass=False),
    }
    return medians(tasks, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    quiet()
    adata, decoder = datasets.simulate(arguments.cells, N_GENES, N_LATENT, median_library=200)
    filled = adata.X.nnz / np.prod(adata.shape)
    print(f"{arguments.cells} cells x {N_GENES} genes, {filled:.1%} of the counts above 0, {N_LATENT} latents\n")
    with threadpool_limits(1):
        print(from_latents(adata, decoder, arguments.repeats).round(2).to_string(), end="\n\n")
        print(of_a_model(adata, arguments.repeats).round(2).to_string())


if __name__ == "__main__":
    main()
