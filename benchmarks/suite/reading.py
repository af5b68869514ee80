"""Rows about reading a trained model: ablation, decoding, populations, latents, export."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from ldvae_ext import tl
from ldvae_ext.kernels.threads import compiled
from ldvae_ext.model import LDVAE
from suite import by_hand
from suite.lab import Lab
from suite.measure import STOCK, race, threads
from suite.registry import Found, Measured, Row, Unavailable, case

GROUPBY = "population"


@case(
    Row("ablate-10", "ablation of all latents from the model, encoding included, 10 latents", 20, in_short=True),
    Row("ablate-10-uncompiled", "the same without the compiled kernel, `compiled(on=False)`", 4),
    Row("ablate-10-exported", "the same from exported latents, `tl.ablate`", 55, in_short=True),
)
def ablate_10(lab: Lab, rows: tuple[Row, ...]) -> Found:
    return _ablate(lab, rows, 10, 1)


@case(Row("ablate-30", "ablation of all latents from the model, encoding included, 30 latents x 4 batches", 45))
def ablate_30(lab: Lab, rows: tuple[Row, ...]) -> Found:
    return _ablate(lab, rows, 30, 4)


def _ablate(lab: Lab, rows: tuple[Row, ...], n_latent: int, n_batches: int) -> Found:
    """Against as many full passes over the cells as there are latents, and one more."""
    stock, ours = lab.pair(n_latent, n_batches)

    def from_model(*, on: bool) -> Callable[[], None]:
        def run() -> None:
            with nullcontext() if on else compiled(on=False):
                ours.ablate()

        return run

    contestants = {
        STOCK: lambda: by_hand.ablation(stock, in_one_pass=False),
        f"ablate-{n_latent}": from_model(on=True),
        f"ablate-{n_latent}-uncompiled": from_model(on=False),
        f"ablate-{n_latent}-exported": lambda: tl.ablate(ours.adata),
    }
    with threads(1):
        for row in rows:
            contestants[row.name]()  # compiled before it is timed
        return race(contestants, rows, min(2, lab.rounds), warm_up=False, spare_seconds=0)


@case(
    Row("posterior-mean", "expression at the posterior mean, full matrix, against `get_normalized_expression()`", 1.5),
    Row("decode", "decoding of given latents, full matrix, against `get_normalized_expression()`", 5, in_short=True),
)
def decode(lab: Lab, rows: tuple[Row, ...]) -> Found:
    stock, ours = lab.pair()
    z_nk = ours.get_latent_representation()
    contestants = {
        STOCK: lambda: stock.get_normalized_expression(return_numpy=True),
        "posterior-mean": lambda: ours.get_normalized_expression(use_posterior_mean=True, return_numpy=True),
        "decode": lambda: ours.decode(z_nk, return_numpy=True),
    }
    with threads(1):
        return race(contestants, rows, lab.rounds, note="`decode` returns float64, the others float32.")


@case(
    Row("population", "mean expression of 8 populations from exported latents, against averaging the full matrix", 8),
    Row("population-encoded", "the same from the model, encoding included"),
)
def population(lab: Lab, rows: tuple[Row, ...]) -> Found:
    _check_population_expression()
    stock, ours = lab.pair()
    contestants = {
        STOCK: lambda: by_hand.population_means(stock, GROUPBY),
        "population": lambda: tl.population_expression(ours.adata, GROUPBY),
        "population-encoded": lambda: ours.get_population_expression(groupby=GROUPBY),
    }
    with threads(1):
        return race(contestants, rows, lab.rounds)


@case(
    Row("population-memory", "memory that this takes beyond the data", 0.1, is_upper_bound=True),
    Row(
        "population-growth",
        "the same with all cells and a quarter of them",
        1.25,
        is_upper_bound=True,
        against="a quarter",
    ),
)
def population_memory(lab: Lab, rows: tuple[Row, ...]) -> Found:
    """Most that numpy and Python hold at once beyond what was there before; chunks of 256 cells, a small part of either."""
    _check_population_expression()
    stock, ours = lab.pair()
    of_quarter = ours.adata[: ours.adata.n_obs // 4].copy()
    quarter, whole = (
        _traced_peak(partial(tl.population_expression, adata, GROUPBY, chunk_size=256))
        for adata in (of_quarter, ours.adata)
    )
    others = {
        "population-memory": _traced_peak(partial(by_hand.population_means, stock, GROUPBY)),
        "population-growth": quarter,
    }
    return {
        row.name: Measured(stock=others[row.name] / 1e6, ours=whole / 1e6, unit="MB", ratio=whole / others[row.name])
        for row in rows
    }


@case(Row("latents", "`get_latent_representation()`, the same to the bit", 2))
def latents(lab: Lab, rows: tuple[Row, ...]) -> Found:
    stock, ours = lab.pair()
    contestants = {STOCK: stock.get_latent_representation, "latents": ours.get_latent_representation}
    with threads(1):
        return race(contestants, rows, lab.rounds)


@case(Row("expression", "`get_normalized_expression()`, one draw, the same to the bit", 1.5))
def expression(lab: Lab, rows: tuple[Row, ...]) -> Found:
    stock, ours = lab.pair()
    contestants = {
        STOCK: lambda: stock.get_normalized_expression(return_numpy=True),
        "expression": lambda: ours.get_normalized_expression(return_numpy=True),
    }
    with threads(1):
        return race(contestants, rows, lab.rounds)


@case(Row("kl", "KL of each latent, against the same by hand from means and variances", 1))
def kl(lab: Lab, rows: tuple[Row, ...]) -> Found:
    stock, ours = lab.pair()
    contestants = {STOCK: lambda: by_hand.latent_kl(stock), "kl": lambda: ours.get_latent_kl()}
    with threads(1):
        return race(contestants, rows, lab.rounds)


@case(Row("export", "`export_to_anndata()`, against latents and loadings written by hand", 1))
def export(lab: Lab, rows: tuple[Row, ...]) -> Found:
    stock, ours = lab.pair()
    contestants = {
        STOCK: lambda: by_hand.export(stock, stock.adata),
        "export": ours.export_to_anndata,
    }
    with threads(1):
        return race(contestants, rows, lab.rounds)


def _check_population_expression() -> None:
    if not (hasattr(tl, "population_expression") and hasattr(LDVAE, "get_population_expression")):
        msg = "this version has no `population_expression`"
        raise Unavailable(msg)


def _traced_peak(task: Callable[[], object]) -> int:
    task()
    tracemalloc.start()
    try:
        task()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
