"""Training and keeping a model: what LinearSCVI gets wrong, shown wrong there and right here.

T1 to T36 number the page on defects; see ``test_traps.py``.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scvi
import torch
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext import datasets
from ldvae_ext.model import LDVAE
from tests.datamodule import CountsDataModule
from tests.helpers import TRAIN, counts, network, untrained
from tests.traps import built, codes, dense, encoded, logits, pair

# LDVAE warns where training ends before the KL term has its full weight; LinearSCVI trains the same and says nothing.
SHORT = {**TRAIN, "plan_kwargs": {"n_epochs_kl_warmup": 1}}


def test_kl_term_reaches_its_full_weight_or_a_warning_says_that_it_did_not():
    # T4
    said = {}
    for cls in (LinearSCVI, LDVAE):
        model = built(counts(n_batches=3), cls)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            model.train(10, log_every_n_steps=1, **TRAIN)
        weights = model.history["kl_weight"].to_numpy(dtype=float).ravel()
        np.testing.assert_allclose(weights, np.arange(10) / 400, err_msg="of 400 epochs, though there are 10")
        said[cls] = any("KL weight of 0.02" in str(w.message) for w in record)
    assert said == {LinearSCVI: False, LDVAE: True}
    ours = model
    ours.export_to_anndata()
    assert ours.adata.uns["ldvae"]["kl_weight"] == weights[-1]

    ours = built(counts(n_batches=3))
    ours.train(10, kl_warmup="auto", log_every_n_steps=1, **TRAIN)
    weights = ours.history["kl_weight"].to_numpy(dtype=float).ravel()
    np.testing.assert_allclose(weights, np.minimum(np.arange(10) / 5, 1))
    ours.export_to_anndata()
    assert ours.adata.uns["ldvae"]["kl_weight"] == 1


def test_query_training_leaves_the_loadings_as_they_are():
    # T9
    assert not hasattr(LinearSCVI, "load_query_data")
    adata = counts(n_cells=120, n_batches=3)
    is_new = (adata.obs["batch"] == "b2").to_numpy()
    reference_cells, query = adata[~is_new].copy(), adata[is_new].copy()
    reference = built(reference_cells)
    reference.train(3, **SHORT)
    before, z = reference.get_decoder(), reference.get_latent_representation()
    model = LDVAE.load_query_data(query, reference)
    start = model.get_decoder()
    assert model.batch_norm_initial_share == reference.batch_norm_initial_share < 1
    model.train(3, batch_size=16, kl_warmup=1, **{**TRAIN, "plan_kwargs": {"lr": 0.05, "weight_decay": 1.0}})
    after = model.get_decoder()
    np.testing.assert_array_equal(after.weight_gk, before.weight_gk)
    np.testing.assert_array_equal(after.theta_bg, before.theta_bg)
    np.testing.assert_array_equal(model.get_loadings(), reference.get_loadings())
    np.testing.assert_array_equal(after.intercept_bg[:2], before.intercept_bg)
    np.testing.assert_allclose(model.get_latent_representation(reference_cells), z, atol=1e-6)
    assert after.batches.tolist() == [*before.batches, "b2"]
    assert np.abs(after.intercept_bg[2] - start.intercept_bg[2]).max() > 1e-3


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`:UserWarning")
def test_library_prior_of_a_data_module_is_that_of_its_cells():
    # T10
    adata = counts(n_batches=3)
    totals, batch = dense(adata).sum(axis=1), codes(adata)
    mean = [np.log(totals[batch == code]).mean() for code in range(3)]
    variance = [np.log(totals[batch == code]).var() for code in range(3)]

    stock = LinearSCVI(registry=CountsDataModule(adata, model_name="LinearSCVI").registry)
    assert (stock.module.library_log_means == 0).all(), "one count"
    assert (stock.module.library_log_vars == 1).all()

    datamodule = CountsDataModule(adata, train_size=0.8)
    later = LDVAE(registry=datamodule.registry)
    later.train(2, datamodule=datamodule, **SHORT)
    for model in (built(adata.copy()), LDVAE(datamodule=datamodule), later):
        np.testing.assert_allclose(model.module.library_log_means, [mean], rtol=1e-5)
        np.testing.assert_allclose(model.module.library_log_vars, [variance], rtol=1e-4)


def test_a_latent_library_can_be_minified():
    # T11
    stock, ours = pair(counts(n_batches=3))
    for model in (stock, ours):
        mean, variance = model.get_latent_representation(return_dist=True)
        model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
    with pytest.raises(ValueError, match="do not use observed library size"):
        stock.minify_adata()
    library, z = encoded(ours)[1].loc.numpy().ravel(), encoded(ours)[0].loc.numpy()
    expected = network(ours, z, codes(ours.adata), np.exp(library)).mu
    ours.minify_adata()
    assert ours.adata.X.nnz == 0
    got = ours.get_normalized_expression(use_posterior_mean=True, library_size="latent")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_heads_that_the_likelihood_does_not_use_are_neither_computed_nor_trained():
    # T12
    idle = {}
    for cls in (LinearSCVI, LDVAE):
        model = built(counts(n_batches=3), cls, use_observed_lib_size=True)
        calls = []
        model.module.decoder.px_dropout_decoder.register_forward_hook(lambda *_args, calls=calls: calls.append(1))
        model.module.train()
        (tensors,) = model._make_data_loader(model.adata)
        model.module(tensors)[2].loss.backward()
        parameters = model.module.named_parameters()
        idle[cls] = {name.split(".")[0] for name, value in parameters if value.requires_grad and value.grad is None}
        assert bool(calls) == (cls is LinearSCVI)
        before = {n: v.clone() for n, v in model.module.state_dict().items() if "px_dropout" in n or "l_encoder" in n}
        model.train(2, **SHORT)
        after = model.module.state_dict()
        unchanged = [torch.equal(value, after[name]) for name, value in before.items()]
        assert all(unchanged) == (cls is LDVAE)
    assert idle == {LinearSCVI: {"decoder", "l_encoder"}, LDVAE: set()}, "what DistributedDataParallel waits for"


def test_running_statistics_of_the_batch_norm_can_be_judged_and_renewed():
    # T14
    adata = datasets.pbmc68k()[:, :100].copy()
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=4)
    model.train(6, train_size=0.8, batch_size=100, **SHORT)
    batch_norm = model.module.decoder.factor_regressor.fc_layers[0][1]
    assert model.batch_norm_initial_share == pytest.approx(0.99**36)

    def fed(rows):
        """What the batch norm is fed at the posterior means."""
        z = torch.as_tensor(model.get_latent_representation(indices=rows))
        with torch.no_grad():
            return model.module.decoder.factor_regressor.fc_layers[0][0](z)

    old = batch_norm.running_var.clone()
    assert old.min() > 0.6, "still 0.7 of the initial 1"
    held_out = model.validation_indices

    def error():
        loss = model.get_reconstruction_error(indices=held_out, use_posterior_mean=True)
        return float(loss["reconstruction_loss"])

    before = error()
    report = model.recalibrate_batch_norm()
    assert report["before"] == pytest.approx(before)
    assert report["kept"] == (report["after"] < report["before"])
    assert error() == pytest.approx(min(report["before"], report["after"]))
    if report["kept"]:
        assert not torch.equal(batch_norm.running_var, old)
    else:
        assert torch.equal(batch_norm.running_var, old)
    assert not hasattr(LinearSCVI, "recalibrate_batch_norm")
    assert fed(model.train_indices).var(dim=0).median() < 0.5 * old.median()


@pytest.mark.filterwarnings("ignore:Last batch will have a small size:UserWarning")
def test_a_last_minibatch_of_one_cell_trains():
    # T18
    adata = counts(n_cells=50, n_batches=3)
    split = {"train_size": 0.82, "validation_size": 0.18, "batch_size": 10}
    stock, ours = built(adata.copy(), LinearSCVI), built(adata.copy())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        stock.train(2, **split, **SHORT)
    sizes = []
    ours.module.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0]["X"])))
    ours.train(2, **split, **SHORT)
    assert sorted(sizes) == 2 * [1] + 8 * [10], "every cell is trained on"
    batch_norm = ours.module.decoder.factor_regressor.fc_layers[0][1]
    assert int(batch_norm.num_batches_tracked) == 8, "one cell has no variance to learn from"


def lines_of_example(cls):
    return [line.split(">>> ")[1] for line in cls.__doc__.splitlines() if ">>> " in line]


def test_the_example_in_the_docstring_runs(monkeypatch):
    # T19
    for module in (scvi.model.base._training_mixin, __import__("ldvae_ext.model._training", fromlist=["_"])):
        monkeypatch.setattr(module, "get_max_epochs_heuristic", lambda _n_obs: 2)
    adata = counts(n_batches=3)
    lines = lines_of_example(LinearSCVI)
    stock = {"scvi": scvi, "anndata": SimpleNamespace(read_h5ad=lambda _path: adata), "path_to_anndata": ""}
    assert lines[-1] == 'adata.var["loadings"] = vae.get_loadings()'
    for line in lines[:-1]:
        exec(line, stock)
    with pytest.raises(ValueError, match="Cannot set a DataFrame with multiple columns"):
        exec(lines[-1], stock)

    names = {"adata": counts(n_batches=3)}
    lines = lines_of_example(LDVAE)
    assert len(lines) >= 5
    for line in lines:
        exec(line, names)
    np.testing.assert_allclose(
        np.abs(names["adata"].varm["ldvae_loadings"]).sum(),
        np.abs(names["model"].get_loadings() - names["model"].get_loadings().mean()).to_numpy().sum(),
        rtol=1e-5,
    )


@pytest.mark.filterwarnings("ignore:This dataset has some empty cells:UserWarning")
def test_an_empty_cell_does_not_widen_the_library_prior():
    # T21
    adata = counts(n_batches=1)
    matrix = dense(adata)
    matrix[7] = 0
    adata.X = matrix.astype(np.float32)
    expected = np.log(np.delete(matrix, 7, axis=0).sum(axis=1)).var()
    stock = built(adata.copy(), LinearSCVI)
    assert stock.module.library_log_vars.item() > 3 * expected
    with pytest.warns(UserWarning, match="cell7"):
        ours = built(adata.copy())
    assert ours.module.library_log_vars.item() == pytest.approx(expected, rel=1e-5)


def test_a_subclass_opens_what_linear_scvi_saved(tmp_path):
    # T22
    class Subclass(LinearSCVI):
        pass

    stock = untrained(counts(n_batches=3), cls=LinearSCVI)
    stock.save(tmp_path / "m", save_anndata=True)
    with pytest.raises(ValueError, match="different class"):
        Subclass.load(tmp_path / "m")
    for ours in (LDVAE.load(tmp_path / "m"), LDVAE.from_linear_scvi(stock)):
        z = ours.get_latent_representation()
        np.testing.assert_array_equal(z, encoded(ours)[0].loc)
        np.testing.assert_array_equal(ours.get_loadings(), stock.get_loadings())
        np.testing.assert_allclose(logits(ours, z), logits(stock, z), atol=1e-6)


@pytest.mark.parametrize("layer", [None, "counts"])
def test_sparse_arrays_are_counts_like_any_other(layer):
    # T27
    adata = counts(n_batches=3)
    if layer is None:
        adata.X = sparse.csr_array(adata.X)
    else:
        adata.layers[layer], adata.X = sparse.csr_array(adata.X), None
    with pytest.raises(TypeError, match="not understood"):
        LinearSCVI.setup_anndata(adata.copy(), batch_key="batch", layer=layer)
    from_array = untrained(adata, setup={"layer": layer}).get_latent_representation()
    np.testing.assert_array_equal(from_array, encoded(untrained(counts(n_batches=3)))[0].loc)


def test_a_minified_model_gives_its_latents_again_after_loading(tmp_path):
    # T27
    for model in pair(counts(n_batches=3), use_observed_lib_size=True):
        mean, variance = model.get_latent_representation(return_dist=True)
        model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
        model.minify_adata()
        model.save(tmp_path / "m", save_anndata=True, overwrite=True)
        back = type(model).load(tmp_path / "m")
        again = back.get_latent_representation()
        if isinstance(model, LDVAE):
            np.testing.assert_allclose(again, mean, atol=1e-6)
        else:
            np.testing.assert_array_equal(again, np.broadcast_to(again[0], again.shape), err_msg="one for all cells")
