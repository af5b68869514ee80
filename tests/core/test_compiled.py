"""Rows shared by threads, whatever the loop: compiled or not."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from ldvae_ext.core import _compiled
from ldvae_ext.core._compiled import compiled, kernels, over_rows, threads
from tests.core.decoders import full_decoder


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
    if not hasattr(_compiled.os, "fork"):
        pytest.skip("no fork here")
    code = """
import os
from ldvae_ext.core._compiled import compiled, over_rows
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


def test_what_is_not_said_inside_is_as_outside_and_ends_there():
    before = threads()
    with compiled(n_threads=3):
        with compiled(on=False):
            assert kernels() is None
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


def test_a_decoders_tables_are_its_own_and_travel_with_no_copy_of_it():
    decoder = full_decoder(0, 12, likelihood="nb", dispersion="gene", covariates=())
    size = len(pickle.dumps(decoder))
    assert decoder._tables is decoder._tables
    assert len(pickle.dumps(decoder)) == size
    copy = pickle.loads(pickle.dumps(decoder))
    np.testing.assert_array_equal(copy._tables.weight_kg, decoder._tables.weight_kg)
    turned = replace(decoder, weight_gk=-decoder.weight_gk)
    np.testing.assert_array_equal(turned._tables.weight_kg, -decoder._tables.weight_kg)
    assert copy != decoder
