"""Training and evaluation mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(module: torch.nn.Module, layers: type[torch.nn.Module] = torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, for layers of a class, and the modes of all layers as they were afterwards."""
    were_training = [layer for layer in module.modules() if layer.training and isinstance(layer, layers)]
    for layer in were_training:
        layer.training = False
    try:
        yield
    finally:
        for layer in were_training:
            layer.training = True
