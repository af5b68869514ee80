"""Every mode of the ablation against scvi-tools' own network in float64, and what its numbers may not depend on."""

from __future__ import annotations

import itertools
import tracemalloc
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from threadpoolctl import threadpool_limits

from ldvae_ext.core.plan import MODES, SCHEMES
from ldvae_ext.kernels.threads import compiled
from ldvae_ext.model import LDVAE
from tests.core.brute_force import own_and_new
from tests.datamodule import CountsDataModule
from tests.helpers import TRAIN, counts, untrained
from tests.network_ablation import counts_distribution, encoded, network_ablation

OPTIONS = ("gene_likelihood", "dispersion", "n_batches", "use_observed_lib_size", "latent_distribution")
# Half of all combinations: any two options occur in all their pairs, for each likelihood.
CASES = [
    (
        likelihood,
        *(levels[i] for levels, i in zip(([*["gene", "gene-batch"]], (1, 3), (False, True), ("normal", "ln")), at)),
    )
    for likelihood, at in itertools.product(("nb", "zinb", "poisson"), itertools.product((0, 1), repeat=4))
    if sum(at) % 2 == 0
]
VALUE = np.array([0.3, -1.0, 0.0, 2.0])
# What each mode needs besides its name.
NEEDED = {"group_mean": {"groupby": "type"}, "permute": {"seed": 3}, "prior": {"seed": 3}, "value": {"value": VALUE}}
EVERY_MODE = [mode for mode in MODES if mode != "drop"]


def grouped(adata):
    """A column of groups, one of which has a slash in its name, and cells without a group."""
    labels = np.resize(["CD4+/CD25 T", "B", None, "NK"], adata.n_obs)
    adata.obs["type"] = pd.Categorical(
        np.random.default_rng(5).permutation(labels), categories=["NK", "CD4+/CD25 T", "B"]
    )
    return adata


@cache
def model_of(case):
    options = dict(zip(OPTIONS, case, strict=True))
    model = untrained(grouped(counts(n_batches=options.pop("n_batches"))), **options)
    with torch.no_grad():  # posteriors as wide as trained ones
        for head in (model.module.z_encoder.mean_encoder, model.module.z_encoder.var_encoder):
            head.weight *= 0.1
    return model


def brute_force(model, adata=None, mode="zero", **arguments):
    adata = model.adata if adata is None else adata
    codes = adata.obs["type"].cat.codes.to_numpy()
    return network_ablation(model, adata, mode=mode, group_n=codes, value_k=VALUE, **arguments)


def assert_equal_to(got, expected, tolerance):
    """To a share of the largest effect."""
    largest = np.nanmax(np.abs(expected), initial=0.0)
    assert np.isfinite(largest)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.grid
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_each_mode_equals_scvi_tools_network(case, mode):
    if mode == "drop" and case[-1] != "ln":
        mode = "zero"  # which a normal latent has in its place
    model, seed = model_of(case), NEEDED.get(mode, {}).get("seed", 0)
    expected = brute_force(model, mode=mode, seed=seed).sum(axis=1)
    assert_equal_to(model.ablate(mode=mode, **NEEDED.get(mode, {})).X, expected, 1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("case", "mode"), list(zip(CASES[1::2], itertools.cycle(EVERY_MODE))))
def test_each_scheme_with_sets_and_orders_equals_scvi_tools_network(case, mode, scheme):
    model = model_of(case)
    for latents in (None, ["Z_3", 0], {"a/b": ["Z_1", 2], "Z_0": [0]}):
        if scheme == "keep_top" and isinstance(latents, dict):
            continue
        arguments = {"mode": mode, "scheme": scheme, "latents": latents}
        expected = brute_force(model, **arguments, seed=NEEDED.get(mode, {}).get("seed", 0)).sum(axis=1)
        assert_equal_to(model.ablate(**arguments, **NEEDED.get(mode, {})).X, expected, 1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("case", [case for case in CASES if case[2] == 3], ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("mode", ["zero", "permute", "prior"])
def test_samples_and_other_batches_equal_scvi_tools_network(case, mode):
    model, refit = model_of(case), case[0] == "zinb"
    got = model.ablate(
        mode=mode,
        use_posterior="samples",
        n_samples=3,
        seed=4,
        transform_batch=["b2", "CD4+/CD25 T"],
        refit_heads=refit,
    )
    expected = brute_force(model, mode=mode, n_samples=3, seed=4, batches=(2, 0), refit_heads=refit).sum(axis=1)
    assert_equal_to(got.X, expected, 1e-5)
    assert got.uns["ldvae_ablation"]["transform_batch"].tolist() == ["b2", "CD4+/CD25 T"]


@pytest.mark.grid
@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("case", CASES[3::8], ids=lambda case: "-".join(map(str, case)))
def test_genes_by_group_equal_scvi_tools_network(case, mode):
    model, codes = model_of(case), model_of(case).adata.obs["type"].cat.codes.to_numpy()
    change_ngs = brute_force(model, mode=mode, seed=NEEDED.get(mode, {}).get("seed", 0))
    expected = np.concatenate([change_ngs[codes == p].mean(axis=0) for p in range(3)])
    got = model.ablate_genes("type", mode=mode, **{k: v for k, v in NEEDED.get(mode, {}).items() if k != "groupby"})
    assert_equal_to(got.X, expected, 1e-5)
    assert got.obs["group"].tolist() == np.repeat(["NK", "CD4+/CD25 T", "B"], 20).tolist()
    assert got.obs["gene"].tolist() == model.adata.var_names.tolist() * 3
    assert got.obs["n_cells"].tolist() == np.repeat([np.sum(codes == p) for p in range(3)], 20).tolist()


@pytest.fixture(scope="module")
def trained():
    adata = grouped(counts(n_cells=150, n_batches=3))
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=4)
    model.train(20, kl_warmup="auto", train_size=0.8, **TRAIN)
    return model


WITH_SAMPLES = [(mode, "mean") for mode in EVERY_MODE] + [
    ("zero", "samples"),
    ("permute", "samples"),
    ("prior", "samples"),
]
every_way = pytest.mark.parametrize(("mode", "use_posterior"), WITH_SAMPLES)


@every_way
def test_cells_get_the_same_whichever_of_them_are_asked_for(trained, mode, use_posterior):
    arguments = {"mode": mode, "use_posterior": use_posterior, **NEEDED.get(mode, {})}
    whole = trained.ablate(**arguments).X
    mask = np.arange(150) % 3 == 1
    for indices in ([140, 3, 77], np.array([6]), mask, np.random.default_rng(0).permutation(150)):
        some = trained.ablate(indices=indices, **arguments)
        assert_equal_to(some.X, whole[indices], 1e-6)
        assert some.obs_names.tolist() == trained.adata.obs_names[indices].tolist()
    with pytest.warns(UserWarning, match="Observation names are not unique"):
        assert_equal_to(trained.ablate(indices=[9, 2, 9], **arguments).X, whole[[9, 2, 9]], 1e-6)


@every_way
def test_a_data_loader_brings_the_same_cells(trained, mode, use_posterior):
    arguments = {"mode": mode, "use_posterior": use_posterior, **NEEDED.get(mode, {})}
    plain = trained._make_data_loader(trained.adata, batch_size=33)
    module = CountsDataModule(trained.adata).inference_dataloader(40)
    for loader in (plain, module):
        if mode == "group_mean":
            with pytest.raises(ValueError, match="`groupby` needs the obs of an AnnData; a `dataloader` brings none"):
                trained.ablate(dataloader=loader, **arguments)
            continue
        got = trained.ablate(dataloader=loader, **arguments)
        assert_equal_to(got.X, trained.ablate(**arguments).X, 1e-6)
        genes = trained.ablate_genes(dataloader=loader, **arguments)
        assert_equal_to(genes.X, trained.ablate_genes(**arguments).X, 1e-6)
        assert set(genes.obs["group"]) == {"all"}


@every_way
def test_numbers_do_not_depend_on_batch_size_or_threads_and_two_calls_are_equal_to_the_bit(
    trained, mode, use_posterior
):
    arguments = {"mode": mode, "use_posterior": use_posterior, **NEEDED.get(mode, {})}
    expected, threads = trained.ablate(batch_size=150, **arguments).X, torch.get_num_threads()
    np.testing.assert_array_equal(trained.ablate(batch_size=150, **arguments).X, expected)
    for batch_size in (7, 64):
        assert_equal_to(trained.ablate(batch_size=batch_size, **arguments).X, expected, 1e-6)
    try:
        torch.set_num_threads(2)
        assert_equal_to(trained.ablate(batch_size=150, **arguments).X, expected, 1e-6)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("mode", "use_posterior"), [("permute", "mean"), ("prior", "mean"), ("zero", "samples")])
def test_the_seed_is_scvi_tools_setting_unless_one_is_given(trained, mode, use_posterior):
    arguments = {"mode": mode, "use_posterior": use_posterior}
    of_five = trained.ablate(seed=5, **arguments)
    assert of_five.uns["ldvae_ablation"]["seed"] == 5
    scvi.settings.seed = 5
    np.testing.assert_array_equal(trained.ablate(**arguments).X, of_five.X)
    scvi.settings.seed = 6
    of_six = trained.ablate(**arguments)
    assert of_six.uns["ldvae_ablation"]["seed"] == 6
    assert np.abs(of_six.X - of_five.X).max() > 0.1
    np.testing.assert_array_equal(trained.ablate(seed=5, **arguments).X, of_five.X)
    expression = {"latents": [0, 1], "return_numpy": True}
    if use_posterior == "mean":
        six = trained.get_ablated_expression(mode=mode, **expression)
        np.testing.assert_array_equal(trained.get_ablated_expression(mode=mode, seed=6, **expression), six)
        assert (trained.get_ablated_expression(mode=mode, seed=5, **expression) != six).any()
    scvi.settings._seed = None  # as before any was set
    np.testing.assert_array_equal(trained.ablate(**arguments).X, trained.ablate(seed=0, **arguments).X)


@every_way
def test_global_random_states_are_left_alone(trained, mode, use_posterior):
    scvi.settings.seed = 1
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    unseen = grouped(counts(n_cells=20, n_batches=3, seed=9))
    arguments = {"mode": mode, "use_posterior": use_posterior, **NEEDED.get(mode, {})}
    trained.ablate(**arguments)
    trained.ablate(unseen, **arguments)
    trained.ablate_genes("type", **{k: v for k, v in arguments.items() if k != "groupby"})
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.is_grad_enabled()


@every_way
def test_sums_over_genes_are_the_means_of_the_groups_cells(trained, mode, use_posterior):
    arguments = {"mode": mode, "use_posterior": use_posterior, **NEEDED.get(mode, {})}
    in_float32 = trained.ablate(**arguments)
    with compiled(on=False):
        cells = trained.ablate(**arguments)
        assert_equal_to(in_float32.X, cells.X, 1e-6)
        arguments.pop("groupby", None)
        genes = trained.ablate_genes("type", **arguments)
        summed = pd.DataFrame(genes.X, genes.obs["group"].astype(str)).groupby(level=0).sum()
        means = pd.DataFrame(cells.X, cells.obs["type"].astype(object)).groupby(level=0).mean()
        assert summed.index.tolist() == means.index.tolist() == ["B", "CD4+/CD25 T", "NK"]
        np.testing.assert_allclose(summed, means, rtol=1e-9, atol=1e-9)
        part = trained.ablate_genes("type", indices=trained.adata.obs["type"] == "B", **arguments)
        assert_equal_to(part.X, genes[genes.obs["group"] == "B"].X, 1e-6)
        if mode != "group_mean":
            whole = trained.ablate_genes(**arguments)
            assert set(whole.obs["group"]) == {"all"}
            assert set(whole.obs["n_cells"]) == {150}
            np.testing.assert_allclose(whole.X.sum(axis=0), cells.X.mean(axis=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_unseen_cells_have_means_donors_and_groups_of_their_own(trained, mode):
    unseen = grouped(counts(n_cells=40, n_batches=3, seed=9))
    expected = brute_force(trained, unseen, mode=mode, seed=NEEDED.get(mode, {}).get("seed", 0)).sum(axis=1)
    got = trained.ablate(unseen, **{"mode": mode, **NEEDED.get(mode, {})})
    assert_equal_to(got.X, expected, 1e-5)
    assert "ldvae_ablation" not in unseen.uns
    some = trained.ablate(unseen, indices=[30, 4], **{"mode": mode, **NEEDED.get(mode, {})})
    assert_equal_to(some.X, expected[[30, 4]], 1e-5)


def test_cells_without_a_group_have_no_effect_to_speak_of(trained):
    effects, no_group = trained.ablate(mode="group_mean", groupby="type"), trained.adata.obs["type"].isna().to_numpy()
    assert no_group.any()
    np.testing.assert_array_equal(np.isnan(effects.X), np.repeat(no_group[:, None], 4, axis=1))
    with pytest.raises(KeyError, match="`groupby`: 'cluster' is not a column"):
        trained.ablate(mode="group_mean", groupby="cluster")
    with pytest.raises(ValueError, match="`groupby` belongs to `mode='group_mean'`; got mode 'zero'"):
        trained.ablate(groupby="type")


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
@pytest.mark.parametrize("mode", MODES)
def test_ablated_expression_decodes_the_replaced_latents(latent_distribution, mode):
    if mode == "drop" and latent_distribution == "normal":
        mode = "zero"
    model = model_of(("zinb", "gene", 3, False, latent_distribution))
    cells, codes = encoded(model, model.adata), model.adata.obs["type"].cat.codes.to_numpy()
    seed = NEEDED.get(mode, {}).get("seed", 0)
    ((own, new),) = own_and_new(cells.mean, cells.variance, mode, group_n=codes, value_k=VALUE, seed=seed)
    own[:, [1, 3]] = new[:, [1, 3]]
    has_group = (codes >= 0) | (mode != "group_mean")
    expected = counts_distribution(model, cells, own).scale.numpy()
    got = model.get_ablated_expression(["Z_3", 1], mode, **NEEDED.get(mode, {}))
    np.testing.assert_allclose(got[has_group], expected[has_group], atol=1e-6)
    assert got[~has_group].isna().all(axis=None)
    some = model.get_ablated_expression(["Z_3", 1], mode, indices=[50, 6], **NEEDED.get(mode, {}))
    np.testing.assert_allclose(some, got.iloc[[50, 6]], atol=1e-6)


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_minified_cells_have_the_same_effects_as_long_as_they_keep_their_counts(mode):
    model, arguments = untrained(grouped(counts(n_batches=3))), {"mode": mode, **NEEDED.get(mode, {})}
    without_groups = {k: v for k, v in arguments.items() if k != "groupby"}
    effects, genes = model.ablate(**arguments).X, model.ablate_genes("type", **without_groups).X
    expression = model.get_ablated_expression([0, 2], return_numpy=True, **arguments)
    model.minify_adata("latent_posterior_parameters_with_counts")
    assert_equal_to(model.ablate(**arguments).X, effects, 1e-5)
    assert_equal_to(model.ablate_genes("type", **without_groups).X, genes, 1e-5)
    minified = model.get_ablated_expression([0, 2], return_numpy=True, **arguments)
    np.testing.assert_allclose(minified, expression, atol=1e-5)


def test_minified_cells_without_counts_have_none_and_say_for_what_they_would_be_needed():
    model = untrained(grouped(counts(n_batches=3)))
    expression = model.get_ablated_expression("Z_1", "mean", return_numpy=True)
    model.minify_adata()
    for name in ("ablate", "ablate_genes", "get_explained_deviance"):
        with pytest.raises(ValueError, match=f"`{name}` needs counts, which data minified as"):
            getattr(model, name)()
    minified = model.get_ablated_expression("Z_1", "mean", return_numpy=True)
    np.testing.assert_allclose(minified, expression, atol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "prior"])
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
def test_matrices_that_are_large_enough_for_several_threads_give_the_same_numbers(mode, gene_likelihood):
    model, threads = untrained(counts(300, 800, 3), gene_likelihood=gene_likelihood), torch.get_num_threads()
    one = model.ablate(mode=mode, batch_size=300).X
    try:
        torch.set_num_threads(2)
        with threadpool_limits(2):
            assert_equal_to(model.ablate(mode=mode, batch_size=300).X, one, 1e-6)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.grid(0)
@pytest.mark.parametrize("mode", ["zero", "mean", "prior"])
def test_memory_does_not_grow_with_the_number_of_cells(mode):
    def peak_of(work):
        work()
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    models = [untrained(counts(n_cells, 300, 3)) for n_cells in (300, 3000)]
    few, many = (peak_of(partial(model.ablate_genes, mode=mode, batch_size=100)) for model in models)
    assert many < 1.1 * few
    few, many = (peak_of(partial(model.ablate, mode=mode, batch_size=100)) for model in models)
    assert many < 1.1 * few + 2 * 2700 * 4 * 8, "twice the result, while it is put together"
