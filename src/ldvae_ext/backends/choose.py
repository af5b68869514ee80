"""In which of three ways a network computes a minibatch, and what stands in the way of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ldvae_ext.core._compiled import kernels
from ldvae_ext.module._decoder import LinearDecoderLayer
from ldvae_ext.module._head import is_known_head
from ldvae_ext.module._sparse import encoders_in_use, is_plain
from ldvae_ext.module._sparse import reads_sparse as can_read
from ldvae_ext.module._step import Steps

BACKENDS = ("numba", "torch", "scvi")
# Of a decoder: the covariance of its inputs takes the place of passes over cells x genes.
_MOST_INPUTS = 256
# What a minibatch passes through; where a subclass or a user has put something else, scvi-tools' own way is taken.
_STEPS = (
    "_get_inference_input",
    "inference",
    "_regular_inference",
    "_get_generative_input",
    "generative",
    "_likelihood",
    "loss",
)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BackendModule:
    """A network that computes its loss in one of three ways.

    ``"scvi"`` is scvi-tools' own; ``"torch"`` evaluates gamma functions on non-zero counts only and knows its gradients; ``"numba"``
    does that in compiled loops, which read sparse counts in the first layer too. All give the same numbers but for rounding.
    """

    _backend: str = "scvi"
    _steps: Steps | None = None

    @contextmanager
    def computing(self, backend: str) -> Iterator[None]:
        """How minibatches with a loss are computed inside.

        Parameters
        ----------
        backend
            One that :meth:`backend` gave.
        """
        before = self._backend, self._steps
        self._backend, self._steps = backend, Steps(self) if backend == "numba" and Steps.fit(self) else None
        try:
            yield
        finally:
            self._backend, self._steps = before

    def backend(self, backend: str = "auto", device: str | None = None) -> str:
        """The backend that is asked for, or with ``"auto"`` the first of numba, torch and scvi that the network allows.

        Parameters
        ----------
        backend
            ``"auto"``, ``"numba"``, ``"torch"`` or ``"scvi"``.
        device
            Type of the device; the network's own if None.

        Raises
        ------
        ValueError
            If the network does not allow it, with the reason.
        """
        if backend == "auto":
            return next(known for known in BACKENDS if self._obstacle(known, device) is None)
        if (obstacle := self._obstacle(backend, device)) is not None:
            msg = f"`backend={backend!r}`: {obstacle}."
            raise ValueError(msg)
        return backend

    def _obstacle(self: Any, backend: str, device: str | None) -> str | None:
        """Why a backend cannot compute this network; None if it can."""
        if backend == "scvi":
            return None
        if self.gene_likelihood == "normal":
            return "`gene_likelihood='normal'` has no gamma functions; scvi-tools' own way is the only one"
        if (device or self.device.type) not in ("cpu", "cuda"):
            return "sparse tensors are there on a CPU and under CUDA only"
        if (obstacle := self.replaced()) is not None:
            return obstacle
        return self._obstacle_to_loops(device) if backend == "numba" else None

    def replaced(
        self: Any, steps: Sequence[str] = _STEPS, layers: Iterable[torch.nn.Module] | None = None
    ) -> str | None:
        """What of the network is not what it was written as, and would be passed by; None if nothing is.

        Parameters
        ----------
        steps
            Names of the methods to look at.
        layers
            Layers that are passed by; all of the network if None.
        """
        layers = (layer for layer in self.modules() if layer is not self) if layers is None else layers
        for name in steps:
            its_own = getattr(type(self), name).__module__.split(".")[0] in ("ldvae_ext", "scvi")
            if name in self.__dict__ or not its_own:
                return f"`{name}` of the network was replaced"
        if any(getattr(layer, hooks) for layer in layers for hooks in _HOOKS):
            return "a layer of the network has hooks, which would not be called"
        return None

    def _obstacle_to_loops(self: Any, device: str | None = None) -> str | None:
        decoder = self.decoder
        heads = [decoder.factor_regressor, decoder.px_dropout_decoder] if is_plain(decoder, LinearDecoderLayer) else []
        obstacles = {
            "numba is not installed": kernels() is None,
            "the network is not on a CPU": (device or self.device.type) != "cpu",
            "the network is not in float32": any(p.dtype != torch.float32 for p in self.parameters()),
            "size factors come with a softplus, the compiled loops are written for a softmax": self.use_size_factor_key,
            "`dispersion='gene-cell'` is another for each cell": self.dispersion == "gene-cell"
            and self.gene_likelihood != "poisson",
            "an encoder is not scvi-tools' own": not self.reads_sparse(),
            "the decoder is not linear as scvi-tools' own": not heads or not all(map(is_known_head, heads)),
        }
        if (obstacle := next((obstacle for obstacle, stands in obstacles.items() if stands), None)) is not None:
            return obstacle
        n_inputs = heads[0].fc_layers[0][0].in_features
        return f"the decoder has {n_inputs} inputs, more than {_MOST_INPUTS}" if n_inputs > _MOST_INPUTS else None

    def reads_sparse(self: Any) -> bool:
        """Whether the encoders in use are scvi-tools' own, whose first layer can take sparse counts."""
        return all(map(can_read, encoders_in_use(self)))
