"""Which backend trains, and where scvi-tools' own way is taken."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from scipy import sparse
from scvi.dataloaders import AnnDataLoader

from ldvae_ext.backends.choose import choose_backend
from ldvae_ext.backends.loader import counts_loader
from ldvae_ext.kernels.threads import compiled
from ldvae_ext.model import LDVAE, fit_ensemble
from ldvae_ext.module import LDVAEModule
from tests.helpers import TRAIN, counts
from tests.query import cells, trained
from tests.reference import covariate_counts

pytestmark = pytest.mark.filterwarnings("ignore:Training ended with a KL weight")


def built(adata=None, setup=None, cls=LDVAE, **kwargs):
    adata = counts(80, 20) if adata is None else adata
    cls.setup_anndata(adata, **(setup or {}))
    scvi.settings.seed = 0
    return cls(adata, n_latent=3, **kwargs)


def used(model, **kwargs):
    """The backend of a training."""
    found = set()

    class Watch(Callback):
        def on_train_batch_end(self, trainer, plan, *_):
            found.add(plan.backend_name)

    model.train(1, callbacks=[Watch()], **TRAIN, **kwargs)
    (backend,) = found
    return backend


@pytest.mark.parametrize("backend", ["scvi", "torch", "numba"])
def test_the_backend_that_is_asked_for(backend):
    assert used(built(), backend=backend) == backend


def test_auto_takes_the_first_that_can():
    assert used(built()) == "numba"
    assert used(built(gene_likelihood="normal")) == "scvi"
    assert used(built(dispersion="gene-cell")) == "torch"
    sized = covariate_counts()
    assert used(built(sized, {"size_factor_key": "size"})) == "torch"


@pytest.mark.parametrize(
    ("setup", "options", "reason"),
    [
        ({"size_factor_key": "size"}, {}, "size factors come with a softplus"),
        ({}, {"dispersion": "gene-cell"}, "`dispersion='gene-cell'` is another for each cell"),
        ({}, {"gene_likelihood": "normal"}, "`gene_likelihood='normal'` has no gamma functions"),
    ],
)
def test_a_backend_that_cannot_says_why(setup, options, reason):
    model = built(covariate_counts(), setup, **options)
    with pytest.raises(ValueError, match=reason):
        model.train(1, **TRAIN, backend="numba")
    assert not model.is_trained


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"`backend` must be one of .*'numba'.*; got 'cuda'"):
        built().train(1, **TRAIN, backend="cuda")


def test_torch_is_taken_where_compiled_loops_are_switched_off():
    with compiled(on=False):
        assert used(built()) == "torch"
        with pytest.raises(ValueError, match="compiled loops are switched off"):
            built().train(1, **TRAIN, backend="numba")
    assert used(built()) == "numba"


def test_a_network_with_its_own_loss_is_computed_its_own_way():
    called = []

    class Module(LDVAEModule):
        def loss(self, *args, kl_weight=1.0, **kwargs):
            called.append(1)
            return super().loss(*args, kl_weight=kl_weight, **kwargs)

    class Model(LDVAE):
        _module_cls = Module

    model = built(cls=Model)
    assert used(model) == "scvi"
    assert len(called) == model.trainer.global_step
    with pytest.raises(ValueError, match="`loss` of the network was replaced"):
        model.train(1, **TRAIN, backend="torch")


def test_a_replaced_generative_is_called():
    model = built()
    usual, called = model.module.generative, []

    def generative(*args, **kwargs):
        called.append(1)
        return usual(*args, **kwargs)

    model.module.generative = generative
    assert used(model) == "scvi"
    assert called


@pytest.mark.parametrize(
    "kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
             "register_full_backward_pre_hook"],
)  # fmt: skip
def test_hooks_of_layers_are_called(kind):
    model, called = built(), []
    getattr(model.module.z_encoder.mean_encoder, kind)(lambda *_: called.append(1))
    assert used(model) == "scvi"
    assert called


def test_other_layers_are_used():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for path in ("z_encoder.mean_encoder", "z_encoder.encoder.fc_layers.0.0", "decoder.factor_regressor.fc_layers.0.0"):
        losses = []
        for backend in ("scvi", "auto"):
            model = built()
            layers = model.module.get_submodule(path.replace(".0.0", ".Layer 0.0"))
            layers.__class__ = Doubled
            model.train(2, **TRAIN, backend=backend)
            losses.append(model.history["elbo_train"].to_numpy(dtype=float))
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, err_msg=path)


def test_reparametrized_layers_are_used():
    losses = []
    for backend in ("scvi", "auto"):
        model = built()
        torch.nn.utils.parametrizations.weight_norm(model.module.decoder.factor_regressor.fc_layers[0][0])
        torch.nn.utils.parametrizations.weight_norm(model.module.z_encoder.mean_encoder)
        scvi.settings.seed = 1
        model.train(2, **TRAIN, backend=backend, batch_size=16)
        losses.append(model.history["elbo_train"].to_numpy(dtype=float))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("data", ["CSC", "workers", "loads sparse tensors", "pinned"])
def test_other_data_is_loaded_by_scvi_tools(data, monkeypatch):
    adata = counts(80, 20)
    kwargs = {}
    if data == "CSC":
        adata.X = sparse.csc_matrix(adata.X)
    if data == "loads sparse tensors":
        kwargs["load_sparse_tensor"] = True
    model = built(adata)
    if data == "workers":
        monkeypatch.setattr(scvi.settings, "dl_num_workers", 1)
    loader = counts_loader(model.adata_manager, pin_memory=data == "pinned", **kwargs)
    assert type(loader) is AnnDataLoader
    if data in ("CSC", "loads sparse tensors"):
        assert used(model, **kwargs) == "numba"
        theirs = built(adata)
        theirs.train(1, **TRAIN, backend="scvi")
        assert model.history["elbo_train"].iloc[0, 0] == pytest.approx(
            theirs.history["elbo_train"].iloc[0, 0], rel=1e-4
        )


def test_genes_that_come_twice_in_a_cell_are_summed():
    adata = counts(80, 20)
    x = adata.X
    halves = np.stack([x.data // 2, x.data - x.data // 2], axis=1).ravel()
    twice = sparse.csr_matrix((halves, np.repeat(x.indices, 2), x.indptr * 2), shape=x.shape)
    assert not twice.has_canonical_format
    losses = []
    for values in (x, twice):
        adata = counts(80, 20)
        adata.X = values
        model = built(adata)
        scvi.settings.seed = 1
        model.train(2, **TRAIN)
        losses.append(model.history["elbo_train"].to_numpy(dtype=float))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_query_trains_alike():
    reference = trained(cells(["a", "b"]))
    histories = []
    for backend in ("scvi", "auto"):
        query = LDVAE.load_query_data(cells(["c"], seed=1), reference)
        assert choose_backend(query.module, "auto", "cpu").name == "numba"
        scvi.settings.seed = 1
        query.train(3, **TRAIN, kl_warmup=1, batch_size=16, backend=backend)
        histories.append(query)
    np.testing.assert_allclose(
        histories[1].history["elbo_train"].astype(float), histories[0].history["elbo_train"].astype(float), rtol=1e-4
    )
    for name, value in histories[0].module.state_dict().items():
        np.testing.assert_allclose(histories[1].module.state_dict()[name], value, atol=2e-3, err_msg=name)


def test_ordered_training_is_alike():
    models = []
    for backend in ("scvi", "auto"):
        adata = counts(80, 20)
        LDVAE.setup_anndata(adata)
        scvi.settings.seed = 0
        models.append(LDVAE.train_ordered(adata, 3, 4, fine_tune_epochs=3, train_kwargs={"backend": backend}, **TRAIN))
    theirs, ours = models
    np.testing.assert_allclose(
        ours.history["elbo_train"].astype(float), theirs.history["elbo_train"].astype(float), rtol=1e-3
    )
    np.testing.assert_allclose(ours.module.get_loadings(), theirs.module.get_loadings(), atol=0.02)


def test_an_ensemble_trains():
    adata = counts(80, 20)
    LDVAE.setup_anndata(adata)
    ensemble = fit_ensemble(adata, n_runs=2, max_epochs=2, n_latent=3, train_kwargs=TRAIN)
    assert len(ensemble.models) == 2
