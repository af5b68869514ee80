"""Posteriors from the decoder beside those of the encoder: speed, held-out cells, panels of genes, simulated truth, new conditions.

Run `python benchmarks/projection.py --help`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from intercept import quiet, read
from scipy.optimize import minimize, nnls
from scipy.special import ndtri
from scipy.stats import rankdata

from ldvae_ext import datasets, get, tl
from ldvae_ext.core import LinearDecoder, log_likelihood, posterior_of
from ldvae_ext.core.evidence import evidence_bound
from ldvae_ext.core.projection import CellPosteriors
from ldvae_ext.kernels.threads import compiled
from ldvae_ext.model import LDVAE
from ldvae_ext.model._axes import network_stream

SHARES = (0.8, 0.5, 0.25, 0.1)
PARTS = ("speed", "held-out", "truth", "conditions")
SETTINGS = {
    "300 genes, 500 counts": {"n_genes": 300, "median_library": 500.0},
    "1,000 genes, 500 counts": {"n_genes": 1000, "median_library": 500.0},
    "1,000 genes, 3,000 counts": {"n_genes": 1000, "median_library": 3000.0},
    "1,000 genes, 1,000 counts, Poisson": {"n_genes": 1000, "median_library": 1000.0, "likelihood": "poisson"},
}


def train(
    adata: anndata.AnnData, epochs: int, *, setup: dict | None = None, split: list | None = None, **options
) -> LDVAE:
    scvi.settings.seed = 0
    LDVAE.setup_anndata(adata, **(setup or {}))
    model = LDVAE(adata, n_latent=10, **options)
    model.train(
        epochs,
        accelerator="cpu",
        kl_warmup="auto",
        plan_kwargs={"lr": 5e-3},
        datasplitter_kwargs={} if split is None else {"external_indexing": split},
        enable_progress_bar=False,
    )
    return model


def halves(n_cells: int) -> list[np.ndarray]:
    cells = np.random.default_rng(0).permutation(n_cells)
    return [np.sort(cells[: n_cells // 2]), np.sort(cells[n_cells // 2 :])]


def cells_per_second(task: Callable[[], object], n_cells: int, repeats: int = 3) -> float:
    task()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        task()
        seconds.append(time.process_time() - start)
    return n_cells / float(np.median(seconds))


def speed(folder: Path, epochs: int) -> dict[str, float]:
    """Cells per second of processor time: 2,000 genes, 10 factors, one thread."""
    import scanpy as sc

    adata = anndata.read_h5ad(folder / "pbmc3k.h5ad")
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, flavor="seurat_v3")
    torch.set_num_threads(1)
    adata = adata[:, adata.var["highly_variable"]].copy()
    model = train(adata, min(epochs, 50))
    decoder, x, z = model.get_decoder(), adata.X, model.get_latent_representation()
    n_few, few = 20, adata.X[:20].toarray().astype(np.float64)
    profiles_gk = decoder.scale(np.eye(10)).T
    shares_ng = few / few.sum(axis=1, keepdims=True)

    def by_scipy() -> None:
        for cell in few:
            minimize(
                lambda u, cell=cell: negative_log_joint(decoder, cell, u), np.zeros(10), jac=True, method="L-BFGS-B"
            )

    out = {}
    with compiled(on=True, n_threads=1):
        out["posterior_of"] = cells_per_second(lambda: posterior_of(decoder, x), adata.n_obs)
        out["posterior_of, from the encoder's means"] = cells_per_second(
            lambda: posterior_of(decoder, x, start_nk=z), adata.n_obs
        )
    with compiled(on=False, n_threads=1):
        out["posterior_of in numpy"] = cells_per_second(lambda: posterior_of(decoder, x[:500]), 500)
    out["scipy, cell by cell (mode only)"] = cells_per_second(by_scipy, n_few)
    out["non-negative least squares, cell by cell"] = cells_per_second(
        lambda: [nnls(profiles_gk, share_g) for share_g in shares_ng], n_few
    )
    out["encoder"] = cells_per_second(lambda: model.get_latent_representation(), adata.n_obs)
    return out


def negative_log_joint(decoder: LinearDecoder, cell: np.ndarray, z: np.ndarray) -> tuple[float, np.ndarray]:
    """Of one cell under a negative binomial, with its gradient."""
    mu = decoder.rate(z[None], library=cell.sum())[0]
    theta = decoder.theta_bg[0]
    first = cell - (cell + theta) * mu / (theta + mu)
    mean = mu @ decoder.weight_gk / mu.sum()
    value = (cell * np.log(mu) - (cell + theta) * np.log(theta + mu)).sum() - 0.5 * z @ z
    return -value, z - first @ (decoder.weight_gk - mean)


def held_out(folder: Path, epochs: int) -> dict[str, object]:
    """Half of the cells of pbmc3k, 1,000 genes: ELBO, and latents from a part of the genes."""
    adata = read("pbmc3k", folder)
    split = halves(adata.n_obs)
    model = train(adata, epochs, split=split)
    model.rotate("none")
    bounds = model.get_amortization_gap(indices=split[1])
    decoder = model.get_decoder()
    with network_stream(model, None, split[1], len(split[1])) as cells:
        (chunk,) = cells.chunks
    chunk = chunk._replace(counts=np.asarray(chunk.counts.toarray(), dtype=np.float64))
    found = posterior_of(decoder, chunk.counts, library=chunk.library, start_nk=chunk.mean)
    diagonal = found.variance_nk[:, :, None] * np.eye(10)
    curvature = 1 / np.diagonal(np.linalg.inv(found.covariance_nkk), axis1=1, axis2=2)
    noise = np.random.default_rng(0).normal(size=(10, len(split[1]), 10))
    out: dict[str, object] = {
        "elbo": {
            "encoder": bounds["encoder"].mean(),
            "decoder, full covariance": bounds["refined"].mean(),
            "decoder, marginal variances": evidence_bound(decoder, chunk, found.mean_nk, diagonal, noise).mean(),
            "decoder, inverse curvatures": evidence_bound(
                decoder, chunk, found.mean_nk, curvature[:, :, None] * np.eye(10), noise
            ).mean(),
            "evidence": found.log_evidence_n.mean(),
        }
    }
    library_n = chunk.counts.sum(axis=1)
    whole = posterior_of(decoder, chunk.counts)
    rows = [panel_row("100 %", whole, whole, decoder, chunk.counts, library_n, encoded=chunk.mean)]
    for share in SHARES:
        rng = np.random.default_rng(1)
        genes = np.sort(rng.permutation(adata.n_vars)[: int(share * adata.n_vars)])
        part = posterior_of(decoder.with_genes(decoder.genes[genes]), chunk.counts[:, genes])
        zeros = np.zeros_like(chunk.counts)
        zeros[:, genes] = chunk.counts[:, genes]
        blank = anndata.AnnData(zeros.astype(np.float32), obs=adata.obs.iloc[split[1]], var=adata.var)
        encoded = model.get_latent_representation(blank)
        rows.append(panel_row(f"{share:.0%}", part, whole, decoder, chunk.counts, library_n, encoded=encoded))
    return {**out, "panels": rows}


def panel_row(
    name: str,
    part: CellPosteriors,
    whole: CellPosteriors,
    decoder: LinearDecoder,
    counts_ng: np.ndarray,
    library_n: np.ndarray,
    *,
    encoded: np.ndarray,
) -> dict[str, object]:
    """Log-likelihood of all genes at latents from some of them, and correlation of these with the modes from all genes."""

    def likelihood(z_nk: np.ndarray) -> float:
        mu_ng = decoder.rate(z_nk, library=library_n)
        return float(log_likelihood("nb", counts_ng, mu_ng, decoder.theta_bg).sum(axis=1).mean())

    return {
        "genes": name,
        "encoder": likelihood(encoded),
        "decoder": likelihood(part.mean_nk),
        "encoder_correlation": float(np.median(correlations(encoded, whole.mean_nk))),
        "decoder_correlation": float(np.median(correlations(part.mean_nk, whole.mean_nk))),
    }


def correlations(a_nk: np.ndarray, b_nk: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(a_nk.T, b_nk.T, strict=True)])


def truth(epochs: int) -> dict[str, dict[str, float]]:
    """Simulated counts: a network whose decoder is the true one and stays so, beside the posterior from it."""
    out = {}
    for name, setting in SETTINGS.items():
        adata, decoder = datasets.simulate(n_cells=3000, n_latent=5, **setting)
        train_cells, test_cells = halves(adata.n_obs)
        model = with_decoder(adata, decoder, epochs, [train_cells, test_cells])
        z_nk = adata.obsm["z_true"][test_cells]
        mean_nk, variance_nk = model.get_latent_representation(indices=test_cells, return_dist=True)
        found = posterior_of(decoder, adata.X[test_cells])
        out[name] = {
            "encoder_correlation": float(correlations(mean_nk, z_nk).mean()),
            "decoder_correlation": float(correlations(found.mean_nk, z_nk).mean()),
            "least_difference": float((correlations(found.mean_nk, z_nk) - correlations(mean_nk, z_nk)).min()),
            "encoder_coverage": coverage(mean_nk, variance_nk, z_nk),
            "decoder_coverage": coverage(found.mean_nk, found.variance_nk, z_nk),
        }
    return out


def with_decoder(adata: anndata.AnnData, decoder: LinearDecoder, epochs: int, split: list[np.ndarray]) -> LDVAE:
    """A model whose decoder is given, and whose encoder is trained for it."""
    scvi.settings.seed = 0
    LDVAE.setup_anndata(adata)
    options = {"use_batch_norm": False, "bias": True, "use_observed_lib_size": True}
    model = LDVAE(adata, n_latent=5, gene_likelihood=decoder.likelihood, **options)
    layer = model.module.decoder.factor_regressor.fc_layers[0][0]
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(decoder.weight_gk))
        layer.bias.copy_(torch.as_tensor(decoder.intercept_bg[0]))
        if decoder.theta_bg is not None:
            model.module.px_r.copy_(torch.log(torch.as_tensor(decoder.theta_bg[0])))
    for parameter in (*model.module.decoder.parameters(), model.module.px_r):
        parameter.requires_grad = False
    model.train(
        epochs,
        accelerator="cpu",
        kl_warmup=1,
        backend="torch",
        plan_kwargs={"lr": 5e-3},
        datasplitter_kwargs={"external_indexing": split},
        enable_progress_bar=False,
    )
    return model


def coverage(mean_nk: np.ndarray, variance_nk: np.ndarray, z_nk: np.ndarray) -> float:
    """Share of the true latents inside 90 % intervals."""
    return float((np.abs(z_nk - mean_nk) <= ndtri(0.95) * np.sqrt(variance_nk)).mean())


def conditions(folder: Path, epochs: int) -> list[dict[str, object]]:
    """Control cells of Kang et al. 2018 as the reference; stimulated cells of the other donors' samples as the query."""
    adata = anndata.read_h5ad(folder / "kang_muscat.h5ad")
    reference = adata[adata.obs["condition"] == "ctrl"].copy()
    query = adata[adata.obs["condition"] == "stim"].copy()
    model = train(reference, epochs, setup={"batch_key": "condition"}, encode_covariates=True)
    model.rotate("varimax")
    model.export_to_anndata(reference)
    names, signs = get.factors(reference).index, get.factors(reference)["sign"].to_numpy()
    rotation, order = model.rotation.matrix_kk, get.factors(reference)["dimension"].to_numpy()
    scores = {"reference, encoder": (reference, np.asarray(reference.obsm["X_ldvae"]))}
    as_control = query.copy()
    as_control.obs["condition"] = "ctrl"
    encoded = model.get_latent_representation(as_control)
    scores["encoder"] = (query, (encoded @ rotation)[:, order] * signs)
    for name, batch in (("decoder", "ctrl"), ('decoder, `"fit"`', "fit")):
        projected = tl.project(query, reference, batch=batch, copy=True)
        scores[name] = (projected, np.asarray(projected.obsm["X_ldvae"]))
    mapped = query.copy()
    trained = LDVAE.load_query_data(mapped, model)
    trained.train(epochs // 2, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"weight_decay": 0.0})
    scores["query training"] = (query, (trained.get_latent_representation() @ rotation)[:, order] * signs)
    rows = []
    for cell_type in sorted(adata.obs["cell_type"].unique()):
        areas = {
            name: auroc(value_nk, cells.obs["cell_type"] == cell_type) for name, (cells, value_nk) in scores.items()
        }
        best = int(np.abs(areas["reference, encoder"] - 0.5).argmax())
        is_low = areas["reference, encoder"][best] < 0.5
        row: dict[str, object] = {"type": cell_type, "factor": names[best]}
        row |= {name: float(1 - area_k[best] if is_low else area_k[best]) for name, area_k in areas.items()}
        rows.append(row)
    return rows


def auroc(value_nk: np.ndarray, inside: pd.Series) -> np.ndarray:
    inside_n = inside.to_numpy()
    n_in, ranks = inside_n.sum(), np.apply_along_axis(rankdata, 0, value_nk)
    return (ranks[inside_n].sum(axis=0) - n_in * (n_in + 1) / 2) / (n_in * (len(inside_n) - n_in))


def page(results: dict) -> str:
    """The tables of the documentation."""
    lines: list[str] = []

    def table(head: list[str], rows: list[list[str]], caption: str) -> None:
        lines.extend([caption, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)])
        lines.extend("| " + " | ".join(row) + " |" for row in rows)
        lines.append("")

    if "speed" in results:
        rows = [[name, f"{value:,.0f}"] for name, value in results["speed"].items()]
        table(["", "cells per second"], rows, "Speed: pbmc3k, 2,000 genes, 10 factors, processor time of one thread.")
    if "held-out" in results:
        part = results["held-out"]
        rows = [[name, f"{value:.1f}"] for name, value in part["elbo"].items()]
        table(["posterior", "ELBO"], rows, "Held-out cells: half of pbmc3k, 1,000 genes, nats per cell.")
        rows = [
            [
                row["genes"],
                f"{row['encoder']:.1f}",
                f"{row['decoder']:.1f}",
                f"{row['encoder_correlation']:.3f}",
                f"{row['decoder_correlation']:.3f}",
            ]
            for row in part["panels"]
        ]
        head = ["genes", "log-likelihood, encoder", "decoder", "correlation, encoder", "decoder"]
        table(
            head,
            rows,
            "Panels: latents of the same cells from a random part of the genes (missing ones are zeros for the encoder): log-likelihood "
            "of all genes at these latents, nats per cell, and median correlation with the modes from all genes.",
        )
    if "truth" in results:
        rows = [
            [
                name,
                f"{row['encoder_correlation']:.3f}",
                f"{row['decoder_correlation']:.3f}",
                f"{row['encoder_coverage']:.1%}",
                f"{row['decoder_coverage']:.1%}",
            ]
            for name, row in results["truth"].items()
        ]
        head = ["counts", "correlation, encoder", "decoder", "90 % intervals, encoder", "decoder"]
        table(head, rows, "Simulated truth: held-out cells, the true decoder, and an encoder trained for it.")
    if "conditions" in results:
        rows = results["conditions"]
        methods = [name for name in rows[0] if name not in ("type", "factor")]
        body = [[row["type"], row["factor"], *(f"{row[name]:.3f}" for name in methods)] for row in rows]
        body.append(["mean", "", *(f"{np.mean([row[name] for row in rows]):.3f}" for name in methods)])
        table(
            ["cell type", "factor", *methods],
            body,
            "New condition: AUROC of the factor that marks the type best in the control cells, in these (first column) and in the "
            "stimulated cells.",
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder with pbmc3k.h5ad and kang_muscat.h5ad")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--json", type=Path, help="file for the results; parts that are in it already are kept")
    parser.add_argument("--page", type=Path, help="file for the tables of the documentation")
    arguments = parser.parse_args()
    quiet()
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    tasks = {
        "speed": lambda: speed(arguments.folder, arguments.epochs),
        "held-out": lambda: held_out(arguments.folder, arguments.epochs),
        "truth": lambda: truth(arguments.epochs),
        "conditions": lambda: conditions(arguments.folder, arguments.epochs),
    }
    for part in arguments.parts:
        results[part] = tasks[part]()
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1, default=float))
    text = page(results)
    print(text)
    if arguments.page:
        arguments.page.write_text(text)


if __name__ == "__main__":
    main()
