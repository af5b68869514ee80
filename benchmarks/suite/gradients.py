"""Rows about the accuracy of float32 gradients, against the network of scvi-tools in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from statistics import median
from typing import Any

import numpy as np
import torch

from ldvae_ext.backends.choose import choose_backend
from suite.lab import Lab, backend
from suite.measure import threads
from suite.registry import Found, Measured, Row, Unavailable, case

N_MINIBATCHES, BATCH_SIZE = 5, 128
Gradients = dict[str, np.ndarray]


@case(
    Row(
        "gradient",
        "error of the float32 gradient, all parameters together, over LinearSCVI's",
        3,
        is_upper_bound=True,
        in_short=True,
    ),
    Row("gradient-worst", "the same, the parameter where it is worst", 3, is_upper_bound=True),
    Row("gradient-px_r", "the same, log dispersions (`px_r`)", 3, is_upper_bound=True),
)
def gradient(lab: Lab, rows: tuple[Row, ...]) -> Found:
    backend("numba")  # or there is nothing to look at
    stock, ours = lab.pair()
    exact = _in_float64(stock.module)
    with threads(1):
        errors = [
            _errors(*(_gradients(m, tensors, seed) for m in (exact, stock.module)), _gradients(ours.module, fast, seed))
            for seed, (tensors, fast) in enumerate(_minibatches(stock, ours))
        ]
    names = errors[0]
    of = {name: tuple(median(e[name][side] for e in errors) for side in (0, 1)) for name in names}
    worst = max((name for name in names if name), key=lambda name: of[name][1] / of[name][0])
    asked = {"gradient": "", "gradient-worst": worst, "gradient-px_r": "px_r"}
    out = {}
    for row in rows:
        mine, theirs = of[asked[row.name]][1], of[asked[row.name]][0]
        out[row.name] = Measured(
            stock=theirs,
            ours=mine,
            unit="relative",
            ratio=mine / theirs,
            n=len(errors),
            note=f"Worst: `{worst}`." if row.name == "gradient-worst" else "",
            more={"errors": of} if row.name == "gradient" else {},
        )
    return out


def _in_float64(module: Any) -> Any:
    """The same network; the prior of the library stays float32, which scvi-tools insists on, and loses nothing by it."""
    exact = deepcopy(module).double()
    exact.library_log_means, exact.library_log_vars = module.library_log_means, module.library_log_vars
    return exact


def _minibatches(stock: Any, ours: Any) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """The same cells as scvi-tools hands them to the network, and as `LDVAE.train` does: counts as a sparse tensor."""
    rng = np.random.default_rng(0)
    counts = ours.adata.X
    for _ in range(N_MINIBATCHES):
        cells = np.sort(rng.choice(stock.adata.n_obs, BATCH_SIZE, replace=False))
        (tensors,) = stock._make_data_loader(stock.adata, indices=cells, batch_size=BATCH_SIZE)
        part = counts[cells]
        sparse = torch.sparse_csr_tensor(
            torch.from_numpy(part.indptr.astype(np.int64)),
            torch.from_numpy(part.indices.astype(np.int64)),
            torch.from_numpy(part.data.astype(np.float32)),
            size=part.shape,
        )
        yield tensors, {**tensors, "X": sparse}


def _gradients(module: Any, tensors: dict[str, torch.Tensor], seed: int) -> Gradients:
    """Of the loss that training minimises, dropout and draws included, in the network's own precision."""
    is_double = next(module.parameters()).dtype == torch.float64
    if is_double:
        tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    before = deepcopy(module.state_dict())
    module.train()
    module.zero_grad()
    torch.manual_seed(seed)
    with _float32_draws():
        if tensors["X"].layout is torch.sparse_csr:
            loss = choose_backend(module, "numba").loss(module, tensors, 1.0).loss
        else:
            loss = module(tensors, loss_kwargs={"kl_weight": torch.tensor(1.0)})[2].loss
        loss.backward()
    out = {n: p.grad.double().numpy().copy() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    module.load_state_dict(before)  # running statistics of the batch norm
    module.eval()
    out["loss"] = np.array([float(loss)])
    return out


@contextmanager
def _float32_draws() -> Iterator[None]:
    """Standard normal draws are those of float32 in float64 too. (Dropout's do not depend on the precision.)"""
    of_torch = torch.distributions.normal._standard_normal

    def draw(shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return of_torch(shape, dtype=torch.float32, device=device).to(dtype)

    torch.distributions.normal._standard_normal = draw
    try:
        yield
    finally:
        torch.distributions.normal._standard_normal = of_torch


def _errors(exact: Gradients, stock: Gradients, ours: Gradients) -> dict[str, tuple[float, float]]:
    """Relative errors of stock and of ours, for each parameter and under "" for all together."""
    for who, found in (("LinearSCVI", stock), ("LDVAE", ours)):
        if not np.allclose(found["loss"], exact["loss"], rtol=1e-5):
            msg = f"{who} draws otherwise than the network in float64: loss {found['loss'][0]} and {exact['loss'][0]}"
            raise Unavailable(msg)
    # The gradient of a bias before a batch norm is 0, and what is found is rounding on all sides.
    names = [
        n
        for n in exact
        if n in ours and n != "loss" and not ("encoder.encoder.fc_layers" in n and n.endswith("0.bias"))
    ]
    norms = {
        n: (np.linalg.norm(stock[n] - exact[n]), np.linalg.norm(ours[n] - exact[n]), np.linalg.norm(exact[n]))
        for n in names
    }
    used = {n: v for n, v in norms.items() if v[2] > 0}
    total = np.sqrt(np.square(np.array(list(used.values()))).sum(axis=0))
    return {"": (total[0] / total[2], total[1] / total[2])} | {n: (s / e, o / e) for n, (s, o, e) in used.items()}
