"""Construction and registration, as LinearSCVI does them."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import pandas as pd
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data._constants import ADATA_MINIFY_TYPE
from scvi.data._utils import _get_adata_minify_type
from scvi.data.fields import CategoricalObsField
from scvi.model import LinearSCVI
from scvi.model.base import BaseMinifiedModeModelClass, RNASeqMixin, UnsupervisedTrainingMixin, VAEMixin

from ldvae_ext._validate import check_positive_int
from ldvae_ext.model._counts import CountsField, check_categories, check_counts, counts_of, library_prior
from ldvae_ext.module import LDVAEModule


class LDVAEBase(RNASeqMixin, VAEMixin, UnsupervisedTrainingMixin, BaseMinifiedModeModelClass):
    """What every part of LDVAE builds on: scvi-tools' base classes, put together as in LinearSCVI."""

    module: LDVAEModule
    _module_cls = LDVAEModule
    # The keys of LinearSCVI, so that minified data of either class opens in the other.
    _LATENT_QZM_KEY = LinearSCVI._LATENT_QZM_KEY
    _LATENT_QZV_KEY = LinearSCVI._LATENT_QZV_KEY

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene",
        gene_likelihood: Literal["zinb", "nb", "poisson"] = "nb",
        use_observed_lib_size: bool = False,
        latent_distribution: Literal["normal", "ln"] = "normal",
        **model_kwargs: Any,
    ) -> None:
        check_positive_int("n_latent", n_latent)
        super().__init__(adata, registry)

        library_log_means, library_log_vars = None, None
        if self.minified_data_type != ADATA_MINIFY_TYPE.LATENT_POSTERIOR and not use_observed_lib_size:
            batch_n = None if adata is None else self.adata_manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()
            counts = None if adata is None else self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
            library_log_means, library_log_vars = library_prior(counts, batch_n, self.summary_stats.n_batch)
        self.module = self._module_cls(
            n_input=self.summary_stats.n_vars,
            n_batch=self.summary_stats.n_batch,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers_encoder=n_layers,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            gene_likelihood=gene_likelihood,
            latent_distribution=latent_distribution,
            library_log_means=library_log_means,
            library_log_vars=library_log_vars,
            use_observed_lib_size=use_observed_lib_size,
            **model_kwargs,
        )
        self._model_summary_string = (
            f"LDVAE model with the following params: \nn_hidden: {n_hidden}, n_latent: {n_latent}, n_layers: {n_layers}, "
            f"dropout_rate: {dropout_rate}, dispersion: {dispersion}, gene_likelihood: {gene_likelihood}, "
            f"latent_distribution: {latent_distribution}"
        )
        self.n_latent = n_latent
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        batch_key: str | None = None,
        labels_key: str | None = None,
        layer: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData of raw counts, after checking all of them.

        Parameters
        ----------
        adata
            Cells x genes; counts dense, CSR or CSC, scipy matrix or array.
        batch_key
            Categorical column of ``adata.obs`` with the batch of each cell.
        labels_key
            Categorical column of ``adata.obs`` with a label of each cell.
        layer
            Layer with the counts; ``adata.X`` if None.
        **kwargs
            Passed to ``scvi.data.AnnDataManager.register_fields``.

        Raises
        ------
        KeyError
            If a layer or a column does not exist.
        ValueError
            If counts are negative, NaN, infinite or all zero, or a column holds NaN. Nothing is written before the checks.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        minify_type = _get_adata_minify_type(adata)
        counts_of(adata, layer)
        if minify_type is None:
            check_counts(adata, layer)
        for name, key in (("batch_key", batch_key), ("labels_key", labels_key)):
            check_categories(adata, name, key)
        fields = [
            CountsField(REGISTRY_KEYS.X_KEY, layer),
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
        ]
        if minify_type is not None:
            fields += cls._get_fields_for_adata_minification(minify_type)
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*does not contain unnormalized count data", category=UserWarning
            )
            manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @property
    def latent_names(self) -> list[str]:
        """The latent dimensions in the network's order, ``Z_0`` first."""
        return [f"Z_{i}" for i in range(self.n_latent)]

    def get_loadings(self) -> pd.DataFrame:
        """Weights of the linear decoder, as LinearSCVI returns them.

        Folded with the batch norm, in the network's order, sign and gauge. For what a decoder needs besides, see
        :meth:`get_decoder`; for loadings in order of information, :meth:`export_to_anndata`.

        Returns
        -------
        Genes x latents (``Z_0``, ``Z_1``, ...), in log-rate per unit of latent.
        """
        return pd.DataFrame(self.module.get_loadings(), index=self.get_var_names(), columns=self.latent_names)
