"""Training with ordered latents: the rotation that orders them, then fine-tuning with nested dropout."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np

from ldvae_ext._validate import check_number, listed
from ldvae_ext.core._views import check_rotatable
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._rotation import deviance_rotation, rotate
from ldvae_ext.module._truncation import bake_rotation

# Arguments that the first training has fixed, or that this training sets.
_DECIDED = (
    "datamodule",
    "datasplitter_kwargs",
    "kl_warmup",
    "max_epochs",
    "plan_config",
    "shuffle_set_split",
    "train_size",
    "validation_size",
)


def check_epochs(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        msg = f"`fine_tune_epochs` must be an integer of at least 0; got {value!r}."
        raise ValueError(msg)


def check_not_decided(method: str, arguments: dict[str, Any], why: str, *more: str) -> None:
    decided = [name for name in arguments if name in (*_DECIDED, *more)]
    if decided:
        msg = f"`{method}` takes no {listed(decided)}: {why}."
        raise TypeError(msg)


def order_factors(
    model: LDVAEBase,
    fine_tune_epochs: int,
    lr: float,
    batch_size: int,
    accelerator: str,
    devices: int | list[int] | str,
    plan_kwargs: dict[str, Any] | None,
    trainer_kwargs: dict[str, Any],
) -> None:
    """See :meth:`ldvae_ext.model.LDVAE.order_factors`."""
    if fine_tune_epochs == 0 and not isinstance(fine_tune_epochs, bool):
        rotate(model, "deviance")
        return
    check_epochs(fine_tune_epochs)
    check_number("lr", lr, least=0)
    check_not_decided("order_factors", trainer_kwargs, "it continues the previous training, on its cells")
    own = [name for name in plan_kwargs or {} if name == "lr" or "kl_w" in name]
    if own:
        msg = f"`plan_kwargs` may not hold {listed(own)}: `lr` is an argument, and the weight of the KL term is 1."
        raise ValueError(msg)
    check_can_be_ordered(model)
    if not model.is_trained_:
        msg = "`order_factors` continues the training of a model: call `train` first, or use `train_ordered`."
        raise ValueError(msg)
    split = _split_of_training(model)
    former = deepcopy(model.module.state_dict()), model.rotation_, model.is_ordered_
    bake_rotation(model.module, deviance_rotation(model, indices=split[0], batch_size=batch_size))
    # A view of the former axes.
    model.rotation_ = None
    try:
        with model.module.truncating():
            model.train(
                fine_tune_epochs,
                accelerator,
                devices,
                batch_size=batch_size,
                datasplitter_kwargs={"external_indexing": split},
                plan_kwargs={**(plan_kwargs or {}), "lr": lr, "n_epochs_kl_warmup": None},
                **trainer_kwargs,
            )
    except BaseException:
        model.module.load_state_dict(former[0])
        _, model.rotation_, model.is_ordered_ = former
        raise
    finally:
        model.module.eval()
    model.is_ordered_ = True


def check_can_be_ordered(model: LDVAEBase) -> None:
    """Raise if nested dropout cannot train this model. A training is not required."""
    if model.adata is None or model.minified_data_type is not None:
        what = "was loaded without data" if model.adata is None else "has minified data"
        msg = f"`order_factors` trains on counts through the encoder; this model {what}."
        raise ValueError(msg)
    check_rotatable(model.module.latent_distribution)
    if model.module.use_batch_norm:
        msg = (
            "`order_factors` cannot train a decoder with batch norm: its statistics depend on how many latents a cell "
            "keeps, and the running ones would fit no number of them. Train with `use_batch_norm=False, bias='auto'`, as "
            "`train_ordered` does; `order_factors(0)` orders this model by a rotation."
        )
        raise ValueError(msg)
    if model.query_ is not None and not model.query_["unfrozen"]:
        msg = (
            "This model is a query whose reference is frozen: its latents cannot be rotated or trained. Order the reference "
            "before the query is loaded, or load it with `unfrozen=True`."
        )
        raise ValueError(msg)


def _split_of_training(model: LDVAEBase) -> list[np.ndarray]:
    """Training, validation and test cells of the last training; all cells are for training if there was none."""
    names = ("train_indices_", "validation_indices_", "test_indices_")
    given = [getattr(model, name, None) for name in names]
    split = [np.array([] if cells is None else cells, dtype=np.int64) for cells in given]
    if given[0] is None:
        split[0] = np.arange(model.adata.n_obs)
    if not np.array_equal(np.sort(np.concatenate(split)), np.arange(model.adata.n_obs)):
        msg = (
            f"The model was trained on {sum(map(len, split))} cells, held-out ones included, but its AnnData has {model.adata.n_obs}: "
            "`order_factors` needs the same cells."
        )
        raise ValueError(msg)
    return split
