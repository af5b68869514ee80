"""Small data, models and measurements for the tests of query mapping."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

GENES = 20
FAST = {**TRAIN, "kl_warmup": 1}
HARD = {"weight_decay": 5.0, "lr": 0.05}


def cells(batches, n_each=30, seed=0):
    """Counts of batches that differ, with a label and two categorical covariates."""
    rng = np.random.default_rng(seed)
    adata = counts(n_each * len(batches), GENES, seed=seed)
    names = np.repeat(batches, n_each)
    x = adata.X.toarray()
    for batch in batches:
        effect = np.random.default_rng([ord(c) for c in batch]).gamma(4, 0.25, GENES)
        x[names == batch] = rng.poisson(x[names == batch] * effect)
    x[:, 0] += 1
    adata.X = sparse.csr_matrix(x.astype(np.float32))
    adata.obs["batch"] = pd.Categorical(names)
    adata.obs["label"] = pd.Categorical(rng.permutation(np.resize(["T", "B/x"], len(names))))
    adata.obs["sex"] = pd.Categorical(rng.permutation(np.resize(["f", "m"], len(names))))
    adata.obs["chemistry"] = pd.Categorical(rng.permutation(np.resize(["v1", "v2", "v3"], len(names))))
    adata.obs["age"] = rng.normal(size=len(names))
    return adata


def trained(adata, *, cls=LDVAE, epochs=4, setup=None, **kwargs):
    cls.setup_anndata(adata, **{"batch_key": "batch", **(setup or {})})
    scvi.settings.seed = 0
    model = cls(adata, n_latent=3, **kwargs)
    more = {"kl_warmup": 1} if cls is LDVAE else {}
    model.train(epochs, **TRAIN, **more, batch_size=32, plan_kwargs={"lr": 0.02})
    return model


def snapshot(model, n_batches):
    """What must never change: decoder and statistics of the first batches, and the state of the network."""
    decoder = model.get_decoder()
    out = {
        "weight": decoder.weight_gk,
        "loadings": model.get_loadings().to_numpy(),
        "intercept": decoder.intercept_bg[:n_batches],
    }
    if decoder.theta_bg is not None:
        out["theta"] = decoder.theta_bg if len(decoder.theta_bg) == 1 else decoder.theta_bg[:n_batches]
    for name, value in model.module.state_dict().items():
        if "running" in name or "num_batches" in name or "mean_encoder" in name or "var_encoder" in name:
            out[name] = value.clone().numpy()
    return {name: np.array(value) for name, value in out.items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def seen_by(model, adata):
    """Latents, log libraries and distribution of counts of some cells, from the network."""
    model._validate_anndata(adata)
    tensors = next(iter(model._make_data_loader(adata, batch_size=adata.n_obs)))
    out = model.module.posterior(tensors)
    with torch.no_grad(), model.module.evaluating():
        inputs = model.module._get_generative_input(
            tensors, {"z": model.module.z_encoder.z_transformation(out.mean), "library": out.log_library[:, None]}
        )
        px = model.module.generative(**inputs)["px"]
    parts = {"mean": out.mean, "variance": out.variance, "library": out.log_library, "scale": px.scale}
    for name in ("mu", "theta", "zi_logits", "rate"):
        if getattr(px, name, None) is not None:
            parts[name] = getattr(px, name).expand(px.scale.shape)
    return {name: value.numpy().copy() for name, value in parts.items()}


def assert_close(before, after, rtol=1e-5):
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=rtol, atol=1e-6, err_msg=name)


def map_query(reference, query, **kwargs):
    return LDVAE.load_query_data(query, reference, **kwargs)


def changed(model, **train):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.train(2, **FAST, batch_size=16, plan_kwargs={"lr": 0.02}, **train)
    after = model.module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
