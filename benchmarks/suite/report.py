"""The table: on the terminal, as JSON, and as a page of the documentation."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from suite.registry import Measured, Row, Unavailable

PACKAGES = ("ldvae-ext", "scvi-tools", "torch", "numpy", "numba", "scipy", "anndata", "lightning", "scikit-learn")
TOLERATED = 0.8
SPACE = "\N{NO-BREAK SPACE}"
LEGEND = (
    "Times are CPU seconds, medians over rounds. The ratio is the median of the rounds' ratios of CPU time (of wall time where the row "
    "says so), in brackets the smallest and the largest; beside it that of wall time. Of errors and memory, and where something is "
    "wanted at most, the ratio is LDVAE's over the other's."
)
HEAD = ("what", "LinearSCVI", "LDVAE", "ratio (range)", "of wall time", "wanted")


@dataclass
class Line:
    """A row with what was found, or why nothing was."""

    row: Row
    found: Measured | None = None
    topic: str = ""
    missing: str = ""
    failed: bool = False

    @classmethod
    def of(cls, row: Row, found: Measured | Unavailable) -> Line:
        return cls(row, missing=f"left out: {found}") if isinstance(found, Unavailable) else cls(row, found)

    def as_cells(self) -> list[str]:
        row, found = self.row, self.found
        wanted = "" if row.target is None else f"{'≤' if row.is_upper_bound else '≥'}{SPACE}{row.target:g}"
        if found is None:
            return [row.title, "", "", self.missing.replace("|", "/"), "", wanted]
        if found.stock is None:
            return [row.title, "", quantity(found.ours, found.unit), "", "", f"{wanted}{SPACE}s"]
        spread = "" if found.low is None or found.n < 2 else f" ({figure(found.low)} to {figure(found.high)})"
        wall = "" if found.wall_ratio is None or row.clock == "wall" else figure(found.wall_ratio)
        ratio = f"{figure(found.ratio)}{spread}"
        left = quantity(found.stock, found.unit)
        if row.against != "LinearSCVI":
            left = f"{row.against}: {left}"
        return [row.title, left, quantity(found.ours, found.unit), ratio, wall, wanted]

    def falls_short(self, share: float) -> bool:
        """Whether the row failed, or its ratio is less than this share of the target."""
        return self.failed or (self.found is not None and self.row.reached(self.found.ratio, share) is False)


@dataclass
class Report:
    """All lines of a run, and where and how it was made."""

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        stored = json.loads(path.read_text())
        for line in stored["lines"]:
            line["row"] = Row(**line["row"])
            line["found"] = line["found"] and Measured(**line["found"])
        lines = [Line(**line) for line in stored.pop("lines")]
        return cls(**stored, lines=lines)


def figure(ratio: float) -> str:
    """A ratio with two or three figures."""
    return f"{ratio:.0f}" if abs(ratio) >= 20 else f"{ratio:.1f}" if abs(ratio) >= 2 else f"{ratio:.2f}"


def quantity(value: float, unit: str) -> str:
    if unit == "relative":
        return f"{value:.1e}"
    if unit.startswith("s") and value < 1:
        return f"{value * 1e3:.3g}{SPACE}m{unit}"
    return f"{value:.3g}{SPACE}{unit}" if value < 1000 else f"{value:,.0f}{SPACE}{unit}"


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    flags = info.read_text() if info.exists() else ""
    return {
        "cpu": names[0] if names else platform.processor(),
        "vectors": "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def described(report: Report) -> str:
    """Machine, versions and settings in a few sentences."""
    m, s = report.machine, report.settings
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    vectors = f", {m['vectors']}" if m["vectors"] else ""
    load = f" The load was {m['load_before']:.1f} before." if m["load_before"] is not None else ""
    return (
        f"{m['cpu']}{vectors}, {m['cores']} cores; {versions}; Python {m['python']}. {s['n_cells']:,} simulated cells x "
        f"{s['n_genes']:,} genes unless a row says otherwise, {s['density']:.1%} of the counts above 0 and {s['ones']:.0%} of these equal to 1. "
        f"One thread unless a row says two. Contestants took turns in one process, {s['rounds']} {'round' if s['rounds'] == 1 else 'rounds'}, {s['n_epochs']} epochs of each training, the "
        f"first dropped.{load} The whole took {report.seconds / 60:.1f} minutes."
    )


def markdown(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def page(report: Report) -> str:
    """The tables for the documentation, one for each topic, with what is to be known of them."""
    noted: list[str] = []
    out = ["<!-- Made by `python benchmarks/compare.py --page`; do not edit. -->", described(report), ""]
    for topic in dict.fromkeys(line.topic for line in report.lines):
        out += ["", f"**{topic}**", "", markdown(list(HEAD)), "|---" * len(HEAD) + "|"]
        for line in report.lines:
            if line.topic != topic:
                continue
            cells = line.as_cells()
            if line.found is not None and line.found.note:
                if line.found.note not in noted:
                    noted.append(line.found.note)
                cells[0] += f" [{noted.index(line.found.note) + 1}]"
            out.append(markdown(cells))
    out += ["", LEGEND, "", *(f"{i}. {note}" for i, note in enumerate(noted, 1)), ""]
    return "\n".join(out)
