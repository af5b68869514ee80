"""Latents in order: a rotation for truncated decoders, the same network on other axes, and training with nested dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import Normal

from ldvae_ext._scvi import MODULE_KEYS, GenerativeInputs

# Key of the mask of kept latents among the outputs of the inference.
_KEPT = "kept_latents"
# Nats per cell, summed over truncations: a sweep that gains less is the last.
_SETTLED = 1e-3


class TruncationModule(GenerativeInputs):
    """Nested dropout (Rippel et al. 2014, arXiv:1402.0915) for a variational autoencoder; precedes the network's class.

    In training, while it is on, each cell keeps its first j latents, j ~ U{1..K}: the others are 0 before the decoder, and
    their posterior is the prior in the loss, so that their KL is 0. The bound is then that of a model with j latents.
    """

    truncates: bool = False

    @contextmanager
    def truncating(self) -> Iterator[None]:
        """Nested dropout inside; only in training mode."""
        before, self.truncates = self.truncates, True
        try:
            yield
        finally:
            self.truncates = before

    def change_latents(
        self: Any, inputs: dict[str, torch.Tensor | None], inference_outputs: dict[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        """Inputs of the decoder, in which latents that a cell does not keep are 0; the kept ones are noted.

        Parameters
        ----------
        inputs, inference_outputs
            Inputs of ``generative`` and outputs of ``inference``, as in scvi-tools.
        """
        if self.truncates and self.training:
            z: Any = inputs[MODULE_KEYS.Z_KEY]
            kept = kept_latents(*z.shape[-2:], device=z.device)
            inference_outputs[_KEPT] = kept
            inputs[MODULE_KEYS.Z_KEY] = torch.where(kept, z, 0.0)
        return inputs

    def loss(
        self: Any,
        tensors: dict[str, torch.Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: torch.Tensor | float = 1.0,
    ) -> Any:
        """scvi-tools' loss, without the KL of latents that a cell does not keep.

        Parameters
        ----------
        tensors, inference_outputs, generative_outputs, kl_weight
            As in scvi-tools.
        """
        kept = inference_outputs.get(_KEPT)
        if kept is not None:
            qz = inference_outputs[MODULE_KEYS.QZ_KEY]
            masked = Normal(torch.where(kept, qz.loc, 0.0), torch.where(kept, qz.scale, 1.0))
            inference_outputs = {**inference_outputs, MODULE_KEYS.QZ_KEY: masked}
        return super().loss(tensors, inference_outputs, generative_outputs, kl_weight=kl_weight)  # type: ignore[misc]


def kept_latents(
    n_cells: int, n_latent: int, *, device: torch.device | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The first j latents of each cell, j ~ U{1..K}.

    Parameters
    ----------
    n_cells, n_latent
        Sizes.
    device
        Where to draw and return them.
    generator
        torch's own if None.

    Returns
    -------
    Shape (cells, latents), bool.
    """
    last = torch.randint(n_latent, (n_cells, 1), device=device, generator=generator)
    return torch.arange(n_latent, device=device) <= last


def truncation_loss(
    module: Any, tensors: Mapping[str, torch.Tensor], posterior: Any, rotation: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of each cell at its posterior mean with some factors only, shape (cells,), in nats.

    Parameters
    ----------
    module
        An ``LDVAEModule`` in evaluation mode.
    tensors
        A minibatch as scvi-tools' data loaders make it.
    posterior
        Result of ``module.posterior``.
    rotation
        Orthogonal, shape (latents, factors).
    kept
        Factors that are kept, shape (cells, factors), bool; the others are 0.
    """
    factors = torch.where(kept, posterior.mean @ rotation, 0.0)
    outputs = {MODULE_KEYS.Z_KEY: factors @ rotation.T, MODULE_KEYS.LIBRARY_KEY: posterior.log_library.unsqueeze(-1)}
    px = module.generative(**module._get_generative_input(tensors, outputs))[MODULE_KEYS.PX_KEY]
    return -px.log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1)


def refine_rotation(
    module: Any,
    tensors: Mapping[str, torch.Tensor],
    start_kk: np.ndarray,
    *,
    n_steps: int = 200,
    lr: float = 0.05,
    n_cells: int = 256,
    seed: int = 0,
) -> np.ndarray:
    """The rotation nearby under which truncated factors explain counts best.

    Adam on the skew-symmetric A of ``R = start @ expm(A)``, minimising the negative log-likelihood of random truncations,
    j ~ U{1..K} for each cell, of the factors ``R' E[z | x]``, decoded by the network as it is. The learning rate falls
    to 0 linearly. Neither the network nor torch's random state is touched.

    Parameters
    ----------
    module
        An ``LDVAEModule``.
    tensors
        Cells as scvi-tools' data loaders make them; all that minibatches are drawn from.
    start_kk
        Orthogonal, shape (latents, factors).
    n_steps, lr
        Number of steps and initial learning rate, in radians.
    n_cells
        Cells in a minibatch.
    seed
        Of minibatches and truncations.

    Returns
    -------
    Orthogonal, shape (latents, factors), float64.
    """
    n_all, n_latent = len(tensors[REGISTRY_KEYS.X_KEY]), len(start_kk)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(mode=False), torch.enable_grad(), module.evaluating():
        start = torch.from_numpy(np.asarray(start_kk, dtype=np.float64))
        tensors = {name: value.to(module.device) for name, value in tensors.items()}
        posterior = type(whole := module.posterior(tensors))(*(value.clone() for value in whole))
        free = torch.zeros(n_latent, n_latent, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=lr)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=n_steps)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(n_steps):
            if len(order) < min(n_cells, n_all):
                order = torch.randperm(n_all, generator=generator)
            rows, order = order[:n_cells], order[n_cells:]
            kept = kept_latents(len(rows), n_latent, generator=generator).to(module.device)
            rows = rows.to(module.device)
            rotation = (start @ torch.matrix_exp(free - free.T)).to(posterior.mean)
            loss = truncation_loss(
                module,
                {name: value[rows] for name, value in tensors.items()},
                type(posterior)(*(value[rows] for value in posterior)),
                rotation,
                kept,
            ).mean()
            # Only of these: the network's parameters get no gradient.
            (free.grad,) = torch.autograd.grad(loss, [free])
            optimizer.step()
            decay.step()
        return (start @ torch.matrix_exp(free - free.T)).detach().numpy()


@torch.no_grad()
def polish_rotation(
    module: Any,
    tensors: Mapping[str, torch.Tensor],
    start_kk: np.ndarray,
    *,
    n_sweeps: int = 3,
    n_cells: int = 2048,
) -> np.ndarray:
    """A rotation under which no two neighbouring factors could share their plane better.

    A rotation by an angle t in the plane of factors j and j + 1 only changes the deviance explained by the first j of them.
    The loss is quadratic in the factors to second order, and so close to ``a + b cos 2t + c sin 2t``; three angles determine
    its minimum. The best angle is used if the loss is lower there, plane by plane, in several sweeps over all planes. For two
    factors in the wrong order the gradient is zero, and the minimum is at a right angle. The function is deterministic.

    Parameters
    ----------
    module
        An ``LDVAEModule``.
    tensors
        Cells as scvi-tools' data loaders make them.
    start_kk
        Orthogonal, shape (latents, factors).
    n_sweeps
        Maximum number of sweeps over the planes.
    n_cells
        Number of cells, evenly spaced among those given.

    Returns
    -------
    Orthogonal, shape (latents, factors), float64.
    """
    n_all = len(tensors[REGISTRY_KEYS.X_KEY])
    rows = torch.linspace(0, n_all - 1, min(n_cells, n_all)).long()
    tensors = {name: value[rows].to(module.device) for name, value in tensors.items()}
    posterior = module.posterior(tensors)
    rotation_kk = np.array(start_kk, dtype=np.float64)
    n_latent = len(rotation_kk)

    def loss(first_kj: np.ndarray) -> float:
        first = torch.from_numpy(first_kj).to(posterior.mean)
        everything = torch.ones(len(posterior.mean), first.shape[1], dtype=torch.bool, device=module.device)
        return float(truncation_loss(module, tensors, posterior, first, everything).double().mean())

    with module.evaluating():
        losses = [loss(rotation_kk[:, :j]) for j in range(1, n_latent)]
        for _ in range(n_sweeps):
            before = sum(losses)
            for j in range(n_latent - 1):
                turns = [_turned(rotation_kk, j, third * np.pi / 3) for third in range(3)]
                at = [losses[j], *(loss(turned[:, : j + 1]) for turned in turns[1:])]
                wave = sum(value * np.exp(-2j * np.pi * third / 3) for third, value in enumerate(at))
                # The minimum of the cosine of 2 t + phase is at pi.
                best_kk = _turned(rotation_kk, j, 0.5 * (np.pi - np.angle(wave)))
                if (lowest := loss(best_kk[:, : j + 1])) < losses[j]:
                    losses[j], rotation_kk = lowest, best_kk
            if before - sum(losses) < _SETTLED:
                break
    return rotation_kk


def _turned(rotation_kk: np.ndarray, j: int, angle: float) -> np.ndarray:
    """Factors j and j + 1 rotated in their plane."""
    turned_kk, cosine, sine = rotation_kk.copy(), np.cos(angle), np.sin(angle)
    turned_kk[:, [j, j + 1]] = rotation_kk[:, [j, j + 1]] @ np.array([[cosine, -sine], [sine, cosine]])
    return turned_kk


@torch.no_grad()
def bake_rotation(module: Any, rotation_kk: np.ndarray) -> None:
    """Rotate the latent space of a network; its decoded expression at the posterior mean does not change.

    The mean head of the encoder is multiplied by ``R'``, each head of the decoder by R. A posterior
    is diagonal on the new axes too: the log-variance head is mixed with weights ``R^2``, whose columns sum to 1, so that a
    factor gets the weighted geometric mean of the variances.

    Parameters
    ----------
    module
        An ``LDVAEModule`` with a normal latent.
    rotation_kk
        Orthogonal, shape (latents, factors).
    """
    rotation = torch.from_numpy(np.asarray(rotation_kk, dtype=np.float64))
    encoder, decoder = module.z_encoder, module.decoder
    for head, mixing in ((encoder.mean_encoder, rotation), (encoder.var_encoder, rotation.square())):
        for parameter in (head.weight, head.bias):
            parameter.copy_(mixing.T @ parameter.cpu().double())
    for name in ("factor_regressor", "px_dropout_decoder", "px_r_decoder"):
        if (layers := getattr(decoder, name, None)) is not None:
            columns = layers.fc_layers[0][0].weight[:, : len(rotation)]
            columns.copy_(columns.cpu().double() @ rotation)
