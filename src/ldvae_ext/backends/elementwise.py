"""``log(1 + x)`` and ``log(1 + e^x)`` of tensors, by numpy where that is several times as fast."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

# torch's softplus is the identity above this.
_IDENTITY_FROM = 20


def is_numpy_array(x: torch.Tensor) -> bool:
    """True for a tensor that numpy can read in place: on a CPU, in float32 or float64."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


@cache
def _has_wide_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def log1p(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + x)`` of a tensor without a graph.

    On a CPU with AVX-512 numpy uses vector instructions, and torch took forty times as long. Elsewhere torch is faster.
    """
    if not (is_numpy_array(x) and _has_wide_vectors()):
        return torch.log1p(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(np.log1p(x.numpy()))


def softplus(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + e^x)`` of a tensor without a graph; x itself above 20, as in torch. See :func:`log1p`."""
    if not (is_numpy_array(x) and _has_wide_vectors()):
        return torch.nn.functional.softplus(x)
    return torch.relu(x).add_(log1p(x.abs().neg_().exp_().masked_fill_(x > _IDENTITY_FROM, 0)))
