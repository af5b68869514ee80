"""Rows about memory and compiling, each contestant in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from suite.lab import Lab
from suite.registry import Found, Measured, Row, Unavailable, case

CHILD = Path(__file__).parent / "child.py"


def in_a_child(*arguments: object, timeout: float = 900, **environment: str) -> dict[str, Any]:
    """What `child.py` prints."""
    done = subprocess.run(
        [sys.executable, str(CHILD), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
        check=False,
    )
    if done.returncode:
        msg = f"the child process failed: {done.stderr.strip().splitlines()[-1:]}"
        raise RuntimeError(msg)
    return json.loads(done.stdout.strip().splitlines()[-1])


@case(
    Row("memory", "peak memory of training beyond imports, data and model", 1.3, is_upper_bound=True),
    Row("memory-total", "peak memory of training, everything", 1.3, is_upper_bound=True),
)
def memory(lab: Lab, rows: tuple[Row, ...]) -> Found:
    """One epoch after that of a tiny model, so that what is imported or compiled on first use is there already."""
    sizes = ("--cells", lab.n_cells, "--genes", lab.n_genes, "--jobs", "train")
    found = {who: in_a_child("--who", who, *sizes)["train"] for who in ("stock", "ours")}
    if not all(one["peak_is_own"] for one in found.values()):
        msg = "this system does not let a process reset its peak of memory"
        raise Unavailable(msg)
    peak = {
        who: {"memory": one["peak_mb"] - one["base_mb"], "memory-total": one["peak_mb"]} for who, one in found.items()
    }
    return {
        row.name: Measured(
            stock=peak["stock"][row.name],
            ours=peak["ours"][row.name],
            unit="MB",
            ratio=peak["ours"][row.name] / peak["stock"][row.name],
        )
        for row in rows
    }


@case(
    Row("compile", "compiling on the first training, seconds of CPU", 4, is_upper_bound=True),
    Row("compile-ablation", "compiling on the first ablation, seconds of CPU", 5, is_upper_bound=True),
    Row("compile-cached", "both in the next process, from the cache", 1, is_upper_bound=True),
)
def first_call(lab: Lab, rows: tuple[Row, ...]) -> Found:
    """What first calls take beyond second ones."""
    with tempfile.TemporaryDirectory() as cache:
        fresh, cached = (in_a_child("--first-calls", NUMBA_CACHE_DIR=cache) for _ in range(2))
    seconds = {
        "compile": fresh["train"],
        "compile-ablation": fresh["ablate"],
        "compile-cached": sum(cached.values()),
    }
    return {row.name: Measured(stock=None, ours=seconds[row.name], unit="s", ratio=seconds[row.name]) for row in rows}
