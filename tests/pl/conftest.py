from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from ldvae_ext import datasets
from ldvae_ext._keys import ABLATION_INFO, export_keys
from ldvae_ext.core import LinearDecoder

mpl.use("Agg")

POPULATIONS = ["CD4+/CD45RA+/CD25- Naive T", "CD8+ Cytotoxic T", "B", "CD34+"]


@pytest.fixture(autouse=True)
def _leaves_no_settings_behind():
    """After each test; figures that it was given are closed."""
    before = mpl.rcParams.copy()
    yield
    changed = {name for name in before if mpl.rcParams[name] != before[name]}
    plt.close("all")
    assert not changed


@pytest.fixture
def shown(monkeypatch) -> list[list[int]]:
    """The open figures at each call of ``plt.show``."""
    calls: list[list[int]] = []
    monkeypatch.setattr(plt, "show", lambda: calls.append(plt.get_fignums()))
    return calls


@pytest.fixture
def exported() -> Callable[..., AnnData]:
    """Makes an AnnData with what an export writes, from a known decoder and posterior."""

    def make(n_latent: int = 5, n_cells: int = 60, n_genes: int = 80, key: str = "ldvae") -> AnnData:
        adata, decoder = datasets.simulate(n_cells, n_genes, n_latent, seed=n_latent)
        rng = np.random.default_rng(0)
        # Ensembl's are the longest names in use.
        adata.var_names = [f"ENSG{gene:011d}.12" if gene % 3 else f"G{gene}" for gene in range(n_genes)]
        decoder = decoder._with(genes=adata.var_names)
        order = rng.permutation(n_latent)
        signs = decoder.signs()[order]
        kl = np.sort(rng.gamma(2.0, 1.0, n_latent))[::-1]
        keys = export_keys(key)
        adata.obsm[keys.latent] = (adata.obsm["z_true"][:, order] * signs).astype(np.float32)
        adata.obsm[keys.variance] = np.full((n_cells, n_latent), 0.1, dtype=np.float32)
        loadings = decoder.reordered(order, signs).centered().weight_gk.astype(np.float32)
        loadings[0] = np.nan
        adata.varm[keys.loadings] = loadings
        adata.var[keys.genes] = np.arange(n_genes) > 0
        adata.uns[keys.info] = {
            "names": decoder.factors[order],
            "order": order,
            "signs": signs,
            "order_by": "kl",
            "statistics": {"kl": kl, "kl_share": kl / kl.sum(), "active_unit": kl / 10},
            "decoder": decoder.to_arrays(),
        }
        adata.obs["population"] = pd.Categorical(rng.choice(POPULATIONS, n_cells), categories=POPULATIONS)
        adata.obs["depth"] = rng.gamma(2.0, 500.0, n_cells)
        return adata

    return make


@pytest.fixture
def ablated() -> Callable[..., AnnData]:
    """Makes what an ablation returns, in which some groups are hurt by some factors."""

    def make(n_latent: int = 5, n_groups: int = 4, n_cells: int = 200) -> AnnData:
        rng = np.random.default_rng(1)
        groups = [*POPULATIONS, *(f"CD4+/CD45RA+/CD25- Naive T, subset {i}" for i in range(n_groups))][:n_groups]
        group_n = np.concatenate([np.arange(n_groups), rng.integers(0, n_groups, n_cells - n_groups)])
        effect_pk = rng.normal(4.0, 6.0, (n_groups, n_latent))
        return AnnData(
            X=(effect_pk[group_n] + rng.normal(size=(n_cells, n_latent))).astype(np.float32),
            obs=pd.DataFrame(
                {"population": pd.Categorical.from_codes(group_n.tolist(), categories=pd.Index(groups))},
                index=[f"cell_{i}" for i in range(n_cells)],
            ),
            var=pd.DataFrame(index=[f"Z_{k}" for k in range(n_latent)]),
            uns={ABLATION_INFO: {"mode": "zero", "unit": "nats"}},
        )

    return make


@pytest.fixture
def readable(exported) -> Callable[..., AnnData]:
    """Makes an export that tools can work with: a decoder of all genes but the first, libraries, batches, named groups."""

    def make(n_latent: int = 5, n_groups: int = 4, *, n_batches: int = 1, link: str = "softmax") -> AnnData:
        adata = exported(n_latent, n_cells=max(60, 4 * n_groups))
        rng = np.random.default_rng(2)
        old = LinearDecoder.from_arrays(adata.uns["ldvae"]["decoder"])
        genes = adata.var_names[1:]
        decoder = LinearDecoder(
            weight_gk=old.weight_gk[1:],
            intercept_bg=old.intercept_bg[:, 1:] + rng.normal(0, 0.5 * (n_batches > 1), (n_batches, len(genes))),
            genes=genes,
            batches=[f"lane {b}" for b in range(n_batches)],
            factors=old.factors,
            theta_bg=old.theta_bg[:, 1:],
            link=link,
        )
        adata.uns["ldvae"] |= {"decoder": decoder.to_arrays(), "setup": {"batch_key": "lane"}}
        adata.obs[export_keys("ldvae").library] = np.asarray(adata.X.sum(axis=1)).ravel()
        adata.obs["lane"] = rng.choice(decoder.batches, adata.n_obs)
        groups = [*POPULATIONS, *(f"{POPULATIONS[0]}, subset {i}" for i in range(n_groups))][:n_groups]
        adata.obs["population"] = pd.Categorical.from_codes(
            (np.arange(adata.n_obs) % n_groups).tolist(), categories=pd.Index(groups)
        )
        return adata

    return make


@pytest.fixture
def rotated(exported) -> Callable[..., AnnData]:
    """Makes an export that was made through a rotation; what the network has is a mixture of the known factors."""

    def make(n_latent: int = 5, **kwargs: Any) -> AnnData:
        adata = exported(n_latent, **kwargs)
        info = adata.uns[kwargs.get("key", "ldvae")]
        matrix_kk = np.linalg.qr(np.random.default_rng(4).normal(size=(n_latent, n_latent)))[0]
        info["rotation"] = {
            "method": "varimax",
            "matrix": matrix_kk,
            "latents": np.array([f"Z_{k}" for k in range(n_latent)]),
        }
        info["names"] = np.array([f"F_{k}" for k in range(n_latent)])
        return adata

    return make


@pytest.fixture
def consensus() -> Callable[..., AnnData]:
    """Adds what the consensus of an ensemble writes, with factors from reproducible to not."""

    def add(
        adata: AnnData,
        n_factors: int = 5,
        n_runs: int = 4,
        *,
        resample: str = "none",
        key: str = "ldvae_consensus",
        n_failed: int = 0,
    ) -> AnnData:
        rng = np.random.default_rng(n_factors + n_runs)
        level_k = np.linspace(0.97, 0.2, n_factors)
        cosine_mk = np.clip(level_k + rng.normal(0, 0.05, (n_runs, n_factors)), 0, 1)
        mean_k = cosine_mk.mean(axis=0)
        adata.uns[key] = {
            "names": np.array([f"C_{k}" for k in range(n_factors)]),
            "statistics": {"reproducibility": mean_k, "lowest": cosine_mk.min(axis=0), "kl": 3 * mean_k},
            "flag": np.array(["stable" if r >= 0.8 else "unstable" if r < 0.6 else "uncertain" for r in mean_k]),
            "cosine": cosine_mk,
            "agreement": np.eye(n_runs),
            "seeds": np.arange(n_runs),
            "resample": resample,
            "thresholds": np.array([0.6, 0.8]),
            "n_failed": n_failed,
        }
        return adata

    return add
