"""The deviance that latents explain, against scvi-tools' own network and distributions in float64."""

from __future__ import annotations

from copy import copy

import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from ldvae_ext.model import LDVAE
from tests.core.brute_force import own_and_new
from tests.datamodule import CountsDataModule
from tests.helpers import TRAIN, counts, untrained
from tests.network_ablation import counts_distribution, encoded

CASES = [
    {"gene_likelihood": "nb"},
    {"gene_likelihood": "nb", "dispersion": "gene-batch", "use_observed_lib_size": True, "latent_distribution": "ln"},
    {"gene_likelihood": "zinb", "use_observed_lib_size": True},
    {"gene_likelihood": "poisson", "latent_distribution": "ln"},
]


def grouped(adata):
    labels = np.resize(["CD4+/CD25 T", "B", None], adata.n_obs)
    adata.obs["type"] = pd.Categorical(np.random.default_rng(5).permutation(labels), categories=["CD4+/CD25 T", "B"])
    return adata


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case.values())))
def model(request):
    return untrained(grouped(counts(n_batches=3)), **request.param)


@pytest.fixture(scope="module")
def trained():
    adata = grouped(counts(n_cells=150, n_batches=3))
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=4)
    model.train(20, kl_warmup="auto", train_size=0.8, **TRAIN)
    return model


def brute_force(model, adata=None, *, mode="zero", latents=None, rows=None, groupby=None, value_k=None):
    """The table, with one whole deviance for each row of it, and what all latents explain in each group."""
    adata = model.adata if adata is None else adata
    cells, codes = encoded(model, adata), adata.obs["type"].cat.codes.to_numpy()
    rows, whole_set = np.arange(len(codes)) if rows is None else rows, range(model.n_latent)
    ((own, new),) = own_and_new(cells.mean, cells.variance, mode, group_n=codes, value_k=value_k)
    names = [f"Z_{k}" for k in whole_set]
    if latents is None:
        kl_k = (cells.mean**2 + cells.variance - 1 - np.log(cells.variance)).mean(axis=0)
        latents = np.argsort(-kl_k)
    x, full = torch.as_tensor(cells.x), counts_distribution(model, cells, own)

    def log_likelihood(rate):
        """Of each cell, with the dispersion and dropout of the full model."""
        px = copy(full)
        px.mu = px.rate = torch.as_tensor(rate)
        return px.log_prob(x).sum(-1).numpy()

    def without(members):
        moved = own.copy()
        moved[:, members] = new[:, members]
        px = counts_distribution(model, cells, moved)
        return deviance(px.rate if model.module.gene_likelihood == "poisson" else px.mu)

    def deviance(rate):
        return 2 * (log_likelihood(x) - log_likelihood(rate))

    share = np.zeros((3, cells.x.shape[1]))
    for b in np.unique(cells.batch[rows]):
        mine = rows[cells.batch[rows] == b]
        share[b] = cells.x[mine].sum(axis=0) / cells.library[mine].sum()
    d_all, d_null = without([]), deviance(share[cells.batch] * cells.library[:, None])
    groups, table = {"all": rows}, []
    if groupby:
        groups = {name: rows[codes[rows] == p] for p, name in enumerate(adata.obs["type"].cat.categories)}
    for group, chosen in groups.items():
        for j, k in enumerate(latents):
            alone = (without([k]) - d_all)[chosen].sum() / d_null[chosen].sum()
            rest = [i for i in whole_set if i not in latents[: j + 1]]
            row = [group, names[k], len(chosen), alone, 1 - without(rest)[chosen].sum() / d_null[chosen].sum()]
            table.append(
                [*row, np.nan if mode == "drop" else 1 - without(whole_set)[chosen].sum() / d_null[chosen].sum()]
            )
    explained = {name: 1 - d_all[chosen].sum() / d_null[chosen].sum() for name, chosen in groups.items()}
    columns = ["group", "factor", "n_cells", "explained_deviance", "cumulative", "without_latents"]
    return pd.DataFrame(table, columns=columns), explained


def assert_same_table(got, expected):
    pd.testing.assert_frame_equal(got, expected, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["zero", "mean", "value"])
def test_the_table_equals_whole_deviances_subtracted(model, mode):
    value = np.array([0.5, -0.5, 0.0, 1.0]) if mode == "value" else None
    expected, whole = brute_force(model, mode=mode, value_k=value)
    got = model.get_explained_deviance(mode=mode, value=value)
    assert_same_table(got, expected)
    assert got["cumulative"].iloc[-1] == pytest.approx(whole["all"], rel=1e-5)
    kl = model.get_latent_kl().mean()
    assert got["factor"].tolist() == kl.sort_values(ascending=False).index.tolist()


@pytest.mark.parametrize("mode", ["zero", "group_mean"])
def test_groups_share_the_null_model_of_all_cells(trained, mode):
    expected, whole = brute_force(trained, mode=mode, groupby="type")
    got = trained.get_explained_deviance("type", mode=mode)
    assert_same_table(got, expected)
    assert got["n_cells"].unique().tolist() == [50]
    for group, share in whole.items():
        assert got[got["group"] == group]["cumulative"].iloc[-1] == pytest.approx(share, rel=1e-5)


def test_dropped_latents_equal_whole_deviances_subtracted():
    model = untrained(grouped(counts(n_batches=3)), latent_distribution="ln")
    expected, _ = brute_force(model, mode="drop")
    assert_same_table(model.get_explained_deviance(mode="drop"), expected)


def test_cells_that_were_held_out_have_a_null_model_of_their_own_and_the_order_of_all(trained):
    held_out = np.asarray(trained.validation_indices)
    assert len(held_out) == 30
    expected, whole = brute_force(trained, rows=held_out)
    got = trained.get_explained_deviance(indices=trained.validation_indices)
    assert_same_table(got, expected)
    assert got["cumulative"].iloc[-1] == pytest.approx(whole["all"], rel=1e-5)
    every = trained.get_explained_deviance()
    assert got["factor"].tolist() == every["factor"].tolist()
    assert abs(every["cumulative"].iloc[-1] - whole["all"]) > 0.001
    assert_same_table(trained.get_explained_deviance(indices=trained.validation_indices, mode="mean"),
                      brute_force(trained, rows=held_out, mode="mean")[0])  # fmt: skip


def test_latents_that_are_not_named_stay_replaced(trained):
    expected, _ = brute_force(trained, latents=[2, 0])
    got = trained.get_explained_deviance(latents=["Z_2", 0])
    assert_same_table(got, expected)
    assert got["factor"].tolist() == ["Z_2", "Z_0"]
    every = trained.get_explained_deviance(latents=["Z_2", "Z_0", "Z_1", "Z_3"])
    assert_same_table(every.iloc[:2], got)
    assert every["cumulative"].iloc[-1] > got["cumulative"].iloc[-1]


def test_batch_size_and_data_loaders_change_nothing(trained):
    expected = trained.get_explained_deviance()
    assert_same_table(trained.get_explained_deviance(batch_size=7), expected)
    loader = CountsDataModule(trained.adata).inference_dataloader(40)
    assert_same_table(trained.get_explained_deviance(dataloader=loader), expected)
    with pytest.raises(ValueError, match="`groupby` needs the obs of an AnnData"):
        trained.get_explained_deviance("type", dataloader=loader)


def test_unseen_cells_are_explained_against_a_null_model_of_their_own(trained):
    unseen = grouped(counts(n_cells=60, n_batches=3, seed=9))
    assert_same_table(trained.get_explained_deviance("type", unseen), brute_force(trained, unseen, groupby="type")[0])
    got = trained.get_explained_deviance(adata=unseen[:, ::-1].copy(), indices=[3, 41, 17], mode="mean")
    assert_same_table(got, brute_force(trained, unseen, rows=np.array([3, 17, 41]), mode="mean")[0])


@pytest.mark.parametrize("mode", ["permute", "prior"])
def test_random_latents_are_refused(trained, mode):
    with pytest.raises(ValueError, match=f"`mode` must be one of 'zero', .*; got '{mode}'"):
        trained.get_explained_deviance(mode=mode)


def test_a_null_model_that_fits_exactly_leaves_nothing_to_explain(trained):
    table = trained.get_explained_deviance(indices=[0])
    assert table[["explained_deviance", "cumulative", "without_latents"]].isna().all(axis=None)


def test_what_is_read_twice_must_not_be_an_iterator(trained):
    loader = list(trained._make_data_loader(trained.adata))
    with pytest.raises(TypeError, match="`dataloader` is read twice"):
        trained.get_explained_deviance(dataloader=iter(loader))
    with pytest.raises(TypeError, match="`dataloader` is read twice"):
        trained.ablate(dataloader=iter(loader), mode="mean")
    assert trained.ablate(dataloader=iter(loader)).n_obs == trained.adata.n_obs
