"""Measure jobs in a process of their own and print one line of JSON: time, and the peak of the resident memory.

`python benchmarks/suite/child.py --who ours --cells 7000 --genes 2000 --latents 10 --jobs train ablate population`
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from suite import by_hand
from suite.lab import TRAIN, of_class, simulated
from suite.measure import now, quiet, since, threads

JOBS = ("train", "ablate", "population")
GROUPBY = "population"


def job(name: str, model: Any, *, is_ours: bool) -> Callable[[], object] | None:
    if name == "train":
        return lambda: model.train(1, plan_kwargs={"lr": 5e-3}, **TRAIN)
    if name == "ablate":
        return model.ablate if is_ours else lambda: by_hand.ablation(model, in_one_pass=False)
    if is_ours:
        if not hasattr(model, "get_population_expression"):
            return None
        return lambda: model.get_population_expression(groupby=GROUPBY)
    return lambda: by_hand.population_means(model, GROUPBY)


def of_process(field: str) -> float:
    """A field of this process in MB: VmRSS, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def forget_peak() -> bool:
    """Start the peak anew from what is held now; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measured(task: Callable[[], object]) -> dict[str, float | bool]:
    is_own = forget_peak()
    base = of_process("VmRSS")
    start = now()
    task()
    spent = since(start)
    peak = of_process("VmHWM") if is_own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu": spent.cpu, "wall": spent.wall, "base_mb": base, "peak_mb": peak, "peak_is_own": is_own}


def first_calls() -> dict[str, float]:
    """CPU seconds that the first call of training and of ablation takes beyond a second one: compiling, or reading the cache."""
    import numba  # noqa: F401

    out = {}
    adata = simulated(300, 300)
    model = of_class(LDVAE, adata, n_latent=5)
    for name in ("train", "ablate"):
        seconds = []
        for _ in range(2):
            task = job(name, model, is_ours=True)
            start = time.process_time()
            task()
            seconds.append(time.process_time() - start)
        out[name] = seconds[0] - seconds[1]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=("stock", "ours"), default="ours")
    parser.add_argument("--cells", type=int, default=7000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--latents", type=int, default=10)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument(
        "--first-calls", action="store_true", help="how long compiling takes; ignores the other arguments"
    )
    args = parser.parse_args()
    quiet()
    with threads(1):
        if args.first_calls:
            print(json.dumps(first_calls()))
            return
        is_ours = args.who == "ours"
        cls = LDVAE if is_ours else LinearSCVI
        # Whatever is imported or compiled on first use, is, before the peak is looked at.
        tiny = of_class(cls, simulated(300, 300), n_latent=5)
        for name in args.jobs:
            warm_up = job(name, tiny, is_ours=is_ours)
            if warm_up is not None:
                warm_up()
        model = of_class(cls, simulated(args.cells, args.genes), n_latent=args.latents)
        out = {}
        for name in args.jobs:
            task = job(name, model, is_ours=is_ours)
            if task is not None:
                out[name] = measured(task)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
