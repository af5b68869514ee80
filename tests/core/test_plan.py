"""Every ablation that can be asked for equals its definition, however the cells come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from ldvae_ext._formats import ABLATION
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.plan import MODES, SCHEMES, AblationPlan, AblationRequest, LatentSummary
from ldvae_ext.kernels.threads import compiled
from tests.core.brute_force import brute_force, replaced_sets
from tests.core.decoders import COVARIATES, full_decoder
from tests.pairwise import examples

LIKELIHOODS = ("nb", "zinb", "poisson", "normal")


def random_cells(decoder: LinearDecoder, n_cells: int, seed: int, *, density: float = 0.6) -> EncodedCells:
    rng = np.random.default_rng(seed)
    shape, n_latent = (n_cells, len(decoder.genes)), len(decoder.factors)
    counts = rng.poisson(rng.gamma(0.5, 6.0, shape)) * (rng.random(shape) < density)
    return EncodedCells(
        mean=rng.normal(0, 1.5, (n_cells, n_latent)).astype(np.float32),
        variance=rng.gamma(2.0, 0.3, (n_cells, n_latent)).astype(np.float32),
        library=rng.gamma(2.0, 30.0, n_cells) if decoder.link == "softmax" else rng.gamma(2.0, 1.0, n_cells),
        batch=rng.integers(0, len(decoder.batches), n_cells),
        label=rng.integers(0, 3, n_cells),
        covariates={
            c.name: rng.normal(size=n_cells) if c.levels is None else rng.choice(c.levels, n_cells)
            for c in decoder.covariates
        }
        or None,
        counts=counts.astype(np.float32),
    )


def rows_of(cells: EncodedCells, rows: Any) -> EncodedCells:
    covariates = cells.covariates and {name: value[rows] for name, value in cells.covariates.items()}
    parts = {name: getattr(cells, name)[rows] for name in cells._fields if name not in ("covariates", "axes")}
    return EncodedCells(**parts, covariates=covariates)


@st.composite
def problems(draw: Any, mode: str | None = None, scheme: str | None = None) -> tuple[Any, ...]:
    """A decoder, cells, their groups, the arguments of an ablation, and the values that ``mode="value"`` sets."""
    mode = draw(st.sampled_from(MODES)) if mode is None else mode
    scheme = draw(st.sampled_from(SCHEMES)) if scheme is None else scheme
    seed, n_latent = draw(st.integers(0, 2**31)), draw(st.integers(2 if mode == "drop" else 1, 4))
    rng = np.random.default_rng(seed)
    decoder = full_decoder(
        seed,
        draw(st.integers(2, 8)),
        n_latent,
        draw(st.integers(1, 3)),
        likelihood=draw(st.sampled_from(LIKELIHOODS)),
        dispersion=draw(st.sampled_from(("gene", "gene-batch", "gene-label", "gene-cell"))),
        link=draw(st.sampled_from(("softmax", "softplus"))),
        latent_distribution="ln" if mode == "drop" else draw(st.sampled_from(("normal", "ln"))),
        covariates=draw(st.sampled_from((COVARIATES, COVARIATES[:1], ()))),
    )
    if decoder.theta_bg is not None:
        decoder = replace(decoder, theta_bg=np.exp(rng.normal(0, draw(st.floats(0, 3)), decoder.theta_bg.shape)))
    cells = random_cells(decoder, draw(st.integers(1, 6)), seed, density=draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))))
    group_n = rng.integers(-1, 3, len(cells.mean)) if mode == "group_mean" or draw(st.booleans()) else 0 * cells.batch
    arguments: dict[str, Any] = {"mode": mode, "scheme": scheme, "latents": draw(latents(decoder, mode, scheme))}
    value_k = rng.normal(size=n_latent)
    if mode == "value":
        form = draw(st.sampled_from(("number", "array", "mapping", "series")))
        sets = replaced_sets(decoder.factors.tolist(), cells.mean, cells.variance, arguments["latents"], scheme, mode)
        needed = sorted({k for members in sets.values() for k in members})
        named = {decoder.factors[k] if k % 2 else k: value_k[k] for k in needed}
        value_k = np.full(n_latent, value_k[0]) if form == "number" else value_k
        arguments["value"] = {"number": value_k[0], "array": value_k, "mapping": named, "series": pd.Series(named)}[
            form
        ]
    if decoder.likelihood == "zinb" or (decoder.dispersion == "gene-cell" and decoder.likelihood != "poisson"):
        arguments["refit_heads"] = draw(st.booleans())
    if draw(st.booleans()):
        arguments |= {"use_posterior": "samples", "n_samples": draw(st.integers(1, 3))}
    if mode in ("permute", "prior") or "n_samples" in arguments:
        arguments["seed"] = draw(st.integers(0, 9))
    last = len(decoder.batches) - 1
    arguments["batches"] = draw(st.sampled_from(((None,), (None,), (0,), (last, 0), (None, last))))
    return decoder, cells, group_n, arguments, value_k


@st.composite
def latents(draw: Any, decoder: LinearDecoder, mode: str, scheme: str) -> Any:
    names = decoder.factors.tolist()
    one = st.sampled_from(range(len(names))).flatmap(lambda k: st.sampled_from((k, np.int64(k), names[k])))
    most = len(names) - (mode == "drop" and scheme == "leave_out")
    kinds = [st.none(), one, st.permutations(names).flatmap(lambda p: st.integers(1, len(p)).map(lambda j: p[:j]))]
    if scheme != "keep_top":
        several = st.lists(one, min_size=1, max_size=most)
        kinds.append(st.dictionaries(st.sampled_from(("a", "CD4+/CD25 T", "Z_0")), several, min_size=1))
    return draw(st.one_of(kinds))


def plan_of(
    decoder: LinearDecoder, chunks: list[EncodedCells], groups: list[np.ndarray], **arguments: Any
) -> AblationPlan:
    """The plan after a look at all cells, if it needs one."""
    request = AblationRequest(decoder=decoder, has_groups=True, **arguments)
    if not request.needs_latents:
        return request.plan()
    seen = LatentSummary(len(decoder.factors), 3, keep=request.mode == "permute")
    for chunk, group_n in zip(chunks, groups, strict=True):
        seen.add(chunk.mean, chunk.variance, group_n)
    return request.plan(seen)


def expected_changes(decoder, cells, group_n, arguments, value_k):
    of_force = {k: v for k, v in arguments.items() if k not in ("value", "use_posterior")}
    return brute_force(decoder, cells, group_n=group_n, value_k=value_k, **of_force)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-8) -> None:
    largest = np.nanmax(np.abs(expected), initial=1.0)
    assert np.isfinite(largest)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
@examples(20)
def test_effects_equal_a_loop_over_cells_and_sets(mode, scheme, data):
    decoder, cells, group_n, arguments, value_k = data.draw(problems(mode, scheme))
    names, expected_ngs = expected_changes(decoder, cells, group_n, arguments, value_k)
    plan = plan_of(decoder, [cells], [group_n], **arguments)
    assert plan.names == names
    for on, tolerance in ((True, 1e-5), (False, 1e-8)):
        with compiled(on=on):
            got_ns = plan.effects(decoder, cells, np.arange(len(group_n)), group_n)
        assert_close(got_ns, expected_ngs.sum(axis=1), tolerance)


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
@examples(25)
def test_sums_over_the_cells_of_a_group_equal_a_loop_for_each_gene(mode, data):
    decoder, cells, group_n, arguments, value_k = data.draw(problems(mode))
    _, change_ngs = expected_changes(decoder, cells, group_n, arguments, value_k)
    expected_pgs = np.stack([change_ngs[group_n == p].sum(axis=0) for p in range(3)])
    plan = plan_of(decoder, [cells], [group_n], **arguments)
    total_pgs = np.full(expected_pgs.shape, 2.0)
    plan.add_gene_effects(total_pgs, decoder, cells, np.arange(len(group_n)), group_n)
    assert_close(total_pgs - 2.0, expected_pgs)


@given(problem=problems())
@examples(60)
def test_sums_over_genes_are_the_sums_of_the_cells_effects(problem):
    decoder, cells, group_n, arguments, _ = problem
    plan, position_n = plan_of(decoder, [cells], [group_n], **arguments), np.arange(len(group_n))
    with compiled(on=False):
        effect_ns = plan.effects(decoder, cells, position_n, group_n)
    total_pgs = np.zeros((3, len(decoder.genes), len(plan.sets)))
    plan.add_gene_effects(total_pgs, decoder, cells, position_n, group_n)
    expected_ps = np.stack([effect_ns[group_n == p].sum(axis=0) for p in range(3)])
    np.testing.assert_allclose(total_pgs.sum(axis=1), expected_ps, atol=1e-9 * max(1, np.abs(total_pgs).max()))


@given(problem=problems(), data=st.data())
@examples(80)
def test_cutting_cells_into_chunks_in_any_order_changes_nothing(problem, data):
    decoder, cells, group_n, arguments, _ = problem
    n_cells = len(group_n)
    cuts = sorted(data.draw(st.sets(st.integers(1, n_cells))))
    in_order = [rows for rows in np.split(np.arange(n_cells), cuts) if len(rows)]
    at_once = plan_of(decoder, [cells], [group_n], **arguments)
    plan = plan_of(decoder, [rows_of(cells, r) for r in in_order], [group_n[r] for r in in_order], **arguments)
    chunks = np.split(np.array(data.draw(st.permutations(range(n_cells)))), cuts)
    # A sum in another order may be another number in float32.
    for on, tolerance in ((False, 1e-9), (True, 1e-6)):
        with compiled(on=on):
            whole = at_once.effects(decoder, cells, np.arange(n_cells), group_n)
            got = np.zeros_like(whole)
            for rows in chunks:
                got[rows] = plan.effects(decoder, rows_of(cells, rows), rows, group_n[rows])
        assert_close(got, whole, tolerance)


@given(
    seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), n_latent=st.integers(1, 3)
)
@examples(40)
def test_a_summary_of_chunks_is_that_of_all_cells(seed, sizes, n_latent):
    rng = np.random.default_rng(seed)
    mean_nk, variance_nk = rng.normal(size=(sum(sizes), n_latent)), rng.gamma(1.0, 1.0, (sum(sizes), n_latent))
    group_n, seen = rng.integers(-1, 3, sum(sizes)), LatentSummary(n_latent, 3, keep=True)
    for rows in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]):
        seen.add(mean_nk[rows], variance_nk[rows], group_n[rows])
    np.testing.assert_allclose(seen.mean_k, mean_nk.mean(axis=0))
    kl_nk = 0.5 * (mean_nk**2 + variance_nk - 1 - np.log(variance_nk))
    np.testing.assert_allclose(seen.kl_k, kl_nk.mean(axis=0), atol=1e-12)
    for p in range(3):
        mine = mean_nk[group_n == p]
        np.testing.assert_allclose(seen.mean_pk[p], mine.mean(axis=0) if len(mine) else np.nan, atol=1e-12)
    kept_nk, axes = seen.latents()
    np.testing.assert_array_equal([kept_nk, axes.variance_nk], [mean_nk, variance_nk])
    np.testing.assert_array_equal(axes.rotation_kk, np.eye(n_latent))


def untidy(matrix: np.ndarray, fmt: str, seed: int) -> Any:
    """A sparse array with explicit zeros, unsorted indices and entries in two parts."""
    rng = np.random.default_rng(seed)
    lines = matrix if fmt == "csr" else matrix.T
    indices, values, pointer = [], [], [0]
    for line in lines:
        at = np.concatenate([np.arange(len(line)), np.flatnonzero(line)])
        value = np.concatenate([line - np.sign(line), np.ones(len(at) - len(line))])
        shuffled = rng.permutation(len(at))
        indices.append(at[shuffled])
        values.append(value[shuffled])
        pointer.append(pointer[-1] + len(at))
    made = (sparse.csr_array if fmt == "csr" else sparse.csc_array)(
        (np.concatenate(values), np.concatenate(indices), np.array(pointer)), shape=matrix.shape
    )
    np.testing.assert_array_equal(made.toarray(), matrix)
    return made


@pytest.mark.parametrize("fmt", ["csr", "csc"])
@given(problem=problems(), seed=st.integers(0, 9))
@examples(40)
def test_sparse_counts_in_any_state_give_what_dense_ones_give(fmt, problem, seed):
    decoder, cells, group_n, arguments, _ = problem
    plan, position_n = plan_of(decoder, [cells], [group_n], **arguments), np.arange(len(group_n))
    expected = plan.effects(decoder, cells, position_n, group_n)
    stored = untidy(cells.counts, fmt, seed)
    before = stored.copy()
    got = plan.effects(decoder, cells._replace(counts=stored), position_n, group_n)
    # Compiled loops read a count's parts one by one, in float32.
    assert_close(got, expected, 1e-6)
    with compiled(on=False):
        expected = plan.effects(decoder, cells, position_n, group_n)
        got = plan.effects(decoder, cells._replace(counts=stored), position_n, group_n)
    assert_close(got, expected, 1e-12)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(stored, part), getattr(before, part), "counts are not written to")


@pytest.mark.parametrize("fmt", ["dense", "csr"])
def test_a_stored_zero_is_no_count_where_the_rate_is_zero(fmt):
    decoder = LinearDecoder(
        weight_gk=[[900.0], [-900.0]], intercept_bg=[[0.0, 0.0]], genes=["a", "b"], batches=["0"], factors=["Z_0"], likelihood="poisson"
    )  # fmt: skip
    x = np.array([[2.0, 0.0]])
    if fmt == "csr":
        x = sparse.csr_array(([2.0, 0.0], [0, 1], [0, 2]), shape=(1, 2))
    cell = EncodedCells(np.zeros((1, 1)), np.ones((1, 1)), np.full(1, 2.0), np.zeros(1, int), np.zeros(1, int), None, x)
    plan = AblationRequest(decoder=decoder, mode="value", value=1.0).plan()
    # The rate of "a" goes from 1 to 2, that of "b" from 1 to 0: -(2 log 2 - 2) + (2 log 1 - 1), and 0 - 1.
    np.testing.assert_allclose(plan.effects(decoder, cell, np.zeros(1, int), np.zeros(1, int)), [[-2 * np.log(2)]])


@pytest.mark.parametrize(
    ("likelihood", "refit_heads"),
    [*((name, False) for name in LIKELIHOODS), ("zinb", True), ("nb", True), ("normal", True)],
)
@pytest.mark.parametrize(
    ("link", "latent_distribution"), [("softmax", "normal"), ("softplus", "normal"), ("softmax", "ln")]
)
def test_a_latent_that_is_already_there_has_exactly_no_effect(link, latent_distribution, likelihood, refit_heads):
    decoder = full_decoder(1, 60, likelihood=likelihood, link=link, latent_distribution=latent_distribution)
    cells = random_cells(decoder, 40, seed=2)
    cells.mean[:, 1] = 0.0
    cells.mean[7] = 0.0
    where = (cells, np.arange(40), np.zeros(40, int))
    effect_ns = AblationRequest(decoder=decoder, refit_heads=refit_heads).plan().effects(decoder, *where)
    assert not effect_ns[:, 1].any()
    assert not effect_ns[7].any()
    assert np.count_nonzero(effect_ns) == 39 * 2, "the others have one"
    arguments = {"scheme": "keep_top", "latents": [2, 0, 1], "use_posterior": "samples", "refit_heads": refit_heads}
    kept_ns = AblationRequest(decoder=decoder, **arguments).plan().effects(decoder, *where)
    assert not kept_ns[:, 3].any(), "draws are the same on both sides"
    assert kept_ns[:, :3].all()


@pytest.fixture(scope="module")
def decoder():
    return full_decoder(likelihood="nb", dispersion="gene")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "median"}, r"`mode` must be one of 'zero', .*, 'drop'; got 'median'"),
        ({"scheme": "out"}, "`scheme` must be one of 'leave_out', 'leave_in', 'keep_top'; got 'out'"),
        ({"use_posterior": "all"}, "`use_posterior` must be one of 'mean', 'samples'; got 'all'"),
        ({"mode": "drop"}, "`mode='drop'` takes a latent out of the simplex; `latent_distribution='normal'` has none"),
        ({"mode": "group_mean"}, "`mode='group_mean'` needs `groupby`"),
        ({"mode": "value"}, "`mode='value'` needs `value`"),
        ({"value": 0.0}, "`value` belongs to `mode='value'`; got mode 'zero'"),
        ({"n_samples": 3}, "`n_samples` belongs to `use_posterior='samples'`"),
        ({"use_posterior": "samples", "n_samples": 0}, "`n_samples` must be an integer of at least 1; got 0"),
        ({"use_posterior": "samples", "n_samples": 2.0}, "`n_samples` must be an integer of at least 1; got 2.0"),
        ({"mode": "mean", "seed": 1}, "`seed` has no effect: `mode='mean'` with `use_posterior='mean'` draws no random numbers"),
        ({"mode": "prior", "seed": -1}, "`seed` must be a non-negative integer below .*; got -1"),
        ({"mode": "prior", "seed": "a"}, "`seed` must be a non-negative integer below .*; got 'a'"),
        ({"mode": "prior", "seed": 0.5}, "`seed` must be a non-negative integer below .*; got 0.5"),
        ({"mode": "permute", "seed": True}, "`seed` must be a non-negative integer below .*; got True"),
        ({"refit_heads": True}, "`refit_heads`: neither dropout nor dispersion of this decoder depends on the latent"),
        ({"scheme": "keep_top", "latents": {"a": [0]}}, "`scheme='keep_top'` takes latents in order, not sets of them"),
        ({"latents": {}}, "`latents` must name at least one set of latents"),
        ({"latents": {1: [0], "1": [2]}}, "`latents` must name .* each by another name; got 1, '1'"),
        ({"mode": "value", "value": "a"}, "`value` must be a finite number.*; got 'a'"),
        ({"mode": "value", "value": {"Z_0": "x"}}, "`value` must be a finite number"),
        ({"mode": "value", "value": [1.0, 2.0]}, "`value` must be a finite number, one for each of 3 latents"),
        ({"mode": "prior", "seed": 2**64}, "`seed` must be a non-negative integer below .*; got"),
        ({"latents": []}, r"`latents` must name at least one latent; got \[\]"),
        ({"latents": {"a": []}}, r"`latents` must name at least one latent; got \[\]"),
        ({"latents": "Z_3"}, "`latents`: 'Z_3' is no latent of this model; allowed are 'Z_0', 'Z_1', 'Z_2' or 0 to 2"),
        ({"latents": {"a": [0, 3]}}, "`latents`: 3 is no latent"),
        ({"latents": [-1]}, "`latents`: -1 is no latent"),
        ({"latents": ["Z_0", "Z_9"], "scheme": "keep_top"}, "`latents`: 'Z_9' is no latent"),
        ({"mode": "value", "value": [1.0, 2.0]}, r"one for each of 3 latents, or a mapping from their names; got \[1.0, 2.0\]"),
        ({"mode": "value", "value": np.inf}, "`value` must be a finite number.*; got inf"),
        ({"mode": "value", "value": [0.0, np.nan, 1.0]}, "`value` must be a finite number"),
        ({"mode": "value", "value": {"Z_0": np.nan, "Z_1": 0, "Z_2": 0}}, "`value` must be a finite number"),
        ({"mode": "value", "value": {"Z_5": 1.0}}, "`value`: 'Z_5' is no latent"),
        ({"mode": "value", "value": {"Z_0": 1.0}, "latents": [0, 1]}, "`value` has none for 'Z_1', which 'Z_1' replaces"),
        (
            {"mode": "value", "value": pd.Series({"Z_0": 1.0}), "latents": {"pair": ["Z_0", "Z_2"]}},
            "`value` has none for 'Z_2', which 'pair' replaces",
        ),
        (
            {"mode": "value", "value": {0: 1.0}, "latents": 0, "scheme": "leave_in"},
            "`value` has none for 'Z_1', 'Z_2', which 'Z_0' replaces",
        ),
        ({"mode": "value", "value": {0: 1.0}, "latents": 0, "scheme": "keep_top"}, "has none for .*'top_0' replaces"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_says_why(decoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        AblationRequest(decoder=decoder, **arguments)


def test_all_latents_of_a_simplex_cannot_be_dropped_at_once_but_all_save_one_can():
    decoder = full_decoder(latent_distribution="ln")
    with pytest.raises(ValueError, match="`mode='drop'` cannot take out all latents at once"):
        AblationRequest(decoder=decoder, mode="drop", latents={"a": [0], "whole": [0, 1, 2]})
    assert AblationRequest(decoder=decoder, mode="drop", latents={"whole": [0, 1, 2]}, scheme="leave_in").plan().names
    assert AblationRequest(decoder=decoder, mode="drop", scheme="keep_top").plan().names == ["top_1", "top_2", "top_3"]


@pytest.mark.parametrize(
    ("likelihood", "dispersion", "has_heads"),
    [("zinb", "gene", True), ("nb", "gene-cell", True), ("normal", "gene-cell", True), ("normal", "gene", False)],
)
def test_heads_are_refitted_where_they_depend_on_the_latent(likelihood, dispersion, has_heads):
    decoder = full_decoder(likelihood=likelihood, dispersion=dispersion)
    if has_heads:
        assert AblationRequest(decoder=decoder, refit_heads=True).plan().refit_heads
    else:
        with pytest.raises(ValueError, match="`refit_heads`"):
            AblationRequest(decoder=decoder, refit_heads=True)


def test_a_poisson_has_no_heads_to_refit_even_if_its_dispersion_is_said_to_be_the_cells():
    with pytest.raises(ValueError, match="`refit_heads`"):
        AblationRequest(decoder=full_decoder(likelihood="poisson", dispersion="gene-cell"), refit_heads=True)


def test_what_was_done_is_described_as_far_as_it_matters(decoder):
    request = AblationRequest(decoder=decoder)
    assert request.description(request.plan()) == {
        "format": ABLATION, "mode": "zero", "scheme": "leave_out", "use_posterior": "mean", "refit_heads": False, "unit": "nats",
    }  # fmt: skip
    request = AblationRequest(
        decoder=decoder, use_posterior="samples", scheme="keep_top", latents=["Z_2", 0], batches=(1, None)
    )
    info = request.description(request.plan(default_seed=7), "type")
    assert info["seed"] == 7
    assert info["n_samples"] == 10
    assert info["groupby"] == "type"
    assert info["order"].tolist() == ["Z_2", "Z_0"]
    assert info["transform_batch"].tolist() == ["other", "each cell's own"]
    request = AblationRequest(decoder=decoder, mode="value", value={"Z_1": 2.0}, latents=1)
    np.testing.assert_array_equal(request.description(request.plan(default_seed=7))["value"], [np.nan, 2.0, np.nan])
    assert "seed" not in request.description(request.plan(default_seed=7))
    request = AblationRequest(decoder=decoder, latents={"both": ["Z_0", "Z_2"], "one": 1})
    info = request.description(request.plan())
    assert info["sets"].tolist() == ["both", "both", "one"]
    assert info["latents"].tolist() == ["Z_0", "Z_2", "Z_1"]
    request = AblationRequest(decoder=decoder, latents=(name for name in ["Z_2", "Z_0"]), scheme="keep_top")
    assert request.description(request.plan())["order"].tolist() == ["Z_2", "Z_0"]
    request = AblationRequest(decoder=decoder, mode="permute", seed=np.int64(3))
    assert request.description(request.plan(default_seed=7))["seed"] == 3
