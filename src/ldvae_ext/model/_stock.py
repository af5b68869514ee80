"""scvi-tools' own methods, called with the same cells, checks and mode as the package's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from ldvae_ext._scvi import MODULE_KEYS, check_adata_or_dataloader
from ldvae_ext._validate import cell_positions, check_column, check_one_of, check_positive_int, listed, warn
from ldvae_ext.backends.loader import DenseMinibatches
from ldvae_ext.model._axes import known_batches
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import cells_to_read, check_registers_cells, is_of_datamodule, minibatches, stream_cells
from ldvae_ext.model._collection import as_anndata, minibatches_of_module

# Arguments with a number of cells or draws.
_COUNTS = ("batch_size", "n_samples", "n_samples_overall", "n_mc_samples", "mc_samples")
# Arguments with names of batches.
_POSITIONS = ("idx1", "idx2")
_BATCHES = ("transform_batch", "batchid1", "batchid2")


def reads_cells(
    method: Callable[..., Any] | None = None,
    *,
    needs_counts: bool = False,
    finite: bool = False,
    empty: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A method of scvi-tools that reads cells, in evaluation mode.

    Cells of another AnnData are read as by the package's own methods: genes and levels by name. If its genes are in the model's
    order, scvi-tools registers it. ``indices`` may be positions or a mask.

    Parameters
    ----------
    method
        Takes ``adata`` and ``indices``.
    needs_counts
        True to raise if the data were minified without counts.
    finite
        True to raise if the result is not finite since a library size is not, and to warn if it is not for another reason.
    empty
        Result without cells, from model and arguments; an error if None.
    """
    if method is None:
        return partial(reads_cells, needs_counts=needs_counts, finite=finite, empty=empty)
    parameters = signature(method)

    @wraps(method)
    def run(self: LDVAEBase, *args: Any, **kwargs: Any) -> Any:
        if needs_counts:
            self._check_has_counts(method.__name__)
        bound = parameters.bind(self, *args, **kwargs)
        given = bound.arguments
        dataloader, indices = minibatches_of_module(given.get("dataloader")), given.get("indices")
        if dataloader is not None:
            given["dataloader"] = dataloader
        for name in _COUNTS:
            if given.get(name) is not None:
                check_positive_int(name, given[name])
        for name in _BATCHES:
            if given.get(name) is not None:
                given[name] = known_batches(self, name, given[name])
        with (
            self.module.evaluating(),
            quiet(indices, None if dataloader is None else given.get("batch_size")),
            cells_to_read(self, given.get("adata"), dataloader) as cells,
        ):
            given["adata"] = cells
            if "dataloader" not in parameters.parameters:
                check_registers_cells(self, method.__name__, cells)
            if is_of_datamodule(self) and cells is not None and "dataloader" in parameters.parameters:
                # scvi-tools reads the cells of such a model from a data loader alone.
                at = cell_positions(indices, cells.n_obs)
                dataloader = DenseMinibatches(minibatches(self, cells, at, given.get("batch_size")))
                given |= {"adata": None, "indices": None, "dataloader": dataloader}
            own = self.adata if cells is None else cells
            if indices is not None and dataloader is None and own is not None:
                given["indices"] = cell_positions(indices, own.n_obs)
                if not len(given["indices"]):
                    if empty is None:
                        msg = f"`indices` selects no cells, of which `{method.__name__}` has no value; got {indices!r}."
                        raise ValueError(msg)
                    return empty(*bound.args, **bound.kwargs)
            for name in _POSITIONS:
                value = given.get(name)
                # A string is a query of obs.
                if own is not None and value is not None and not isinstance(value, str):
                    given[name] = cell_positions(value, own.n_obs, argument=name)
            if not finite:
                return method(*bound.args, **bound.kwargs)
            where = method.__name__, cells, given.get("indices"), dataloader
            try:
                with np.errstate(over="ignore"):  # an error or a warning follows
                    result = method(*bound.args, **bound.kwargs)
            except ValueError:  # of a distribution of counts
                _check_libraries(self, *where)
                raise
            if not _is_finite(result):
                _check_libraries(self, *where)
                warn(f"`{method.__name__}` has values that are not finite.")
            return result

    return run


def _is_finite(result: Any) -> bool:
    if isinstance(result, dict):
        return all(map(_is_finite, result.values()))
    values = result.detach().cpu().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
    # One infinite or undefined value makes the sum infinite or undefined.
    return bool(np.isfinite(values.sum(dtype=np.float64)))


def _check_libraries(model: LDVAEBase, method: str, adata: AnnData | None, indices: Any, dataloader: Any) -> None:
    """Raise if the posterior mean of a library size is infinite in float32."""
    if dataloader is None and not model.module.use_observed_lib_size:
        with stream_cells(model, adata, indices) as cells:
            library_n = np.concatenate([chunk.library for chunk in cells.chunks])
            names = None if cells.obs is None else cells.obs.index
        large = np.flatnonzero(~(library_n < np.finfo(np.float32).max))
        if names is not None and len(large):
            msg = (
                f"`{method}` is not finite: the posterior mean of the library size of {len(large)} cells is more than float32 can "
                f"hold, such as exp({np.log(library_n[large[0]]):.0f}) for {names[large[0]]!r}. The encoder of the library has not "
                "learned their totals: train with a lower learning rate, or with `use_observed_lib_size=True`."
            )
            raise ValueError(msg)


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
        bound = signature(method).bind(self, *args, **kwargs)
        given = bound.arguments
        adata, groupby = as_anndata(given.get("adata", self.adata)), given.get("groupby")
        check_registers_cells(self, method.__name__, given.get("adata"))
        if adata is not None and groupby is not None:
            check_column(adata.obs.columns, "groupby", groupby)
            groups = _groups_with_cells(adata.obs[groupby], groupby)
            for name in ("group1", "group2"):
                asked = given.get(name)
                for group in [asked] if isinstance(asked, str) or not isinstance(asked, Iterable) else asked:
                    if group is not None:
                        check_one_of(name, group, groups)
            if given.get("group1") is None and given.get("idx1") is None:
                # scvi-tools takes all categories of the column, also those without cells.
                if len(groups) < 2:
                    msg = f"`groupby`: `adata.obs[{groupby!r}]` has the single group {listed(groups)}; there is none to compare it with."
                    raise ValueError(msg)
                given["group1"] = groups
        return method(*bound.args, **bound.kwargs)

    return run


def _groups_with_cells(column: pd.Series, key: str) -> list[Any]:
    """Groups of a column, in the order of its categories."""
    is_missing = column.isna()
    if is_missing.any() and not isinstance(column.dtype, (np.dtype, pd.CategoricalDtype)):
        msg = (
            f"`groupby`: `adata.obs[{key!r}]` has no value for {int(is_missing.sum())} of {len(column)} cells, and its type "
            f"{column.dtype} cannot be compared then; `.astype(object)`, or name a group for each cell."
        )
        raise ValueError(msg)
    present = column[~is_missing].astype("category").cat.remove_unused_categories()
    return present.cat.categories.tolist()


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
