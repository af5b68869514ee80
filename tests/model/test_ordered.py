"""Latents in order: the rotation of a model, and the training that orders them."""

from __future__ import annotations

from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext.core.likelihood import deviance
from ldvae_ext.model import LDVAE, _rotation
from ldvae_ext.model._rotation import deviance_rotation
from tests.helpers import TRAIN, counts, untrained
from tests.query import cells, map_query

FREE = {"use_batch_norm": "encoder", "bias": "auto"}


def programs(n_cells=500, strengths=(1.2, 0.8, 0.5), n_each=15, seed=0):
    """Programs of their own genes, each weaker than the one before, in latents of one scale."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((n_each * (len(strengths) + 1), len(strengths)))
    for k, strength in enumerate(strengths):
        weight[k * n_each : (k + 1) * n_each, k] = strength * rng.choice([-1, 1], n_each)
    share = np.exp(rng.normal(size=(n_cells, len(strengths))) @ weight.T)
    rate = 600 * share / share.sum(axis=1, keepdims=True)
    x = rng.poisson(rate * rng.gamma(10.0, 0.1, rate.shape))
    return ad.AnnData(
        X=sparse.csr_matrix(x.astype(np.float32)),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(len(weight))]),
    )


def trained(adata, epochs=3, n_latent=3, *, cls=LDVAE, setup=None, train=None, **options):
    cls.setup_anndata(adata, **(setup or {}))
    scvi.settings.seed = 0
    model = cls(adata, n_latent=n_latent, **{**FREE, **options})
    model.train(epochs, kl_warmup=1, batch_size=64, plan_kwargs={"lr": 0.02}, **(train or {}), **TRAIN)
    return model


@pytest.fixture(scope="module")
def of_programs():
    """Tests must not change it."""
    return trained(programs(), epochs=30, n_latent=5, use_observed_lib_size=True, train={"train_size": 0.8})


@pytest.fixture
def quick(monkeypatch):
    """Few steps of the refinement, for tests of all but its result."""
    monkeypatch.setattr(_rotation, "refine_rotation", partial(_rotation.refine_rotation, n_steps=10))
    monkeypatch.setattr(_rotation, "polish_rotation", partial(_rotation.polish_rotation, n_sweeps=1))


def explained(model, rotation):
    """Share of the held-out deviance that the first j factors explain, j = 1, 2, ...; the others are 0."""
    held_out, decoder = model.validation_indices, model.get_decoder()
    x = model.adata.X.toarray().astype(float)
    library = x[held_out].sum(axis=1)
    profile = x[model.train_indices].sum(axis=0)
    null = deviance("nb", x[held_out], library[:, None] * profile / profile.sum(), decoder.theta_bg).sum()
    z = model.get_latent_representation(indices=held_out).astype(float)
    out = []
    for j in range(1, rotation.shape[1] + 1):
        kept = rotation[:, :j] @ rotation[:, :j].T
        out.append(
            1 - deviance("nb", x[held_out], decoder.rate(z @ kept, library=library), decoder.theta_bg).sum() / null
        )
    return np.array(out)


def kl_order(model):
    kl = model.get_latent_kl(indices=model.train_indices).to_numpy().mean(axis=0)
    return np.eye(len(kl))[:, np.argsort(-kl)]


def state(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


@pytest.mark.slow
def test_first_rotated_factors_explain_more_of_held_out_cells_than_those_of_largest_kl(of_programs):
    rotation = deviance_rotation(of_programs, indices=of_programs.train_indices)
    by_rotation, by_kl = explained(of_programs, rotation), explained(of_programs, kl_order(of_programs))
    assert (by_rotation[:2] > by_kl[:2] + 0.05).all()
    assert by_rotation[-1] == pytest.approx(by_kl[-1], abs=1e-6)


@pytest.mark.slow
def test_strong_programs_come_first(of_programs):
    rotation = deviance_rotation(of_programs)
    loadings = of_programs.get_decoder().rotated(rotation).centered().weight_gk
    genes = np.repeat(np.arange(4), 15)
    power = np.stack([(loadings[genes == k] ** 2).sum(axis=0) for k in range(4)])
    assert power[:3, :3].argmax(axis=0).tolist() == [0, 1, 2]


@pytest.mark.usefixtures("quick")
def test_the_rotation_is_orthogonal_deterministic_and_leaves_no_trace(of_programs):
    of_programs.module.train()
    of_programs.module.zero_grad()
    before, modes = state(of_programs), [layer.training for layer in of_programs.module.modules()]
    torch.manual_seed(3)
    random = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = deviance_rotation(of_programs)
    assert torch.equal(random[0], torch.get_rng_state())
    np.testing.assert_array_equal(random[1], np.random.get_state()[1])  # noqa: NPY002
    assert all(torch.equal(value, of_programs.module.state_dict()[name]) for name, value in before.items())
    assert modes == [layer.training for layer in of_programs.module.modules()]
    assert all(p.grad is None for p in of_programs.module.parameters())
    of_programs.module.eval()
    assert first.dtype == np.float64
    np.testing.assert_allclose(first.T @ first, np.eye(5), atol=1e-10)
    np.testing.assert_array_equal(first, deviance_rotation(of_programs))
    # Minibatches of the encoder are not those of the refinement.
    np.testing.assert_allclose(deviance_rotation(of_programs, batch_size=33), first, atol=1e-3)
    assert (of_programs.get_decoder().rotated(first).signs() == 1).all()


@pytest.mark.usefixtures("quick")
def test_cells_decide_and_many_are_sampled(of_programs, monkeypatch):
    whole = deviance_rotation(of_programs)
    few = deviance_rotation(of_programs, indices=np.arange(60))
    assert np.abs(whole - few).max() > 1e-3
    elsewhere = deviance_rotation(of_programs, of_programs.adata[:60].copy())
    np.testing.assert_allclose(elsewhere, few, atol=1e-6)
    seen = []
    refine = _rotation.refine_rotation

    def note(module, tensors, start):
        seen.append(len(tensors["X"]))
        return refine(module, tensors, start)

    monkeypatch.setattr(_rotation, "refine_rotation", note)
    monkeypatch.setattr(_rotation, "_MAX_CELLS", 100)
    sampled = deviance_rotation(of_programs)
    np.testing.assert_array_equal(sampled, deviance_rotation(of_programs))
    monkeypatch.setattr(_rotation, "_MAX_CELLS", 4096)
    monkeypatch.setattr(_rotation, "_MIN_CELLS", 20)
    monkeypatch.setattr(_rotation, "_MAX_COUNTS", 50 * 60)
    deviance_rotation(of_programs)
    assert seen == [100, 100, 50]


def test_one_latent_is_only_turned():
    model = untrained(counts(n_batches=3), n_latent=1)
    assert deviance_rotation(model).tolist() in ([[1.0]], [[-1.0]])


@pytest.mark.usefixtures("quick")
def test_a_rotation_in_force_does_not_matter(of_programs):
    plain = deviance_rotation(of_programs)
    of_programs.rotation_ = {"matrix": kl_order(of_programs), "method": "varimax"}
    try:
        np.testing.assert_array_equal(deviance_rotation(of_programs), plain)
    finally:
        of_programs.rotation_ = None


@pytest.mark.parametrize(
    "options", [{"gene_likelihood": "zinb", "dispersion": "gene-cell"}, {"use_batch_norm": "both"}]
)
@pytest.mark.usefixtures("quick")
def test_every_model_with_a_normal_latent_has_a_rotation(options):
    model = untrained(counts(n_batches=3), **options)
    rotation = deviance_rotation(model)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(4), atol=1e-10)


@pytest.mark.usefixtures("quick")
def test_ordering_trains_with_dropout_at_full_kl_weight_on_the_same_cells(monkeypatch):
    model = trained(
        counts(100, n_batches=3), setup={"batch_key": "batch"}, train={"train_size": 0.6, "validation_size": 0.2}
    )
    splits = [np.array(v) for v in (model.train_indices, model.validation_indices, model.test_indices)]
    passes = []
    forward = type(model.module).forward

    def note(module, tensors, *args, **kwargs):
        out = forward(module, tensors, *args, **kwargs)
        dropout = [layer.training for layer in module.modules() if isinstance(layer, torch.nn.Dropout)]
        passes.append((module.training, all(dropout), "kept_latents" in out[0], len(tensors["X"])))
        return out

    monkeypatch.setattr(type(model.module), "forward", note)
    model.order_factors(2, batch_size=32, check_val_every_n_epoch=1, **TRAIN)
    for before, after in zip(splits, (model.train_indices, model.validation_indices, model.test_indices)):
        np.testing.assert_array_equal(np.sort(before), np.sort(after))
    in_training = [of for of in passes if of[0]]
    assert {of[1:3] for of in in_training} == {(True, True)}
    assert sum(of[3] for of in in_training) == 2 * 60
    validation = [of for of in passes if not of[0]]
    assert {of[1:3] for of in validation} == {(False, False)}
    assert model.final_kl_weight == 1
    assert model.trainer.lightning_module.lr == 2e-3
    assert model.is_ordered_
    assert not model.module.training
    assert not model.module.truncates
    assert len(model.history["elbo_train"]) == 3 + 2


@pytest.mark.usefixtures("quick")
def test_the_rotation_is_baked_in_before_the_training(monkeypatch):
    model = trained(counts(60))
    rotation = deviance_rotation(model, indices=model.train_indices)
    z = model.get_latent_representation().astype(float)
    scale = model.get_normalized_expression(use_posterior_mean=True).to_numpy()
    model.rotation_ = {"matrix": rotation, "method": "deviance"}
    monkeypatch.setattr(LDVAE, "train", lambda *_args, **_kwargs: None)
    model.order_factors(1)
    assert model.rotation_ is None
    np.testing.assert_allclose(model.get_latent_representation(), z @ rotation, atol=1e-5)
    np.testing.assert_allclose(model.get_normalized_expression(use_posterior_mean=True), scale, atol=1e-6)


@pytest.mark.usefixtures("quick")
def test_order_is_saved_queried_and_lost_in_an_ordinary_training(tmp_path):
    adata = cells(["a", "b"])
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE.train_ordered(
        adata, 3, 2, fine_tune_epochs=1, batch_size=32, train_kwargs={"train_size": 1.0}, **TRAIN
    )
    assert model.is_ordered_
    assert model.history["elbo_train"].shape[0] == 3
    model.save(tmp_path / "model", save_anndata=True)
    again = LDVAE.load(tmp_path / "model")
    assert again.is_ordered_
    np.testing.assert_array_equal(again.get_loadings(), model.get_loadings())
    query = map_query(model, cells(["c"], seed=1))
    assert query.is_ordered_
    with pytest.raises(ValueError, match="query whose reference is frozen"):
        query.order_factors(1)
    query.train(2, kl_warmup=1, **TRAIN)
    assert query.is_ordered_
    again.module.train()
    again.train(2, kl_warmup=1, **TRAIN)
    assert not again.is_ordered_


@pytest.mark.usefixtures("quick")
def test_linear_scvi_opens_an_ordered_model(tmp_path):
    adata = counts(60)
    LDVAE.setup_anndata(adata)
    model = LDVAE.train_ordered(adata, 3, 2, fine_tune_epochs=1, **TRAIN)
    state_dict = model.module.state_dict()
    LinearSCVI.setup_anndata(adata)
    stock = LinearSCVI(adata, n_latent=3, use_batch_norm=False, bias=True)
    assert list(stock.module.state_dict()) == list(state_dict)
    stock.module.load_state_dict(state_dict)
    stock.module.eval()
    stock.is_trained_ = True
    np.testing.assert_array_equal(stock.get_latent_representation(), model.get_latent_representation())


@pytest.mark.usefixtures("quick")
def test_an_unfrozen_query_can_be_ordered():
    reference = trained(cells(["a", "b"]), setup={"batch_key": "batch"})
    query = map_query(reference, cells(["c"], seed=1), unfrozen=True)
    query.train(2, kl_warmup=1, **TRAIN)
    query.order_factors(1, **TRAIN)
    assert query.is_ordered_


@pytest.mark.usefixtures("quick")
def test_no_epochs_are_a_rotation_alone():
    model = trained(counts(60), use_batch_norm="both", bias=False)
    before = state(model)
    model.order_factors(0)
    assert model.rotation_["method"] == "deviance"
    np.testing.assert_allclose(np.abs(model.rotation_["matrix"]), np.abs(deviance_rotation(model)), atol=1e-12)
    assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in before.items())
    assert not model.is_ordered_


def batch_norm():
    return trained(counts(60), use_batch_norm="both", bias=False)


def minified():
    model = trained(counts(60))
    model.minify_adata()
    return model


def other_cells():
    model = trained(counts(60))
    model.train_indices_ = model.train_indices_[:5]
    return model


def not_trained():
    adata = counts(60)
    LDVAE.setup_anndata(adata)
    return LDVAE(adata, n_latent=3, **FREE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (batch_norm, "cannot train a decoder with batch norm"),
        (lambda: trained(counts(60), latent_distribution="ln"), "logistic-normal latent"),
        (minified, "has minified data"),
        (other_cells, "needs the same cells"),
        (not_trained, "call `train` first"),
    ],
    ids=["batch norm", "ln", "minified", "other cells", "not trained"],
)
def test_what_cannot_be_ordered_says_why_and_stays(make, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        model.order_factors(1, **TRAIN)
    assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in before.items())
    assert not model.is_ordered_


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fine_tune_epochs": -1}, ValueError, "`fine_tune_epochs` must be an integer of at least 0; got -1"),
        ({"train_size": 0.5}, TypeError, "takes no 'train_size'"),
        ({"kl_warmup": "auto"}, TypeError, "takes no 'kl_warmup'"),
        ({"plan_kwargs": {"lr": 1.0}}, ValueError, "may not hold 'lr'"),
        ({"plan_kwargs": {"max_kl_weight": 0.5}}, ValueError, "may not hold 'max_kl_weight'"),
    ],
)
def test_arguments_that_would_change_what_it_is_are_refused(of_programs, arguments, error, message):
    with pytest.raises(error, match=message):
        of_programs.order_factors(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_kwargs": {"latent_distribution": "ln"}}, ValueError, "logistic-normal latent"),
        ({"model_kwargs": {"use_batch_norm": True}}, ValueError, "with batch norm"),
        ({"plan_kwargs": {"lr": 1e-3}}, TypeError, "takes no 'plan_kwargs'"),
        ({"fine_tune_epochs": -1}, ValueError, "an integer of at least 0"),
        ({"fine_tune_epochs": 2.5}, ValueError, "an integer of at least 0"),
        ({"fine_tune_epochs": True}, ValueError, "an integer of at least 0"),
        ({"fine_tune_epochs": 0, "model_kwargs": {"latent_distribution": "ln"}}, ValueError, "logistic-normal latent"),
    ],
)
def test_what_cannot_be_ordered_is_not_trained_first(monkeypatch, arguments, error, message):
    adata = counts(60)
    LDVAE.setup_anndata(adata)
    monkeypatch.setattr(LDVAE, "train", lambda *_args, **_kwargs: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        LDVAE.train_ordered(adata, 3, 1, **arguments)


class Stop(Callback):
    """Breaks a training off in its second epoch."""

    def on_train_epoch_start(self, trainer, _module):
        if trainer.current_epoch == 1:
            msg = "stopped"
            raise ValueError(msg)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"nonsense": 1}, TypeError), ({"callbacks": [Stop()]}, ValueError)],
    ids=["refused", "broken off"],
)
def test_a_fine_tuning_that_fails_leaves_the_model_as_it_was(arguments, error):
    model = trained(counts(60))
    model.rotate()
    before, rotation = state(model), model.rotation.matrix_kk
    with pytest.raises(error, match=r"nonsense|stopped"):
        model.order_factors(3, **TRAIN, **arguments)
    assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in before.items())
    np.testing.assert_array_equal(model.rotation.matrix_kk, rotation)
    assert not model.is_ordered_
    assert not model.module.training


def test_rotations_without_counts_or_axes_are_refused():
    with pytest.raises(ValueError, match="logistic-normal"):
        deviance_rotation(trained(counts(60), latent_distribution="ln"))
    with pytest.raises(ValueError, match="needs counts"):
        deviance_rotation(minified())
    with pytest.raises(ValueError, match="no cells"):
        deviance_rotation(trained(counts(60)), indices=[])


@pytest.mark.slow
def test_ordered_latents_explain_more_with_few_and_hardly_less_with_all():
    adata = programs(1000)
    LDVAE.setup_anndata(adata)
    options = {**FREE, "use_observed_lib_size": True}
    more = {"train_size": 0.8, "plan_kwargs": {"lr": 5e-3}}
    scvi.settings.seed = 0
    model = LDVAE.train_ordered(adata, 5, 60, fine_tune_epochs=20, model_kwargs=options, train_kwargs=more, **TRAIN)
    scvi.settings.seed = 0
    ordinary = LDVAE(adata, n_latent=5, **options)
    ordinary.train(80, kl_warmup="auto", **more, **TRAIN)
    np.testing.assert_array_equal(np.sort(model.validation_indices), np.sort(ordinary.validation_indices))
    ours, plain = explained(model, np.eye(5)), explained(ordinary, kl_order(ordinary))
    assert (ours[:2] > plain[:2] + 0.03).all()
    assert ours[-1] > plain[-1] - 0.02
    assert ours[2] > ours.max() - 0.02
    assert np.argsort(-ours[:3]).tolist() == [2, 1, 0]
