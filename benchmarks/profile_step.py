"""Where the time of a training step goes: LinearSCVI beside LDVAE, what is left inside of LDVAE's step, and the arithmetic alone.

Run `python benchmarks/profile_step.py --help`; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from scvi.model import LinearSCVI
from suite.lab import TRAIN, of_class, simulated
from suite.measure import quiet, threads, timed

from ldvae_ext.backends.numba import NumbaBackend
from ldvae_ext.kernels import batch_norm, decoder_head, encoder, likelihood, sparse
from ldvae_ext.model import LDVAE

N_HIDDEN, N_EPOCHS = 128, 4
FIRST_LAYERS = "first layers, forward and gradient of the weights"
FORWARD, BACKWARD, ADAM = "forward pass", "backward pass", "optimizer"
STAGES = {
    FORWARD: "forward pass: encoders, decoder, likelihood",
    BACKWARD: "backward pass",
    ADAM: "fused Adam, hooks after it",
    "loading": "minibatch: gathering, Lightning's hooks",
    "rest": "metrics, closures, `zero_grad`, Lightning",
}
# Compiled loops of LDVAE's step, in words.
LOOPS: dict[str, list[tuple[Any, str]]] = {
    FIRST_LAYERS: [(sparse, "sparse_dense_product"), (sparse, "csr_to_csc")],
    "batch norm, ReLU, dropout, posteriors, KL": [
        (encoder, name) for name in ("hidden_layer", "posterior", "hidden_layer_backward", "posterior_backward")
    ],
    "batch norm of the decoder": [(batch_norm, "fold_batch_norm"), (batch_norm, "fold_batch_norm_backward")],
    "linear decoder, softmax, likelihood, all gradients": [
        (decoder_head, "negative_binomial_head"),
        (likelihood, "dispersion_tables"),
    ],
}


class Watch(Callback):
    """Seconds between the hooks of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage].append(now - self._last)
        self._last = now

    def on_train_batch_start(self, *_: object) -> None:
        self.mark("loading")

    def on_before_zero_grad(self, *_: object) -> None:
        self.mark("rest")

    def on_before_backward(self, *_: object) -> None:
        self.mark("rest")

    def on_after_backward(self, *_: object) -> None:
        self.mark(BACKWARD)

    def on_before_optimizer_step(self, *_: object) -> None:
        self.mark("rest")

    def on_train_batch_end(self, *_: object) -> None:
        self.mark(ADAM)


def timing(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    def timed_call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - start)

    return timed_call


def per_step(model: Any, batch_size: int) -> dict[str, float]:
    """Milliseconds of each stage in a step: medians; forward is taken out of the rest."""
    watch = Watch()
    room, name = (NumbaBackend, "loss") if isinstance(model, LDVAE) else (type(model.module), "forward")
    before = getattr(room, name)
    setattr(room, name, timing(before, watch.seconds[FORWARD]))
    try:
        model.train(N_EPOCHS, batch_size=batch_size, callbacks=[watch], plan_kwargs={"lr": 5e-3}, **TRAIN)
    finally:
        setattr(room, name, before)
    n_steps = len(watch.seconds[FORWARD])
    half = {stage: values[len(values) // 2 :] for stage, values in watch.seconds.items()}
    of_step = {
        s: float(np.median(v)) * 1e3 * round(len(watch.seconds[s]) / n_steps) for s, v in half.items() if s != "rest"
    }
    rest = np.array(watch.seconds["rest"]).reshape(n_steps, -1).sum(axis=1)
    of_step["rest"] = float(np.median(rest[n_steps // 2 :])) * 1e3 - of_step[FORWARD]
    return of_step


def loops(adata: Any, batch_size: int) -> dict[str, float]:
    """Milliseconds of the compiled loops in a step of LDVAE."""
    found: dict[str, dict[str, list[float]]] = {stage: {} for stage in LOOPS}
    before = []
    for stage, functions in LOOPS.items():
        for room, name in functions:
            before.append((room, name, getattr(room, name)))
            found[stage][name] = []
            setattr(room, name, timing(getattr(room, name), found[stage][name]))
    try:
        of_class(LDVAE, adata, n_latent=10).train(N_EPOCHS, batch_size=batch_size, plan_kwargs={"lr": 5e-3}, **TRAIN)
    finally:
        for room, name, function in before:
            setattr(room, name, function)
    n_steps = len(found["linear decoder, softmax, likelihood, all gradients"]["negative_binomial_head"])
    return {
        stage: sum(float(np.median(v[len(v) // 2 :])) * 1e3 * round(len(v) / n_steps) for v in functions.values())
        for stage, functions in found.items()
    }


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
    """Milliseconds of the arithmetic of a step, one operation of torch, or one plain loop, after another."""
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
        "linear decoder, softmax, likelihood, all gradients": lambda: (sweep(), of_non_zeros(), decoder()),
        FIRST_LAYERS: lambda: _sparse_layer(part.indptr, part.indices, part.data, weight_gh, out_nh, gradient_gh),
        ADAM: adam.step,
    }
    for task in tasks.values():
        task()
    return {name: float(np.median([timed(task).wall for _ in range(50)])) * 1e3 for name, task in tasks.items()}


def table(stock: dict[str, float], ours: dict[str, float], inside: dict[str, float], least: dict[str, float]) -> str:
    lines = ["| stage of a step | LinearSCVI, ms | LDVAE, ms |", "|---|---|---|"]
    lines += [f"| {title} | {stock[s]:.2f} | {ours[s]:.2f} |" for s, title in STAGES.items()]
    lines += [f"| sum | {sum(stock.values()):.2f} | {sum(ours.values()):.2f} |", ""]
    lines += ["| compiled loops inside of LDVAE's step | ms | one primitive after another, ms |", "|---|---|---|"]
    for stage, value in inside.items():
        known = least.get(stage)
        lines.append(f"| {stage} | {value:.2f} | {'' if known is None else f'{known:.2f}'} |")
    lines.append(f"| fused Adam, alone | | {least[ADAM]:.2f} |")
    lines.append(f"| sum | {sum(inside.values()):.2f} | {sum(least.values()):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=7000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--page", type=Path, help="write the tables for the documentation to this file, too")
    args = parser.parse_args()
    quiet()
    adata = simulated(args.cells, args.genes)
    with threads(1):
        found = [per_step(of_class(cls, adata, n_latent=10), args.batch_size) for cls in (LinearSCVI, LDVAE)]
        text = table(*found, loops(adata, args.batch_size), floor(adata.X, 10, args.batch_size))
    print(text)
    if args.page:
        note = f"{args.cells:,} simulated cells x {args.genes:,} genes, 10 latents, minibatches of {args.batch_size}, one thread."
        args.page.write_text(
            f"<!-- Made by `python benchmarks/profile_step.py --page`; do not edit. -->\n{note}\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
