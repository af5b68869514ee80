"""Pages that promise tests name tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


@cache
def names_in(path: Path) -> set[str]:
    """Functions of a test file, those of a class behind its name."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def rows(page: str) -> list[list[str]]:
    """Cells of the tables' rows, without their heads."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    table = [line for i, line in enumerate(lines) if line.startswith("| ") and not lines[i + 1].startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


@pytest.mark.parametrize("page", ["defects.md", "tasks.md", "interoperability.md"])
def test_every_row_of_a_table_names_a_test_that_exists(page):
    assert len(rows(page)) > (10 if page == "interoperability.md" else 30)
    for row in rows(page):
        (named,) = NAMED.findall(row[-1])
        assert named[1] in names_in(ROOT / named[0]), row


def test_every_defect_has_a_row_and_its_test_has_its_number():
    numbers = [row[0] for row in rows("defects.md")]
    assert sorted(set(numbers), key=lambda n: int(n[1:])) == [f"T{i}" for i in range(1, 37)]
    for number, *_, test in rows("defects.md"):
        path, name = NAMED.findall(test)[0]
        body = (ROOT / path).read_text().split(f"def {name}(")[1].split("\ndef ")[0]
        assert re.search(rf"# {number}\b", body), (number, name)
