"""Names and signatures of everything public: they change on purpose or not at all."""

from __future__ import annotations

import difflib

from tests.golden.make_public_api import PATH, public_api


def test_public_names_and_signatures_are_those_of_the_snapshot():
    difference = list(difflib.unified_diff(PATH.read_text().splitlines(), public_api(), "snapshot", "code", n=0))
    assert difference == [], "`python -m tests.golden.make_public_api` takes a change that is meant into the snapshot"
