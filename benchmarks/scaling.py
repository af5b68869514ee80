"""How time and memory grow with cells, genes and latents: training, ablation, mean expression of populations.

Each point is a process of its own. Points that are in the file already are not measured again. Run
`python benchmarks/scaling.py --help`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from suite.footprint import in_a_child

USUAL = {"cells": 7000, "genes": 2000, "latents": 10}
AXES = {"cells": (7000, 50_000, 200_000), "genes": (1000, 2000, 5000, 10_000), "latents": (5, 10, 30, 60)}
JOBS = {"train": "training, an epoch", "ablate": "ablation of all latents", "population": "means of 8 populations"}
WHO = {"stock": ("LinearSCVI", "#b45309"), "ours": ("LDVAE", "#1d4ed8")}
STATIC = Path(__file__).parents[1] / "docs" / "_static"


def points(scale: float) -> list[dict[str, int]]:
    """Each size once, the usual one first, small before large."""
    sizes = [USUAL | {axis: value} for axis, values in AXES.items() for value in values]
    unique = list({tuple(size.values()): size for size in sizes}.values())
    by_work = sorted(unique, key=lambda size: size["cells"] * size["genes"] * (size["latents"] + 20))
    return [
        {name: max(5, int(value * scale)) if name != "latents" else value for name, value in s.items()} for s in by_work
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_there(known: list[dict[str, Any]], point: dict[str, int], who: str) -> bool:
    return any(all(row[name] == value for name, value in point.items()) and row["who"] == who for row in known)


def measure(path: Path, point: dict[str, int], who: str, timeout: float) -> None:
    sizes = [text for name, value in point.items() for text in (f"--{name}", value)]
    start = time.perf_counter()
    try:
        found = in_a_child("--who", who, *sizes, timeout=timeout)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"{point} {who}: {error}", flush=True)
        return
    rows = [{**point, "who": who, "job": job, **numbers} for job, numbers in found.items()]
    with path.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    took = time.perf_counter() - start
    print(
        point,
        who,
        {row["job"]: f"{row['cpu']:.2f} s, {row['peak_mb']:.0f} MB" for row in rows},
        f"{took:.0f} s",
        flush=True,
    )


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Exponent of a power law, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else np.nan


def along(table: pd.DataFrame, axis: str, usual: dict[str, int]) -> pd.DataFrame:
    """Points that differ from the usual size in this axis alone."""
    others = [name for name in usual if name != axis]
    return table[(table[others] == pd.Series({name: usual[name] for name in others})).all(axis=1)].sort_values(axis)


def figure(table: pd.DataFrame, usual: dict[str, int], path: Path) -> None:
    """Time (a row of panels for each job) and, in the last row, the memory that population means add, on logarithmic axes."""
    panels = [(job, "cpu") for job in JOBS] + [("population", "added_mb")]
    fig, axes = plt.subplots(
        len(panels), len(AXES), figsize=(7.8, 2.2 * len(panels)), sharex="col", sharey="row", layout="constrained"
    )
    for line, (job, value) in zip(axes, panels, strict=True):
        for ax, axis in zip(line, AXES, strict=True):
            _panel(ax, along(table[table["job"] == job], axis, usual), axis, value)
        title = JOBS[job] if value == "cpu" else "memory of these means"
        line[0].set_ylabel(f"{title}\n{'CPU seconds' if value == 'cpu' else 'MB that it adds'}", fontsize=9)
    for ax, axis in zip(axes[-1], AXES, strict=True):
        ax.set_xlabel(axis, fontsize=9)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _panel(ax: Any, table: pd.DataFrame, axis: str, value: str) -> None:
    lines = []
    for who, (label, color) in WHO.items():
        mine = table[table["who"] == who]
        if mine.empty:
            continue
        x, y = mine[axis].to_numpy(float), mine[value].to_numpy(float)
        ax.loglog(x, y, "o-", color=color, markersize=4, linewidth=1.5)
        lines.append((x, y, f"{label}, {slope(x, y):.2f}", color))
    ax.margins(x=0.1, y=0.2)
    ax.grid(which="major", color="#e5e7eb", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    ax.minorticks_off()
    ticks = [v for v in AXES[axis] if v in set(table[axis])] or sorted(set(table[axis]))
    ax.set_xticks(ticks, [f"{v / 1000:g}k" if v >= 1000 else f"{v:g}" for v in ticks])
    # The upper name stands above the end of its line, the lower one below the start of its own.
    for x, y, label, color in lines:
        is_upper = y[-1] == max(one[1][-1] for one in lines)
        at = -1 if is_upper else 0
        ax.annotate(
            label,
            (x[at], y[at]),
            xytext=(0, 6 if is_upper else -6),
            textcoords="offset points",
            ha="right" if is_upper else "left",
            va="bottom" if is_upper else "top",
            fontsize=9,
            color=color,
        )


def summary(table: pd.DataFrame, usual: dict[str, int]) -> str:
    """A Markdown table of the exponents and of the ends of the lines."""
    lines = [
        "| job | grows with | LinearSCVI: exponent, from to | LDVAE: exponent, from to | ratio at the end |",
        "|---|---|---|---|---|",
    ]
    for job in JOBS:
        for axis in AXES:
            cells, ends = [], []
            for who in WHO:
                mine = along(table[(table["job"] == job) & (table["who"] == who)], axis, usual)
                if len(mine) < 2:
                    cells.append("")
                    continue
                ends.append(mine["cpu"].iloc[-1])
                start, end = mine.iloc[0], mine.iloc[-1]
                cells.append(
                    f"{slope(mine[axis].to_numpy(float), mine['cpu'].to_numpy()):.2f}, {start['cpu']:.2g} to {end['cpu']:.3g} s, "
                    f"{start['peak_mb'] / 1e3:.2f} to {end['peak_mb'] / 1e3:.2f} GB"
                )
            low, high = table[axis].min(), table[axis].max()
            ratio = f"{ends[0] / ends[1]:.1f}" if len(ends) == 2 else ""
            lines.append(f"| {JOBS[job]} | {axis}, {low:,} to {high:,} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling.jsonl"), help="file that points are added to")
    parser.add_argument("--figure", type=Path, default=STATIC / "scaling.png")
    parser.add_argument("--csv", type=Path, help="write the points as a csv, too")
    parser.add_argument("--page", type=Path, help="write the table for the documentation to this file, too")
    parser.add_argument("--summary", action="store_true", help="measure nothing; draw and print what is in the file")
    parser.add_argument("--scale", type=float, default=1, help="of cells and genes, to try the script")
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds for one point; one that takes longer is left out"
    )
    args = parser.parse_args()
    if not args.summary:
        for point in points(args.scale):
            for who in WHO:
                if not is_there(read(args.out), point, who):
                    measure(args.out, point, who, args.timeout)
    table = pd.DataFrame(read(args.out))
    # What is less than a page or two of the allocator is nothing.
    table["added_mb"] = (table["peak_mb"] - table["base_mb"]).clip(lower=1)
    usual = {name: int(value * args.scale) if name != "latents" else value for name, value in USUAL.items()}
    figure(table, usual, args.figure)
    if args.csv:
        table.round(4).to_csv(args.csv, index=False)
    text = summary(table, usual)
    print(text)
    if args.page:
        args.page.write_text(f"<!-- Made by `python benchmarks/scaling.py --page`; do not edit. -->\n{text}\n")


if __name__ == "__main__":
    main()
