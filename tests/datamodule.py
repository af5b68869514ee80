"""A Lightning data module over an AnnData, which brings minibatches and a registry as scvi-tools' own data modules do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anndata as ad
import numpy as np
import scvi
import torch
from lightning.pytorch import LightningDataModule
from scipy import sparse
from torch.utils.data import DataLoader, Dataset


class _Rows(Dataset):
    """Cells of an AnnData as dictionaries of raw values, codes of columns under the columns' names."""

    def __init__(self, adata: ad.AnnData, columns: dict[str, np.ndarray], rows: np.ndarray) -> None:
        self.counts = adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)
        self.columns, self.rows = columns, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        return {"X": self.counts[row], **{name: values[row] for name, values in self.columns.items()}}


class CountsDataModule(LightningDataModule):
    """The cells of an AnnData as a stream; registry and minibatches are those of ``MappedCollectionDataModule``.

    The first ``train_size`` of the cells are trained on, the others are for validation.
    """

    def __init__(
        self,
        adata: ad.AnnData,
        batch_key: str | None = "batch",
        labels_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        *,
        batch_size: int = 16,
        train_size: float = 1.0,
        model_name: str = "LDVAE",
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.adata, self.batch_key, self.labels_key = adata, batch_key, labels_key
        self.categorical, self.continuous = categorical_covariate_keys, continuous_covariate_keys
        self.batch_size, self.model_name, self.shuffle = batch_size, model_name, shuffle
        self.n_train = round(train_size * adata.n_obs)
        keys = [key for key in (batch_key, labels_key, *(categorical_covariate_keys or [])) if key is not None]
        # As there: names to codes, in the order of the names.
        self.encoders = {
            key: {name: code for code, name in enumerate(sorted(adata.obs[key].astype(str).unique()))} for key in keys
        }
        self.columns = {
            key: adata.obs[key].astype(str).map(encoder).to_numpy(dtype=np.int64)
            for key, encoder in self.encoders.items()
        }
        for key in continuous_covariate_keys or []:
            self.columns[key] = adata.obs[key].to_numpy(dtype=np.float32)

    @property
    def n_obs(self) -> int:
        return self.adata.n_obs

    @property
    def n_vars(self) -> int:
        return self.adata.n_vars

    @property
    def n_batch(self) -> int:
        return 1 if self.batch_key is None else len(self.encoders[self.batch_key])

    @property
    def n_labels(self) -> int:
        return 0 if self.labels_key is None else len(self._labels())

    @property
    def registry(self) -> dict[str, Any]:
        categorical = {key: np.array(list(self.encoders[key])) for key in self.categorical or []}
        return {
            "scvi_version": scvi.__version__,
            "model_name": self.model_name,
            "setup_args": {
                "layer": None,
                "batch_key": self.batch_key,
                "labels_key": self.labels_key,
                "sample_key": None,
                "size_factor_key": None,
                "categorical_covariate_keys": self.categorical,
                "continuous_covariate_keys": self.continuous,
            },
            "field_registries": {
                "X": _field(
                    "X",
                    None,
                    {"n_obs": self.n_obs, "n_vars": self.n_vars, "column_names": np.array(self.adata.var_names)},
                    {"n_vars": self.n_vars, "n_cells": self.n_obs},
                ),
                "batch": _field(
                    "obs",
                    "_scvi_batch",
                    {
                        "categorical_mapping": None if self.batch_key is None else self.encoders[self.batch_key],
                        "original_key": self.batch_key,
                    },
                    {"n_batch": self.n_batch},
                ),
                "labels": _field(
                    "obs",
                    "_scvi_labels",
                    {"categorical_mapping": self._labels(), "original_key": self.labels_key, "unlabeled_category": "?"},
                    {"n_labels": self.n_labels},
                ),
                "extra_categorical_covs": _field(
                    "obsm",
                    "_scvi_extra_categorical_covs",
                    {
                        "field_keys": list(categorical),
                        "mapping": categorical,
                        "n_cats_per_key": [len(levels) for levels in categorical.values()],
                    }
                    if categorical
                    else {},
                    {"n_extra_categorical_covs": len(categorical)},
                ),
                "extra_continuous_covs": _field(
                    "obsm",
                    "_scvi_extra_continuous_covs",
                    {"columns": np.array(self.continuous, dtype=object)} if self.continuous else {},
                    {"n_extra_continuous_covs": len(self.continuous or [])},
                ),
                "size_factor": {"data_registry": {}, "state_registry": {}, "summary_stats": {}},
            },
            "setup_method_name": "setup_datamodule",
        }

    def _labels(self) -> np.ndarray | None:
        # As there: with the category of cells without a label behind the others.
        return None if self.labels_key is None else np.array([*self.encoders[self.labels_key], "?"], dtype=object)

    def _loader(self, rows: np.ndarray, batch_size: int, *, shuffle: bool) -> DataLoader:
        return DataLoader(_Rows(self.adata, self.columns, rows), batch_size=batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self._loader(np.arange(self.n_train), self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader | None:
        rows = np.arange(self.n_train, self.n_obs)
        return self._loader(rows, self.batch_size, shuffle=False) if len(rows) else None

    def inference_dataloader(self, batch_size: int = 4096, indices: Any = None) -> _Inference:
        """All cells in their order, as a getter's ``dataloader``."""
        rows = np.arange(self.n_obs) if indices is None else np.asarray(indices)
        return _Inference(self, self._loader(rows, batch_size, shuffle=False))

    def on_before_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int | None) -> dict[str, Any]:
        """A minibatch as scvi-tools' networks take it."""

        def columns(keys: list[str] | None) -> torch.Tensor | None:
            return None if not keys else torch.cat([batch[key][:, None] for key in keys], dim=1)

        return {
            "X": batch["X"].float(),
            "batch": columns(self.batch_key and [self.batch_key]),
            "labels": 0 if self.labels_key is None else columns([self.labels_key]),
            "extra_categorical_covs": columns(self.categorical),
            "extra_continuous_covs": columns(self.continuous),
            "sample": None,
        }


class _Inference:
    """Minibatches of cells, converted."""

    def __init__(self, datamodule: CountsDataModule, loader: DataLoader) -> None:
        self.datamodule, self.loader = datamodule, loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            yield self.datamodule.on_before_batch_transfer(batch, None)


def _field(attr_name: str, attr_key: str | None, state: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "data_registry": {"attr_name": attr_name, "attr_key": attr_key},
        "state_registry": state,
        "summary_stats": summary,
    }
