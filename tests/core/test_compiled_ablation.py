"""The compiled ablation against numpy's, which test_plan.py compares with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from ldvae_ext.core import ablation as ablation_module
from ldvae_ext.core import ablation_effects
from ldvae_ext.core._paired import SetUpdates
from ldvae_ext.kernels.threads import compiled
from tests.core.decoders import full_decoder
from tests.pairwise import examples

SETS = [0, 3, [0, 1, 2], [1, 2, 3], [], [2], [0, 1, 2, 3], [1, 2, 3], [3], [0, 3]]


def case(seed=0, n_genes=300, n_cells=40, scale=0.7, **changes):
    """A decoder and cells like real ones, and one with nothing."""
    arguments = {"likelihood": "nb", "dispersion": "gene", "covariates": (), **changes}
    decoder = full_decoder(seed, n_genes, 4, **arguments)
    rng = np.random.default_rng(seed)
    z_nk, library_n = scale * rng.normal(size=(n_cells, 4)), rng.gamma(2.0, 300.0, n_cells)
    batch_n = rng.integers(0, 2, n_cells)
    x_ng = rng.poisson(decoder.rate(z_nk, batch_n, library=library_n) * rng.gamma(0.5, 2.0, (n_cells, n_genes)))
    x_ng[0] = 0
    return decoder, x_ng.astype(np.float32), z_nk, library_n, batch_n


def both(cells, value, sets=SETS, **arguments):
    got = ablation_effects(*cells, value, sets, **arguments)
    with compiled(on=False):
        expected = ablation_effects(*cells, value, sets, **arguments)
    return got, expected


def assert_close(got, expected, tolerance=1e-5):
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.nanmax(np.abs(expected), initial=1e-300))


@pytest.fixture
def in_numpy(monkeypatch):
    """Number of cells that numpy was asked for."""
    counted = []
    changes = ablation_module.ablation_changes

    def count(decoder, x_ng, *args, **kwargs):
        counted.append(x_ng.shape[0])
        return changes(decoder, x_ng, *args, **kwargs)

    monkeypatch.setattr(ablation_module, "ablation_changes", count)
    return counted


@pytest.mark.parametrize("n_genes", [1, 15, 64, 300, 2500])
@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_float32_is_enough_for_cells_like_real_ones(in_numpy, likelihood, latent_distribution, n_genes):
    cells = case(n_genes=n_genes, likelihood=likelihood, latent_distribution=latent_distribution)
    got = ablation_effects(*cells, 0.3, SETS)
    assert in_numpy == []
    with compiled(on=False):
        expected = ablation_effects(*cells, 0.3, SETS)
    if n_genes == 1:
        np.testing.assert_allclose(got, 0, atol=1e-3)
    else:
        assert_close(got, expected)
    assert got.dtype == np.float64


@pytest.mark.parametrize("dispersion", ["gene-batch", "gene-label"])
def test_each_cell_has_the_dispersion_of_its_batch_or_label(dispersion):
    cells = case(dispersion=dispersion)
    label = np.random.default_rng(1).integers(0, 3, 40)
    assert_close(*both(cells, 0.0, label=label if dispersion == "gene-label" else None))


@given(
    seed=st.integers(0, 2**31),
    value=st.one_of(st.floats(-3, 3), st.sampled_from([-1e3, 1e3, 30.0, -1e12, 1e-3, -np.inf])),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    likelihood=st.sampled_from(["nb", "poisson"]),
    latent_distribution=st.sampled_from(["normal", "ln"]),
)
@examples(120)
def test_extreme_latents_and_values_are_left_to_float64(seed, value, scale, likelihood, latent_distribution):
    if value == -np.inf and latent_distribution == "normal":
        value = 0.0
    sets = [entry for entry in SETS if value != -np.inf or np.size(entry) < 4]
    cells = case(seed, 40, 7, scale, likelihood=likelihood, latent_distribution=latent_distribution)
    with np.errstate(all="ignore"):
        got, expected = both(cells, value, sets)
    finite = np.isfinite(expected)
    largest = np.abs(expected[finite]).max(initial=1e-3)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=1e-5 * largest)


def test_neither_threads_nor_chunks_nor_other_sets_matter():
    cells = case()
    decoder, x_ng, z_nk, library_n, batch_n = cells
    with compiled(n_threads=1):
        whole = ablation_effects(*cells, 0.0, SETS)
    largest = np.abs(whole).max()
    with compiled(n_threads=2):
        np.testing.assert_array_equal(ablation_effects(*cells, 0.0, SETS), whole)
    for at in (slice(0, 1), slice(1, 33), np.array([5, 2, 39])):
        some = ablation_effects(decoder, x_ng[at], z_nk[at], library_n[at], batch_n[at], 0.0, SETS)
        np.testing.assert_array_equal(some, whole[at])
    for column, members in enumerate(SETS):
        alone = ablation_effects(*cells, 0.0, [members])
        np.testing.assert_allclose(alone[:, 0], whole[:, column], rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint16])
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csr_array, sparse.csc_array, np.asfortranarray])
def test_counts_come_in_any_form_and_are_not_written_to(form, dtype):
    decoder, x_ng, *others = case()
    expected = ablation_effects(decoder, x_ng, *others, 0.0, SETS)
    counts = form(x_ng.astype(dtype))
    if sparse.issparse(counts):
        counts.data.setflags(write=False)
    np.testing.assert_array_equal(ablation_effects(decoder, counts, *others, 0.0, SETS), expected)


def test_a_set_of_none_has_no_effect_and_no_set_gives_no_columns():
    cells = case()
    np.testing.assert_array_equal(ablation_effects(*cells, 0.0, [[], []]), 0)
    np.testing.assert_array_equal(ablation_effects(*cells, cells[2], [0, 3]), 0)
    assert ablation_effects(*cells, 0.0, []).shape == (40, 0)
    none = ablation_effects(cells[0], cells[1][:0], cells[2][:0], cells[3][:0], cells[4][:0], 0.0, SETS)
    assert none.shape == (0, len(SETS))


def test_counts_of_other_cells_or_genes_are_refused_before_they_are_read():
    decoder, x_ng, *others = case()
    for wrong in (x_ng[:-1], x_ng[:, :-1]):
        with pytest.raises(ValueError, match=r"`x` must have shape \(40, 300\)"):
            ablation_effects(decoder, wrong, *others, 0.0, SETS)


@given(st.lists(st.sets(st.integers(0, 5)), max_size=8))
def test_steps_lead_to_the_sets(sets):
    steps, reached = SetUpdates.of([np.array(sorted(members), dtype=int) for members in sets]), None
    for s, members in enumerate(sets):
        at = slice(steps.ptr[s], steps.ptr[s + 1])
        is_single = steps.is_fresh[s] and at.stop == at.start + 1
        if steps.is_fresh[s]:
            reached = np.zeros(6)
        assert reached is not None, "what a latent on its own leaves behind is not built on"
        np.add.at(reached, steps.latent[at], steps.sign[at])
        np.testing.assert_array_equal(np.flatnonzero(reached), sorted(members))
        assert set(reached) <= {0, 1}
        reached = None if is_single else reached
