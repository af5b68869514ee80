"""LDVAE on a GPU: results beside those of the CPU, times and memory beside LinearSCVI. Under eight minutes; `--device cpu` tries it out.

Draws of a GPU are not those of a CPU, so that trainings are compared between the backends on one device, and readers between
the devices, with one set of weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from scvi.model import LinearSCVI
from suite import by_hand
from suite.lab import of_class, simulated
from suite.measure import quiet

from ldvae_ext.model import LDVAE

TOLERANCE = 1e-4
TARGETS = {"epoch": 1.5, "ablation": 20.0}
READERS: dict[str, Callable[[LDVAE], Any]] = {
    "`get_latent_representation`": lambda model: model.get_latent_representation(),
    "`get_latent_kl`": lambda model: model.get_latent_kl().to_numpy(),
    "`get_normalized_expression(use_posterior_mean=True)`": lambda model: model.get_normalized_expression(
        use_posterior_mean=True, return_numpy=True
    ),
    "`ablate`": lambda model: model.ablate().X,
    "`ablate_genes`": lambda model: model.ablate_genes().X,
    "`get_explained_deviance`": lambda model: model.get_explained_deviance().select_dtypes("number").to_numpy(),
    "`get_population_expression`": lambda model: model.get_population_expression(groupby="population").to_numpy(),
    "`get_reconstruction_error(use_posterior_mean=True)`": lambda model: float(
        model.get_reconstruction_error(use_posterior_mean=True)["reconstruction_loss"]
    ),
}


class Epochs(Callback):
    """Seconds of each epoch, the device having finished."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        synchronise()
        self._start = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        synchronise()
        self.seconds.append(time.perf_counter() - self._start)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def accelerator(device: str) -> dict[str, Any]:
    return {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "enable_progress_bar": False}


def trained(cls: type, adata: Any, device: str, n_epochs: int, **kwargs: Any) -> tuple[Any, list[float]]:
    """A model after training, and the seconds of its epochs."""
    model, clock = of_class(cls, adata, n_latent=10), Epochs()
    scvi.settings.seed = 0
    model.train(
        n_epochs,
        callbacks=[clock],
        check_val_every_n_epoch=None,
        plan_kwargs={"lr": 5e-3},
        **accelerator(device),
        **kwargs,
    )
    return model, clock.seconds


def largest_difference(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def equality(adata: Any, device: str) -> dict[str, float]:
    """Largest differences: of the losses of each backend from scvi-tools' own, and of readers from the CPU's."""
    models = {name: trained(LDVAE, adata, device, 3, backend=name)[0] for name in backends(device)}
    losses = {name: model.history["train_loss"].to_numpy(dtype=float) for name, model in models.items()}
    found = {f'losses, `backend="{name}"`': largest_difference(losses[name], losses["scvi"]) for name in losses}
    model = models["scvi"]
    on_device = {name: read(model) for name, read in READERS.items()}
    model.to_device("cpu")
    return found | {name: largest_difference(on_device[name], read(model)) for name, read in READERS.items()}


def backends(device: str) -> list[str]:
    return ["scvi", "torch", *(["numba"] if device == "cpu" else [])]


def copies_in_an_epoch(adata: Any, device: str) -> int | None:
    """Copies between host and device in one epoch, beyond one for each field of a minibatch; None on a CPU."""
    if device == "cpu":
        return None
    model, _ = trained(LDVAE, adata, device, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model.train(1, check_val_every_n_epoch=None, **accelerator(device))
    return sum(event.count for event in profile.key_averages() if "Memcpy" in event.key and "DtoD" not in event.key)


def seconds(task: Callable[[], object], n: int = 3) -> float:
    """Median of some calls after a first one."""
    taken = []
    for _ in range(n + 1):
        synchronise()
        start = time.perf_counter()
        task()
        synchronise()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[1:]))


def timings(adata: Any, device: str, n_epochs: int) -> dict[str, Any]:
    """Seconds of LinearSCVI and of LDVAE, and peak memory of the device, MB."""
    found: dict[str, Any] = {}
    for name, cls in (("LinearSCVI", LinearSCVI), ("LDVAE", LDVAE)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model, epochs = trained(cls, adata, device, n_epochs)
        found[name] = {"epoch": float(np.median(epochs[1:] or epochs))}
        found[name]["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None
        if name == "LinearSCVI":
            found[name]["ablation"] = seconds(lambda: by_hand.ablation(model, in_one_pass=False), 1)  # noqa: B023
            found[name]["decoding"] = seconds(lambda: model.get_normalized_expression(return_numpy=True), 1)  # noqa: B023
        else:
            found[name]["ablation"] = seconds(lambda: model.ablate(), 1)  # noqa: B023
            found[name]["decoding"] = seconds(
                lambda: model.get_normalized_expression(use_posterior_mean=True, return_numpy=True),  # noqa: B023
                1,
            )
    return found


def table(report: dict[str, Any]) -> str:
    """The tables for the documentation."""
    lines = [f"<!-- Made by `python benchmarks/gpu.py --page`; do not edit. -->\n{report['machine']}", ""]
    lines += ["| what | largest difference |", "|---|---|"]
    lines += [f"| {name} | {value:.1e} |" for name, value in report["equality"].items()]
    lines += ["", "| cells | what | LinearSCVI | LDVAE | ratio | wanted |", "|---|---|---|---|---|---|"]
    for n_cells, found in report["timings"].items():
        for what in ("epoch", "ablation", "decoding"):
            stock, ours = (found[name][what] for name in ("LinearSCVI", "LDVAE"))
            wanted = f"≥ {TARGETS[what]:g}" if what in TARGETS else ""
            lines.append(
                f"| {int(n_cells):,} | {what} | {stock:.3g} s | {ours:.3g} s | {stock / ours:.1f} | {wanted} |"
            )
    if report["copies"] is not None:
        lines += ["", f"Copies between host and device in an epoch: {report['copies']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cells", type=int, nargs="+", default=[7000, 200_000])
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--page", type=Path, help="write the table for the documentation to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; `--device cpu` tries the script out")
    quiet()
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    small = simulated(min(2000, *args.cells), args.genes)
    report = {
        "machine": f"{name}; torch {torch.__version__}, scvi-tools {scvi.__version__}; {args.genes:,} genes.",
        "equality": equality(small, args.device),
        "copies": copies_in_an_epoch(small, args.device),
        "timings": {str(n): timings(simulated(n, args.genes), args.device, args.epochs) for n in args.cells},
    }
    report["seconds"] = time.perf_counter() - start
    text = table(report)
    print(text + f"\n{report['seconds']:.0f} seconds")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.page:
        args.page.write_text(text)
    unequal = {what: value for what, value in report["equality"].items() if not value <= TOLERANCE}
    if unequal:
        print(f"not equal: {unequal}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
