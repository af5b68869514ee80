"""A training by two processes, as a script: each process runs it, the second one started by Lightning.

`python -m tests.ddp_training FILE BACKEND` writes the outcome of the first process to a JSON file.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import scvi
import torch
from lightning.pytorch import Callback

from ldvae_ext import datasets
from ldvae_ext.model import LDVAE

# Without batch norm, whose running statistics make the ELBO of a short training noisy.
OPTIONS = {"n_latent": 4, "use_batch_norm": "none", "bias": "auto"}
TRAINING = {
    "max_epochs": 30,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "kl_warmup": 10,
    "plan_kwargs": {"lr": 5e-3},
}


class Weights(Callback):
    """The weights of all processes at the end of the training."""

    def on_train_end(self, trainer, plan):
        weight = plan.module.get_loadings()
        self.found = [np.asarray(each) for each in trainer.strategy.all_gather(torch.from_numpy(weight))]


def cells():
    adata, _ = datasets.simulate(n_cells=800, n_genes=60, n_latent=4, n_batches=2, seed=0)
    LDVAE.setup_anndata(adata, batch_key="batch")
    return adata


def validation_elbo(model):
    torch.manual_seed(0)
    return float(model.get_elbo(indices=model.validation_indices))


def main(path, backend):
    torch.set_num_threads(1)
    adata = cells()
    scvi.settings.seed = 0
    model = LDVAE(adata, **OPTIONS)
    weights = Weights()
    # Half of the minibatch in each process.
    model.train(**TRAINING, batch_size=32, devices=2, strategy="ddp", backend=backend, callbacks=[weights])
    if model.trainer.is_global_zero:
        outcome = {
            "elbo": validation_elbo(model),
            "backend": model.trainer.lightning_module.backend_name,
            "steps": model.trainer.global_step,
            "differences": [float(np.abs(each - weights.found[0]).max()) for each in weights.found],
        }
        Path(path).write_text(json.dumps(outcome))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
