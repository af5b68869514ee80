from __future__ import annotations

import warnings

import numpy as np
import pytest
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts


@pytest.fixture
def model():
    adata = counts()
    LDVAE.setup_anndata(adata)
    return LDVAE(adata, n_latent=2)


def kl_warnings(record):
    return [w for w in record if "KL weight" in str(w.message)]


def test_a_warm_up_that_did_not_end_is_said_once_with_the_remedy(model):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model.train(5, **TRAIN)
    (warning,) = kl_warnings(record)
    assert "KL weight of 0.01" in str(warning.message)
    assert "train(kl_warmup='auto')" in str(warning.message)
    assert warning.filename == __file__
    assert model.final_kl_weight == pytest.approx(4 / 400)
    model.export_to_anndata()
    assert model.adata.uns["ldvae"]["kl_weight"] == model.final_kl_weight


def test_auto_reaches_one_at_half_of_the_epochs(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message="The number of training batches|.*does not have many workers|.*option is deprecated"
        )
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        model.train(8, kl_warmup="auto", log_every_n_steps=1, **TRAIN)
    assert model.final_kl_weight == 1
    weights = model.history["kl_weight"].to_numpy(dtype=float).ravel()
    np.testing.assert_allclose(weights, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


@pytest.mark.parametrize(("epochs", "kl_warmup", "last"), [(1, "auto", 0.0), (3, 2, 1.0), (2, 4, 0.25)])
def test_warm_up_in_epochs(model, epochs, kl_warmup, last):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        model.train(epochs, kl_warmup=kl_warmup, **TRAIN)
    assert model.final_kl_weight == pytest.approx(last)


def test_the_default_warm_up_is_that_of_linear_scvi():
    histories = []
    for cls in (LinearSCVI, LDVAE):
        adata = counts()
        cls.setup_anndata(adata)
        fitted = cls(adata, n_latent=2)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            fitted.train(3, log_every_n_steps=1, **TRAIN)
        histories.append(fitted.history["kl_weight"])
    np.testing.assert_array_equal(*histories)


def test_a_lower_maximum_gets_another_remedy(model):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model.train(4, kl_warmup=1, plan_kwargs={"max_kl_weight": 0.5}, **TRAIN)
    (warning,) = kl_warnings(record)
    assert "`max_kl_weight=0.5` was requested" in str(warning.message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kl_warmup": "auto", "plan_kwargs": {"n_epochs_kl_warmup": 3}},
            r"either `kl_warmup` \('auto'\) or `plan_kwargs\['n_epochs_kl_warmup'\]` \(3\)",
        ),
        ({"kl_warmup": 0}, "`kl_warmup` must be an integer of at least 1; got 0"),
        ({"kl_warmup": "half"}, "`kl_warmup` must be one of 'auto'; got 'half'"),
    ],
)
def test_bad_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.train(4, **arguments, **TRAIN)
    assert not model.is_trained


def test_the_other_arguments_reach_scvi_tools(model):
    model.train(
        3, "cpu", 1, 0.5, 0.25, kl_warmup=1, shuffle_set_split=False, batch_size=10, early_stopping=True,
        datasplitter_kwargs={"drop_last": True}, plan_config={"lr": 0.02}, enable_progress_bar=False,
    )  # fmt: skip
    assert (len(model.train_indices), len(model.validation_indices), len(model.test_indices)) == (30, 15, 15)
    assert list(model.train_indices) == sorted(model.train_indices)
    assert model.trainer.early_stopping_callback is not None
    assert model.trainer.lightning_module.lr == 0.02
    assert model.trainer.num_training_batches == 3


def test_the_remedy_fits_what_was_asked_for(model):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model.train(2, kl_warmup=4, **TRAIN)
    (warning,) = kl_warnings(record)
    assert "A shorter `kl_warmup` than the epochs that were run" in str(warning.message)


def test_the_callers_plan_arguments_are_left_alone(model):
    plan = {"lr": 1e-3}
    model.train(2, kl_warmup=1, plan_kwargs=plan, **TRAIN)
    assert plan == {"lr": 1e-3}
