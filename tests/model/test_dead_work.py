"""No parameter is trained that the likelihood never sees: fewer parameters, every gradient there, data-parallel training."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import scvi
import torch
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

STOCK_OPTIONS = [
    {},
    {"gene_likelihood": "zinb", "dispersion": "gene-batch"},
    {"gene_likelihood": "poisson", "use_observed_lib_size": True},
    {"use_batch_norm": False, "bias": True, "n_layers": 2},
    {"use_batch_norm": False, "latent_distribution": "ln"},
    {"bias": True, "dispersion": "gene-label", "n_labels": 2},
    {"gene_likelihood": "zinb", "use_observed_lib_size": True, "log_variational": False},
]


def built(cls, adata, **kwargs):
    # LinearSCVI does not tell its network how many labels there are; ours knows from the data.
    if cls is LDVAE:
        kwargs.pop("n_labels", None)
    cls.setup_anndata(adata, batch_key="batch", labels_key="label" if "label" in adata.obs else None)
    scvi.settings.seed = 0
    return cls(adata, **kwargs)


def n_trainable(model):
    return sum(value.numel() for value in model.module.parameters() if value.requires_grad)


def test_the_common_model_trains_two_fifths_fewer_parameters():
    adata = counts(n_cells=10, n_genes=2000)
    stock, ours = (built(cls, adata, use_observed_lib_size=True) for cls in (LinearSCVI, LDVAE))
    assert n_trainable(ours) <= 0.6 * n_trainable(stock)
    unused = [value.numel() for name, value in stock.module.named_parameters() if "l_encoder" in name]
    unused += [value.numel() for name, value in stock.module.named_parameters() if "px_dropout" in name]
    assert n_trainable(stock) - n_trainable(ours) == sum(unused)


@pytest.mark.parametrize("n_batches", [1, 3])
@pytest.mark.parametrize("kwargs", STOCK_OPTIONS, ids=str)
def test_names_order_and_shapes_are_those_of_linear_scvi(n_batches, kwargs):
    adata = counts(n_batches=n_batches)
    if "n_labels" in kwargs:
        adata.obs["label"] = np.array(["a", "b"])[np.arange(60) % 2]
    stock, ours = (built(cls, adata, **kwargs) for cls in (LinearSCVI, LDVAE))
    theirs, own = stock.module.state_dict(), ours.module.state_dict()
    assert [(n, v.shape, v.dtype) for n, v in theirs.items()] == [(n, v.shape, v.dtype) for n, v in own.items()]
    assert [n for n, _ in stock.module.named_parameters()] == [n for n, _ in ours.module.named_parameters()]
    for name, value in theirs.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=0, msg=name)
    for to, given in ((stock, own), (ours, theirs)):
        shifted = {name: value + 1 for name, value in given.items()}
        to.module.load_state_dict(shifted, strict=True)
        assert all(torch.equal(value, shifted[name]) for name, value in to.module.state_dict().items())


@pytest.mark.filterwarnings(
    "ignore:Category . in adata.obs:UserWarning", "ignore:Last batch will have a small:UserWarning"
)
class TestSingleCells:
    """Batch norm cannot divide by the variance of one cell."""

    def fit(self, cls, n_cells, batch_size, train_size, **kwargs):
        model = built(cls, counts(n_cells=n_cells, n_batches=1), n_latent=2, **kwargs)
        model.train(2, batch_size=batch_size, train_size=train_size, plan_kwargs={"n_epochs_kl_warmup": 1}, **TRAIN)
        return model

    @pytest.mark.grid(0)
    @pytest.mark.parametrize(
        ("n_cells", "batch_size", "train_size"), [(33, 16, 1.0), (36, 16, 0.9), (2, 128, 0.5), (3, 2, 1.0)]
    )
    def test_a_last_minibatch_of_one_cell_trains(self, n_cells, batch_size, train_size):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            self.fit(LinearSCVI, n_cells, batch_size, train_size)
        model = self.fit(LDVAE, n_cells, batch_size, train_size)
        assert len(model.train_indices) % batch_size == 1
        assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
        assert all(torch.isfinite(value).all() for value in model.module.state_dict().values())

    def test_minibatches_of_one_cell_train(self):
        model = self.fit(LDVAE, 10, 1, 1.0)
        assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()

    @pytest.mark.parametrize("use_observed_lib_size", [False, True])
    def test_one_cell_is_enough(self, use_observed_lib_size):
        model = self.fit(LDVAE, 1, 128, 1.0, use_observed_lib_size=use_observed_lib_size)
        assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
        assert np.isfinite(model.ablate().X).all()

    def test_a_batch_of_one_cell_is_no_trouble(self):
        adata = counts(n_cells=30)
        adata.obs["batch"] = ["many"] * 29 + ["one"]
        model = built(LDVAE, adata, n_latent=2)
        model.train(2, kl_warmup=1, **TRAIN)
        np.testing.assert_allclose(model.module.library_log_vars[0, 1], 1)
        np.testing.assert_allclose(model.module.library_log_means[0, 1], np.log(adata.X[29].sum()), rtol=1e-6)

    def test_its_gradient_is_that_of_the_running_statistics_and_modes_come_back(self):
        model = built(LDVAE, counts(n_cells=5), n_latent=2, dropout_rate=0.0)
        (tensors,) = model._make_data_loader(model.adata, indices=[0], batch_size=5)
        before = {name: value.clone() for name, value in model.module.named_buffers()}
        losses = []
        for mode in (True, False):
            torch.manual_seed(0)
            model.module.train(mode)
            losses.append(model.module(tensors)[2].loss)
            assert all(layer.training == mode for layer in model.module.modules())
        losses[0].backward()
        assert torch.equal(*losses)
        assert all(torch.equal(value, before[name]) for name, value in model.module.named_buffers())


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("cls", [LDVAE, LinearSCVI])
@pytest.mark.usefixtures("process_group")
def test_torchs_data_parallel_wrapper_finds_no_unused_parameters(cls, gene_likelihood):
    """It raises in the second pass if a parameter that needs a gradient got none in the first."""
    model = built(cls, counts(n_batches=3), gene_likelihood=gene_likelihood, use_observed_lib_size=True)
    module = torch.nn.parallel.DistributedDataParallel(model.module)
    first, second = model._make_data_loader(model.adata, batch_size=30)
    module(first)[2].loss.backward()
    if cls is LinearSCVI:
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            module(second)
    else:
        module(second)[2].loss.backward()


PLAIN_DDP = """
    import sys
    from pathlib import Path
    import numpy as np
    from ldvae_ext.model import LDVAE
    from tests.helpers import counts

    if __name__ == "__main__":
        adata = counts(n_cells=64, n_batches=3)
        LDVAE.setup_anndata(adata, batch_key="batch")
        model = LDVAE(adata, n_latent=3, use_observed_lib_size=True)
        before = model.get_loadings()
        model.train(
            2, kl_warmup=1, accelerator="cpu", devices=2, strategy="ddp", train_size=1.0, batch_size=16,
            enable_progress_bar=False, default_root_dir=sys.argv[1],
        )
        assert np.isfinite(model.get_loadings().to_numpy()).all()
        assert not np.allclose(before, model.get_loadings())
        assert model.trainer.world_size == 2
        assert model.trainer.lightning_module.backend_name == "numba"
        # A file for each process: what two of them print at once can get mixed.
        (Path(sys.argv[1]) / f"rank{model.trainer.global_rank}").touch()
"""


@pytest.mark.slow
def test_plain_ddp_trains_on_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PLAIN_DDP))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"]
