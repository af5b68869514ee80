"""What rows share: sizes, counts, and models that are trained once."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scvi
from anndata import AnnData
from scvi.model import LinearSCVI

from ldvae_ext import datasets
from ldvae_ext.model import LDVAE
from suite.registry import Unavailable

KIDNEY = "human_kidney_hvg2000.h5ad"
# Counts of the median cell for each gene: about 8 % of the counts are then above 0, and 7 of 10 of those are 1.
COUNTS_PER_GENE = 0.2
N_POPULATIONS = 8
TRAIN = {"accelerator": "cpu", "enable_progress_bar": False}


def simulated(n_cells: int, n_genes: int, n_batches: int = 1, seed: int = 0) -> AnnData:
    """Negative binomial counts from a linear decoder; cells beyond 20,000 are drawn with replacement from these."""
    adata, _ = datasets.simulate(
        min(n_cells, 20_000),
        n_genes,
        10,
        n_batches=n_batches,
        n_populations=N_POPULATIONS,
        median_library=COUNTS_PER_GENE * n_genes,
        seed=seed,
    )
    if n_cells > adata.n_obs:
        rows = np.random.default_rng(seed).integers(adata.n_obs, size=n_cells)
        adata = AnnData(adata.X[rows], obs=adata.obs.iloc[rows].reset_index(drop=True), var=adata.var)
        adata.obs_names = [f"cell_{i}" for i in range(n_cells)]
    return adata


def of_class(cls: type, adata: AnnData, n_batches: int = 1, seed: int = 0, **options: Any) -> Any:
    """A fresh model of a class that has LinearSCVI's arguments."""
    cls.setup_anndata(adata, batch_key="batch" if n_batches > 1 else None)
    scvi.settings.seed = seed
    return cls(adata, **options)


def backend(name: str) -> dict[str, str]:
    """The argument of `LDVAE.train` that says how the training step is computed."""
    if "backend" not in inspect.signature(LDVAE.train).parameters:
        msg = "this version has no `backend`"
        raise Unavailable(msg)
    return {"backend": name}


@dataclass
class Lab:
    """Settings of a run of the suite."""

    rounds: int = 3
    n_epochs: int = 3
    """Epochs of a training that is timed; the first is dropped."""
    n_cells: int = 7000
    n_genes: int = 2000
    folder: Path | None = field(default_factory=lambda: _folder())
    n_long: int = 60
    """Epochs of the training that runs to its best held-out ELBO."""

    def __post_init__(self) -> None:
        self._counts: dict[tuple, AnnData] = {}
        self._pairs: dict[tuple, tuple] = {}

    def counts(self, n_genes: int | None = None, n_batches: int = 1, n_cells: int | None = None) -> AnnData:
        """Simulated counts of this size. The last is kept, and that of the usual size with one batch."""
        key = (n_cells or self.n_cells, n_genes or self.n_genes, n_batches)
        if key not in self._counts:
            usual = (self.n_cells, self.n_genes, 1)
            self._counts = {k: v for k, v in self._counts.items() if k == usual}
            self._counts[key] = simulated(*key)
        return self._counts[key]

    @cached_property
    def kidney(self) -> AnnData:
        path = None if self.folder is None else self.folder / KIDNEY
        if path is None or not path.exists():
            msg = f"{KIDNEY} is not here: give `--folder` or LDVAE_EXT_DATA"
            raise Unavailable(msg)
        return anndata.read_h5ad(path)

    def pair(self, n_latent: int = 10, n_batches: int = 1) -> tuple[LinearSCVI, LDVAE]:
        """LinearSCVI and LDVAE with the same weights, those of a short training, exported to their AnnData.

        The last pair is kept.
        """
        key = (n_latent, n_batches)
        if key not in self._pairs:
            adata = self.counts(n_batches=n_batches).copy()
            ours = of_class(LDVAE, adata, n_batches, n_latent=n_latent)
            ours.train(5, plan_kwargs={"lr": 5e-3, "n_epochs_kl_warmup": 2}, **TRAIN)
            ours.export_to_anndata()
            stock = of_class(LinearSCVI, adata, n_batches, n_latent=n_latent)
            stock.module.load_state_dict(ours.module.state_dict())
            stock.module.eval()
            stock.is_trained_ = True
            self._pairs = {key: (stock, ours)}
        return self._pairs[key]


def _folder() -> Path | None:
    named = os.environ.get("LDVAE_EXT_DATA")
    if named:
        return Path(named)
    nearby = Path(__file__).parents[3] / "shared" / "data"
    return nearby if nearby.exists() else None
