"""Numbers of threads of torch and of compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.layers import store_weights
from ldvae_ext.kernels.threads import compiled


def with_torch_threads[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    """The method, whose compiled loops take ``torch.get_num_threads()`` threads."""

    @wraps(method)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        with compiled(n_threads=torch.get_num_threads()):
            return method(*args, **kwargs)

    return limited


@contextmanager
def set_up_for(backend: Backend, module: Any) -> Iterator[None]:
    """Threads as a training by a backend needs them; afterwards, threads and the storage of weights as torch has them.

    With compiled loops, torch has one thread, since its operations on a minibatch are small: two save little of a step on an idle
    machine, and on a busy one each operation waits for the slower of them. The loops may take as many as torch had.

    Parameters
    ----------
    backend
        The backend.
    module
        The network.
    """
    if not backend.stores_by_columns:
        yield
        return
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with compiled(n_threads=n_threads):
            yield
    finally:
        torch.set_num_threads(n_threads)
        store_weights(module, by_columns=False)
