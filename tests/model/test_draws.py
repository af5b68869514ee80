"""The getters of scvi-tools that draw: LinearSCVI's numbers to the bit, and its random state afterwards, by a shorter way."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE, _draws
from tests.helpers import TRAIN, counts

CASES = {
    "default": ({}, {}),
    "observed library": ({}, {"use_observed_lib_size": True}),
    "batches and covariates": ({"batch_key": "batch", "continuous_covariate_keys": ["depth"]}, {}),
    "zinb": ({}, {"gene_likelihood": "zinb"}),
}


def pair(case):
    setup, options = CASES[case]
    adata = counts(150, 30)
    adata.obs["depth"] = np.random.default_rng(0).normal(size=150)
    if "continuous_covariate_keys" in setup:
        # LinearSCVI takes none: the same network, read by scvi-tools' own loops.
        LDVAE.setup_anndata(adata, **setup)
        scvi.settings.seed = 0
        ours = LDVAE(adata, n_latent=3, **options)
        ours.train(2, **TRAIN, kl_warmup=1)
        return ours, None
    models = []
    for cls in (LDVAE, LinearSCVI):
        own = adata.copy()
        cls.setup_anndata(own, **setup)
        scvi.settings.seed = 0
        models.append(cls(own, n_latent=3, **options))
    ours, theirs = models
    ours.train(2, **TRAIN, kl_warmup=1)
    theirs.module.load_state_dict(ours.module.state_dict())
    theirs.module.eval()
    theirs.is_trained_ = True
    return ours, theirs


def called(model, method, **kwargs):
    """The result, and the state of torch's generator."""
    torch.manual_seed(3)
    result = getattr(model, method)(**kwargs)
    return result, torch.rand(1).item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        ("get_latent_representation", {}),
        ("get_latent_representation", {"give_mean": False}),
        ("get_latent_representation", {"return_dist": True}),
        ("get_latent_representation", {"batch_size": 7, "indices": [4, 9, 2, 2], "give_mean": False}),
        ("get_normalized_expression", {}),
        ("get_normalized_expression", {"library_size": 1e4, "batch_size": 40}),
        ("get_normalized_expression", {"gene_list": ["GENE3", "GENE1"], "indices": [5, 1, 100]}),
        ("get_normalized_expression", {"return_numpy": True, "weights": "uniform"}),
        ("get_normalized_expression", {"transform_batch": "all"}),
    ],
    ids=str,
)
def test_numbers_and_random_state_are_those_of_scvi_tools(monkeypatch, case, method, kwargs):
    ours, theirs = pair(case)
    if "gene_list" in kwargs:
        kwargs = {**kwargs, "gene_list": [ours.adata.var_names[3], ours.adata.var_names[1]]}
    if kwargs.get("transform_batch") == "all":
        levels = ours.adata_manager.get_state_registry("batch").categorical_mapping
        kwargs = {"transform_batch": list(levels)}
    ways = []
    real = _draws.draw_library
    monkeypatch.setattr(_draws, "draw_library", lambda *a: ways.append(1) or real(*a))
    got, state = called(ours, method, **kwargs)
    assert ways, "scvi-tools' own loop was used"
    if theirs is None:
        for module in ("_tasks", "_decoding"):
            monkeypatch.setattr(f"ldvae_ext.model.{module}.cells_to_draw", lambda *_: None)
        theirs = ours
    expected, expected_state = called(theirs, method, **kwargs)
    assert state == expected_state
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(got, expected, check_exact=True)
        return
    for one, other in zip(*((each if isinstance(each, tuple) else (each,)) for each in (got, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("part", ["z_encoder", "l_encoder", "decoder"])
def test_a_changed_part_of_the_network_is_called(part):
    ours, _ = pair("default")
    layer = getattr(ours.module, part)
    own, seen = layer.forward, []
    layer.forward = lambda *args: seen.append(1) or own(*args)
    ours.get_normalized_expression()
    assert seen


def test_an_untrained_model_is_refused_as_in_scvi_tools():
    adata = counts(50, 30)
    LDVAE.setup_anndata(adata)
    with pytest.raises(RuntimeError, match="train"):
        LDVAE(adata).get_latent_representation()
