from __future__ import annotations

import sys

import pytest

from ldvae_ext import _progress
from ldvae_ext._progress import shown_if_slow


@pytest.mark.filterwarnings("ignore:IProgress not found")
@pytest.mark.parametrize(("delay", "is_shown"), [(0, True), (60, False)])
def test_a_bar_is_shown_if_a_call_takes_long(monkeypatch, capsys, delay, is_shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(_progress, "_SLOW", delay)
    assert list(shown_if_slow(iter("abc"), 3)) == list("abc")
    captured = capsys.readouterr()
    assert ("Reading cells" in captured.err) == is_shown
    assert captured.out == ""


def test_no_bar_is_written_to_a_file(monkeypatch, capsys):
    monkeypatch.setattr(_progress, "_SLOW", 0)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert list(shown_if_slow(iter("abc"), 3)) == list("abc")
    assert capsys.readouterr().err == ""
