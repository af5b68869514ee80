"""Sets of latents that an ablation replaces, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldvae_ext._validate import factor_indices, listed
from ldvae_ext.core.decoder import LinearDecoder


def named_sets(
    decoder: LinearDecoder, latents: Any, scheme: str, mode: str, order: np.ndarray | None
) -> list[tuple[str, np.ndarray]]:
    """Names of the columns of an ablation, and the positions of the latents that each replaces."""
    names = decoder.factors.tolist()
    whole = np.arange(len(names))
    if scheme == "keep_top":
        order = latent_order(decoder, latents, order)
        # Without any latent on the simplex there is no point of it.
        return [(f"top_{j}", np.setdiff1d(whole, order[:j])) for j in range(1 if mode == "drop" else 0, len(order) + 1)]
    if isinstance(latents, Mapping):
        sets = [(str(name), factor_indices(members, names)) for name, members in latents.items()]
        if len({name for name, _ in sets}) < max(1, len(latents)):
            msg = f"`latents` must name at least one set of latents, and each by another name; got {listed(latents)}."
            raise ValueError(msg)
    else:
        sets = [(names[k], np.array([k])) for k in factor_indices(latents, names)]
    if scheme == "leave_in":
        sets = [(name, np.setdiff1d(whole, members)) for name, members in sets]
    if mode == "drop" and any(len(members) == len(names) for _, members in sets):
        msg = "`mode='drop'` cannot take out all latents at once, since the others are renormalised."
        raise ValueError(msg)
    return sets


def latent_order(decoder: LinearDecoder, latents: Any, default: np.ndarray | None) -> np.ndarray:
    """Positions of latents in the order in which they were named, each once; a default, or all, if none were."""
    names = decoder.factors.tolist()
    if latents is None:
        return np.arange(len(names)) if default is None else default
    if isinstance(latents, Mapping):
        return np.unique(np.concatenate([factor_indices(members, names) for members in latents.values()]))
    factor_indices(latents, names)
    given = [latents] if isinstance(latents, (str, int, np.integer)) else latents
    return np.array(list(dict.fromkeys(int(factor_indices([latent], names)[0]) for latent in given)))
