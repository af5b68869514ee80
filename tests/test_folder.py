"""Folders of results: nothing is removed that is not a result."""

from __future__ import annotations

import json

import pytest

from ldvae_ext._folder import (
    MARKER,
    FolderError,
    check_can_be_written,
    foreign_entry,
    keep_incomplete,
    put_in_place,
    temporary_beside,
    write_marker,
)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def results(out, text="new"):
    """A finished temporary folder for ``out``."""
    work = temporary_beside(out)
    (work / "tables").mkdir()
    (work / "tables" / "a.csv").write_text(text)
    (work / "b.txt").write_text(text)
    write_marker(work, "1.2.3")
    return work


@pytest.fixture
def out(tmp_path):
    """A folder with results."""
    out = tmp_path / "deep" / "results"
    put_in_place(results(out, "old"), out, overwrite=False)
    return out


def test_results_are_put_in_place_with_a_marker(out):
    assert [p.name for p in out.parent.iterdir()] == ["results"]
    marker = json.loads((out / MARKER).read_text())
    assert marker == {"format": 1, "version": "1.2.3", "files": ["b.txt", "tables/a.csv"]}
    assert foreign_entry(out) is None


def test_results_replace_results(out):
    check_can_be_written(out, overwrite=True)
    put_in_place(results(out), out, overwrite=True)
    assert content(out) | {MARKER: ""} == {"b.txt": "new", "tables/a.csv": "new", MARKER: ""}
    assert [p.name for p in out.parent.iterdir()] == ["results"]


@pytest.mark.parametrize("name", ["thesis.docx", "tables/thesis.docx", ".hidden", "chapters/one.docx"])
@pytest.mark.parametrize("put", [False, True])
def test_a_foreign_file_is_named_and_nothing_is_touched(out, name, put):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    before, work = content(out), results(out)
    with pytest.raises(FolderError, match=name.split("/")[0]):
        put_in_place(work, out, overwrite=True) if put else check_can_be_written(out, overwrite=True)
    assert content(out) == before
    assert "new" in content(work).values(), "the new results are still there"


def test_an_empty_foreign_folder_is_foreign(out):
    (out / "empty").mkdir()
    assert foreign_entry(out) == out / "empty"


def test_links_are_not_followed(out, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.docx").write_text("years of work")
    (out / "link").symlink_to(elsewhere)
    with pytest.raises(FolderError, match="link"):
        check_can_be_written(out, overwrite=True)
    (out / "link").unlink()
    (out / "b.txt").unlink()
    (out / "b.txt").symlink_to(elsewhere / "thesis.docx")
    put_in_place(results(out), out, overwrite=True)
    assert (elsewhere / "thesis.docx").read_text() == "years of work"


@pytest.mark.parametrize(
    "marker", [None, "", "[]", "{}", '{"format": "x", "files": []}', '{"format": 1}', '{"format": 1, "files": 3}']
)
def test_without_a_readable_marker_all_is_foreign(out, marker):
    (out / MARKER).unlink()
    if marker is not None:
        (out / MARKER).write_text(marker)
    with pytest.raises(FolderError, match="did not write"):
        check_can_be_written(out, overwrite=True)


def test_a_folder_of_a_newer_version_is_left_alone_with_the_reason(out):
    (out / MARKER).write_text('{"format": 99, "files": []}')
    with pytest.raises(FolderError, match=r"has format 99, .* Update ldvae_ext"):
        check_can_be_written(out, overwrite=True)


def test_a_marker_cannot_name_files_elsewhere(out):
    victim = out.parent / "thesis.docx"
    victim.write_text("years of work")
    marker = json.loads((out / MARKER).read_text())
    marker["files"] += ["../thesis.docx", str(victim)]
    (out / MARKER).write_text(json.dumps(marker))
    put_in_place(results(out), out, overwrite=True)
    assert victim.read_text() == "years of work"


def test_an_empty_folder_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FolderError, match="exists; use --overwrite"):
        check_can_be_written(tmp_path / "out", overwrite=False)
    check_can_be_written(tmp_path / "out", overwrite=True)
    put_in_place(results(tmp_path / "out"), tmp_path / "out", overwrite=True)
    assert foreign_entry(tmp_path / "out") is None


def test_the_first_of_two_runs_without_overwrite_wins(tmp_path):
    out = tmp_path / "out"
    check_can_be_written(out, overwrite=False)
    first, second = results(out, "first"), results(out, "second")
    put_in_place(first, out, overwrite=False)
    with pytest.raises(FolderError, match="exists"):
        put_in_place(second, out, overwrite=False)
    assert content(out)["b.txt"] == "first"
    assert content(second)["b.txt"] == "second"


def test_a_folder_that_appears_while_results_are_replaced_stays(out, monkeypatch):
    work, move = results(out), type(out).rename

    def another_program_is_faster(self, target):
        if self == work:
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")
        return move(self, target)

    monkeypatch.setattr(type(out), "rename", another_program_is_faster)
    with pytest.raises(FolderError, match="another program"):
        put_in_place(work, out, overwrite=True)
    assert content(out) == {"theirs.txt": "theirs"}


def test_old_results_come_back_if_the_new_ones_cannot_be_put_in_place(out, monkeypatch):
    work, move, before = results(out), type(out).rename, content(out)

    def fail(self, target):
        if self == work:
            raise OSError(28, "No space left on device")
        return move(self, target)

    monkeypatch.setattr(type(out), "rename", fail)
    with pytest.raises(FolderError, match="No space left on device"):
        put_in_place(work, out, overwrite=True)
    assert content(out) == before


@pytest.mark.parametrize(("name", "message"), [("a" * 300, "File name too long"), ("file/sub", "Not a directory")])
def test_a_path_that_cannot_be_created_is_named(tmp_path, name, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match=message):
        check_can_be_written(tmp_path / name, overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_check_leaves_nothing(tmp_path):
    check_can_be_written(tmp_path / "a" / "b" / "c", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_incomplete_results_get_a_name_of_their_own(tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        work = temporary_beside(out)
        (work / "model.pt").write_text("x")
        assert keep_incomplete(work, out) == tmp_path / f"out-incomplete-{number}"
    assert content(tmp_path / "out-incomplete-2") == {"model.pt": "x"}
