"""Rows shared by threads, and the switch between compiled loops and numpy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from ldvae_ext.kernels.threads import compiled, is_compiled, over_rows, threads


@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_pieces_are_the_rows_each_once_and_of_like_size(n_rows, n_threads):
    seen = []
    with compiled(n_threads=n_threads):
        over_rows(lambda start, stop, word: seen.append((start, stop, word)), n_rows, "word")
    seen.sort()
    assert [row for start, stop, _ in seen for row in range(start, stop)] == list(range(n_rows))
    sizes = [stop - start for start, stop, _ in seen]
    assert max(sizes) - min(sizes) <= 1
    assert len(seen) == max(1, min(n_threads, n_rows))
    assert {word for *_, word in seen} == {"word"}


def test_pieces_run_at_the_same_time():
    together = threading.Barrier(3, timeout=20)
    with compiled(n_threads=3):
        over_rows(lambda *_: together.wait(), 3)


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_an_error_in_any_piece_reaches_the_caller_after_all_have_ended(culprit):
    ended, others_have_started = [], threading.Barrier(3, timeout=20)

    def loop(start, stop):
        others_have_started.wait()
        if start == culprit:
            msg = f"row {start}"
            raise ZeroDivisionError(msg)
        ended.append(start)

    with compiled(n_threads=3), pytest.raises(ZeroDivisionError, match=f"row {culprit}"):
        over_rows(loop, 3)
    assert sorted(ended) == sorted({0, 1, 2} - {culprit})


def test_a_forked_process_makes_threads_of_its_own():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    code = """
import os
from ldvae_ext.kernels.threads import compiled, over_rows
seen = []
with compiled(n_threads=3):
    over_rows(lambda start, stop: seen.append(start), 3)
    child = os.fork()
    if not child:
        over_rows(lambda start, stop: seen.append(start), 3)
        os._exit(len(seen))
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=60).returncode == 6


def test_options_that_are_not_given_stay_as_they_were_and_all_end_with_the_context():
    before = threads()
    with compiled(n_threads=3):
        with compiled(on=False):
            assert not is_compiled()
            assert threads() == 3
            with compiled(on=True, n_threads=2):
                assert threads() == 2
        assert threads() == 3
        with pytest.raises(KeyError), compiled(on=False, n_threads=7):
            raise KeyError
        assert threads() == 3
    assert threads() == before


def test_another_thread_is_not_limited():
    seen = []
    with compiled(n_threads=77):
        other = threading.Thread(target=lambda: seen.append(threads()))
        other.start()
        other.join()
    assert seen != [77]


@pytest.mark.parametrize(
    ("asked", "expected"), [("3", 3), ("1", 1), ("", None), ("0", None), ("many", None), ("4,2", None)]
)
def test_the_environment_says_how_many_threads(monkeypatch, asked, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    default = threads()
    assert default >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads() == (default if expected is None else expected)
