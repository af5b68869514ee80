"""Run all bad inputs, and write what becomes of them to `docs/_static/bad_inputs_table.md`.

Run `python -m tests.bad_inputs.make_table` after a change of the cases or of messages.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

# Before numpy and torch are imported: the same sums on each machine.
os.environ["OMP_NUM_THREADS"] = "1"

PATH = Path(__file__).parents[2] / "docs" / "_static" / "bad_inputs_table.md"
_LONGEST = 200
# The command line has no exceptions.
_COMMANDS = {"CommandError": "exit code 1", "UsageError": "exit code 2"}


def literal(text: str) -> str:
    """Text as inline code, which MyST and HTML show as it is, in one line; control characters as escapes."""
    from ldvae_ext._validate import printable

    text = printable(text)
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + " ..."
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # A bar would end the cell of the table, also in code.
    return f"{fence} {text} {fence}".replace("|", r"\|")


def rows() -> list[tuple[str, str, str]]:
    """Entry point, input and outcome of each case; raises if one is not as expected."""
    from tests.bad_inputs import CASES
    from tests.bad_inputs.case import assert_expected, run_case

    found = []
    for case in CASES:
        outcome = run_case(case)
        assert_expected(case, outcome)
        name = type(outcome.error).__name__
        kind = "the right result" if outcome.error is None else _COMMANDS.get(name) or literal(name)
        message = literal(outcome.message) if case.fragments else ""
        found.append((case.entry, case.what, f"{kind}: {message}" if message else kind))
    return found


def first_columns(table: str) -> list[str]:
    """Entry point and input of each row of a table, as they are written."""
    return [line.rsplit(" | ", 1)[0] for line in table.splitlines() if line.startswith("| ")][2:]


def written(cells: list[tuple[str, ...]]) -> str:
    """The rows as a table."""
    head = ["| entry point | input | outcome |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| {literal(entry)} | {what} | {outcome} |" for entry, what, outcome in cells)]) + "\n"


if __name__ == "__main__":
    import matplotlib as mpl

    mpl.use("Agg")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    table = written(rows())
    PATH.write_text(table, encoding="utf-8")
    sys.stdout.write(f"{len(first_columns(table))} rows\n")
