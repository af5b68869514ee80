"""scvi-tools' own methods, called in evaluation mode and with checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from anndata import AnnData

from ldvae_ext._scvi import MODULE_KEYS, check_adata_or_dataloader
from ldvae_ext._validate import check_column, check_one_of
from ldvae_ext.model._base import LDVAEBase


def in_evaluation_mode(method: Callable[..., Any], *, needs_counts: bool = False) -> Callable[..., Any]:
    """A method of scvi-tools that runs in evaluation mode, with a helpful error if counts are missing."""

    @wraps(method)
    def run(self: LDVAEBase, *args: Any, **kwargs: Any) -> Any:
        if needs_counts:
            self._check_has_counts(method.__name__)
        with self.module.evaluating(), quiet(kwargs.get("indices"), kwargs.get("batch_size")):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def quiet(*given: Any) -> Iterator[None]:
    """Suppress scvi-tools' warning on arguments with a data loader if none were given: it also warns of its own defaults."""
    with warnings.catch_warnings():
        if all(value is None for value in given):
            warnings.filterwarnings("ignore", "Using .* after custom Dataloader", UserWarning)
        yield


def with_u(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of scvi-tools that takes latents for Gaussian vectors: under ``"ln"`` it is given u.

    On the simplex their covariance is singular, so that the search for outliers fails.
    """

    @wraps(method)
    def run(self: LDVAEBase, *args: Any, **kwargs: Any) -> Any:
        if self.module.latent_distribution != "ln":
            return method(self, *args, **kwargs)
        of_u = partial(self.get_latent_representation, return_dist=True)
        self.get_latent_representation = lambda *a, **k: of_u(*a, **k)[0]
        try:
            return method(self, *args, **kwargs)
        finally:
            del self.get_latent_representation

    return run


def with_checked_groups(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of scvi-tools that compares groups of cells, with an error for a group that does not exist."""

    @wraps(method)
    def run(self: LDVAEBase, *args: Any, **kwargs: Any) -> Any:
        given = signature(method).bind(self, *args, **kwargs).arguments
        adata, groupby = given.get("adata", self.adata), given.get("groupby")
        if adata is not None and groupby is not None:
            check_column(adata.obs.columns, "groupby", groupby)
            groups = list(adata.obs[groupby].unique())
            for name in ("group1", "group2"):
                asked = given.get(name)
                for group in [asked] if isinstance(asked, str) or not isinstance(asked, Iterable) else asked:
                    if group is not None:
                        check_one_of(name, group, groups)
        return method(self, *args, **kwargs)

    return run


def minibatches_of(
    model: LDVAEBase,
    adata: AnnData | None,
    indices: Any,
    batch_size: int | None,
    dataloader: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Minibatches of cells, as in scvi-tools' getters."""
    check_adata_or_dataloader(model, adata, dataloader)
    if dataloader is not None:
        return dataloader
    adata = model._validate_anndata(adata)
    return model._make_data_loader(adata=adata, indices=indices, batch_size=batch_size, **kwargs)


@torch.inference_mode()
def sampled_distribution(
    model: LDVAEBase, tensors: dict[str, torch.Tensor], n_samples: int, transform_batch: Any = None
) -> Any:
    """Distribution of the counts for latents drawn from the posteriors of a minibatch."""
    _, generative = model.module.forward(
        tensors,
        inference_kwargs={"n_samples": n_samples},
        generative_kwargs={"transform_batch": transform_batch},
        compute_loss=False,
    )
    return generative[MODULE_KEYS.PX_KEY]
