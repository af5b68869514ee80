"""Two processes train one model, each on half of a minibatch. (The compiled loops under plain ddp: `model/test_dead_work.py`.)"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import scvi

from ldvae_ext.model import LDVAE
from tests import ddp_training

pytestmark = pytest.mark.slow


def of_two_processes(folder, backend):
    path = folder / "outcome.json"
    done = subprocess.run(
        [sys.executable, ddp_training.__file__, str(path), backend],
        capture_output=True, text=True, check=False, cwd=folder, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_two_processes_reach_the_elbo_of_one(tmp_path):
    found = of_two_processes(tmp_path, "torch")
    assert found["backend"] == "torch"
    assert len(found["differences"]) == 2
    assert max(found["differences"]) == 0, "the processes have the same weights"
    adata = ddp_training.cells()
    scvi.settings.seed = 0
    model = LDVAE(adata, **ddp_training.OPTIONS)
    model.train(**ddp_training.TRAINING, batch_size=64)
    assert model.trainer.global_step == found["steps"]
    expected = ddp_training.validation_elbo(model)
    assert found["elbo"] == pytest.approx(expected, rel=0.01)
    of_epochs = model.history["elbo_train"]["elbo_train"]
    assert of_epochs.iloc[0] > 1.1 * of_epochs.iloc[-1], "the training should matter"
