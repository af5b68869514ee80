"""Data that are not those of the set-up: what LinearSCVI gets wrong, shown wrong there and right here.

T28 to T36 number the page on defects; see ``test_traps.py``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
from scvi.external import SOLO
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from ldvae_ext.model._fields import matched_column
from tests.helpers import TRAIN, counts, untrained
from tests.traps import built, codes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*KL weight|.*fewer than 3 cells|.*does not match those used|.*unnormalized count|This dataset has some empty|Training history cannot"
)
BOTH = pytest.mark.parametrize("cls", [LinearSCVI, LDVAE])


def cells():
    adata = counts(120, n_batches=2)
    adata.obs["type"] = pd.Categorical(np.resize(["T", "B"], 120))
    return adata


@BOTH
def test_a_training_reads_the_batches_of_its_own_set_up(cls):
    # T28
    loadings = []
    for second in (None, "type"):
        adata = cells()
        model = built(adata, cls)
        if second is not None:
            cls.setup_anndata(adata, batch_key=second)
            cls(adata)
        scvi.settings.seed = 1
        model.train(3, **TRAIN)
        loadings.append(model.module.decoder.factor_regressor.fc_layers[0][0].weight.detach().numpy())
    assert np.array_equal(*loadings) == (cls is LDVAE)


@BOTH
def test_counts_that_were_normalised_in_place_are_not_read(cls):
    # T29
    model = built(cells(), cls)
    model.is_trained_ = True
    before = model.get_latent_representation()
    model.adata.X = np.log1p(model.adata.X.toarray())
    if cls is LDVAE:
        with pytest.raises(ValueError, match="no longer those of `setup_anndata`"):
            model.get_latent_representation()
    else:
        assert np.abs(model.get_latent_representation() - before).max() > 0.1


@BOTH
def test_genes_are_found_by_name(cls, tmp_path):
    # T30
    model = untrained(cells(), cls=cls)
    expected = model.get_latent_representation()
    turned = cells()[:, ::-1].copy()
    assert np.allclose(model.get_latent_representation(turned), expected, atol=1e-5) == (cls is LDVAE)
    model.save(tmp_path / "model")
    if cls is LDVAE:
        with pytest.raises(ValueError, match="genes of `adata` are in another order"):
            cls.load(tmp_path / "model", turned, accelerator="cpu")
    else:
        back = cls.load(tmp_path / "model", turned, accelerator="cpu")
        assert not np.allclose(back.get_loadings().loc["gene0"], model.get_loadings().loc["gene0"])


@BOTH
def test_a_group_without_cells_is_not_compared(cls):
    # T31
    model = untrained(cells(), cls=cls)
    model.adata.obs["merged"] = model.adata.obs["type"].cat.add_categories(["gone"])
    if cls is LDVAE:
        assert set(model.differential_expression(groupby="merged", silent=True)["group1"]) == {"T", "B"}
    else:
        with pytest.raises(ZeroDivisionError):
            model.differential_expression(groupby="merged", silent=True)


@BOTH
@pytest.mark.parametrize("known", [["1", "2"], [1, 2]])
@pytest.mark.parametrize("given", [["1", "2"], [1, 2], [1.0, 2.0]])
def test_levels_may_be_numbers_here_and_text_there(cls, known, given):
    # T32
    adata, other = cells(), cells()
    adata.obs["batch"], other.obs["batch"] = np.resize(np.array(known), 120), np.resize(np.array(given), 120)
    model = untrained(adata, cls=cls)
    expected = model.get_normalized_expression(n_samples=1).shape
    if cls is LDVAE:
        np.testing.assert_array_equal(model.ablate(other).X, model.ablate().X)
        assert model.get_normalized_expression(other, transform_batch=given[0]).shape == expected
        query = LDVAE.load_query_data(other, model, accelerator="cpu")
        assert query.get_decoder().batches.tolist() == ["1", "2"]
        assert other.obs["batch"].tolist() == np.resize(np.array(given), 120).tolist(), "the column of the user stays"
    elif isinstance(known[0], str) is not isinstance(given[0], str):
        with pytest.raises((ValueError, TypeError)):
            model.get_normalized_expression(other)
    else:
        assert model.get_normalized_expression(other).shape == expected


@BOTH
@pytest.mark.filterwarnings("ignore:overflow encountered|invalid value encountered")
def test_the_prior_of_the_library_is_right_for_float16(cls):
    # T33
    adata = cells()
    adata.X = (adata.X.toarray() * 2000).clip(0, 60000).astype(np.float16)
    totals = adata.X.astype(np.float64).sum(axis=1)
    expected = [np.log(totals[codes(adata) == code]).mean() for code in range(2)]
    found = built(adata, cls).module.library_log_means.numpy().ravel()
    assert np.allclose(found, expected, rtol=1e-3) == (cls is LDVAE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_a_second_training_continues_the_first():
    # T34
    last = {}
    for name, cls, options in (
        ("LinearSCVI", LinearSCVI, {}),
        ("LDVAE", LDVAE, {}),
        ("evaluation mode", LDVAE, {"evaluation_mode": True}),
    ):
        for epochs in ([60], [30, 30]):
            model = built(counts(300, 40, 2), cls)
            for i, n in enumerate(epochs):
                scvi.settings.seed = i
                more = options if i else {}
                plan = {"lr": 1e-3, "n_epochs_kl_warmup": None}
                model.train(n, **TRAIN, train_size=1.0, batch_size=64, plan_kwargs=plan, **more)
            last[name, len(epochs)] = float(model.history["elbo_train"].iloc[-5:].mean().iloc[0])
    # The loss of the first training, in which the new optimizer makes a difference of some percent.
    assert last["LDVAE", 2] <= 1.01 * last["LDVAE", 1]
    # In evaluation mode, dropout is off and batch norms are frozen: another loss, and a lower one.
    assert last["LinearSCVI", 2] < 0.97 * last["LDVAE", 2]
    np.testing.assert_allclose(last["evaluation mode", 2], last["LinearSCVI", 2], rtol=1e-3)


@BOTH
def test_other_models_of_scvi_tools_take_a_trained_model(cls):
    # T35
    model = built(cells(), cls)
    model.is_trained_ = True
    if cls is LDVAE:
        assert SOLO.from_scvi_model(model, restrict_to_batch="b1").adata.n_obs == 180
    else:
        with pytest.raises(KeyError, match="state_registry"):
            SOLO.from_scvi_model(model, restrict_to_batch="b1")


@BOTH
def test_a_model_is_saved_also_if_its_anndata_cannot_be(cls, tmp_path):
    # T36
    model = untrained(cells(), cls=cls)
    model.adata.obs["note"] = pd.Series([1, "x"] * 60, index=model.adata.obs_names, dtype=object)
    with pytest.raises((TypeError, ValueError)) as raised:
        model.save(tmp_path / "model", save_anndata=True)
    assert (tmp_path / "model" / "model.pt").exists() == (cls is LDVAE)
    if cls is LDVAE:
        assert "'note'" in str(raised.value)
        assert f"The model was saved to {tmp_path / 'model'} without it." in str(raised.value)
        assert cls.load(tmp_path / "model", cells(), accelerator="cpu").n_latent == 4


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        (["3", "1"], [1, 2], [3, 1]),
        (["07", "7"], [1, 2], None),
        (["1.0", "1"], [0, 1, 2], None),
        (["1e1", "10"], [0, 1], None),
        (["nan", "0"], [0, 1], None),
        ([3.0, 1.0], ["1", "2"], ["3", "1"]),
        (["3.5"], [1.5, 2.5], [3.5]),
    ],
)
def test_a_new_level_is_never_merged_with_another(given, known, expected):
    column = pd.Series(given)
    if expected is None:
        with pytest.raises((TypeError, ValueError), match="`b`: "):
            matched_column(column, known, "b", extend=True)
    else:
        assert matched_column(column, known, "b", extend=True).tolist() == expected


def test_a_complete_folder_is_not_touched_by_a_save_that_is_refused(tmp_path):
    model = untrained(cells())
    model.save(tmp_path / "model", save_anndata=True)
    before = (tmp_path / "model" / "adata.h5ad").read_bytes()
    model.adata.obs["note"] = pd.Series([1, "x"] * 60, index=model.adata.obs_names, dtype=object)
    with pytest.raises(ValueError, match="already exists"):
        model.save(tmp_path / "model", save_anndata=True)
    assert (tmp_path / "model" / "adata.h5ad").read_bytes() == before


def test_a_model_is_saved_also_if_a_table_of_its_anndata_cannot_be(tmp_path):
    model = untrained(cells())
    model.adata.obsm["table"] = pd.DataFrame({"note": [1, "x"] * 60}, index=model.adata.obs_names, dtype=object)
    with pytest.raises(ValueError, match=r"The model was saved to .* without it"):
        model.save(tmp_path / "model", save_anndata=True)
    found = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert found == ["model.json", "model.pt", "weights.safetensors"]
