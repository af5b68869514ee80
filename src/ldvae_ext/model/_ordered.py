"""Latents in order of what they explain: the rotation that orders them, and a fine-tuning that makes the first ones enough."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Self

import numpy as np
from anndata import AnnData

from ldvae_ext._validate import listed
from ldvae_ext.core._views import check_rotatable
from ldvae_ext.model._deviance import deviance_rotation
from ldvae_ext.model._export import ExportMixin
from ldvae_ext.module._truncation import bake_rotation

# What the first training decided, or what this one is.
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


def _check_epochs(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        msg = f"`fine_tune_epochs` must be an integer of at least 0; got {value!r}."
        raise ValueError(msg)


def _check_not_decided(method: str, arguments: dict[str, Any], why: str, *more: str) -> None:
    decided = [name for name in arguments if name in (*_DECIDED, *more)]
    if decided:
        msg = f"`{method}` takes no {listed(decided)}: {why}."
        raise TypeError(msg)


class OrderedMixin(ExportMixin):
    """Latents whose first j are a good model by themselves."""

    def order_factors(
        self,
        fine_tune_epochs: int = 40,
        *,
        lr: float = 2e-3,
        batch_size: int = 128,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        plan_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Put the latents in order of what they explain, and train on so that the first j are a good model by themselves.

        The latent space is rotated first (:func:`deviance_rotation` of the training cells), which changes no decoded
        expression. Then comes a fine-tuning with nested dropout (Rippel et al. 2014, arXiv:1402.0915): each cell of a
        minibatch keeps its first j latents, j ~ U{1..K}; the others are 0, and their KL is not counted. Afterwards
        ``Z_0``, ``Z_1``, ... are in order, and latents beyond the j-th can be left out as zeros, as in
        ``get_explained_deviance()``.

        The cells are those of the first training; the weight of the KL term is 1. Whatever goes wrong, also in the fine-tuning,
        leaves the model as it was.

        Parameters
        ----------
        fine_tune_epochs
            Number of epochs. With 0, nothing is trained, whatever the arguments below: the model is the same, and
            ``rotate("deviance")`` shows it on other axes.
        lr
            Learning rate.
        batch_size, accelerator, devices, plan_kwargs, **trainer_kwargs
            As in :meth:`train`.

        Raises
        ------
        TypeError
            If an argument would change the cells, the epochs or the weight of the KL term.
        ValueError
            If the model is not trained, has no counts, a logistic-normal latent or batch norm in the decoder, or is a query
            whose reference is frozen.
        """
        if fine_tune_epochs == 0 and not isinstance(fine_tune_epochs, bool):
            self.rotate("deviance")
            return
        _check_epochs(fine_tune_epochs)
        _check_not_decided("order_factors", trainer_kwargs, "it goes on from the training that was, on its cells")
        own = [name for name in plan_kwargs or {} if name == "lr" or "kl_w" in name]
        if own:
            msg = f"`plan_kwargs` may not hold {listed(own)}: `lr` is an argument, and the weight of the KL term is 1."
            raise ValueError(msg)
        self._check_can_be_ordered()
        if not self.is_trained_:
            msg = "`order_factors` goes on from a trained model: call `train` first, or use `train_ordered`."
            raise ValueError(msg)
        split = self._split_of_training()
        former = deepcopy(self.module.state_dict()), self.rotation_, self.is_ordered_
        bake_rotation(self.module, deviance_rotation(self, indices=split[0], batch_size=batch_size))
        # A view of the former axes.
        self.rotation_ = None
        # Lightning leaves a trained network in evaluation mode and trains it in the mode it finds: without dropout.
        self.module.train()
        try:
            with self.module.truncating():
                self.train(
                    fine_tune_epochs,
                    accelerator,
                    devices,
                    batch_size=batch_size,
                    datasplitter_kwargs={"external_indexing": split},
                    plan_kwargs={**(plan_kwargs or {}), "lr": lr, "n_epochs_kl_warmup": None},
                    **trainer_kwargs,
                )
        except BaseException:
            self.module.load_state_dict(former[0])
            _, self.rotation_, self.is_ordered_ = former
            raise
        finally:
            self.module.eval()
        self.is_ordered_ = True

    @classmethod
    def train_ordered(
        cls,
        adata: AnnData,
        n_latent: int = 10,
        max_epochs: int | None = None,
        *,
        fine_tune_epochs: int = 40,
        fine_tune_lr: float = 2e-3,
        batch_size: int = 128,
        model_kwargs: dict[str, Any] | None = None,
        train_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> Self:
        """A model with ordered latents: ordinary training, then :meth:`order_factors`.

        The decoder has a gene intercept that starts at the log mean expression, and no batch norm, whose statistics a
        truncated decoder would not have: ``use_batch_norm="encoder"``, ``bias="auto"``.

        Parameters
        ----------
        adata
            AnnData registered by :meth:`setup_anndata`.
        n_latent
            Number of latents.
        max_epochs
            Epochs of the ordinary training, as in :meth:`train`.
        fine_tune_epochs, fine_tune_lr
            Number of epochs and learning rate of the fine-tuning, as in :meth:`order_factors`.
        batch_size
            Cells per minibatch, of both trainings.
        model_kwargs
            Other arguments of the model.
        train_kwargs
            Arguments of :meth:`train` for the ordinary training alone, such as ``train_size`` or ``plan_kwargs``.
            ``kl_warmup`` is ``"auto"`` unless given.
        **trainer_kwargs
            Arguments of :meth:`train` for both trainings, such as ``accelerator``.

        Returns
        -------
        The model.

        Raises
        ------
        ValueError
            If the options of the model do not let it be ordered; see :meth:`order_factors`.
        """
        _check_not_decided(
            "train_ordered", trainer_kwargs, "`train_kwargs` are for the ordinary training", "plan_kwargs"
        )
        _check_epochs(fine_tune_epochs)
        options = {"use_batch_norm": "encoder", "bias": "auto", **(model_kwargs or {})}
        model = cls(adata, n_latent=n_latent, **options)
        if fine_tune_epochs:
            model._check_can_be_ordered()
        else:
            check_rotatable(model.module.latent_distribution)
            model._check_has_counts("train_ordered")
        own = {"kl_warmup": "auto", **(train_kwargs or {})}
        model.train(max_epochs, batch_size=batch_size, **own, **trainer_kwargs)
        model.order_factors(fine_tune_epochs, lr=fine_tune_lr, batch_size=batch_size, **trainer_kwargs)
        return model

    def _check_can_be_ordered(self) -> None:
        """Raise if nested dropout cannot train this model; whether it is trained is not asked."""
        if self.adata is None or self.minified_data_type is not None:
            what = "was loaded without data" if self.adata is None else "has minified data"
            msg = f"`order_factors` trains on counts through the encoder; this model {what}."
            raise ValueError(msg)
        check_rotatable(self.module.latent_distribution)
        if self.module.use_batch_norm:
            msg = (
                "`order_factors` cannot train a decoder with batch norm: its statistics depend on how many latents a cell "
                "keeps, and the running ones would fit no number of them. Train with `use_batch_norm=False, bias='auto'`, as "
                "`train_ordered` does; `order_factors(0)` orders this model by a rotation."
            )
            raise ValueError(msg)
        if self.query_ is not None and not self.query_["unfrozen"]:
            msg = (
                "This model is a query whose reference is frozen: its latents cannot be rotated or trained. Order the reference "
                "before the query is loaded, or load it with `unfrozen=True`."
            )
            raise ValueError(msg)

    def _split_of_training(self) -> list[np.ndarray]:
        """Training, validation and test cells of the last training; all cells are for training if there was none."""
        names = ("train_indices_", "validation_indices_", "test_indices_")
        given = [getattr(self, name, None) for name in names]
        split = [np.array([] if cells is None else cells, dtype=np.int64) for cells in given]
        if given[0] is None:
            split[0] = np.arange(self.adata.n_obs)
        if not np.array_equal(np.sort(np.concatenate(split)), np.arange(self.adata.n_obs)):
            msg = (
                f"The model was trained on {sum(map(len, split))} cells, held-out ones included, but its AnnData has {self.adata.n_obs}: "
                "`order_factors` needs those that it was trained on."
            )
            raise ValueError(msg)
        return split
