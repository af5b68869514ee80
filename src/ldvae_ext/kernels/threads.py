"""The switch between compiled loops and numpy, and the number of threads that share the rows of a loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

_is_on: ContextVar[bool] = ContextVar("_is_on", default=True)
_limit: ContextVar[int | None] = ContextVar("_limit", default=None)
_pools: dict[int, ThreadPoolExecutor] = {}
# A forked process inherits a pool, but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def is_compiled() -> bool:
    """True if compiled loops are to be used; see :func:`compiled`."""
    return _is_on.get()


@contextmanager
def compiled(*, on: bool | None = None, n_threads: int | None = None) -> Iterator[None]:
    """Switch compiled loops on or off, and set their number of threads, inside the context.

    Parameters
    ----------
    on
        True for compiled loops, False for numpy and torch; unchanged if None.
    n_threads
        Number of threads; unchanged if None, see :func:`threads`.
    """
    switch = _is_on.set(_is_on.get() if on is None else on)
    limit = _limit.set(_limit.get() if n_threads is None else n_threads)
    try:
        yield
    finally:
        _is_on.reset(switch)
        _limit.reset(limit)


def threads() -> int:
    """Number of threads: that of :func:`compiled`, else ``OMP_NUM_THREADS``, else the processors of this process."""
    limit = _limit.get()
    if limit is not None:
        return limit
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_rows(loop: Callable[..., Any], n_rows: int, *arguments: Any) -> None:
    """Call ``loop(start, stop, *arguments)`` on as many pieces of the rows as there are threads, at the same time.

    Parameters
    ----------
    loop
        Compiled without the interpreter's lock; writes to rows of its arguments.
    n_rows
        Number of rows.
    *arguments
        Further arguments.
    """
    n_pieces = max(1, min(threads(), n_rows))
    bounds = [n_rows * i // n_pieces for i in range(n_pieces + 1)]
    pieces = list(pairwise(bounds))
    others = [_pool(n_pieces - 1).submit(loop, *piece, *arguments) for piece in pieces[1:]]
    try:
        loop(*pieces[0], *arguments)
    finally:
        wait(others)
    for other in others:
        other.result()


def _pool(n_workers: int) -> ThreadPoolExecutor:
    if n_workers not in _pools:
        _pools[n_workers] = ThreadPoolExecutor(n_workers, thread_name_prefix="ldvae_ext")
    return _pools[n_workers]
