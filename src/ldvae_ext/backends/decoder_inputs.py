"""The inputs of the decoder and of the likelihood, as the network makes them of a minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scvi.nn import FCLayers


class DecoderInputs(NamedTuple):
    """Inputs of the decoder and of the likelihood of a minibatch, other than parameters."""

    values: torch.Tensor
    """Latents, continuous covariates and embedded batches, shape (cells, inputs) or (samples, cells, inputs)."""
    categories: list[torch.Tensor]
    """Codes of batch (unless embedded) and categorical covariates, shape (cells, 1) each."""
    log_library: torch.Tensor
    """Log of the library sizes, or of the size factors, shape (cells, 1) or (samples, cells, 1)."""
    batch_index: torch.Tensor
    """Codes of the batches, shape (cells, 1)."""
    labels: torch.Tensor | None
    """Codes of the labels, shape (cells, 1); None where there are none."""


def with_one_hot(layers: FCLayers, values_np: torch.Tensor, categories: Sequence[torch.Tensor]) -> torch.Tensor:
    """All inputs of a linear head: values and one-hot levels, which its weights are multiplied with.

    Parameters
    ----------
    layers
        The head.
    values_np
        Latents and continuous covariates, shape (cells, inputs).
    categories
        Codes of the categorical covariates, shape (cells, 1) each.
    """
    one_hot = [
        torch.nn.functional.one_hot(codes.squeeze(-1), n_levels).to(values_np.dtype)
        for n_levels, codes in zip(layers.n_cat_list, categories, strict=False)
        if n_levels > 1
    ]
    return torch.cat([values_np, *one_hot], dim=-1) if one_hot else values_np


def dispersion_codes(module: Any, batch_index: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Column of the dispersions for each cell, shape (cells,); None where all cells have the same.

    Parameters
    ----------
    module
        The network.
    batch_index, labels
        Codes of batches and labels, shape (cells, 1).

    Raises
    ------
    ValueError
        If labels are needed and not there, or a code has no dispersion.
    """
    if module.dispersion == "gene":
        return None
    codes = labels if module.dispersion == "gene-label" else batch_index
    if codes is None:
        msg = "`dispersion='gene-label'` needs labels; register them with `labels_key`."
        raise ValueError(msg)
    lowest, highest = (int(extreme) for extreme in codes.aminmax())
    if lowest < 0 or highest >= module.px_r.shape[1]:
        msg = (
            f"Codes must be 0 to {module.px_r.shape[1] - 1}, of which there are dispersions; got {lowest} to {highest}."
        )
        raise ValueError(msg)
    return codes.squeeze(-1)


def log_theta(module: Any, batch_index: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Log of the inverse dispersions that are parameters, shape (genes,), or (cells, genes) by batch or label.

    Parameters
    ----------
    module, batch_index, labels
        See :func:`dispersion_codes`.
    """
    codes = dispersion_codes(module, batch_index, labels)
    if codes is None:
        return module.px_r
    one_hot = torch.nn.functional.one_hot(codes, module.px_r.shape[1]).to(module.px_r.dtype)
    return torch.nn.functional.linear(one_hot, module.px_r)
