"""The memory of an ablation does not grow with the number of cells."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import sparse

from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.explained import ExplainedSums, PooledProfile, explained_sets
from ldvae_ext.core.plan import AblationRequest, LatentSummary
from tests.core.decoders import full_decoder

N_CELLS, N_GENES, N_LATENT = 32, 300, 5


def chunks(n_chunks, fmt):
    for i in range(n_chunks):
        rng = np.random.default_rng(i)
        counts = rng.poisson(0.5, (N_CELLS, N_GENES)).astype(np.float32)
        cells = EncodedCells(
            mean=rng.normal(size=(N_CELLS, N_LATENT)),
            variance=rng.gamma(2.0, 0.2, (N_CELLS, N_LATENT)),
            library=np.full(N_CELLS, 200.0),
            batch=rng.integers(0, 2, N_CELLS),
            label=np.zeros(N_CELLS, dtype=np.int64),
            covariates=None,
            counts=sparse.csr_array(counts) if fmt == "csr" else counts,
        )
        yield cells, i * N_CELLS + np.arange(N_CELLS), rng.integers(-1, 3, N_CELLS)


def peak_of(work, n_chunks):
    """Bytes that are held at once, after one call that fills every cache."""
    work(2)
    tracemalloc.start()
    try:
        work(n_chunks)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def plan_of(n_chunks, fmt, likelihood, **arguments):
    decoder = full_decoder(0, N_GENES, N_LATENT, likelihood=likelihood, dispersion="gene-batch", covariates=())
    request = AblationRequest(decoder=decoder, has_groups=True, **arguments)
    seen = LatentSummary(N_LATENT, 3)
    if request.needs_latents:
        for cells, _, group_n in chunks(n_chunks, fmt):
            seen.add(cells.mean, cells.variance, group_n)
    return decoder, request.plan(seen)


WAYS = [
    {},
    {"mode": "mean", "scheme": "leave_in"},
    {"mode": "group_mean", "latents": {"a": [0, 1]}},
    {"mode": "prior", "scheme": "keep_top"},
    {"use_posterior": "samples", "n_samples": 2, "batches": (0, 1)},
]


@pytest.mark.grid(0)
@pytest.mark.parametrize("arguments", WAYS, ids=str)
@pytest.mark.parametrize(("likelihood", "fmt"), [("nb", "csr"), ("zinb", "dense"), ("poisson", "csr")])
def test_sums_of_genes_take_the_memory_of_a_chunk(likelihood, fmt, arguments):
    def work(n_chunks):
        decoder, plan = plan_of(n_chunks, fmt, likelihood, **arguments)
        total_pgs = np.zeros((3, N_GENES, len(plan.sets)))
        for cells, position_n, group_n in chunks(n_chunks, fmt):
            plan.add_gene_effects(total_pgs, decoder, cells, position_n, group_n)

    few, many = peak_of(work, 4), peak_of(work, 40)
    assert many < 1.1 * few
    assert few < 40 * N_CELLS * N_GENES * 8, "and of no more than some dozens of them"


@pytest.mark.grid(0)
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_explained_deviances_take_the_memory_of_a_chunk(likelihood):
    def work(n_chunks):
        decoder, plan = plan_of(n_chunks, "csr", likelihood, scheme="keep_top")
        profile, sums = PooledProfile(2, N_GENES), ExplainedSums(3, explained_sets(plan))
        for cells, _, _ in chunks(n_chunks, "csr"):
            profile.add(cells)
        for cells, position_n, group_n in chunks(n_chunks, "csr"):
            sums.add(decoder, cells, position_n, group_n, profile.share_bg)

    assert peak_of(work, 40) < 1.1 * peak_of(work, 4)


@pytest.mark.grid(0)
@pytest.mark.parametrize("arguments", WAYS, ids=str)
def test_effects_of_cells_take_the_memory_of_a_chunk_and_of_themselves(arguments):
    sizes = {}

    def work(n_chunks):
        decoder, plan = plan_of(n_chunks, "csr", "nb", **arguments)
        effects = [plan.effects(decoder, *where) for where in chunks(n_chunks, "csr")]
        sizes[n_chunks] = sum(effect_ns.nbytes for effect_ns in effects)

    few, many = peak_of(work, 4), peak_of(work, 40)
    assert many - few < 1.1 * (sizes[40] - sizes[4]) + 0.05 * few
