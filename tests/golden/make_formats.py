"""Write one small example of each format of the package, and beside it what it says, to `tests/golden/formats`.

    python -m tests.golden.make_formats

writes the folders that are not there: those of formats whose number in `ldvae_ext/_formats.py` was raised. `README.md` says how the
examples of releases were made. `tests/test_formats.py` reads all of them.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse

import ldvae_ext
from ldvae_ext.model import LDVAE
from tests.golden.schemas import schema_of

FORMATS = Path(__file__).parent / "formats"
N_CELLS, N_GENES, N_LATENT = 20, 8, 2
BATCHES, GROUPS = ["CD4+/CD25 T", "b1"], ["T/NK", "B"]
# The first release had fewer options.
IS_FIRST = find_spec("ldvae_ext.tl") is None
TRAIN = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": 10, "train_size": 1.0}
# Number of the format in `ldvae_ext/_formats.py`, and the files that are kept.
EXAMPLES: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {}


def example(number: str) -> Callable[[Callable[[Path], dict[str, Any]]], Callable[[Path], dict[str, Any]]]:
    """A function that writes an example to a folder, and returns what is expected of readers."""

    def registered(write: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
        EXAMPLES[write.__name__] = (number, write)
        return write

    return registered


def cells() -> ad.AnnData:
    """Counts with batches, groups and a covariate; two labels have a slash in them."""
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1.0, 4.0, N_GENES) * rng.gamma(2.0, 0.5, (N_CELLS, N_GENES)))
    x[:, 0] += 1
    return ad.AnnData(
        X=sparse.csr_matrix(x.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "batch": pd.Categorical(np.array(BATCHES)[np.arange(N_CELLS) % 2], categories=BATCHES),
                "group": pd.Categorical(np.array(GROUPS)[np.arange(N_CELLS) // 10], categories=GROUPS),
                "age": np.linspace(-1.0, 1.0, N_CELLS).astype(np.float32),
            },
            index=[f"cell{i}" for i in range(N_CELLS)],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]),
    )


def model_of(adata: ad.AnnData, setup: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A model that was trained for two epochs."""
    LDVAE.setup_anndata(adata, batch_key="batch", **(setup or {}))
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=N_LATENT, n_hidden=4, **kwargs)
    model.train(2, plan_kwargs={"lr": 1e-2, "n_epochs_kl_warmup": 1}, **TRAIN)
    return model


@torch.inference_mode()
def scale(model: Any, z: np.ndarray, batch: np.ndarray, *covariates: np.ndarray) -> np.ndarray:
    """Decoded expression by the layers of scvi-tools."""
    px = model.module.eval().generative(
        z=torch.as_tensor(z, dtype=torch.float32),
        library=torch.zeros(len(z), 1),
        batch_index=torch.as_tensor(batch).reshape(-1, 1),
        **{name: torch.as_tensor(value).reshape(-1, 1) for name, value in zip(("cont_covs", "cat_covs"), covariates)},
    )["px"]
    return px.scale.numpy()


@torch.inference_mode()
def posterior(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of the latents by the layers of scvi-tools."""
    adata, covariates = model.adata, None
    if "extra_continuous_covs" in model.adata_manager.data_registry:
        covariates = torch.as_tensor(adata.obs["age"].to_numpy()).reshape(-1, 1)
    batch = torch.as_tensor(adata.obs["batch"].cat.codes.to_numpy().astype(np.int64)).reshape(-1, 1)
    qz = model.module.eval().inference(torch.as_tensor(adata.X.toarray()), batch, cont_covs=covariates)["qz"]
    return qz.loc.numpy(), qz.scale.numpy() ** 2


def order(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Positions of the latents, most informative first."""
    return np.argsort(-0.5 * (mean**2 + variance - 1 - np.log(variance)).mean(axis=0), kind="stable")


def remove_export(adata: ad.AnnData) -> None:
    """Leave the latents and loadings of an export alone, to have small files."""
    del adata.uns["ldvae"], adata.var["ldvae"], adata.obs["ldvae_library"]
    for slot in (adata.obsm, adata.varm):
        for name in [name for name in slot if "ldvae_" in name and not name.endswith("loadings")]:
            del slot[name]


@example("DECODER")
def decoder(folder: Path) -> dict[str, Any]:
    """Arrays of a decoder, with all that a decoder can have; the loadings are decoded by scvi-tools' layers."""
    setup = None if IS_FIRST else {"continuous_covariate_keys": ["age"], "categorical_covariate_keys": ["group"]}
    model = model_of(cells(), setup, gene_likelihood="zinb", dispersion="gene-batch")
    model.get_decoder().save(folder / "decoder.npz")
    z, batch = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-2.0, 3.0]]), np.array([0, 1, 0, 1])
    age, group = np.array([-1.0, 0.0, 0.5, 2.0], dtype=np.float32), np.array([0, 0, 1, 1])
    return {
        "z": z,
        "batch": np.array(BATCHES)[batch],
        **({} if IS_FIRST else {"age": age, "group": np.array(GROUPS)[group]}),
        "scale": scale(model, z, batch, *(() if IS_FIRST else (age, group))),
        "theta": np.exp(model.module.px_r.detach().numpy()).T[batch],
    }


@example("EXPORT")
def export(folder: Path) -> dict[str, Any]:
    """An export: expression by scvi-tools' layers, order by the KL."""
    model = model_of(cells())
    model.export_to_anndata(**({} if IS_FIRST else {"stats": True}))
    model.adata.write_h5ad(folder / "adata.h5ad")
    if not IS_FIRST:
        _export_variants(model, folder)
    mean, variance = posterior(model)
    codes = model.adata.obs["batch"].cat.codes.to_numpy().astype(np.int64)
    return {
        "names": [f"Z_{k}" for k in order(mean, variance)],
        "mean": mean,
        "variance": variance,
        "scale": scale(model, mean, codes),
    }


def _export_variants(model: Any, folder: Path) -> None:
    """Exports with all that there may be: rotated, as a PCA, of a logistic normal, of a projection, of another model."""
    from ldvae_ext.model import order_latents

    target, query = model.adata.copy(), cells()
    ldvae_ext.tl.project(query, target, batch="fit")
    query.write_h5ad(folder / "variant_projection.h5ad")
    model.rotate("varimax")
    model.export_to_anndata(target, as_pca=True)
    target.write_h5ad(folder / "variant_rotated.h5ad")
    order_latents(model, other := cells())
    other.write_h5ad(folder / "variant_ordered.h5ad")
    logistic = model_of(cells(), latent_distribution="ln")
    logistic.export_to_anndata()
    logistic.adata.write_h5ad(folder / "variant_ln.h5ad")


@example("ABLATION")
def ablation(folder: Path) -> dict[str, Any]:
    """An ablation: log-likelihoods by scvi-tools' own distributions, in float64."""
    from tests.helpers import brute_force_ablation

    model = model_of(cells())
    effects = model.ablate()
    effects.write_h5ad(folder / "adata.h5ad")
    if not IS_FIRST:
        sets = {"both": ["Z_0", "Z_1"]}
        options: list[dict[str, Any]] = [
            {"latents": sets, "mode": "value", "value": 1.0, "transform_batch": "b1"},
            {"scheme": "keep_top", "use_posterior": "samples", "n_samples": 2, "seed": 0},
            {"mode": "group_mean", "groupby": "group"},
        ]
        for number, given in enumerate(options):
            model.ablate(**given).write_h5ad(folder / f"variant_{number}.h5ad")
        model.ablate_genes("group").write_h5ad(folder / "variant_genes.h5ad")
    return {"effect": brute_force_ablation(model, model.adata, np.zeros(N_LATENT))}


@example("RANKING")
def ranking(folder: Path) -> dict[str, Any]:
    """Factors that distinguish groups. Areas under the curve are counted by the test."""
    model = model_of(cells())
    model.export_to_anndata()
    ldvae_ext.tl.rank_factors_groups(model.adata, "group")
    remove_export(model.adata)
    model.adata.write_h5ad(folder / "adata.h5ad")
    return {"groups": GROUPS}


@example("POPULATIONS")
def populations(folder: Path) -> dict[str, Any]:
    """Loadings in populations: differences of mean latents, multiplied by loadings, are computed by the test."""
    model = model_of(cells())
    model.export_to_anndata()
    ldvae_ext.tl.population_loadings(model.adata, "group", "contribution")
    for kind in ("gradient", "path", "within"):
        ldvae_ext.tl.population_loadings(model.adata, "group", kind, copy=True).write_h5ad(
            folder / f"variant_{kind}.h5ad"
        )
    remove_export(model.adata)
    model.adata.write_h5ad(folder / "adata.h5ad")
    return {"groups": GROUPS}


@example("CONSENSUS")
def consensus(folder: Path) -> dict[str, Any]:
    """A consensus of three runs, and the numbers of the ensemble."""
    from ldvae_ext.model import fit_ensemble

    adata = cells()
    LDVAE.setup_anndata(adata, batch_key="batch")
    options = {"plan_kwargs": {"lr": 1e-2}, **TRAIN}
    models = fit_ensemble(
        adata,
        3,
        n_latent=N_LATENT,
        seed=0,
        max_epochs=2,
        model_kwargs={"n_hidden": 4},
        train_kwargs=options,
        silent=True,
    )
    models.export_to_anndata(adata)
    adata.write_h5ad(folder / "adata.h5ad")
    halves = fit_ensemble(
        adata,
        2,
        n_latent=N_LATENT,
        resample="halves",
        max_epochs=2,
        model_kwargs={"n_hidden": 4},
        train_kwargs={name: value for name, value in options.items() if name != "train_size"},
        silent=True,
    )
    halves.export_to_anndata(variant := cells())
    variant.write_h5ad(folder / "variant_halves.h5ad")
    return {"reproducibility": models.stats["reproducibility"], "loadings": models.consensus.loading_gk}


@example("PROGRAMS")
def programs(folder: Path) -> dict[str, Any]:
    """Additive programs, and the numbers that were exported."""
    model = model_of(cells())
    found = model.get_programs(n_programs=2, seed=0)
    found.export_to_anndata(model.adata)
    model.adata.write_h5ad(folder / "adata.h5ad")
    return {"usages": found.usages, "profiles": found.profiles, "stability": found.stats["stability"]}


@example("SAVED_MODEL")
def saved_model(folder: Path) -> dict[str, Any]:
    """A saved model with its cells: latents by scvi-tools' layers, loadings as scvi-tools gives them."""
    model = model_of(cells(), None if IS_FIRST else {"continuous_covariate_keys": ["age"]})
    if not IS_FIRST:
        model.rotate("varimax")
    model.save(str(folder / "model"), overwrite=True)
    mean, variance = posterior(model)
    return {"mean": mean, "variance": variance, "loadings": scvi.model.LinearSCVI.get_loadings(model)}


@example("ENSEMBLE")
def ensemble(folder: Path) -> dict[str, Any]:
    """The folder of an ensemble: latents of each run by scvi-tools' layers, and the numbers of the ensemble."""
    models = ensemble_in(folder / "ensemble", cells())
    halves = {name: value for name, value in TRAIN.items() if name != "train_size"}
    ensemble_in(folder / "variant_halves", cells(), resample="halves", train_kwargs=halves)
    posteriors = [posterior(model) for model in models.models]
    return {
        "mean": np.stack([mean for mean, _ in posteriors]),
        "variance": np.stack([variance for _, variance in posteriors]),
        "loadings": models.consensus.loading_gk,
        "reproducibility": models.stats["reproducibility"],
    }


def ensemble_in(folder: Path, adata: ad.AnnData, **options: Any) -> Any:
    """The ensemble of the example, trained, or read from the folder if it is there."""
    from ldvae_ext.model import fit_ensemble

    LDVAE.setup_anndata(adata, batch_key="batch")
    given = {"n_latent": N_LATENT, "seed": 0, "max_epochs": 2, "model_kwargs": {"n_hidden": 4}, "train_kwargs": TRAIN}
    return fit_ensemble(adata, 2, **given | options, silent=True, folder=folder)


@example("CHECKPOINT")
def checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint of a training: latents by scvi-tools' layers, and the history."""
    model = resumed(folder, 2)
    mean, variance = posterior(model)
    return {"mean": mean, "variance": variance, "elbo": model.history["elbo_train"]["elbo_train"]}


def resumed(folder: Path, n_epochs: int, **options: Any) -> Any:
    """The model of the example after a number of epochs, continued from the checkpoint if it is there."""
    adata = cells()
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=N_LATENT, n_hidden=4)
    model.train(n_epochs, plan_kwargs={"lr": 1e-2, "n_epochs_kl_warmup": 1}, resume=folder, **TRAIN, **options)
    return model


@example("RESULTS")
def results(folder: Path) -> dict[str, Any]:
    """The tables of `ldvae-ext run`, and the file that marks the folder; reports, figures and the model are left out."""
    from typer.testing import CliRunner

    from ldvae_ext.cli import app

    adata, out = cells(), folder / "run"
    adata.write_h5ad(folder / "in.h5ad")
    options = "--groupby group --batch-key batch --n-latent 2 --max-epochs 2"
    if not IS_FIRST:
        options += " --runs 2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, ["run", str(folder / "in.h5ad"), *options.split(), "--out", str(out)])
    if result.exit_code:
        raise RuntimeError(result.output) from result.exception
    if not IS_FIRST:
        arguments = [
            "project",
            str(folder / "in.h5ad"),
            "--reference",
            str(out / "adata.h5ad"),
            "--batch",
            "fit",
            "--out",
            str(folder / "project"),
        ]
        result = CliRunner().invoke(app, arguments)
        if result.exit_code:
            raise RuntimeError(result.output) from result.exception
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.suffix != ".csv" and not path.name.startswith(".ldvae-ext"):
            path.unlink()
    return {"factors": 2, "cells": N_CELLS}


def plain(value: Any) -> Any:
    """Numbers and text as JSON has them."""
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return value


def write(name: str, folder: Path) -> None:
    """Write one example with its expected values and its schema."""
    folder.mkdir(parents=True)
    expected = EXAMPLES[name][1](folder)
    values = {key: plain(value) for key, value in expected.items()}
    (folder / "expected.json").write_text(json.dumps(values) + "\n")
    schema = schema_of(folder)
    for path in folder.glob("variant_*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / "schema.json").write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")


def number_of(name: str) -> int:
    """Present number of a format."""
    from ldvae_ext import _formats

    return getattr(_formats, EXAMPLES[name][0])


if __name__ == "__main__":
    # The release whose code is on the path, for examples of before there were numbers; and the formats that it has.
    release, *chosen = sys.argv[1:] or [""]
    for name in chosen or EXAMPLES:
        target = FORMATS / name / (f"1-{release}" if release else str(number_of(name)))
        if not target.exists():
            write(name, target)
            print(target.relative_to(FORMATS.parent))  # noqa: T201
