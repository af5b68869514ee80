"""Query mapping: the reference stays as it is, to the bit, and what is new learns."""

from __future__ import annotations

import itertools
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from scvi.model import LinearSCVI
from scvi.model.base import ArchesMixin
from scvi.nn import FCLayers

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN
from tests.query import (
    FAST,
    GENES,
    HARD,
    assert_close,
    assert_same,
    cells,
    changed,
    map_query,
    seen_by,
    snapshot,
    trained,
)

CASES = [
    {"known": known, "dispersion": dispersion, "use_observed_lib_size": observed}
    for known, dispersion, observed in itertools.product((["a"], ["a", "b"]), ("gene", "gene-batch"), (True, False))
] + [
    {"known": ["a"], "gene_likelihood": "zinb"},
    {"known": ["a", "b"], "gene_likelihood": "zinb", "dispersion": "gene-batch"},
    {"known": ["a", "b"], "dispersion": "gene-cell"},
    {"known": ["a"], "dispersion": "gene-cell", "encode_covariates": True},
    {"known": ["a"], "encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": True},
    {"known": ["a", "b"], "encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": False},
    {"known": ["a", "b"], "batch_representation": "embedding", "encode_covariates": True},
    {"known": ["a"], "batch_representation": "embedding", "dispersion": "gene-batch"},
    {"known": ["a", "b"], "use_batch_norm": False, "bias": "auto"},
    {"known": ["a"], "use_batch_norm": "decoder", "use_layer_norm": "encoder"},
    {"known": ["a"], "gene_likelihood": "poisson"},
    {"known": ["a", "b"], "gene_likelihood": "normal", "latent_distribution": "ln"},
]


@pytest.mark.grid(1)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_reference_does_not_move_and_the_new_batch_learns(case):
    case = dict(case)
    known = case.pop("known")
    n_known = len(known)
    adata = cells(known)
    reference = trained(adata, **case)
    in_reference = seen_by(reference, adata)
    state = {name: value.clone() for name, value in reference.module.state_dict().items()}

    model = map_query(reference, cells(["new", "a"], seed=1))
    assert type(model) is LDVAE
    assert isinstance(model, ArchesMixin)
    assert not model.is_trained_
    assert model.get_decoder().batches.tolist() == [*known, "new"]
    start = seen_by(model, adata)
    assert_close(in_reference, start)
    assert all(torch.equal(value, reference.module.state_dict()[name]) for name, value in state.items())

    before, first = snapshot(model, n_known), model.get_decoder()
    model.train(2, **FAST, batch_size=16, plan_kwargs=HARD)
    assert model.is_trained_
    assert_same(before, snapshot(model, n_known))
    assert_same(start, seen_by(model, adata))
    last = model.get_decoder()
    assert np.abs(last.intercept_bg[n_known] - first.intercept_bg[n_known]).max() > 1e-4
    if case.get("dispersion") == "gene-batch":
        assert np.abs(np.log(last.theta_bg[n_known] / first.theta_bg[n_known])).max() > 1e-4
        np.testing.assert_allclose(
            np.log(first.theta_bg[n_known]), np.log(first.theta_bg[:n_known]).mean(axis=0), atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("known", [["a"], ["a", "b"]])
def test_training_fits_the_new_cells(known):
    reference = trained(cells(known), epochs=30, dispersion="gene-batch")
    model = map_query(reference, cells(["new"], 60, seed=1))
    before = model.get_elbo()
    model.train(30, **FAST, batch_size=16, plan_kwargs={"lr": 0.02})
    assert model.get_elbo() > before


COVARIATES = {"categorical_covariate_keys": ["sex", "chemistry"], "continuous_covariate_keys": ["age"]}


@pytest.mark.grid(1)
@pytest.mark.parametrize("known", [["a"], ["a", "b"]])
@pytest.mark.parametrize(
    "options", [{}, {"encode_covariates": True, "n_layers": 2}, {"batch_representation": "embedding"}]
)
def test_columns_of_covariates_stay_with_their_covariates(known, options):
    adata = cells(known)
    reference = trained(adata, setup=COVARIATES, dispersion="gene-cell", gene_likelihood="zinb", **options)
    in_reference = seen_by(reference, adata)
    query = cells(["new1", "new2"], seed=1)
    query.obs["sex"] = query.obs["sex"].astype(str).replace("f", "unknown").astype("category")
    model = map_query(reference, query)
    assert model.get_decoder().batches.tolist() == [*known, "new1", "new2"]
    assert model.get_decoder().covariates[1].levels.tolist() == ["f", "m", "unknown"]
    start = seen_by(model, adata)
    assert_close(in_reference, start)
    first = model.get_decoder()
    model.train(2, **FAST, batch_size=16, plan_kwargs=HARD)
    assert_same(start, seen_by(model, adata))
    last = model.get_decoder()
    # The slope of the age, f, m and the unknown sex, and the three chemistries.
    moved = np.abs(last.covariate_cg - first.covariate_cg).max(axis=1)
    assert (moved[[0, 1, 2, 4, 5, 6]] == 0).all()
    assert moved[3] > 0


def test_a_covariate_with_one_level_gets_a_column_of_zeros():
    adata = cells(["a", "b"])
    adata.obs["sex"] = pd.Categorical(["f"] * adata.n_obs)
    reference = trained(adata, setup=COVARIATES)
    in_reference = seen_by(reference, adata)
    model = map_query(reference, cells(["a"], seed=1))
    assert (model.get_decoder().covariate_cg[1:3] == 0).all()
    assert_close(in_reference, seen_by(model, adata))


def test_labels_of_the_query():
    adata = cells(["a"])
    reference = trained(adata, setup={"labels_key": "label"}, dispersion="gene-label")
    query = cells(["new"], seed=1)
    query.obs["label"] = pd.Categorical(["T", "NK"] * (query.n_obs // 2))
    model = map_query(reference, query)
    first = model.get_decoder()
    assert first.labels.tolist() == ["B/x", "T", "NK"]
    np.testing.assert_allclose(np.log(first.theta_bg[2]), np.log(first.theta_bg[:2]).mean(axis=0), atol=1e-5)
    model.train(2, **FAST, plan_kwargs=HARD)
    moved = np.abs(model.get_decoder().theta_bg - first.theta_bg).max(axis=1)
    assert (moved[:2] == 0).all()
    assert moved[2] > 0
    # Without one of the reference's labels, and without the column.
    query = cells(["new"], seed=1)
    query.obs["label"] = "T"
    assert map_query(reference, query).get_decoder().labels.tolist() == ["B/x", "T"]
    query = cells(["new"], seed=1)
    del query.obs["label"]
    with pytest.raises(KeyError, match="'label' is not a column"):
        map_query(reference, query)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=0.5)


@pytest.mark.parametrize(
    "plan",
    [
        {"optimizer": "AdamW", "weight_decay": 0.9, "lr": 0.05},
        {"optimizer": "Custom", "optimizer_creator": sgd},
        {"weight_decay": 10.0, "fused_optimizer": False, "reduce_lr_on_plateau": True, "lr_patience": 0},
    ],
    ids=["AdamW", "SGD", "plateau"],
)
def test_no_optimizer_moves_the_reference(plan):
    reference = trained(cells(["a", "b"]), dispersion="gene-batch", encode_covariates=True)
    model = map_query(reference, cells(["new", "a"], seed=1))
    before, first = snapshot(model, 2), model.get_decoder()
    weight = model.module.z_encoder.encoder.fc_layers[0][0].weight.detach().clone()
    model.train(3, **FAST, plan_kwargs=plan, train_size=0.8, check_val_every_n_epoch=1)
    assert_same(before, snapshot(model, 2))
    assert np.abs(model.get_decoder().intercept_bg[2] - first.intercept_bg[2]).max() > 0
    moved = (model.module.z_encoder.encoder.fc_layers[0][0].weight != weight).any(dim=0)
    assert moved.nonzero().ravel().tolist() == [GENES + 2]


def test_the_prior_of_the_library_is_the_batch_s_own():
    reference = trained(cells(["a", "b"]))
    query = cells(["new", "a"], seed=1)
    query.X = query.X * 3
    model = map_query(reference, query)
    logs = np.log(np.asarray(query.X.sum(axis=1)).ravel()[query.obs["batch"] == "new"])
    for name, new in (("library_log_means", logs.mean()), ("library_log_vars", logs.var())):
        own, old = getattr(model.module, name), getattr(reference.module, name)
        assert torch.equal(own[:, :2], old)
        np.testing.assert_allclose(own[0, 2], new, rtol=1e-5)


@pytest.mark.parametrize("use_batch_norm", [True, "none"], ids=str)
@pytest.mark.parametrize("saved", [False, True])
def test_a_reference_of_linear_scvi(saved, use_batch_norm, tmp_path):
    adata = cells(["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = trained(adata, cls=LinearSCVI, gene_likelihood="zinb", use_batch_norm=use_batch_norm)
    own = LDVAE.from_linear_scvi(reference)
    if saved:
        reference.save(tmp_path / "reference")
        reference = tmp_path / "reference"
    model = map_query(reference, cells(["new"], seed=1))
    assert type(model) is LDVAE
    assert_close(seen_by(own, adata), seen_by(model, adata))
    before = snapshot(model, 1)
    model.train(2, **FAST, plan_kwargs=HARD)
    assert_same(before, snapshot(model, 1))


def test_a_query_model_is_saved_opened_trained_on_and_a_reference_itself(tmp_path):
    adata = cells(["a"])
    reference = trained(adata)
    reference.save(str(tmp_path / "reference"), save_anndata=True)
    model = map_query(str(tmp_path / "reference"), cells(["new"], seed=1), freeze_dropout=True)
    before, start = snapshot(model, 1), seen_by(model, adata)
    model.train(2, **FAST, plan_kwargs=HARD)
    model.save(str(tmp_path / "query"), save_anndata=True)
    opened = LDVAE.load(str(tmp_path / "query"), accelerator="cpu")
    assert_same(snapshot(model, 2), snapshot(opened, 2))
    assert {layer.p for layer in opened.module.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}
    opened.train(2, **FAST, plan_kwargs=HARD)
    assert_same(before, snapshot(opened, 1))
    assert_same(start, seen_by(opened, adata))
    assert np.abs(opened.get_decoder().intercept_bg[1] - model.get_decoder().intercept_bg[1]).max() > 0
    stock = LinearSCVI.load(str(tmp_path / "query"), accelerator="cpu", allowed_classes_names_list=["LDVAE"])
    np.testing.assert_array_equal(stock.get_loadings().to_numpy(), before["loadings"])
    next_model = map_query(opened, cells(["newer", "a"], seed=2))
    assert next_model.get_decoder().batches.tolist() == ["a", "new", "newer"]
    before = snapshot(next_model, 2)
    next_model.train(2, **FAST, plan_kwargs=HARD)
    assert_same(before, snapshot(next_model, 2))


def test_each_argument_frees_what_it_names():
    reference = trained(cells(["a", "b"]), n_layers=2)
    query = cells(["new"], seed=1)
    every, parameters = set(reference.module.state_dict()), dict(reference.module.named_parameters())
    columns = "decoder.factor_regressor.fc_layers.Layer 0.0.weight"
    norms = "decoder.factor_regressor.fc_layers.Layer 0.1."
    assert changed(map_query(reference, query.copy())) == {columns}

    model = map_query(reference, query.copy(), freeze_batchnorm_decoder=False)
    loadings = model.get_loadings()
    assert changed(model) == {columns, *(name for name in every if name.startswith(norms))}
    assert not np.allclose(loadings, model.get_loadings())

    model = map_query(reference, query.copy(), freeze_decoder_first_layer=False)
    assert changed(model) == {columns}
    assert not np.allclose(loadings, model.get_loadings())

    first = "z_encoder.encoder.fc_layers.Layer 0.0."
    model = map_query(reference, query.copy(), freeze_expression=False)
    assert changed(model) == {columns, f"{first}weight", f"{first}bias"}

    model = map_query(reference, query.copy(), freeze_batchnorm_encoder=False)
    assert {".".join(name.split(".")[:4]) for name in changed(model) - {columns}} == {
        f"z_encoder.encoder.fc_layers.Layer {i}" for i in range(2)
    }
    model = map_query(reference, query.copy(), freeze_library_encoder=False)
    assert changed(model) == {columns, *(name for name in every if name.startswith("l_encoder."))}

    model = map_query(reference, query.copy(), unfrozen=True)
    dead = {name for name, value in parameters.items() if not value.requires_grad}
    assert dead == {name for name in parameters if "px_dropout" in name}
    still = every - changed(model)
    assert {name for name in still if "px_dropout" not in name and "library_log" not in name} == set()
    assert dead <= still


def test_gradients_are_those_of_what_is_new():
    reference = trained(cells(["a", "b"]), encode_covariates=True)
    model = map_query(reference, cells(["new", "a"], seed=1))
    for tensors in model._make_data_loader(model.adata, batch_size=50):
        model.module(tensors)[2].loss.backward()
    linear, norm = model.module.z_encoder.encoder.fc_layers[0][:2]
    assert (linear.weight.grad[:, : GENES + 2] == 0).all()
    assert (linear.weight.grad[:, -1] != 0).any()
    assert (linear.bias.grad == 0).all()
    assert norm.momentum == 0
    assert not model.module.train().decoder.factor_regressor.fc_layers[0][1].training


def test_with_nothing_to_learn_the_model_is_the_reference():
    adata = cells(["a", "b"])
    reference = trained(adata)
    model = map_query(reference, cells(["b"], seed=1))
    assert model.is_trained_
    assert_same(seen_by(reference, adata), seen_by(model, adata))
    with pytest.raises(ValueError, match="There are no parameters to train"):
        model.train(1, **FAST)


def test_a_frozen_batch_norm_is_not_estimated_anew():
    model = map_query(trained(cells(["a"])), cells(["b"], seed=1))
    model.train(2, **FAST)
    with pytest.raises(ValueError, match="belongs to a reference"):
        model.recalibrate_batch_norm()


class Stock(ArchesMixin, LinearSCVI):
    """LinearSCVI with scvi-tools' own query mapping, as far as that runs at all."""


def test_what_scvi_tools_would_do(monkeypatch):
    adata = cells(["a"])
    reference = trained(adata, cls=Stock)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'register_hook'"):
        Stock.load_query_data(cells(["new"], seed=1), reference)
    hook = FCLayers.set_online_update_hooks
    monkeypatch.setattr(
        FCLayers, "set_online_update_hooks", lambda self, first=True: hook(self, first) if self.bias else None
    )
    model = Stock.load_query_data(cells(["new"], seed=1), reference)
    weights = [
        m.module.decoder.factor_regressor.fc_layers[0][0].weight for m in (model, LDVAE.from_linear_scvi(reference))
    ]
    assert (weights[0][:, 3] != 0).any()  # random, for the reference's own batch
    encoder = model.module.z_encoder.encoder.fc_layers[0][0].weight
    before = encoder.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(3, **TRAIN)
    assert not torch.equal(before, encoder)  # frozen, but for weight decay


@pytest.fixture(scope="module")
def kang(real_data):
    """200 cells of each condition and the genes with the highest variance."""
    adata = ad.read_h5ad(real_data / "kang_muscat.h5ad")
    genes = np.sort(np.argsort(np.log1p(adata.X.toarray()).var(axis=0))[-200:])
    conditions = np.asarray(adata.obs["condition"])
    rows = [np.random.default_rng(0).permutation(np.flatnonzero(conditions == c))[:200] for c in ("ctrl", "stim")]
    return [adata[np.sort(each), genes].copy() for each in rows]


@pytest.mark.grid(1)
@pytest.mark.parametrize("batch_key", ["condition", "batch"], ids=["one batch", "two batches"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
@pytest.mark.parametrize("observed", [True, False], ids=["observed", "latent"])
def test_stimulated_cells_on_a_reference_of_controls(kang, batch_key, dispersion, observed):
    control, stimulated = (adata.copy() for adata in kang)
    options = {"dispersion": dispersion, "use_observed_lib_size": observed}
    reference = trained(control, setup={"batch_key": batch_key}, epochs=5, **options)
    n_known = control.obs[batch_key].nunique()
    in_reference = seen_by(reference, control)
    model = map_query(reference, stimulated)
    start, before = seen_by(model, control), snapshot(model, n_known)
    assert_close(in_reference, start, rtol=1e-4)
    elbo, first = model.get_elbo(), model.get_decoder()
    model.train(5, **FAST, batch_size=64, plan_kwargs={"lr": 0.02})
    assert_same(before, snapshot(model, n_known))
    assert_same(start, seen_by(model, control))
    assert model.get_elbo() > elbo + 1
    last = model.get_decoder()
    assert (last.intercept_bg[n_known:] != first.intercept_bg[n_known:]).any(axis=1).all()
    if dispersion == "gene-batch":
        assert (last.theta_bg[n_known:] != first.theta_bg[n_known:]).any(axis=1).all()


@pytest.mark.slow
def test_the_new_batch_s_intercept_is_the_response_to_interferon(kang):
    control, stimulated = (adata.copy() for adata in kang)
    model = map_query(trained(control, setup={"batch_key": "condition"}, epochs=25), stimulated)
    assert (model.get_decoder().intercept_bg[1] == model.get_decoder().intercept_bg[0]).all()
    model.train(20, **FAST, batch_size=32, plan_kwargs={"lr": 0.05})
    decoder = model.get_decoder()
    gain = decoder.intercept_bg[1] - decoder.intercept_bg[0]
    share = [np.asarray(adata.X.sum(axis=0)).ravel() + 0.5 for adata in (control, stimulated)]
    response = np.log(share[1] / share[1].sum()) - np.log(share[0] / share[0].sum())
    assert spearmanr(gain, response)[0] > 0.5
    assert {"ISG15", "IFI6"} <= set(decoder.genes[np.argsort(gain)[-20:]])
