"""Replication and recovery of gene programs: LDVAE beside cNMF, NMF and PCA.

Cells are divided into two halves. Each method is applied to each half and then gives usages of all cells. Programs of the halves
are matched. All methods see 80 % of the counts; the deviance of the others measures the fit. Run `python benchmarks/programs.py --help`; benchmarks/README.md describes what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from intercept import quiet, variable_genes
from scipy import sparse
from scipy.special import xlogy
from sklearn.decomposition import NMF, PCA, non_negative_factorization
from sklearn.metrics import average_precision_score, roc_auc_score

from ldvae_ext import datasets
from ldvae_ext.core.matching import cosines, match_columns
from ldvae_ext.core.rotation import varimax
from ldvae_ext.core.scores import SlopeSums, log_normalised
from ldvae_ext.model import LDVAE, fit_ensemble
from ldvae_ext.model.programs import decoded_expression
from ldvae_ext.model.replication import Readout, agreement, readouts

REAL, SIMULATED = ("pbmc3k", "kang_muscat"), ("identity-activity", "additive", "log-linear")
# Options of LDVAE: those of LinearSCVI, and those that the page *How to choose* recommends.
DECODERS = {
    "default": {},
    "recommended": {"use_batch_norm": "encoder", "bias": "auto", "use_observed_lib_size": True},
}
N_GENES, N_TOP, KEPT = 1000, 50, 0.8
# Markers of blood cells that are found in textbooks; a list is covered if half of its genes are among the top genes of a program.
MARKERS = {
    "T cell": ("CD3D", "CD3E", "CD3G", "IL32", "CD2"),
    "naive T": ("CCR7", "LEF1", "TCF7", "SELL", "MAL"),
    "CD8 T": ("CD8A", "CD8B", "GZMK", "CCL5"),
    "NK": ("GNLY", "NKG7", "PRF1", "GZMB", "FGFBP2", "KLRD1", "KLRF1"),
    "B cell": ("CD79A", "CD79B", "MS4A1", "CD19", "BANK1", "TCL1A"),
    "CD14 monocyte": ("CD14", "LYZ", "S100A8", "S100A9", "VCAN", "FCN1"),
    "FCGR3A monocyte": ("FCGR3A", "MS4A7", "CDKN1C", "LST1", "RHOC"),
    "dendritic": ("FCER1A", "CST3", "CLEC10A", "CD1C", "HLA-DQA1"),
    "platelet": ("PPBP", "PF4", "GNG11", "SDPR", "TUBB1"),
    "MHC II": ("HLA-DRA", "HLA-DRB1", "HLA-DPA1", "HLA-DPB1", "CD74"),
    "interferon": ("ISG15", "IFI6", "IFIT1", "IFIT3", "MX1", "ISG20", "IFIT2"),
    "regulatory T": ("FOXP3", "IL2RA", "CTLA4", "TIGIT", "IKZF2"),
    "plasma cell": ("MZB1", "JCHAIN", "IGJ", "XBP1", "DERL3", "IGHG1", "IGHA1"),
    "plasmacytoid dendritic": ("LILRA4", "IL3RA", "TCF4", "SERPINF1", "ITM2C", "IRF8", "PLD4"),
    "cell cycle": ("MKI67", "TOP2A", "STMN1", "TYMS", "PCNA", "HMGB2", "TUBA1B"),
    "ribosome": ("RPS27", "RPS29", "RPL34", "RPL32", "RPS12", "RPL13", "RPS3A"),
    "immediate early": ("FOS", "JUN", "JUNB", "DUSP1", "EGR1"),
}


def read(name: str, folder: Path, seed: int = 0) -> anndata.AnnData:
    """Counts; genes in fewer than ten cells are left out."""
    if name in SIMULATED:
        options = {"likelihood": "poisson"} if name == "additive" else {}
        adata, decoder = datasets.simulate(3000, N_GENES, 8, kind=name, median_library=1500.0, seed=seed, **options)
        if decoder is not None:
            adata.varm["program_true"], adata.obsm["usage_true"] = decoder.weight_gk, adata.obsm["z_true"]
    else:
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
    adata.X = sparse.csr_matrix(adata.X).astype(np.float32)
    adata = adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 10].copy()
    return variable_genes(adata, N_GENES) if adata.n_vars > N_GENES else adata


def slopes(counts, usage_nk: np.ndarray) -> np.ndarray:
    sums = SlopeSums(counts.shape[1], usage_nk.shape[1])
    sums.add(counts, usage_nk)
    return sums.scores().score_gk


def nnls(counts, profile_gk: np.ndarray, loss: str = "frobenius") -> np.ndarray:
    """Usages of cells for fixed profiles."""
    solver = "cd" if loss == "frobenius" else "mu"
    return non_negative_factorization(
        counts, H=np.ascontiguousarray(profile_gk.T), n_components=profile_gk.shape[1], init="custom", update_H=False,
        solver=solver, beta_loss=loss, max_iter=500,
    )[0]  # fmt: skip


def shares(usage_nk: np.ndarray) -> np.ndarray:
    return usage_nk / np.maximum(usage_nk.sum(axis=1, keepdims=True), 1e-12)


def unit_variance(counts) -> np.ndarray:
    deviation_g = counts.toarray().std(axis=0, ddof=1)
    return np.divide(1.0, deviation_g, out=np.zeros_like(deviation_g, dtype=np.float64), where=deviation_g > 0)


class Result:
    """Result of one method on one half: scores of genes, usages of all cells, and expression predicted from other counts."""

    def __init__(self, score_gk, usage_nk, predict=None) -> None:
        self.score_gk, self.usage_nk, self.predict = score_gk, usage_nk, predict


def ldvae(adata, half, models, n_programs: int) -> dict[str, Result]:
    found = readouts(models, half, n_programs)

    def predict(counts):
        other = anndata.AnnData(counts, var=pd.DataFrame(index=adata.var_names))
        return np.concatenate([e for _, _, e in decoded_expression(models, other, np.arange(other.n_obs), None)])

    loading_gk = models[0].get_decoder().centered().weight_gk
    single_kk = varimax(loading_gk)
    names = {
        "programs": "LDVAE programs",
        "promax": "LDVAE consensus factors, promax, slopes",
        "factors": "LDVAE consensus factors, slopes",
        "factors, loadings": "LDVAE consensus factors, loadings",
    }
    results = {name: Result(*found[key], predict if key == "programs" else None) for key, name in names.items()}
    single_nk = models[0].get_latent_representation() @ single_kk
    return results | {"LDVAE one run, varimax loadings": Result(loading_gk @ single_kk, single_nk)}


def drvi(adata, half, n_programs: int, epochs: int) -> dict[str, Result]:
    """One training of DRVI, whose decoder is additive but not linear, with its defaults."""
    part = adata[half].copy()
    scvi.external.DRVI.setup_anndata(part)
    model = scvi.external.DRVI(part, n_latent=n_programs)
    model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False)
    usage_nk = model.get_latent_representation(anndata.AnnData(adata.X.copy(), var=adata.var[[]].copy()))
    return {"DRVI, slopes": Result(slopes(adata.X[half], usage_nk[half]), usage_nk)}


def cnmf(adata, half, n_programs: int, n_iter: int) -> dict[str, Result]:
    """cNMF with its own defaults, on all genes; usages of all cells by its own non-negative least squares."""
    import matplotlib as mpl

    mpl.use("Agg")
    from cnmf import cNMF
    from cnmf.cnmf import load_df_from_npz

    threads = torch.get_num_threads()
    counts = adata.X[half].astype(np.float64)
    (known,) = np.nonzero(np.asarray(counts.sum(axis=0)).ravel())
    genes = np.array([f"g{i}" for i in known])
    obs = pd.DataFrame(index=[f"c{n}" for n in half])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "counts.h5ad"
        anndata.AnnData(sparse.csr_matrix(counts[:, known]), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)
        run = cNMF(output_dir=folder, name="run")
        run.prepare(counts_fn=str(path), components=[n_programs], n_iter=n_iter, seed=14, num_highvar_genes=len(genes))
        run.factorize(worker_i=0, total_workers=1)
        run.combine()
        run.consensus(k=n_programs, density_threshold=0.5, show_clustering=False, close_clustergram_fig=True)
        _, scores, _, _ = run.load_results(K=n_programs, density_threshold=0.5)
        spectra = load_df_from_npz(run.paths["consensus_spectra"] % (n_programs, "0_5"))[genes].to_numpy(
            dtype=np.float64
        )
    # cNMF sets the number of threads to that of the processors.
    torch.set_num_threads(threads)
    per_sd_g = unit_variance(counts)[known]
    score_gk = np.zeros((adata.n_vars, n_programs))
    score_gk[known] = scores.loc[genes].to_numpy()
    profile_gk = np.zeros_like(score_gk)
    profile_gk[known] = (spectra / per_sd_g).T

    def usage_of(x):
        return nnls(x[:, known].toarray() * per_sd_g, spectra.T)

    usage_nk = shares(usage_of(adata.X.astype(np.float64)))

    def predict(x):
        expression = usage_of(x.astype(np.float64)) @ profile_gk.T
        return expression / np.maximum(expression.sum(axis=1, keepdims=True), 1e-12)

    return {
        "cNMF": Result(score_gk, usage_nk, predict),
        "cNMF, slopes": Result(slopes(adata.X[half], usage_nk[half]), usage_nk),
    }


def plain(adata, half, n_programs: int) -> dict[str, Result]:
    """One NMF with the Kullback-Leibler loss, and varimax of principal components."""
    counts = adata.X[half].toarray().astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NMF(n_programs, init="nndsvda", beta_loss="kullback-leibler", solver="mu", max_iter=300, random_state=0)
        model.fit(counts)
        profile_gk = model.components_.T

        def usage_of(x):
            return nnls(x.toarray().astype(np.float64), profile_gk, "kullback-leibler")

        usage_nk = shares(usage_of(adata.X))

    def predict(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expression = usage_of(x) @ profile_gk.T
        return expression / np.maximum(expression.sum(axis=1, keepdims=True), 1e-12)

    y_ng = log_normalised(adata.X).toarray()
    pca = PCA(n_programs, random_state=0).fit(y_ng[half])
    loading_gk = pca.components_.T * np.sqrt(pca.explained_variance_)
    rotation_kk = varimax(loading_gk)
    pca_nk = (pca.transform(y_ng) / np.sqrt(pca.explained_variance_)) @ rotation_kk
    return {
        "NMF, KL": Result(slopes(adata.X[half], usage_nk[half]), usage_nk, predict),
        "PCA, varimax": Result(loading_gk @ rotation_kk, pca_nk),
    }


def top(score_g: np.ndarray) -> set[int]:
    return set(np.argsort(-score_g)[:N_TOP].tolist())


def replication(a: Result, b: Result) -> dict[str, float]:
    found = agreement(Readout(a.score_gk, a.usage_nk), Readout(b.score_gk, b.usage_nk), N_TOP)
    return {
        "cosine": found["scores"].median(), "top 50": found["top_genes"].mean(), "usages": found["usages"].median()
    }  # fmt: skip


def recovery(adata, result: Result) -> dict[str, float]:
    """Cosine with the true effects, and average precision of their 50 largest genes, per true program."""
    true_gk = adata.varm["program_true"]
    if "z_true" in adata.obsm:
        effect_gk = expected_gk = true_gk
    else:
        log_gk = np.log(true_gk + 1e-12)
        effect_gk = log_gk - np.median(log_gk, axis=1, keepdims=True)
        expected_gk = slopes(adata.X, adata.obsm["usage_true"])
    pairs = match_columns(cosines(expected_gk, result.score_gk))
    precision = []
    for i, j, sign in zip(pairs.first, pairs.second, pairs.sign):
        is_top_g = np.isin(np.arange(len(effect_gk)), list(top(effect_gk[:, i])))
        precision.append(average_precision_score(is_top_g, sign * result.score_gk[:, j]))
    return {"true cosine": np.median(pairs.cosine), "AUPRC": np.mean(precision)}


def labelled(adata, result: Result) -> dict[str, float]:
    """Mean over cell types of the best AUROC of a usage, and number of marker lists that a program covers."""
    types = adata.obs["cell_type"].astype(str)
    best = [
        max(max(a, 1 - a) for a in (roc_auc_score(types == name, u_n) for u_n in result.usage_nk.T))
        for name in types.unique()
    ]
    tops = [{adata.var_names[g] for g in top(s * column)} for column in result.score_gk.T for s in (1, -1)]
    lists = [set(genes) & set(adata.var_names) for genes in MARKERS.values()]
    covered = sum(any(2 * len(wanted & found) >= len(wanted) for found in tops) for wanted in lists if len(wanted) > 1)
    return {"AUROC": np.mean(best), "markers": covered}


def explained_deviance(adata, rows, result: Result) -> float:
    """Share of the Poisson deviance of the held-out counts of some cells that is explained, beyond the pooled profile."""
    kept, held = adata.X[rows], adata.layers["held"][rows].toarray().astype(np.float64)
    share_ng = np.maximum(result.predict(kept), 1e-12)
    pooled_g = np.asarray(kept.sum(axis=0)).ravel() + 1e-3

    def deviance(share):
        rate = share * held.sum(axis=1, keepdims=True)
        return 2 * (xlogy(held, held) - xlogy(held, rate) - held + rate).sum()

    return 1 - deviance(share_ng) / deviance(pooled_g / pooled_g.sum())


def thinned(adata, rng: np.random.Generator) -> None:
    """Leave 80 % of the counts in ``X`` at random; the others are held out."""
    counts = adata.X.tocsr()
    kept = counts.copy()
    kept.data = rng.binomial(counts.data.astype(int), KEPT).astype(np.float32)
    adata.layers["held"] = (counts - kept).tocsr()
    kept.eliminate_zeros()
    adata.X = kept


def measure(args: argparse.Namespace, name: str, n_programs: int) -> list[dict]:
    adata = read(name, args.folder)
    thinned(adata, np.random.default_rng(0))
    LDVAE.setup_anndata(adata)
    started = time.perf_counter()
    options = {
        "accelerator": "cpu",
        "check_val_every_n_epoch": None,
        "kl_warmup": "auto",
        "plan_kwargs": {"lr": args.lr},
    }
    runs = fit_ensemble(
        adata,
        2 * args.runs,
        n_latent=n_programs,
        resample="halves",
        max_epochs=args.epochs,
        silent=True,
        train_kwargs=options,
        model_kwargs=DECODERS[args.decoder],
    )
    training = time.perf_counter() - started
    halves = [np.sort(runs.models[h].train_indices) for h in (0, 1)]
    results = []
    for h, half in enumerate(halves):
        models = [m for m, kind in zip(runs.models, runs.cells_of_run) if kind == h]
        found = ldvae(adata, half, models, n_programs) | plain(adata, half, n_programs)
        found |= cnmf(adata, half, n_programs, args.iterations)
        results.append(found | (drvi(adata, half, n_programs, args.epochs // 2) if n_programs in args.drvi else {}))
    rows = []
    for method in results[0]:
        pair = [result[method] for result in results]
        row = {"data": name, "n": n_programs, "method": method, **replication(*pair)}
        each = [recovery(adata, r) if name in SIMULATED else labelled(adata, r) for r in pair]
        row |= {key: np.mean([values[key] for values in each]) for key in each[0]}
        if pair[0].predict is not None:
            row["deviance"] = np.mean([explained_deviance(adata, halves[h], pair[h]) for h in (0, 1)])
            row["other cells"] = np.mean([explained_deviance(adata, halves[1 - h], pair[h]) for h in (0, 1)])
        rows.append(row)
    print(
        pd.DataFrame(rows).round(3).to_string(),
        f"{training:.0f} s of training, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return rows


def page(rows: list[dict]) -> str:
    """The tables of the documentation, in Markdown."""
    table = pd.DataFrame(rows)
    parts = []
    for (name, n), part in table.groupby(["data", "n"], sort=False):
        shown = part.drop(columns=["data", "n"]).dropna(axis=1, how="all").set_index("method")
        lines = [
            f"**`{name}`, {n} programs**",
            "",
            "| | " + " | ".join(shown.columns) + " |",
            "|---" * (shown.shape[1] + 1) + "|",
        ]
        for method, row in shown.iterrows():
            cells = [
                "" if np.isnan(value) else f"{value:.1f}" if key == "markers" else f"{value:.3f}"
                for key, value in row.items()
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="folder with pbmc3k.h5ad and kang_muscat.h5ad")
    parser.add_argument("--data", nargs="+", default=[*REAL, *SIMULATED], choices=[*REAL, *SIMULATED])
    parser.add_argument("--programs", nargs="+", type=int, default=[8, 6, 10, 14])
    parser.add_argument("--runs", type=int, default=5, help="LDVAE runs on each half")
    parser.add_argument("--iterations", type=int, default=20, help="factorisations of cNMF")
    parser.add_argument("--drvi", nargs="*", type=int, default=[], help="numbers of programs at which DRVI is trained")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--decoder", choices=list(DECODERS), default="recommended")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--from-json", type=Path, nargs="+", help="measure nothing; take the rows of these files")
    parser.add_argument("--page", type=Path, help="write the tables for the documentation to this file")
    args = parser.parse_args()
    if args.from_json:
        rows = [row for path in args.from_json for row in json.loads(path.read_text())]
        print(page(rows))
        if args.page is not None:
            args.page.write_text(page(rows))
        return
    if args.folder is None and set(args.data) & set(REAL):
        parser.error("--folder is needed for real counts")
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = 0
    rows = []
    for n_programs in args.programs:
        for name in args.data:
            rows += measure(args, name, n_programs)
            if args.json is not None:
                args.json.write_text(json.dumps(rows, default=float, indent=1))
    if args.page is not None:
        args.page.write_text(page(rows))


if __name__ == "__main__":
    main()
