"""Query mapping: a network with more batches than the reference, of which only the new parts are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers

from ldvae_ext.backends.plan import GatheringPlan


class Levels(NamedTuple):
    """Numbers of batches, labels and levels of each categorical covariate of a network."""

    n_batch: int
    n_labels: int
    n_cats_per_cov: tuple[int, ...] = ()


class Freezing(NamedTuple):
    """Parts of the reference that are frozen; see ``LDVAE.load_query_data``."""

    unfrozen: bool = False
    freeze_dropout: bool = False
    freeze_expression: bool = True
    freeze_decoder_first_layer: bool = True
    freeze_batchnorm_encoder: bool = True
    freeze_batchnorm_decoder: bool = True
    freeze_library_encoder: bool = True


class QueryModule:
    """Methods of a network with frozen parts; precedes the network's class."""

    learnable: dict[str, torch.Tensor] | None = None
    """Masks of the entries of each parameter that are trained; None if all are, as in a model that is not a query."""

    @property
    def can_learn(self) -> bool:
        """True if there are parameters to train."""
        return self.learnable is None or any(mask.any() for mask in self.learnable.values())

    def train(self: Any, mode: bool = True) -> Any:
        """Set training or evaluation mode; frozen batch norms, known by their momentum of 0, stay in evaluation mode.

        Parameters
        ----------
        mode
            True for training mode.
        """
        super().train(mode)  # type: ignore[misc]
        for layer in self.modules():
            if isinstance(layer, torch.nn.BatchNorm1d) and layer.momentum == 0:
                layer.training = False
        return self


class QueryTrainingPlan(GatheringPlan):
    """scvi-tools' training plan, which leaves frozen entries of a query's network as they are, to the bit.

    Frozen entries get no gradient, but weight decay and momentum would still move them: they are put back after each step,
    whatever the optimizer. For a network that is no query, it is scvi-tools' own plan.

    Parameters
    ----------
    module
        The network.
    evaluation_mode
        True to train a network in evaluation mode.
    **kwargs
        As in ``scvi.train.TrainingPlan``.

    Raises
    ------
    ValueError
        If there are no parameters to train.
    """

    def __init__(self, module: Any, *, evaluation_mode: bool = False, **kwargs: Any) -> None:
        if not module.can_learn:
            msg = (
                "There are no parameters to train: the reference has all batches and levels of the query, and all else is "
                "frozen. The model can be used as it is; to train it, load the query with `unfrozen=True`, or with one of "
                "the `freeze_...` arguments False."
            )
            raise ValueError(msg)
        super().__init__(module, **kwargs)
        self.evaluation_mode = evaluation_mode

    def on_fit_start(self) -> None:
        """Set training mode: a network that was trained, loaded or mapped is in evaluation mode, and Lightning keeps it."""
        super().on_fit_start()
        # All layers, at first: Lightning would warn of layers in evaluation mode.
        for layer in self.module.modules():
            layer.training = True

    def on_train_start(self) -> None:
        """Set training mode for trained layers, evaluation mode for frozen batch norms or as requested."""
        super().on_train_start()
        self.module.train(not self.evaluation_mode)
        # Copied here, where weights are stored as in the steps.
        self._references = [value.detach().clone() for value, _ in self._frozen]

    def configure_optimizers(self) -> dict[str, Any]:
        """scvi-tools' optimizer, which restores frozen entries after each step."""
        config = super().configure_optimizers()
        # torch.compile puts a prefix before the names.
        parameters = {name.removeprefix("_orig_mod."): value for name, value in self.module.named_parameters()}
        self._frozen = [
            (parameters[name], parts)
            for name, mask in (self.module.learnable or {}).items()
            if parameters[name].requires_grad and (parts := _frozen_parts(mask))
        ]
        if self._frozen:
            config["optimizer"].register_step_post_hook(self._restore)
        return config

    @torch.no_grad()
    def _restore(self, *_of_hook: Any) -> None:
        for (value, parts), reference in zip(self._frozen, self._references, strict=True):
            for part in parts:
                value[part] = reference[part]


def _frozen_parts(mask: torch.Tensor) -> list[tuple[slice, ...]]:
    """Blocks of adjacent rows or columns of a parameter that are not trained, from the mask of its trained entries."""
    for dim in reversed(range(mask.ndim)):
        first = mask.select(1 - dim, 0) if mask.ndim > 1 else mask
        if mask.ndim > 1 and not (mask == first.unsqueeze(1 - dim)).all():
            continue
        changes = np.flatnonzero(np.diff(np.concatenate([[False], ~first.cpu().numpy(), [False]]).astype(np.int8)))
        whole = [slice(None)] * mask.ndim
        return [(*whole[:dim], slice(start, end), *whole[dim + 1 :]) for start, end in changes.reshape(-1, 2).tolist()]
    msg = "Trained entries of a parameter must be whole rows or columns."
    raise ValueError(msg)


def _linears(module: torch.nn.Module) -> Iterator[tuple[str, FCLayers, int]]:
    """Name of each linear layer among fully connected ones, these, and which of them it is."""
    for path, layers in module.named_modules():
        if isinstance(layers, FCLayers):
            for i, name in enumerate(dict(layers.fc_layers.named_children())):
                yield f"{path}.fc_layers.{name}.0", layers, i


def _category_levels(module: Any, levels: Levels, layers: FCLayers, position: int) -> list[int]:
    """Number of levels of each category whose one-hot vector a linear layer reads, in order."""
    if not layers.n_cat_list or not layers.inject_into_layer(position):
        return []
    batch = [] if module.batch_representation == "embedding" else [levels.n_batch]
    return [*batch, *levels.n_cats_per_cov]


def _n_columns(n_levels: int) -> int:
    return n_levels if n_levels > 1 else 0


def _extended(values: torch.Tensor, n_new: int, dim: int) -> torch.Tensor:
    """Values followed by the given number of copies of their mean."""
    mean = values.mean(dim=dim, keepdim=True)
    return torch.cat([values, mean.repeat_interleave(n_new, dim=dim)], dim=dim)


def _widened(weight: torch.Tensor, old: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """A linear layer's weight with columns for more levels, each category's in its own place."""
    n_own = weight.shape[1] - sum(map(_n_columns, old))
    own, *blocks = weight.split([n_own, *map(_n_columns, old)], dim=1)
    out = [own]
    for block, n_old, n_new in zip(blocks, old, new, strict=True):
        # A single level has no column, which is the same as a column of zeros.
        known = block if n_old > 1 else weight.new_zeros(len(weight), n_old)
        out.append(_extended(known, n_new - n_old, dim=1) if n_new > 1 else block)
    return torch.cat(out, dim=1)


def _new_columns(weight: torch.Tensor, old: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """True for each entry of a widened weight that belongs to a new level."""
    blocks = [torch.arange(_n_columns(n_new)) >= n_old for n_old, n_new in zip(old, new, strict=True)]
    own = torch.zeros(weight.shape[1] - sum(map(len, blocks)), dtype=torch.bool)
    return torch.cat([own, *blocks]).to(weight.device).expand_as(weight)


def levels_of(module: Any) -> Levels:
    """Numbers of batches, labels and levels of covariates of a network.

    Parameters
    ----------
    module
        An ``LDVAEModule``.
    """
    return Levels(module.n_batch, module.n_labels, tuple(module.n_cats_per_cov))


def _embedding_name() -> str:
    return f"_embeddings_dict.{REGISTRY_KEYS.BATCH_KEY}.weight"


@torch.no_grad()
def take_over(module: Any, state: dict[str, torch.Tensor], reference: Levels, *, library_known: bool) -> None:
    """Load the parameters of a reference's network into a network with more levels.

    Entries of the reference's levels are copied; those of new levels start at their mean. The
    only level of a reference has no column: it gets one of zeros, and so do the new ones.

    Parameters
    ----------
    module
        An ``LDVAEModule`` whose first levels are the reference's.
    state
        State dict of the reference's network.
    reference
        Numbers of levels of the reference.
    library_known
        True if the network has the prior of the library size of new batches, from counts. If not, it is the mean of the
        reference's.
    """
    state = dict(state)
    levels = levels_of(module)
    for name, layers, i in _linears(module):
        old, new = (_category_levels(module, each, layers, i) for each in (reference, levels))
        state[f"{name}.weight"] = _widened(state[f"{name}.weight"], old, new)
    n_new = levels.n_batch - reference.n_batch
    if module.dispersion in ("gene-batch", "gene-label"):
        state["px_r"] = _extended(state["px_r"], module.px_r.shape[1] - state["px_r"].shape[1], dim=1)
    if _embedding_name() in state:
        state[_embedding_name()] = _extended(state[_embedding_name()], n_new, dim=0)
    for name in ("library_log_means", "library_log_vars"):
        if name in state:
            own = getattr(module, name)[:, reference.n_batch :].to(state[name])
            extended = _extended(state[name], n_new, dim=1)
            state[name] = torch.cat([state[name], own], dim=1) if library_known else extended
    module.load_state_dict(state)


def freeze(module: Any, reference: Levels, options: Freezing) -> None:
    """Freeze the reference's part of a network, so that only new parts are trained.

    Parameters that a configuration never uses stay as they are, whatever the options.

    Parameters
    ----------
    module
        A fresh ``LDVAEModule``, whose ``learnable`` is set.
    reference
        Numbers of levels of the reference.
    options
        Parts to freeze.
    """
    used = {name for name, value in module.named_parameters() if value.requires_grad}
    learnable = {
        name: mask if name in used else torch.zeros_like(mask)
        for name, mask in _masks(module, reference, options).items()
    }
    module.learnable = learnable
    if options.unfrozen:
        return
    hooked = set()
    for path, layers in module.named_modules():
        names = [f"{path}.{name}" for name, _ in layers.named_parameters()]
        if isinstance(layers, FCLayers) and any(learnable[name].any() for name in names):
            hooked |= {name for name in names if name.split(".")[-2] == "0"} & used
        if isinstance(layers, torch.nn.Dropout) and options.freeze_dropout:
            layers.p = 0.0
        if isinstance(layers, torch.nn.BatchNorm1d) and _is_frozen_norm(path, options):
            layers.momentum = 0.0
            layers.training = False
    for name, value in module.named_parameters():
        # Linear layers with other trained entries keep a gradient, of zero, as in scvi-tools.
        value.requires_grad_(name in hooked or bool(learnable[name].any()))
        if value.requires_grad and not learnable[name].all():
            value.register_hook(partial(_only_learnable, _frozen_parts(learnable[name])))


def _only_learnable(frozen: Sequence[tuple[slice, ...]], gradient: torch.Tensor) -> torch.Tensor:
    learnable = gradient.clone()
    for part in frozen:
        learnable[part] = 0
    return learnable


def _is_frozen_norm(path: str, options: Freezing) -> bool:
    part = path.split(".")[0]
    return {
        "decoder": options.freeze_batchnorm_decoder,
        "z_encoder": options.freeze_batchnorm_encoder,
        "l_encoder": options.freeze_library_encoder,
    }[part]


def _masks(module: Any, reference: Levels, options: Freezing) -> dict[str, torch.Tensor]:
    """Masks of the trained entries of each parameter, by the name of the parameter."""
    masks = {
        name: torch.full_like(value, _learns(name, options), dtype=torch.bool)
        for name, value in module.named_parameters()
    }
    levels = levels_of(module)
    for name, layers, i in _linears(module):
        name = f"{name}.weight"
        old, new = (_category_levels(module, each, layers, i) for each in (reference, levels))
        masks[name] = masks[name] | _new_columns(masks[name], old, new)
    if module.dispersion in ("gene-batch", "gene-label"):
        n_known = reference.n_labels if module.dispersion == "gene-label" else reference.n_batch
        masks["px_r"][:, n_known:] = True
    if _embedding_name() in masks:
        masks[_embedding_name()][reference.n_batch :] = True
    return masks


def _learns(name: str, options: Freezing) -> bool:
    """True if the entries of a parameter for the reference's levels are trained, too."""
    if options.unfrozen:
        return True
    if name.startswith("l_encoder."):
        return not options.freeze_library_encoder
    if "fc_layers" not in name:
        return False
    if name.split(".")[-2] == "1":
        return not _is_frozen_norm(name, options)
    if name.startswith("decoder."):
        return not options.freeze_decoder_first_layer
    return ".Layer 0." in name and not options.freeze_expression
