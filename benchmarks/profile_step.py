"""Where the time of a training step goes, LDVAE beside LinearSCVI, and what the arithmetic alone would take.

Epochs of `train` take turns, with torch's profiler and without it. Run `python benchmarks/profile_step.py --help`; see
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from scvi.model import LinearSCVI
from suite.lab import TRAIN, of_class, simulated
from suite.measure import Clock, quiet, threads, timed
from suite.report import markdown
from torch.profiler import ProfilerActivity, profile, record_function

from ldvae_ext.model import LDVAE

N_HIDDEN = 128
FIRST, ENCODERS, LINEAR, UNUSED, RATE, LIKELIHOOD, METRICS, ADAM, LOADING, ELSE, REST = (
    "encoders: first layers",
    "encoders: the rest",
    "decoder: linear map, batch norm",
    "decoder: dropout logits, which nobody uses",
    "softmax, rate, dispersion",
    "likelihood and KL",
    "metrics",
    "Adam",
    "data loading",
    "all else in torch",
    "Python, Lightning (by difference)",
)
STAGES = (FIRST, ENCODERS, LINEAR, UNUSED, RATE, LIKELIHOOD, METRICS, ADAM, LOADING, ELSE)
# An autograd function written in Python goes by the name of its class; those of torch have a number at their end.
OWN_FUNCTION = re.compile(r"_?[A-Z][A-Za-z_]*")


class Profiler(Callback):
    """Every other epoch with torch's profiler."""

    def __init__(self) -> None:
        self.profiles: list[profile] = []

    def on_train_epoch_start(self, trainer: Any, *_: object) -> None:
        if trainer.current_epoch % 2:
            # Not with the shapes of tensors: that alone makes an epoch take three times as long.
            self.profiles.append(profile(activities=[ProfilerActivity.CPU]))
            self.profiles[-1].__enter__()

    def on_train_epoch_end(self, trainer: Any, *_: object) -> None:
        if trainer.current_epoch % 2:
            self.profiles[-1].__exit__(None, None, None)

    def on_train_start(self, trainer: Any, plan: Any) -> None:
        """Give the stages their names: methods of the network, and layers inside them."""
        module = plan.module
        for name, stage in (("inference", ENCODERS), ("generative", RATE), ("loss", LIKELIHOOD)):
            _name(module, name, stage)
        _name(plan, "compute_and_log_metrics", METRICS)
        for encoder in (module.z_encoder, module.l_encoder):
            _name(encoder.encoder.fc_layers[0][0], "forward", FIRST)
        _name(module.decoder.factor_regressor, "forward", LINEAR)
        if getattr(module.decoder, "px_dropout_decoder", None) is not None:
            _name(module.decoder.px_dropout_decoder, "forward", UNUSED)


def _name(owner: Any, method: str, stage: str) -> None:
    inner = getattr(owner, method)

    @functools.wraps(inner)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(stage):
            return inner(*args, **kwargs)

    setattr(owner, method, named)


def above(event: Any) -> Iterator[Any]:
    """The event, and those that called it."""
    while event is not None:
        yield event
        event = event.cpu_parent


def stages(events: list[Any]) -> Iterator[tuple[Any, str | None]]:
    """Which line of the table each event belongs to; None for what is found by difference."""
    backward_ends: dict[int, float] = {}
    stage_of_forward: dict[int, str] = {}
    for event in events:
        callers = list(above(event))
        if event.name.startswith("autograd::engine"):
            for caller in callers:
                if caller.name.startswith("Optimizer.step"):
                    backward_ends[caller.id] = max(backward_ends.get(caller.id, 0), event.time_range.end)
        elif event.sequence_nr >= 0 and not any(caller.name.startswith("autograd::engine") for caller in callers):
            # The last operator with a number is the one that the backward pass calls by that number.
            stage_of_forward[event.sequence_nr] = _stage(callers) or ELSE
    for event in events:
        callers = list(above(event))
        numbers = [e.sequence_nr for e in callers if e.name.startswith("autograd::engine")]
        stage = _stage(callers) or (stage_of_forward.get(numbers[0], ELSE) if numbers else None)
        if stage is None:
            # Lightning runs the whole step inside the optimizer's: what follows the backward pass is the optimizer's own.
            steps = [e for e in callers[1:] if e.name.startswith("Optimizer.step")]
            if steps and event.time_range.start >= backward_ends.get(steps[0].id, np.inf):
                stage = ADAM
            elif event.name.startswith("aten::"):
                stage = ELSE
        yield event, stage


def _stage(callers: list[Any]) -> str | None:
    """The innermost stage that has a name."""
    for event in callers:
        if event.name in STAGES:
            return event.name
        if event.name.startswith("enumerate(DataLoader)"):
            return LOADING
        if event.name.startswith("Optimizer.zero_grad") or "_fused_adam" in event.name:
            return ADAM
        if OWN_FUNCTION.fullmatch(event.name):
            return f"`{event.name.removesuffix('Backward')}`"
    return None


def per_step(model: Any, batch_size: int) -> tuple[dict[str, float], float]:
    """Milliseconds of each stage, in the quieter of the epochs that were profiled, and of the whole, in the others."""
    clock, profiler = Clock(), Profiler()
    model.train(5, batch_size=batch_size, callbacks=[clock, profiler], plan_kwargs={"lr": 5e-3}, **TRAIN)
    n_steps = math.ceil(len(model.train_indices) / batch_size)
    quieter = min(map(_of_stages, profiler.profiles), key=lambda found: sum(found.values()))
    # The first epoch is dropped already, so that these are the third and the fifth.
    whole = min(times.cpu for times in clock.epochs()[1::2]) * 1e3 / n_steps
    return {stage: spent / n_steps for stage, spent in quieter.items()}, whole


def _of_stages(profiler: profile) -> dict[str, float]:
    found: Counter[str] = Counter()
    for event, stage in stages(profiler.events()):
        if stage is not None:
            found[stage] += event.self_cpu_time_total / 1e3
    return found


@numba.njit(fastmath=True, error_model="numpy")
def _sparse_layer(indptr, indices, data, weight_gh, out_nh, gradient_gh):
    """Forward pass of a sparse layer, and the gradient of its weight, for counts in rows."""
    for n in range(out_nh.shape[0]):
        out_h = out_nh[n]
        out_h[:] = 0
        for j in range(indptr[n], indptr[n + 1]):
            count, weight_h = data[j], weight_gh[np.uint64(indices[j])]
            for h in range(out_h.size):
                out_h[h] += count * weight_h[h]
        for j in range(indptr[n], indptr[n + 1]):
            count, gradient_h = data[j], gradient_gh[np.uint64(indices[j])]
            for h in range(out_h.size):
                gradient_h[h] += count * out_h[h]


def floor(counts: Any, n_latent: int, batch_size: int) -> dict[str, float]:
    """Milliseconds that the arithmetic of a step cannot do without, at the rates of this machine's own primitives."""
    part = counts[:batch_size]
    n_genes = part.shape[1]
    dense = torch.rand(batch_size, n_genes) + 0.5
    weight_gh, out_nh = np.ones((n_genes, 2 * N_HIDDEN), np.float32), np.zeros((batch_size, 2 * N_HIDDEN), np.float32)
    gradient_gh, z, weight = np.zeros_like(weight_gh), torch.rand(batch_size, n_latent), torch.rand(n_genes, n_latent)
    parameters = [torch.nn.Parameter(torch.rand(n_genes, 2 * N_HIDDEN + n_latent + 3))]
    parameters[0].grad = torch.rand_like(parameters[0])
    adam = torch.optim.Adam(parameters, fused=True)
    of_counts = torch.from_numpy(part.data)

    def sweep() -> None:
        dense.exp().log().reciprocal()

    def of_non_zeros() -> None:
        of_counts.log().log1p()

    def decoder() -> None:
        z @ weight.T
        dense @ weight
        dense.T @ z

    tasks: dict[str, Callable[[], object]] = {
        LIKELIHOOD: lambda: (sweep(), of_non_zeros()),
        FIRST: lambda: _sparse_layer(part.indptr, part.indices, part.data, weight_gh, out_nh, gradient_gh),
        LINEAR: decoder,
        ADAM: adam.step,
    }
    for task in tasks.values():
        task()
    return {name: float(np.median([timed(task).wall for _ in range(50)])) * 1e3 for name, task in tasks.items()}


def table(stock: tuple[dict[str, float], float], ours: tuple[dict[str, float], float], least: dict[str, float]) -> str:
    lines = ["| stage | LinearSCVI, ms | LDVAE, ms | floor, ms |", "|---|---|---|---|"]
    own = sorted({name for found in (stock[0], ours[0]) for name in found} - set(STAGES))
    lines += [
        markdown([stage, *(_ms(found.get(stage)) for found in (stock[0], ours[0], least))]) for stage in (*STAGES, *own)
    ]
    rests = [whole - sum(found.values()) for found, whole in (stock, ours)]
    lines.append(markdown([REST, *map(_ms, rests), ""]))
    lines.append(markdown(["a step of `train`", _ms(stock[1]), _ms(ours[1]), _ms(sum(least.values()))]))
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=7000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--page", type=Path, help="write the table for the documentation to this file, too")
    args = parser.parse_args()
    quiet()
    adata = simulated(args.cells, args.genes)
    with threads(1):
        found = [per_step(of_class(cls, adata, n_latent=10), args.batch_size) for cls in (LinearSCVI, LDVAE)]
        least = floor(adata.X, 10, args.batch_size)
    text = table(*found, least)
    print(text)
    if args.page:
        note = f"{args.cells:,} simulated cells x {args.genes:,} genes, 10 latents, minibatches of {args.batch_size}, one thread."
        args.page.write_text(
            f"<!-- Made by `python benchmarks/profile_step.py --page`; do not edit. -->\n{note}\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
