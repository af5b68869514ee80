"""What interferon does to five types of blood cells, gene by gene and factor by factor.

Trains LDVAE on the counts of Kang et al. 2018 (10.1038/nbt.4042), half of them stimulated with interferon beta, and splits the
log-ratio of each gene between stimulated and control cells of a type over factors. The model is told neither the condition nor
the types. Run `python benchmarks/kang_interferon.py --help`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scvi
from intercept import quiet
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from ldvae_ext.model import LDVAE

INDUCED = ["ISG15", "IFI6", "IFIT1", "IFIT2", "IFIT3", "MX1"]
N_SHOWN, N_SHARED = 10, 20
# Okabe & Ito's colours; gray for what is left.
COLORS, OTHERS = ("#0072B2", "#D55E00", "#009E73"), "#BBBBBB"


def train(adata: anndata.AnnData, epochs: int, seed: int) -> LDVAE:
    scvi.settings.seed = seed
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=10)
    model.train(epochs, accelerator="cpu", kl_warmup="auto", enable_progress_bar=False)
    return model


def responses(model: LDVAE) -> dict[str, pd.DataFrame]:
    """For each cell type the log-ratios of stimulated to control cells, genes x factors."""
    cell_type = model.adata.obs["cell_type"]
    return {
        name: model.get_population_loadings(
            "condition", "path", indices=np.flatnonzero(cell_type == name), reference="ctrl"
        )["stim"]
        for name in cell_type.cat.categories
    }


def shares(response: pd.DataFrame) -> pd.Series:
    """Share of each factor in the log-ratios of the genes that are induced most, largest first."""
    induced = response.loc[response.sum(axis=1).nlargest(N_SHARED).index]
    return (induced.sum() / induced.to_numpy().sum()).sort_values(ascending=False)


def observed(adata: anndata.AnnData, name: str) -> np.ndarray:
    """Log-ratios of the pooled counts of a cell type, half a count added to each gene."""
    log_share = []
    for condition in ("stim", "ctrl"):
        cells = (adata.obs["cell_type"] == name) & (adata.obs["condition"] == condition)
        counts_g = np.asarray(adata.X[cells.to_numpy()].sum(axis=0)).ravel() + 0.5
        log_share.append(np.log(counts_g / counts_g.sum()))
    return log_share[0] - log_share[1]


def table(adata: anndata.AnnData, by_type: dict[str, pd.DataFrame]) -> str:
    lines = [
        f"| cell type | ctrl, stim | genes, by log-ratio | ranks of {', '.join(INDUCED)} | share of factors "
        "| ISG15 in the counts | Spearman |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, response in by_type.items():
        total = response.sum(axis=1).sort_values(ascending=False)
        rank = total.rank(ascending=False).astype(int)
        n_cells = adata.obs.loc[adata.obs["cell_type"] == name, "condition"].value_counts()
        largest = ", ".join(f"{factor} {share:.0%}" for factor, share in shares(response).head(3).items())
        genes = ", ".join(f"{gene} {value:.1f}" for gene, value in total.head(N_SHOWN).items())
        in_counts = pd.Series(observed(adata, name), index=adata.var_names)
        agreement = spearmanr(response.sum(axis=1), in_counts).statistic
        lines.append(
            f"| {name} | {n_cells['ctrl']}, {n_cells['stim']} | {genes} "
            f"| {', '.join(str(rank[gene]) for gene in INDUCED)} | {largest} | {in_counts['ISG15']:.1f} | {agreement:.2f} |"
        )
    return "\n".join(lines)


def leading(by_type: dict[str, pd.DataFrame]) -> list[str]:
    """The factors with a colour of their own: those that carry most of the genes of all cell types."""
    return pd.concat([shares(r) for r in by_type.values()], axis=1).mean(axis=1).nlargest(len(COLORS)).index.tolist()


def draw(by_type: dict[str, pd.DataFrame], path: Path) -> None:
    """A panel for each cell type: the genes that are induced most, each bar split over factors."""
    factors = leading(by_type)
    figure, axes = plt.subplots(2, 3, figsize=(9.5, 6.2), sharex=True, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for ax, (name, response) in zip(axes.flat, by_type.items(), strict=False):
        top = response.loc[response.sum(axis=1).nlargest(N_SHOWN).index]
        parts = top[factors].assign(others=top.drop(columns=factors).sum(axis=1))
        at = np.arange(N_SHOWN)
        # Those below 0 are stacked to the left of it, those above to the right.
        left, right = np.zeros(N_SHOWN), np.zeros(N_SHOWN)
        for factor, color in zip(parts, (*COLORS, OTHERS), strict=True):
            value = parts[factor].to_numpy()
            start = np.where(value < 0, left, right)
            ax.barh(at, value, left=start, height=0.78, color=color, label=factor)
            left, right = left + np.minimum(value, 0), right + np.maximum(value, 0)
        ax.plot(top.sum(axis=1), at, linestyle="none", marker="D", markersize=4, color="black", label="sum")
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(at, top.index, fontstyle="italic", fontsize="small")
        ax.set_ylim(N_SHOWN - 0.4, -0.6)
        ax.set_title(name, fontsize="medium")
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelbottom=True, labelsize="small")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(axis="x", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
    for ax in axes.flat[len(by_type) :]:
        ax.set_axis_off()
    handle = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
    named = {**{factor: factor for factor in factors}, "the other factors": "others", "sum of all factors": "sum"}
    axes.flat[-1].legend(
        [handle[label] for label in named.values()],
        named,
        loc="center left",
        title="Part of the log-ratio",
        alignment="left",
        frameon=False,
    )
    figure.supxlabel("log-ratio of expression, stimulated to control (natural logarithm)", fontsize="medium")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder with kang_muscat.h5ad")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="png to draw to")
    arguments = parser.parse_args()
    quiet()
    adata = anndata.read_h5ad(arguments.folder / "kang_muscat.h5ad")
    by_type = responses(train(adata, arguments.epochs, arguments.seed))
    print(table(adata, by_type))
    if arguments.figure is not None:
        draw(by_type, arguments.figure)


if __name__ == "__main__":
    main()
