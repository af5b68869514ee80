"""Batch norm or a gene intercept in the decoder: fit of held-out cells, and agreement between seeds.

Trains LDVAE on real counts with each of five decoders and several seeds; the held-out cells are the same for all. Run
`python benchmarks/intercept.py --help`; benchmarks/README.md describes the columns of the output.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from ldvae_ext import datasets
from ldvae_ext.core import log_likelihood
from ldvae_ext.model import LDVAE

DECODERS = {
    "batch norm": {},
    "batch norm, auto": {"bias": "auto"},
    "off, no intercept": {"use_batch_norm": False},
    "off, bias": {"use_batch_norm": False, "bias": True},
    "off, auto": {"use_batch_norm": False, "bias": "auto"},
}
DATA = ("pbmc68k", "kang_muscat", "pbmc3k", "human_kidney_hvg2000")
HELD_OUT = 0.2
ELBO_DRAWS = 10


def variable_genes(adata: anndata.AnnData, n_genes: int) -> anndata.AnnData:
    """The genes whose log1p of counts, scaled to the median total, varies most."""
    counts = sparse.csr_matrix(adata.X)
    total_n = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sparse.csr_matrix(sparse.diags(np.median(total_n) / total_n) @ counts)
    scaled.data = np.log1p(scaled.data)
    variance_g = np.asarray(scaled.multiply(scaled).mean(axis=0) - np.square(scaled.mean(axis=0))).ravel()
    kept = adata[:, np.sort(np.argsort(variance_g)[-n_genes:])].copy()
    return kept[np.asarray(kept.X.sum(axis=1)).ravel() > 0].copy()


def read(name: str, folder: Path) -> anndata.AnnData:
    adata = datasets.pbmc68k() if name == "pbmc68k" else anndata.read_h5ad(folder / f"{name}.h5ad")
    return variable_genes(adata, 1000) if name == "pbmc3k" else adata


def fixed_split(n_cells: int) -> list[np.ndarray]:
    """Training and held-out cells, whatever the seed of the training."""
    cells = np.random.default_rng(0).permutation(n_cells)
    n_held_out = int(HELD_OUT * n_cells)
    return [np.sort(cells[n_held_out:]), np.sort(cells[:n_held_out])]


def quiet() -> None:
    """One thread, and no word of lightning."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR


def held_out_log_likelihood(model: LDVAE, cells: np.ndarray) -> float:
    """Of the counts given the posterior means of latent and library, nats per cell."""
    rate_ng = model.get_normalized_expression(indices=cells, library_size="latent", use_posterior_mean=True).to_numpy()
    counts_ng = model.adata.X[cells].toarray()
    of_counts = log_likelihood("nb", counts_ng, rate_ng.astype(np.float64), model.get_decoder().theta_bg)
    return float(of_counts.sum(axis=1).mean())


def matched(similarity: np.ndarray) -> float:
    """Mean of the pairs that make the sum largest."""
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return float(similarity[rows, columns].mean())


def unit_columns(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(axis=0)
    return centred / np.linalg.norm(centred, axis=0)


def agreement(columns_of_runs: list[np.ndarray]) -> list[float]:
    """For each run the matched |cosine| of its centred columns with those of the other runs, averaged over these."""
    units = [unit_columns(columns) for columns in columns_of_runs]
    return [
        float(np.mean([matched(np.abs(a.T @ b)) for b in units if b is not a])) if len(units) > 1 else np.nan
        for a in units
    ]


def likeness_to_mean(model: LDVAE, loadings_gk: np.ndarray) -> float:
    """Largest |correlation| over genes of a latent's loadings with the log mean expression."""
    log_mean_g = np.log(np.asarray(model.adata.X.sum(axis=0)).reshape(-1, 1) + 0.5)
    return float(np.abs(unit_columns(loadings_gk).T @ unit_columns(log_mean_g)).max())


def train(adata: anndata.AnnData, split: list[np.ndarray], seed: int, lr: float, epochs: int, **options: object):
    """One model: its row of results, its loadings and the posterior means of the held-out cells."""
    scvi.settings.seed = seed
    model = LDVAE(adata, n_latent=10, **options)
    start = time.process_time()
    model.train(
        epochs,
        accelerator="cpu",
        kl_warmup="auto",
        plan_kwargs={"lr": lr},
        datasplitter_kwargs={"external_indexing": split},
        enable_progress_bar=False,
    )
    seconds = time.process_time() - start
    cells = model.validation_indices
    if not np.array_equal(np.sort(cells), split[1]):
        msg = "The held-out cells are not those that were asked for."
        raise RuntimeError(msg)
    kl_k = model.get_latent_kl(indices=cells).to_numpy().mean(axis=0)
    loadings_gk = model.get_loadings().to_numpy().astype(np.float64)
    row = {
        "elbo": np.mean([float(model.get_elbo(indices=cells)) for _ in range(ELBO_DRAWS)]),
        "log_likelihood": held_out_log_likelihood(model, cells),
        "kl": kl_k.sum(),
        "used": int((kl_k > 0.1).sum()),
        "seconds": seconds,
        "like_mean": likeness_to_mean(model, loadings_gk),
    }
    return row, loadings_gk, model.get_latent_representation(indices=split[1])


def run(arguments: argparse.Namespace) -> None:
    for name in arguments.data:
        adata = read(name, arguments.folder)
        LDVAE.setup_anndata(adata, batch_key="batch" if "batch" in adata.obs else None)
        split = fixed_split(adata.n_obs)
        library = "latent" if arguments.latent_library else "observed"
        for decoder in arguments.decoders:
            options = {"use_observed_lib_size": not arguments.latent_library, **DECODERS[decoder]}
            rows, loadings, latents = [], [], []
            for seed in range(arguments.seeds):
                row, loadings_gk, latent_nk = train(adata, split, seed, arguments.lr, arguments.epochs, **options)
                setting = {
                    "data": name,
                    "library": library,
                    "lr": arguments.lr,
                    "epochs": arguments.epochs,
                    "decoder": decoder,
                }
                rows.append({**setting, "seed": seed, **row})
                loadings.append(loadings_gk)
                latents.append(latent_nk)
            table = pd.DataFrame(rows).assign(
                loadings_agreement=agreement(loadings), latents_agreement=agreement(latents)
            )
            is_new = not arguments.out.exists()
            table.round(4).to_csv(arguments.out, mode="a", header=is_new, index=False)
            print(table.round(3).to_string(index=False, header=is_new), flush=True)


def summary(path: Path) -> str:
    """A Markdown table of the means over seeds, with the smallest and largest ELBO."""
    keys = ["data", "library", "lr", "epochs", "decoder"]
    lines = [
        "| data | library | lr | epochs | decoder | ELBO (range) | log-lik. | KL | loadings | latents | like mean | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, group in pd.read_csv(path).groupby(keys, sort=False):
        mean = group.mean(numeric_only=True)
        name, library, lr, epochs, decoder = key
        lines.append(
            f"| {name} | {library} | {lr:g} | {epochs} | {decoder} | {mean.elbo:.1f} ({group.elbo.min():.1f} to {group.elbo.max():.1f}) "
            f"| {mean.log_likelihood:.1f} | {mean.kl:.1f} | {mean.loadings_agreement:.2f} "
            f"| {mean.latents_agreement:.2f} | {mean.like_mean:.2f} | {mean.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="folder with the .h5ad files")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, metavar="NAME", help=", ".join(DATA))
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS), metavar="NAME")
    parser.add_argument("--latent-library", action="store_true", help="as LinearSCVI's default; else the cell's total")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate; 1e-3 is scvi-tools' default")
    parser.add_argument("--out", type=Path, default=Path("intercept.csv"), help="csv that rows are added to")
    parser.add_argument("--summary", action="store_true", help="print the table of an existing csv, and train nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.out))
        return
    quiet()
    run(arguments)


if __name__ == "__main__":
    main()
