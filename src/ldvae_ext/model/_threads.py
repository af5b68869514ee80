"""Number of threads of compiled loops, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from ldvae_ext.kernels.threads import compiled


def with_torch_threads[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    """The method, whose compiled loops take ``torch.get_num_threads()`` threads."""

    @wraps(method)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        with compiled(n_threads=torch.get_num_threads()):
            return method(*args, **kwargs)

    return limited
