"""What pages promise exists: tests, public names, papers, pages in the navigation."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import ldvae_ext

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


def test_the_index_of_the_api_names_everything_public():
    named = set(re.findall(r"<(ldvae_ext[\w.]+)>|`~(ldvae_ext[\w.]+)`", (ROOT / "docs/api/index.md").read_text()))
    named = {first or second for first, second in named}
    public = {f"ldvae_ext.{name}" for name in ("run", "report")}
    for module in ("model", "module", "core", "tl", "get", "pl", "datasets"):
        public |= {f"ldvae_ext.{module}.{name}" for name in getattr(ldvae_ext, module).__all__}
    listed = re.findall(r"^   (LDVAE\.\w+)$", (ROOT / "docs/api/model.md").read_text(), re.M)
    public |= {f"ldvae_ext.model.{name}" for name in listed}
    assert public - named == set()


def test_the_walks_name_functions_where_they_are():
    walks = (ROOT / "docs/contributing.md").read_text().split("## Additions")[0]
    steps = re.findall(r"`([\w/]+\.py)`,\s+`([\w.]+)`", walks)
    assert len(steps) >= 20
    for path, name in steps:
        source = (ROOT / "src/ldvae_ext" / path).read_text()
        for part in name.split("."):
            assert re.search(rf"^\s*(?:def|class) {part}\b", source, re.M), (path, name)


def test_papers_are_in_the_list_and_the_list_is_cited():
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    cited = {key for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", pages) for key in keys.split(",")}
    assert cited == set(re.findall(r"^@\w+\{(\w+),", (ROOT / "docs/references.bib").read_text(), re.M))


def test_every_page_is_in_the_navigation():
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").glob("*.md")}
    pages |= {f"tutorials/{path.stem}" for path in (ROOT / "tutorials").glob("*.ipynb")}
    shown = set()
    for page in (ROOT / "docs").glob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            shown |= {re.sub(r".*<(.*)>", r"\1", line) for line in tree.splitlines() if line and line[0] != ":"}
    assert pages - {"index"} == shown - {"api/index"}
