"""LDVAE beside LinearSCVI: how long training and reading take, how accurate gradients are, how much memory it needs.

Contestants take turns in one process; the table holds medians over rounds. Each row is a small function in the folder `suite`.
Run `python benchmarks/compare.py --help`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from suite import footprint, gradients, peers, reading, training
from suite.lab import Lab
from suite.measure import busy_core, quiet
from suite.registry import CASES, Case, Unavailable, chosen
from suite.report import HEAD, TOLERATED, Line, Report, described, machine, markdown, page

TOPICS = {
    training.__name__: "Training",
    gradients.__name__: "Accuracy of gradients",
    footprint.__name__: "Memory of training, and compiling",
    reading.__name__: "Reading a trained model",
    peers.__name__: "Other tools",
}
# In a short run sizes are smaller and fewer rounds are run: a ratio is far off only where something is broken.
TOLERATED_SHORT = 0.4


def in_order(cases: list[Case]) -> list[Case]:
    return sorted(cases, key=lambda one: list(TOPICS).index(one.measure.__module__))


def settled(lab: Lab) -> dict[str, object]:
    counts = lab.counts().X
    return {
        "n_cells": lab.n_cells,
        "n_genes": lab.n_genes,
        "rounds": lab.rounds,
        "n_epochs": lab.n_epochs,
        "density": counts.nnz / (counts.shape[0] * counts.shape[1]),
        "ones": float((counts.data == 1).mean()),
    }


def lines_of(one: Case, lab: Lab) -> list[Line]:
    """What a case found; a row that fails does not stop the others."""
    try:
        found = one.measure(lab, one.rows)
    except Unavailable as reason:
        return [Line.of(row, reason) for row in one.rows]
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return [Line(row, missing=f"failed: {type(error).__name__}: {error}", failed=True) for row in one.rows]
    return [Line.of(row, found[row.name]) for row in one.rows]


def run(args: argparse.Namespace) -> Report:
    sizes = {"rounds": 2, "n_epochs": 2, "n_cells": 2000, "n_genes": 1000} if args.short else {}
    given = {"rounds": args.rounds, "n_cells": args.cells, "n_genes": args.genes, "folder": args.folder}
    lab = Lab(**sizes | {name: value for name, value in given.items() if value is not None})
    report = Report(machine(), settled(lab))
    print(described(report).rsplit(" The whole took", 1)[0], end="\n\n")
    print(markdown(list(HEAD)) + "\n" + "|---" * len(HEAD) + "|", flush=True)
    start = time.perf_counter()
    for one in in_order(chosen(args.only, short=args.short)):
        began = time.perf_counter()
        for line in lines_of(one, lab):
            line.topic = TOPICS[one.measure.__module__]
            line.row = replace(line.row, title=line.row.title.format(genes=f"{lab.n_genes:,}"))
            report.lines.append(line)
            print(markdown(line.as_cells()), flush=True)
            if line.found is not None and line.found.note:
                print(f"    {line.found.note}", file=sys.stderr, flush=True)
        report.seconds = time.perf_counter() - start
        print(f"    {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if args.json:
            report.write(args.json)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="only rows whose name matches; --list shows the names")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--short", action="store_true", help="a few rows on fewer cells, under a minute")
    parser.add_argument("--rounds", type=int, help="3, or 2 with --short")
    parser.add_argument("--cells", type=int, help="7,000, or 2,000 with --short")
    parser.add_argument("--genes", type=int, help="2,000, or 1,000 with --short")
    parser.add_argument("--folder", type=Path, help="folder with human_kidney_hvg2000.h5ad; else $LDVAE_EXT_DATA")
    parser.add_argument("--json", type=Path, help="write everything to this file, row by row")
    parser.add_argument("--from-json", type=Path, help="measure nothing; print, or write, the table of this file")
    parser.add_argument("--page", type=Path, help="write the table for the documentation to this file")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail where a ratio is below {TOLERATED} of its target ({TOLERATED_SHORT} with --short), or a row failed",
    )
    parser.add_argument(
        "--beside-busy-core", action="store_true", help="keep one core busy with another program meanwhile"
    )
    args = parser.parse_args()
    if args.list:
        for one in in_order(CASES):
            for row in one.rows:
                print(f"{row.name:22} {'short ' if row.in_short else '      '}{row.title}")
        return
    quiet()
    if args.from_json:
        report = Report.read(args.from_json)
        if not args.page:
            print(page(report))
    else:
        with busy_core() if args.beside_busy_core else nullcontext():
            report = run(args)
        print(f"\n{report.seconds:.0f} seconds")
    if args.page:
        args.page.write_text(page(report))
    short = [line for line in report.lines if line.falls_short(TOLERATED_SHORT if args.short else TOLERATED)]
    for line in short:
        ratio = "" if line.found is None else f": {line.found.ratio:.2f}, wanted {line.row.target}"
        print(f"short of its target: {line.row.name}{ratio}", file=sys.stderr)
    if args.check and short:
        sys.exit(1)


if __name__ == "__main__":
    main()
