"""Processes beside this one, which share the runs of an ensemble with it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor

from ldvae_ext._validate import warn


class Workers:
    """Other processes, each of which trains the next run when it has ended one.

    Parameters
    ----------
    n_others
        Number of processes.
    runs
        Numbers of the runs.
    task
        Function of the number, which trains the run.
    n_threads
        Number of threads of each process.
    """

    def __init__(self, n_others: int, runs: Sequence[int], task: Callable[[int], Any], n_threads: int) -> None:
        # Libraries that are loaded there take as many threads as a training.
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
        threads = {name: os.environ.get(name, str(n_threads)) for name in names}
        # One of its own: that of joblib may have work of the caller.
        self._executor = ProcessPoolExecutor(n_others, env=threads) if n_others else None
        self._left, self._task = deque(runs), task
        self._ended: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self._is_broken = self._is_stopped = False
        for _ in range(n_others):
            self._begin()

    def next_run(self) -> int | None:
        """Number of a run that no process has begun; None if there is none."""
        try:
            return self._left.popleft()
        except IndexError:
            return None

    def ended(self, *, wait: bool) -> Iterator[tuple[int, Any]]:
        """Numbers and results of runs that ended.

        Parameters
        ----------
        wait
            True to wait for the next one, or for a run that has to be begun again.
        """
        while wait or not self._ended.empty():
            result, wait = self._ended.get(), False
            if result is None:
                continue
            m, future = result
            try:
                outcome = future.result()
            except BrokenProcessPool:
                self._left.append(m)
                if not self._is_broken:
                    self._is_broken = True
                    warn(
                        "A process was ended from outside, perhaps for lack of memory. Runs that had not ended are trained in this process."
                    )
                continue
            yield m, outcome

    def stop(self) -> None:
        """End the processes."""
        self._is_stopped = True
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)

    def _begin(self, _: Any = None) -> None:
        """Give a process the next run. Called in a thread when one has ended."""
        if self._executor is None or self._is_stopped:
            return
        m = self.next_run()
        if m is None:
            return
        try:
            future = self._executor.submit(self._task, m)
        except Exception:  # noqa: BLE001 - the executor takes no more work, usually since a process was killed
            self._left.append(m)
            self._ended.put(None)
            return
        future.add_done_callback(lambda future: self._ended.put((m, future)))
        future.add_done_callback(self._begin)
