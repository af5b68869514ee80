"""Layers that the backends' formulas hold for: scvi-tools' own, unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scvi.nn import Encoder, FCLayers

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(layer: Any, kind: type[torch.nn.Module]) -> bool:
    """True if a layer is of a kind and computes what this kind computes: its ``forward`` has not been replaced.

    Parameters
    ----------
    layer
        The layer.
    kind
        Class of the layer.
    """
    has_own_forward = isinstance(layer, torch.nn.Module) and "forward" in layer.__dict__
    return isinstance(layer, kind) and type(layer).forward is kind.forward and not has_own_forward


def encoders_in_use(module: Any) -> list[Encoder]:
    """The encoder of the latents, and that of the library size if it is latent.

    Parameters
    ----------
    module
        The network.
    """
    return [module.z_encoder] if module.use_observed_lib_size else [module.z_encoder, module.l_encoder]


def reads_sparse_counts(module: Any) -> bool:
    """True if the encoders in use are scvi-tools' own, whose first layer can multiply sparse counts.

    Parameters
    ----------
    module
        The network.
    """
    return all(map(_has_linear_first_layer, encoders_in_use(module)))


def _has_linear_first_layer(encoder: Any) -> bool:
    return (
        is_plain(encoder, Encoder)
        and is_plain(encoder.encoder, FCLayers)
        and is_plain(encoder.encoder.fc_layers[0][0], torch.nn.Linear)
    )


def has_one_hidden_layer(encoder: Any) -> bool:
    """True if an encoder is scvi-tools' own with one hidden layer, ReLU and exp; its batch norm is not checked.

    Parameters
    ----------
    encoder
        The encoder.
    """
    if (
        not _has_linear_first_layer(encoder)
        or len(encoder.encoder.fc_layers) != 1
        or encoder.var_activation is not torch.exp
    ):
        return False
    linear, _, layer_norm, activation, _ = encoder.encoder.fc_layers[0]
    return (
        layer_norm is None
        and is_plain(activation, torch.nn.ReLU)
        and all(
            is_plain(layer, torch.nn.Linear) and layer.bias is not None
            for layer in (linear, encoder.mean_encoder, encoder.var_encoder)
        )
    )


def transposed(weight_hg: torch.Tensor) -> np.ndarray:
    """Transpose of a weight, row-major: no copy if the weight is stored column by column, see :func:`store_weights`.

    Parameters
    ----------
    weight_hg
        The weight.
    """
    return weight_hg.detach().t().contiguous().numpy()


def store_weights(module: Any, *, by_columns: bool, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Store the weights next to the genes column by column, or row by row as torch does. Their values and shapes stay.

    Compiled loops read the weights of a gene and of a latent, and write their gradients, in one piece. The optimizer's
    loops run through parameter, gradient and moments in the order of memory.

    Parameters
    ----------
    module
        A network whose encoders and heads are scvi-tools' own.
    by_columns
        True for column by column.
    optimizers
        Optimizers whose moments follow.
    """
    firsts = [encoder.encoder.fc_layers[0][0] for encoder in encoders_in_use(module)]
    heads = [head.fc_layers[0][0] for head in (module.decoder.factor_regressor, module.decoder.px_dropout_decoder)]
    for weight in (layer.weight for layer in (*firsts, *heads)):
        weight.data = _stored(weight.data, by_columns=by_columns)
        for optimizer in optimizers:
            # Nothing is stored before the first step, unless a training is resumed.
            state = optimizer.state.get(weight, {})
            state |= {
                name: _stored(value, by_columns=by_columns)
                for name, value in state.items()
                if value.shape == weight.shape
            }


def _stored(value: torch.Tensor, *, by_columns: bool) -> torch.Tensor:
    return value.t().contiguous().t() if by_columns else value.contiguous()


def is_linear_head(layers: Any) -> bool:
    """True if a head of the decoder is one linear layer with or without batch norm, and nothing else.

    Parameters
    ----------
    layers
        The head.
    """
    if (
        not is_plain(layers, FCLayers)
        or len(layers.fc_layers) != 1
        or any(layer is not None for layer in layers.fc_layers[0][2:])
    ):
        return False
    linear, norm = layers.fc_layers[0][:2]
    return is_plain(linear, torch.nn.Linear) and (norm is None or has_moving_averages(norm))


def has_moving_averages(norm: Any) -> bool:
    """True if a layer is a batch norm whose running statistics are moving averages.

    Parameters
    ----------
    norm
        The layer.
    """
    is_batch_norm = is_plain(norm, torch.nn.BatchNorm1d)
    return is_batch_norm and norm.affine and norm.track_running_stats and norm.momentum is not None


def replaced(module: Any, methods: Sequence[str], layers: Iterable[torch.nn.Module] | None = None) -> str | None:
    """The part of a network that is not the package's or scvi-tools' own and would be passed over; None if there is none.

    Parameters
    ----------
    module
        The network.
    methods
        Names of the methods that are passed over.
    layers
        Layers that are passed over, whose hooks would not be called; the network and all its layers if None.
    """
    for name in methods:
        is_own = getattr(type(module), name).__module__.split(".")[0] in ("ldvae_ext", "scvi")
        if name in module.__dict__ or not is_own:
            return f"`{name}` of the network was replaced"
    if any(getattr(layer, hooks) for layer in (module.modules() if layers is None else layers) for hooks in _HOOKS):
        return "a layer of the network has hooks, which would not be called"
    return None
