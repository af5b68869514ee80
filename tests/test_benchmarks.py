"""The benchmarks can be run: rows import, a tiny one is measured, and what is written is read back."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {"n_cells": 300, "n_genes": 100, "rounds": 1, "n_epochs": 2}


@pytest.fixture
def suite(monkeypatch):
    """The folder of the benchmarks as a place to import from."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("compare", "gpu", "scaling", "profile_step") or name.split(".")[0] in ("suite", "asv_benchmarks"):
            del sys.modules[name]


@pytest.mark.usefixtures("suite")
def test_rows_have_names_of_their_own_and_belong_to_a_topic():
    import compare

    rows = [row for one in compare.in_order(compare.CASES) for row in one.rows]
    assert len({row.name for row in rows}) == len(rows) > 30
    assert {row.name for one in compare.chosen(None, short=True) for row in one.rows} >= {"epoch-1000", "ablate-10"}


@pytest.mark.usefixtures("suite")
def test_a_tiny_row_is_measured_written_and_read_back(tmp_path):
    import compare
    from suite.report import Report, machine, page

    lab = compare.Lab(**TINY)
    report = Report(machine(), compare.settled(lab))
    (one,) = compare.chosen("^decode$", short=False)
    report.lines = compare.lines_of(one, lab)
    assert not report.lines[0].failed, report.lines[0].missing
    assert report.lines[0].found.ratio > 0
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["lines"][0]["row"]["name"] == "decode"
    assert page(Report.read(tmp_path / "report.json")) == page(report)
    assert "decoding of given latents" in page(report)


@pytest.mark.usefixtures("suite")
def test_a_row_that_fails_or_has_no_data_does_not_stop_the_others():
    import compare
    from suite.registry import Case, Row, Unavailable

    def broken(_lab, _rows):
        raise KeyError

    def absent(_lab, _rows):
        reason = "no data"
        raise Unavailable(reason)

    (failed,) = compare.lines_of(Case((Row("a", "a", 2.0),), broken), None)
    (left_out,) = compare.lines_of(Case((Row("b", "b", 2.0),), absent), None)
    assert failed.falls_short(0.8)
    assert not left_out.falls_short(0.8)
    assert left_out.missing == "left out: no data"


@pytest.mark.usefixtures("suite")
@pytest.mark.parametrize(
    ("is_upper_bound", "ratio", "enough"),
    [(False, 4.0, True), (False, 3.9, False), (True, 6.2, True), (True, 6.3, False)],
)
def test_targets_are_checked_with_some_tolerance(is_upper_bound, ratio, enough):
    from suite.registry import Row

    assert Row("a", "a", 5.0, is_upper_bound=is_upper_bound).reached(ratio, 0.8) is enough


@pytest.mark.usefixtures("suite")
def test_what_is_compared_is_the_same_thing():
    from suite import by_hand
    from suite.lab import Lab

    stock, ours = Lab(**TINY).pair(n_latent=3)
    theirs = by_hand.ablation(stock, in_one_pass=False)
    assert np.allclose(theirs, by_hand.ablation(stock, in_one_pass=True), atol=1e-5)
    # float32 sums over genes against float64 differences gene by gene.
    assert np.allclose(theirs, ours.ablate().X, atol=2e-3)
    assert np.allclose(by_hand.latent_kl(stock), ours.get_latent_kl(), atol=1e-5)


@pytest.mark.usefixtures("suite")
@pytest.mark.slow
def test_the_checks_of_a_gpu_pass_on_a_cpu(tmp_path, monkeypatch, capsys):
    import gpu

    paths = ["--json", str(tmp_path / "gpu.json"), "--page", str(tmp_path / "gpu.md")]
    sizes = ["--cells", "300", "--genes", "100", "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *sizes, *paths])
    with warnings.catch_warnings():
        gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(gpu.READERS) < set(report["equality"])
    assert (tmp_path / "gpu.md").read_text() == gpu.table(report)
    assert "300 | epoch" in capsys.readouterr().out

    monkeypatch.setitem(gpu.READERS, "`ablate`", lambda model: np.random.default_rng().normal(size=3))
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        gpu.main()
