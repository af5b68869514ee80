"""Ordered latents: what the first j of them explain of held-out cells, against separate models with j latents.

Trains, for each split of the cells, `LDVAE.train_ordered` with two seeds and an ordinary LDVAE for each number of latents,
equally long. Run `python benchmarks/ordered.py --help`; benchmarks/README.md describes recipes, columns and tables.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
from intercept import quiet, read, unit_columns
from scipy import sparse

from ldvae_ext.core import LinearDecoder
from ldvae_ext.core.likelihood import deviance
from ldvae_ext.model import LDVAE
from ldvae_ext.model._rotation import deviance_rotation

DATA = ("pbmc3k", "kang_muscat")
N_LATENT = 10
OPTIONS = {"use_batch_norm": "encoder", "bias": "auto", "use_observed_lib_size": True}
TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}
ELBO_DRAWS = 20
RECIPES = ("ordered", "rotation alone", "ordinary, KL order", "ordinary, KL order, at the mean")
KEYS = ["data", "split", "recipe", "seed", "epochs", "fine_tune_epochs"]


class HeldOut:
    """Explained deviance of held-out cells: one dispersion, null model and library for whatever explains them."""

    def __init__(self, adata: anndata.AnnData, split: list[np.ndarray], theta_g: np.ndarray) -> None:
        counts = sparse.csr_matrix(adata.X)
        column = adata.obs["batch"] if "batch" in adata.obs else pd.Series("all", index=adata.obs_names)
        self.cells = split[1]
        self.batch = column.to_numpy()[self.cells] if "batch" in adata.obs else None
        self.counts_ng = counts[self.cells].toarray().astype(np.float64)
        self.library = self.counts_ng.sum(axis=1)
        self.theta_g = theta_g
        null_ng = np.empty_like(self.counts_ng)
        for name in column.unique():
            of_batch = (column == name).to_numpy()
            profile_g = np.asarray(counts[np.intersect1d(np.flatnonzero(of_batch), split[0])].sum(axis=0)).ravel()
            null_ng[of_batch[self.cells]] = profile_g / profile_g.sum()
        self.null = deviance("nb", self.counts_ng, null_ng * self.library[:, None], theta_g).sum()

    def explained(self, decoder: LinearDecoder, z_nk: np.ndarray) -> float:
        rate_ng = decoder.rate(z_nk, self.batch, library=self.library)
        return 1 - deviance("nb", self.counts_ng, rate_ng, self.theta_g).sum() / self.null

    def curve(self, model: LDVAE, rotation_kk: np.ndarray, fill_k: np.ndarray | float = 0.0) -> list[float]:
        """With the first j factors, j = 1, 2, ...; the others are at ``fill_k``, given in the latent space."""
        decoder = model.get_decoder()
        moved_nk = model.get_latent_representation(indices=self.cells) - fill_k
        first = (rotation_kk[:, :j] for j in range(1, rotation_kk.shape[1] + 1))
        return [self.explained(decoder, fill_k + moved_nk @ r @ r.T) for r in first]


def split_of(n_cells: int, seed: int) -> list[np.ndarray]:
    """Four fifths for training, one fifth held out."""
    cells = np.random.default_rng(seed).permutation(n_cells)
    n_held_out = n_cells // 5
    return [np.sort(cells[n_held_out:]), np.sort(cells[:n_held_out])]


def elbo(model: LDVAE, cells: np.ndarray) -> float:
    scvi.settings.seed = 0
    return float(np.mean([float(model.get_elbo(indices=cells)) for _ in range(ELBO_DRAWS)]))


def separate(adata: anndata.AnnData, split: list[np.ndarray], n_latent: int, seed: int, settings: argparse.Namespace):
    """An ordinary model, trained as long as an ordered one."""
    scvi.settings.seed = seed
    model = LDVAE(adata, n_latent=n_latent, **OPTIONS)
    indexing = {"external_indexing": split}
    model.train(
        settings.epochs,
        kl_warmup="auto",
        plan_kwargs={"lr": settings.lr},
        datasplitter_kwargs=dict(indexing),
        **TRAINER,
    )
    # A second training would run without dropout otherwise.
    model.module.train()
    plan = {"lr": settings.fine_tune_lr, "n_epochs_kl_warmup": None}
    model.train(settings.fine_tune_epochs, plan_kwargs=plan, datasplitter_kwargs=dict(indexing), **TRAINER)
    return model


def ordered(adata: anndata.AnnData, split: list[np.ndarray], seed: int, settings: argparse.Namespace):
    scvi.settings.seed = seed
    return LDVAE.train_ordered(
        adata,
        N_LATENT,
        settings.epochs,
        fine_tune_epochs=settings.fine_tune_epochs,
        fine_tune_lr=settings.fine_tune_lr,
        model_kwargs=OPTIONS,
        train_kwargs={
            "plan_kwargs": {"lr": settings.lr},
            "datasplitter_kwargs": {"external_indexing": list(split)},
        },
        **TRAINER,
    )


def results(
    adata: anndata.AnnData, split: list[np.ndarray], settings: argparse.Namespace, seeds: list[int]
) -> Iterator[tuple[dict, np.ndarray | None]]:
    """Rows of the table as soon as they are known, with the loadings of ordered models."""
    held_out = None
    whole = np.eye(N_LATENT)
    for n_latent in [N_LATENT, *(j for j in settings.separate if j < N_LATENT)]:
        start = time.process_time()
        model = separate(adata, split, n_latent, seeds[0], settings)
        row = {"recipe": "separate", "seed": seeds[0], "seconds": time.process_time() - start}
        if held_out is None:
            held_out = HeldOut(adata, split, model.get_decoder().theta_bg)
        explained = held_out.explained(model.get_decoder(), model.get_latent_representation(indices=split[1]))
        yield {**row, "j": [n_latent], "d2": [explained], "elbo": elbo(model, split[1])}, None
        if n_latent < N_LATENT:
            continue
        of_model = {"seed": seeds[0], "j": range(1, N_LATENT + 1), "elbo": elbo(model, split[1])}
        order = np.argsort(-model.get_latent_kl(indices=split[0]).to_numpy().mean(axis=0))
        mean_k = model.get_latent_representation(indices=split[0]).mean(axis=0)
        yield {"recipe": RECIPES[2], **of_model, "d2": held_out.curve(model, whole[:, order])}, None
        yield {"recipe": RECIPES[3], **of_model, "d2": held_out.curve(model, whole[:, order], mean_k)}, None
        start = time.process_time()
        rotation = deviance_rotation(model, indices=split[0])
        seconds = time.process_time() - start
        loadings = model.get_loadings().to_numpy() @ rotation
        curve = held_out.curve(model, rotation)
        yield {"recipe": RECIPES[1], **of_model, "d2": curve, "seconds": seconds}, loadings
        for seed in seeds:
            start = time.process_time()
            own = ordered(adata, split, seed, settings)
            seconds = time.process_time() - start
            row = {"recipe": RECIPES[0], "seed": seed, "j": range(1, N_LATENT + 1), "d2": held_out.curve(own, whole)}
            yield {**row, "elbo": elbo(own, split[1]), "seconds": seconds}, own.get_loadings().to_numpy()


def run(settings: argparse.Namespace) -> None:
    for name in settings.data:
        adata = read(name, settings.folder)
        LDVAE.setup_anndata(adata, batch_key="batch" if "batch" in adata.obs else None)
        for split_seed in settings.splits:
            seeds = [2 * split_seed, 2 * split_seed + 1]
            for row, loadings in results(adata, split_of(adata.n_obs, split_seed), settings, seeds):
                lengths = {"epochs": settings.epochs, "fine_tune_epochs": settings.fine_tune_epochs}
                table = pd.DataFrame({"data": name, "split": split_seed, **lengths, **row})
                table = table.reindex(columns=[*KEYS, "j", "d2", "elbo", "seconds"])
                table.round(5).to_csv(settings.out, mode="a", header=not settings.out.exists(), index=False)
                print(table.round(3).to_string(index=False, header=False), flush=True)
                if loadings is not None:
                    settings.loadings.mkdir(parents=True, exist_ok=True)
                    recipe = row["recipe"].replace(" ", "_")
                    np.save(settings.loadings / f"{name}_{split_seed}_{recipe}_{row['seed']}.npy", loadings)


def _position(column: pd.Series) -> pd.Series:
    return column.map(RECIPES.index) if column.name == "recipe" else column


def summary(settings: argparse.Namespace) -> str:
    """Markdown tables: explained deviance, what full models lose, agreement of loadings index by index."""
    table = pd.read_csv(settings.out).drop_duplicates([*KEYS, "j"], keep="last")
    lengths = table["epochs"].astype(str) + "+" + table["fine_tune_epochs"].astype(str)
    table = table.assign(run=table["data"] + ", split " + table["split"].astype(str) + ", " + lengths)
    shown = (1, 2, 3, 4, 5, 7, 10)
    lines = [
        f"| run | recipe | seed | {' | '.join(f'j={j}' for j in shown)} | mean 2-10 | worst j >= 2 | ELBO, all latents |",
        "|---" * (len(shown) + 6) + "|",
    ]
    for run_name, group in table.groupby("run", sort=False):
        reference = group[group.recipe == "separate"].set_index("j").sort_index()
        if len(reference) < N_LATENT:
            continue
        values = [f"{reference.d2[j]:.3f}" for j in shown]
        mean = reference.d2.loc[2:].mean()
        lines.append(
            f"| {run_name} | separate | | {' | '.join(values)} | {mean:.3f} | | {reference.elbo[N_LATENT]:.1f} |"
        )
        others = group[group.recipe != "separate"].sort_values(["recipe", "seed"], key=_position)
        for (recipe, seed), own in others.groupby(["recipe", "seed"], sort=False):
            gap = (own.set_index("j").d2 - reference.d2).sort_index()
            full = own.elbo.iloc[0] - reference.elbo[N_LATENT]
            values = [f"{gap[j]:+.3f}" for j in shown]
            later = gap.loc[2:]
            lines.append(
                f"| | {recipe} | {seed} | {' | '.join(values)} | {later.mean():+.4f} | {later.min():+.3f} (j={later.idxmin()}) "
                f"| {full:+.2f} ({100 * full / abs(reference.elbo[N_LATENT]):+.2f} %) |"
            )
    return "\n".join([*lines, "", *agreement(settings.loadings)])


def agreement(folder: Path) -> Iterator[str]:
    """Lines of a table: |cosine| of gene-centred loadings of the same index in two runs."""
    yield f"| data | recipe | runs | {' | '.join(f'Z_{k}' for k in range(N_LATENT))} |"
    yield "|---" * (N_LATENT + 3) + "|"
    files = sorted(folder.glob("*.npy"))
    for i, a in enumerate(files):
        for b in files[i + 1 :]:
            (data_a, split_a, recipe_a, seed_a), (data_b, split_b, recipe_b, seed_b) = map(parts, (a, b))
            if (data_a, recipe_a) == (data_b, recipe_b):
                cosine_k = np.abs(np.sum(unit_columns(np.load(a)) * unit_columns(np.load(b)), axis=0))
                runs = f"splits {split_a}, {split_b}; " if split_a != split_b else f"split {split_a}, "
                cells = " | ".join(f"{value:.2f}" for value in cosine_k)
                yield f"| {data_a} | {recipe_a} | {runs}seeds {seed_a}, {seed_b} | {cells} |"


def parts(path: Path) -> tuple[str, str, str, str]:
    data = next(name for name in DATA if path.stem.startswith(name))
    split, *recipe, seed = path.stem.removeprefix(f"{data}_").split("_")
    return data, split, " ".join(recipe), seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="folder with the .h5ad files")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, metavar="NAME", help=", ".join(DATA))
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1], help="seeds of the splits")
    parser.add_argument(
        "--separate",
        type=int,
        nargs="*",
        default=[*range(N_LATENT - 1, 0, -1)],
        help="latents of separate models, besides 10",
    )
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--fine-tune-epochs", type=int, default=40)
    parser.add_argument("--fine-tune-lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("ordered.csv"), help="csv that rows are added to")
    parser.add_argument("--loadings", type=Path, default=Path("ordered_loadings"), help="folder for loadings")
    parser.add_argument("--summary", action="store_true", help="print the tables of an existing csv, and train nothing")
    settings = parser.parse_args()
    if settings.summary:
        print(summary(settings))
        return
    quiet()
    run(settings)


if __name__ == "__main__":
    main()
