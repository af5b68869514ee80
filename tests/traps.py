"""A LinearSCVI and an LDVAE with one network, and what that network says without either class."""

from __future__ import annotations

import numpy as np
import scvi
import torch
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.helpers import untrained


def pair(adata, **kwargs):
    """The same network in both classes."""
    stock = untrained(adata.copy(), cls=LinearSCVI, **kwargs)
    return stock, ours_of(stock)


def ours_of(stock):
    """LDVAE with the network of a LinearSCVI, on data of its own."""
    adata = stock.adata.copy()
    for name in [name for name in adata.obs if name.startswith("_scvi")]:
        del adata.obs[name]
    LDVAE.setup_anndata(adata, batch_key="batch")
    ours = LDVAE(adata, **{**stock.init_params_["non_kwargs"], **stock.init_params_["kwargs"]["model_kwargs"]})
    ours.module.load_state_dict(stock.module.state_dict())
    ours.module.eval()
    ours.is_trained_ = True
    return ours


def dense(adata):
    return np.asarray(adata.X.toarray() if sparse.issparse(adata.X) else adata.X, dtype=float)


def codes(adata):
    return adata.obs["batch"].cat.codes.to_numpy().astype(np.int64)


def encoded(model):
    """Posteriors of z (of u under "ln") and of the log library, straight from the encoders."""
    with torch.no_grad():
        x = torch.as_tensor(dense(model.adata), dtype=torch.float32)
        out = model.module.eval().inference(x, torch.as_tensor(codes(model.adata)).reshape(-1, 1))
    return out["qz"], out["ql"]


def logits(model, z, *categories):
    """The linear head of the network, run as it is in evaluation mode; all cells in the first level of everything."""
    z = torch.as_tensor(z, dtype=torch.float32)
    with torch.no_grad():
        levels = [torch.full((len(z), 1), code) for code in (categories or (0,))]
        return model.module.eval().decoder.factor_regressor(z, *levels).numpy().astype(float)


def built(adata, cls=LDVAE, **kwargs):
    cls.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    return cls(adata, n_latent=4, **kwargs)
