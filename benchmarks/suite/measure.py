"""Times, taken in turns."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import scvi
import torch
from lightning.pytorch.callbacks import Callback
from threadpoolctl import threadpool_limits

from ldvae_ext.kernels.threads import compiled
from suite.registry import Measured, Row

STOCK = "stock"


@dataclass(frozen=True)
class Times:
    """CPU seconds of the process, all its threads together, and seconds on the wall."""

    cpu: float
    wall: float


def now() -> Times:
    return Times(time.process_time(), time.perf_counter())


def since(start: Times) -> Times:
    end = now()
    return Times(end.cpu - start.cpu, end.wall - start.wall)


def timed(task: Callable[[], object]) -> Times:
    start = now()
    task()
    return since(start)


class Clock(Callback):
    """Times of the epochs of a training, from the start of one to the start of the next, the first dropped."""

    def __init__(self) -> None:
        self.ticks: list[Times] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.ticks.append(now())

    def on_train_end(self, *_: object) -> None:
        self.ticks.append(now())

    def epochs(self) -> list[Times]:
        of_all = [Times(b.cpu - a.cpu, b.wall - a.wall) for a, b in zip(self.ticks, self.ticks[1:], strict=False)]
        return of_all[1:] or of_all


def quiet() -> None:
    """No word of lightning, no progress, no warnings."""
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR


@contextmanager
def threads(n: int) -> Iterator[None]:
    """So many threads for torch, BLAS and the compiled loops."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with threadpool_limits(n), compiled(n_threads=n):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def busy_core() -> Iterator[None]:
    """Another program that keeps one core busy."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


Contestant = Callable[[], object]


def race(
    contestants: dict[str, Contestant],
    rows: tuple[Row, ...],
    rounds: int,
    *,
    own_clock: bool = False,
    warm_up: bool = True,
    spare_seconds: float = 3.0,
    note: str = "",
) -> dict[str, Measured]:
    """Let stock and the contestants that rows name take turns, and compare each with stock, round by round.

    Parameters
    ----------
    contestants
        Stock, and one for the name of each row.
    rows
        Rows that are asked for; contestants of others do not run.
    rounds
        Number of rounds. Quick contestants run up to five times as many, while that takes fewer than `spare_seconds`.
    own_clock
        Whether contestants return the times that count, of which the median is taken. Else they are timed from outside.
    warm_up
        Whether each runs once before.
    spare_seconds
        See `rounds`.
    note
        What the page says below the table.
    """
    wanted = {name: contestants[name] for name in (STOCK, *(row.name for row in rows))}
    if warm_up:
        for task in wanted.values():
            task()
    found: dict[str, list[Times]] = {name: [] for name in wanted}
    start = time.perf_counter()
    while len(found[STOCK]) < rounds or (
        len(found[STOCK]) < 5 * rounds and time.perf_counter() - start < spare_seconds
    ):
        # Back and forth: whoever was first comes last, so that a drift of the machine helps nobody.
        for name in list(wanted)[:: -1 if len(found[STOCK]) % 2 else 1]:
            found[name].append(_median(wanted[name]()) if own_clock else timed(wanted[name]))
    return {row.name: _compared(found[STOCK], found[row.name], row, note) for row in rows}


def _median(times: Sequence[Times]) -> Times:
    return Times(median(t.cpu for t in times), median(t.wall for t in times))


def _compared(stock: list[Times], ours: list[Times], row: Row, note: str) -> Measured:
    of_rounds = {
        "cpu": [a.cpu / b.cpu for a, b in zip(stock, ours, strict=True)],
        "wall": [a.wall / b.wall for a, b in zip(stock, ours, strict=True)],
    }
    checked = of_rounds[row.clock]
    return Measured(
        stock=median(getattr(times, row.clock) for times in stock),
        ours=median(getattr(times, row.clock) for times in ours),
        unit="s" if row.clock == "cpu" else "s wall",
        ratio=median(checked),
        low=min(checked),
        high=max(checked),
        cpu_ratio=median(of_rounds["cpu"]),
        wall_ratio=median(of_rounds["wall"]),
        n=len(stock),
        note=note,
        more={
            f"{who}_{clock}_seconds": median(getattr(t, clock) for t in times)
            for who, times in (("stock", stock), ("ours", ours))
            for clock in ("cpu", "wall")
        },
    )
