"""Other options of LDVAE: fit of held-out cells, with batch norm off, an intercept at the log mean and observed library sizes.

One option at a time is changed from `BASE`. Run `python benchmarks/options.py --help`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import scvi
from intercept import DATA, ELBO_DRAWS, fixed_split, quiet, read

from ldvae_ext.model import LDVAE

BASE = {"n_latent": 10, "use_batch_norm": False, "bias": "auto", "use_observed_lib_size": True}
OPTIONS = {
    "base": {},
    "gene_likelihood='zinb'": {"gene_likelihood": "zinb"},
    "gene_likelihood='poisson'": {"gene_likelihood": "poisson"},
    "dispersion='gene-batch'": {"dispersion": "gene-batch"},
    "latent_distribution='ln'": {"latent_distribution": "ln"},
    "use_observed_lib_size=False": {"use_observed_lib_size": False},
    "n_latent=5": {"n_latent": 5},
    "n_latent=20": {"n_latent": 20},
    "no batch_key": {},
}


def train(adata, option: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    scvi.settings.seed = seed
    model = LDVAE(adata, **BASE | OPTIONS[option])
    model.train(
        arguments.epochs,
        accelerator="cpu",
        kl_warmup="auto",
        plan_kwargs={"lr": arguments.lr},
        datasplitter_kwargs={"external_indexing": fixed_split(adata.n_obs)},
        enable_progress_bar=False,
    )
    cells = model.validation_indices
    kl_k = model.get_latent_kl(indices=cells).to_numpy().mean(axis=0)
    elbo = np.mean([float(model.get_elbo(indices=cells)) for _ in range(ELBO_DRAWS)])
    is_latent = not model.module.use_observed_lib_size
    library = np.log(np.asarray(model.get_latent_library_size(indices=cells, give_mean=is_latent)).ravel())
    off = np.abs(library - np.log(np.asarray(adata.X[cells].sum(axis=1)).ravel()))
    return {"elbo": elbo, "kl": kl_k.sum(), "used": int((kl_k > 0.1).sum()), "library_off": np.median(off)}


def run(arguments: argparse.Namespace) -> None:
    for name in arguments.data:
        adata = read(name, arguments.folder)
        batch_key = "batch" if "batch" in adata.obs else None
        for option in arguments.options:
            if batch_key is None and option in ("dispersion='gene-batch'", "no batch_key"):
                continue
            LDVAE.setup_anndata(adata, batch_key=None if option == "no batch_key" else batch_key)
            setting = {"data": name, "lr": arguments.lr, "epochs": arguments.epochs, "option": option}
            table = pd.DataFrame(
                [{**setting, "seed": s, **train(adata, option, s, arguments)} for s in range(arguments.seeds)]
            )
            is_new = not arguments.out.exists()
            table.round(4).to_csv(arguments.out, mode="a", header=is_new, index=False)
            print(table.round(3).to_string(index=False, header=is_new), flush=True)


def summary(path: Path) -> str:
    """A Markdown table of the means over seeds, with the smallest and largest ELBO."""
    lines = ["| data | option | ELBO (range) | KL | used | library |", "|---|---|---|---|---|---|"]
    for (name, option), group in pd.read_csv(path).groupby(["data", "option"], sort=False):
        mean = group.mean(numeric_only=True)
        lines.append(
            f"| {name} | {option} | {mean.elbo:.1f} ({group.elbo.min():.1f} to {group.elbo.max():.1f}) "
            f"| {mean.kl:.1f} | {mean.used:.1f} | {mean.library_off:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="folder with the .h5ad files")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA[:2], metavar="NAME", help=", ".join(DATA))
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS), metavar="OPTION")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate; 1e-3 is scvi-tools' default")
    parser.add_argument("--out", type=Path, default=Path("options.csv"), help="csv that rows are added to")
    parser.add_argument("--summary", action="store_true", help="print the table of an existing csv, and train nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.out))
        return
    quiet()
    run(arguments)


if __name__ == "__main__":
    main()
