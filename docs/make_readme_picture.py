"""Draw ``docs/_static/readme_ablation.png``, the picture of the README. Run it after a change of ``pl.ablation``."""

from __future__ import annotations

from pathlib import Path

import scvi

import ldvae_ext
from ldvae_ext.model import LDVAE

scvi.settings.seed = 0
adata = ldvae_ext.datasets.pbmc68k()
LDVAE.setup_anndata(adata)
model = LDVAE(adata, n_latent=10)
model.train(250, kl_warmup="auto", plan_kwargs={"lr": 5e-3})
axes = ldvae_ext.pl.ablation(model.ablate(), "bulk_labels", show=False)
axes.set_ylabel("")
axes.figure.savefig(Path(__file__).parent / "_static" / "readme_ablation.png", dpi=130, bbox_inches="tight")
