"""No global state outlives a call, also if it raises: threads, seeds, modes, settings, filters, environment."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings

import anndata
import joblib
import matplotlib as mpl
import matplotlib.pyplot as plt
import numba
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi
import torch

import ldvae_ext
from ldvae_ext import get, pl, tl
from ldvae_ext.kernels.threads import is_compiled, threads
from ldvae_ext.model import LDVAE, fit_ensemble, order_latents
from tests.helpers import TRAIN, counts

# What scvi-tools' own training draws from.
DRAWS = {"torch's draws", "numpy's draws"}
# Lightning's trainer decides at each training if cuDNN tries its algorithms, as with LinearSCVI. It concerns GPUs alone.
OF_TRAINER = {"cudnn"}
LOGGERS = [
    "",
    "ldvae_ext",
    "scvi",
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "matplotlib",
    "numba",
    "anndata",
]


def snapshot():
    """All global state that a call could leave changed, by name."""
    settings = (
        "seed",
        "batch_size",
        "dl_num_workers",
        "dl_persistent_workers",
        "progress_bar_style",
        "verbosity",
        "logging_dir",
    )
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        # First: early releases of numba set torch's threads when theirs are started.
        "numba's threads": numba.get_num_threads(),
        "torch's threads": torch.get_num_threads(),
        "torch's threads between operations": torch.get_num_interop_threads(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly detection": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "precision of products": torch.get_float32_matmul_precision(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "torch's draws": torch.get_rng_state().numpy().tobytes(),
        "numpy's draws": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "python's draws": random.getstate(),
        "floating point errors": np.geterr(),
        "print options": {k: v for k, v in np.get_printoptions().items() if k != "override_repr"},
        "threads of loops": (threads(), is_compiled()),
        "rcParams": dict(mpl.rcParams),
        "matplotlib's backend": mpl.get_backend(),
        "figures": plt.get_fignums(),
        "warning filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "scvi.settings": {name: getattr(scvi.settings, name) for name in settings},
        "scanpy's settings": {
            name: repr(getattr(sc.settings, name)) for name in ("verbosity", "autoshow", "autosave", "figdir", "n_jobs")
        },
        "anndata's settings": repr(anndata.settings),
        "pandas' options": [
            pd.get_option(name) for name in ("mode.string_storage", "display.max_rows", "compute.use_numexpr")
        ],
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "loggers": [
            (logging.getLogger(n).level, logging.getLogger(n).disabled, list(logging.getLogger(n).handlers))
            for n in LOGGERS
        ],
        "output": (sys.stdout, sys.stderr, sys.excepthook),
        "recursion": sys.getrecursionlimit(),
        "joblib": joblib.parallel.DEFAULT_BACKEND,
    }


def changes(before, after):
    return sorted(name for name in before if before[name] != after[name])


def cells():
    adata = counts(40, 12)
    adata.obs["group"] = pd.Categorical(np.array(["T/NK", "B"])[np.arange(40) % 2])
    return adata


@pytest.fixture(scope="module")
def model():
    adata = cells()
    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=2, n_hidden=8)
    model.train(2, kl_warmup=1, **TRAIN)
    model.export_to_anndata()
    tl.rank_factors_groups(adata, "group")
    tl.population_loadings(adata, "group")
    return model


def fresh():
    adata = cells()
    LDVAE.setup_anndata(adata)
    return LDVAE(adata, n_latent=2, n_hidden=8)


class Failing(scvi.train._callbacks.Callback):
    """Raises in the middle of a training."""

    def on_train_epoch_end(self, *_):
        msg = "in the middle"
        raise RuntimeError(msg)


ENSEMBLE = {"n_latent": 2, "max_epochs": 2, "model_kwargs": {"n_hidden": 8}, "train_kwargs": TRAIN, "silent": True}
# Entry points that need a model that is trained and exported.
CALLS = {
    "get_latent_representation": lambda m: m.get_latent_representation(),
    "get_latent_kl": lambda m: m.get_latent_kl(),
    "get_decoder": lambda m: m.get_decoder(),
    "get_factor_stats": lambda m: m.get_factor_stats(),
    "get_explained_deviance": lambda m: m.get_explained_deviance(),
    "get_refined_posterior": lambda m: m.get_refined_posterior(),
    "get_population_loadings": lambda m: m.get_population_loadings("group", "gradient"),
    "get_programs": lambda m: m.get_programs(2, seed=0),
    "rotate": lambda m: m.rotate("varimax"),
    "unrotate": lambda m: m.rotate("none"),
    "ablate": lambda m: m.ablate(),
    "ablate by samples": lambda m: m.ablate(use_posterior="samples", n_samples=2, seed=1),
    "ablate_genes": lambda m: m.ablate_genes("group"),
    "export_to_anndata": lambda m: m.export_to_anndata(stats=True),
    "order_latents": lambda m: order_latents(m, cells()),
    "tl.ablate": lambda m: tl.ablate(m.adata),
    "tl.ablate_genes": lambda m: tl.ablate_genes(m.adata, "group"),
    "tl.rank_factors_groups": lambda m: tl.rank_factors_groups(m.adata, "group"),
    "tl.population_loadings": lambda m: tl.population_loadings(m.adata, "group"),
    "tl.project": lambda m: tl.project(cells(), m.adata),
    "get.ablation_df": lambda m: get.ablation_df(tl.ablate(m.adata), "group"),
    "get.top_genes": lambda m: get.top_genes(m.adata),
    "datasets": lambda m: ldvae_ext.datasets.simulate(30, 20),
}
FIGURES = {
    "pl.loadings": lambda m: pl.loadings(m.adata, show=False, return_fig=True, n_genes=3),
    "pl.factor_scree": lambda m: pl.factor_scree(m.adata, show=False, return_fig=True),
    "pl.ablation": lambda m: pl.ablation(tl.ablate(m.adata), "group", show=False, return_fig=True),
    "pl.latent_pairs": lambda m: pl.latent_pairs(m.adata, show=False, return_fig=True),
    "pl.training_curves": lambda m: pl.training_curves(m.history, show=False, return_fig=True),
    "pl.factor_groups": lambda m: pl.factor_groups(m.adata, show=False, return_fig=True),
}
TRAININGS = {
    "train": lambda: fresh().train(2, kl_warmup=1, **TRAIN),
    "train by torch": lambda: fresh().train(2, kl_warmup=1, backend="torch", **TRAIN),
    "train by scvi-tools": lambda: fresh().train(2, kl_warmup=1, backend="scvi", **TRAIN),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_no_global_state(model, name):
    before = snapshot()
    CALLS[name](model)
    # scvi-tools draws a latent in the getters that are its own.
    assert set(changes(before, snapshot())) <= ({"torch's draws"} if name == "get_latent_representation" else set())


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_leaves_no_global_state(model, name):
    before = snapshot()
    plt.close(FIGURES[name](model))
    assert changes(before, snapshot()) == []


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_leaves_no_global_state_but_that_it_drew(name):
    before = snapshot()
    TRAININGS[name]()
    assert set(changes(before, snapshot())) <= DRAWS | OF_TRAINER


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_ensemble_leaves_no_global_state(n_jobs):
    adata = cells()
    LDVAE.setup_anndata(adata)
    before = snapshot()
    fit_ensemble(adata, 2, n_jobs=n_jobs, **ENSEMBLE)
    assert set(changes(before, snapshot())) <= OF_TRAINER


@pytest.mark.parametrize("n_runs", [1, 2])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_run_leaves_no_global_state(seed, n_runs, monkeypatch):
    if seed is None:
        # As in a session that has set none.
        monkeypatch.setattr(scvi.settings, "_seed", None)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    else:
        scvi.settings.seed = seed
    # The caller's own draws go on after the run.
    torch.rand(3), np.random.rand(3)  # noqa: NPY002
    before = snapshot()
    ldvae_ext.run(cells(), n_latent=2, n_runs=n_runs, max_epochs=2, umap=False, silent=True)
    assert changes(before, snapshot()) == []


def test_a_training_that_raises_leaves_no_global_state_but_that_it_drew():
    before = snapshot()
    for backend in ("numba", "torch", "scvi"):
        with pytest.raises(RuntimeError, match="in the middle"):
            fresh().train(2, kl_warmup=1, backend=backend, callbacks=[Failing()], **TRAIN)
    with pytest.raises(FloatingPointError, match="diverged"):
        fresh().train(2, plan_kwargs={"lr": 1e30}, **TRAIN)
    assert set(changes(before, snapshot())) <= DRAWS | OF_TRAINER


@pytest.mark.filterwarnings("ignore:The run with seed . failed and is left out:UserWarning")
@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_ensemble_that_raises_leaves_no_global_state(n_jobs):
    adata = cells()
    LDVAE.setup_anndata(adata)
    options = {**ENSEMBLE, "train_kwargs": {**TRAIN, "plan_kwargs": {"lr": 1e30}}}
    before = snapshot()
    with pytest.raises(RuntimeError, match="diverged"):
        fit_ensemble(adata, 2, n_jobs=n_jobs, **options)
    assert set(changes(before, snapshot())) <= OF_TRAINER


def test_a_run_that_raises_leaves_no_global_state(monkeypatch):
    def fail(*_, **__):
        msg = "in the middle"
        raise RuntimeError(msg)

    monkeypatch.setattr("ldvae_ext.model.Ensemble.representative", fail)
    before = snapshot()
    with pytest.raises(RuntimeError, match="in the middle"):
        ldvae_ext.run(cells(), n_latent=2, n_runs=2, max_epochs=2, umap=False, silent=True)
    assert changes(before, snapshot()) == []


@pytest.mark.parametrize("name", ["ablate", "ablate_genes", "tl.ablate", "export_to_anndata"])
def test_a_reading_that_raises_leaves_no_global_state(model, monkeypatch, name):
    def fail(*_, **__):
        msg = "in the middle"
        raise RuntimeError(msg)

    target = (
        "ldvae_ext.model._export.write_export" if name == "export_to_anndata" else "ldvae_ext.core.plan.set_effects"
    )
    if name == "ablate_genes":
        target = "ldvae_ext.core.plan.AblationPlan.add_gene_effects"
    monkeypatch.setattr(target, fail)
    before = snapshot()
    with pytest.raises(RuntimeError, match="in the middle"):
        CALLS[name](model)
    assert changes(before, snapshot()) == []


def test_a_figure_that_raises_leaves_no_global_state(model):
    before = snapshot()
    with pytest.raises((KeyError, ValueError)):
        pl.loadings(model.adata, factors=["no factor"], show=False)
    assert changes(before, snapshot()) == []


def test_the_snapshot_sees_changes():
    before, filters = snapshot(), list(warnings.filters)
    n_threads, level = torch.get_num_threads(), logging.getLogger("scvi").level
    try:
        torch.set_num_threads(n_threads + 1)
        warnings.simplefilter("ignore")
        logging.getLogger("scvi").setLevel(1)
        os.environ["LDVAE_EXT_A_TEST"] = "1"
        torch.rand(1)
        assert changes(before, snapshot()) == [
            "environment",
            "loggers",
            "torch's draws",
            "torch's threads",
            "warning filters",
        ]
    finally:
        torch.set_num_threads(n_threads)
        warnings.filters[:] = filters
        logging.getLogger("scvi").setLevel(level)
        del os.environ["LDVAE_EXT_A_TEST"]
