"""Construction and registration, as LinearSCVI does them."""

from __future__ import annotations

import inspect
import warnings
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import NumericalJointObsField, NumericalObsField
from scvi.model import LinearSCVI
from scvi.model.base import (
    ArchesMixin,
    BaseMinifiedModeModelClass,
    EmbeddingMixin,
    RNASeqMixin,
    UnsupervisedTrainingMixin,
    VAEMixin,
)

from ldvae_ext._scvi import (
    ADATA_MINIFY_TYPE,
    SETUP_ARGS_KEY,
    DataChecks,
    DenoisedSamples,
    adata_minify_type,
)
from ldvae_ext._validate import check_names_last, check_number, check_positive_int, listed, warn
from ldvae_ext.backends.loader import loader_of_getters
from ldvae_ext.core.rotation import CONSENSUS, Rotation
from ldvae_ext.model._counts import (
    check_categories,
    check_counts,
    check_given_anndata,
    check_is_anndata,
    check_numbers,
    check_scale,
    checked_keys,
    counts_of,
    library_prior,
    mean_expression,
)
from ldvae_ext.model._datamodule import start_of
from ldvae_ext.model._fields import CountsField, CovariatesField, LevelsField, check_levels_fit
from ldvae_ext.model._fingerprint import check_unchanged
from ldvae_ext.model._linear_scvi import as_linear_scvi_knows, as_linear_scvi_meant, is_of_linear_scvi
from ldvae_ext.model._registry import (
    EMPTY_REGISTRY,
    SETUP_ARGUMENTS,
    covariates_of,
    has_size_factors,
    registry_of,
    state_of,
)
from ldvae_ext.module import LDVAEModule
from ldvae_ext.module._options import batch_norm_where


class LDVAEBase(
    DataChecks,
    DenoisedSamples,
    EmbeddingMixin,
    RNASeqMixin,
    VAEMixin,
    ArchesMixin,
    UnsupervisedTrainingMixin,
    BaseMinifiedModeModelClass,
):
    """Base of LDVAE and of its mixins: scvi-tools' base classes as in LinearSCVI, construction and set-up."""

    module: LDVAEModule
    _module_cls = LDVAEModule
    _data_loader_cls = staticmethod(loader_of_getters)
    # The keys of LinearSCVI, so that minified data of either class opens in the other.
    _LATENT_QZM_KEY = LinearSCVI._LATENT_QZM_KEY
    _LATENT_QZV_KEY = LinearSCVI._LATENT_QZV_KEY
    # These end in an underscore to be saved with the model, as scvi-tools saves such attributes.
    rotation_: dict[str, Any] | None = None
    is_ordered_: bool = False
    kl_weight_: float | None = None
    query_: dict[str, Any] | None = None

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene",
        gene_likelihood: Literal["zinb", "nb", "poisson", "normal"] = "nb",
        use_observed_lib_size: bool = False,
        latent_distribution: Literal["normal", "ln"] = "normal",
        **model_kwargs: Any,
    ) -> None:
        for name, value in (("n_hidden", n_hidden), ("n_latent", n_latent), ("n_layers", n_layers)):
            check_positive_int(name, value)
        check_number("dropout_rate", dropout_rate, least=0, most=1)
        datamodule = model_kwargs.pop("datamodule", None)
        if adata is None and registry is None:
            if datamodule is None:
                self._await_datamodule(locals())
                return
            registry = registry_of(datamodule)
        if is_of_linear_scvi(registry):
            model_kwargs = as_linear_scvi_meant(model_kwargs)
        check_is_anndata(adata)
        super().__init__(adata, registry)
        if adata is not None:
            check_unchanged(self.adata_manager)
        covariates = covariates_of(self.registry)
        of_data: dict[str, Any] = {
            "n_input": self.summary_stats.n_vars,
            "n_batch": self.summary_stats.n_batch,
            "n_labels": self.summary_stats.n_labels,
            "n_continuous_cov": sum(c.levels is None for c in covariates),
            "n_cats_per_cov": [len(c.levels) for c in covariates if c.levels is not None],
            "use_size_factor_key": has_size_factors(self.registry),
        }
        of_data["library_log_means"], of_data["library_log_vars"] = self._library_prior(
            of_data["n_batch"], use_observed_lib_size or of_data["use_size_factor_key"]
        )
        module_kwargs = _own_kwargs(self._module_cls, model_kwargs, of_data)
        if registry is None:
            _warn_about_intercept(**module_kwargs)
        self.module = self._module_cls(
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers_encoder=n_layers,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            gene_likelihood=gene_likelihood,
            latent_distribution=latent_distribution,
            use_observed_lib_size=use_observed_lib_size,
            **of_data,
            **module_kwargs,
        )
        self.module.minified_data_type = self.minified_data_type
        # With a registry this is a saved model, whose parameters come next.
        if self.module.bias == "auto" and adata is not None and registry is None and self.minified_data_type is None:
            self.module.start_intercept(torch.from_numpy(self._mean_expression()))
        self._has_start = adata is not None
        if datamodule is not None:
            self._start_from(datamodule)
        self._model_summary_string = (
            f"LDVAE model with the following params: \nn_hidden: {n_hidden}, n_latent: {n_latent}, n_layers: {n_layers}, "
            f"dropout_rate: {dropout_rate}, dispersion: {dispersion}, gene_likelihood: {gene_likelihood}, "
            f"latent_distribution: {latent_distribution}"
        )
        self.n_latent = n_latent
        model_kwargs = as_linear_scvi_knows(model_kwargs)
        self.init_params_ = self._get_init_params(locals())

    def _await_datamodule(self, arguments: dict[str, Any]) -> None:
        """As SCVI without data: the network is built by ``train(datamodule=...)``."""
        super().__init__(None, deepcopy(EMPTY_REGISTRY))
        self._module_init_on_train, self.module = True, None  # type: ignore[assignment]
        self.init_params_ = self._get_init_params(arguments)
        self._model_summary_string = "LDVAE model without data; its network is built by `train(datamodule=...)`."
        warn("Without `adata` the network is built when `train(datamodule=...)` brings cells.")

    def _start_from(self, datamodule: Any) -> None:
        """Network, prior of the log library, and start of the intercept, from the cells of a data module."""
        if self.module is None:
            saved = self.init_params_
            arguments: dict[str, Any] = {**saved["non_kwargs"], **saved["kwargs"]["model_kwargs"]}
            type(self).__init__(self, datamodule=datamodule, **arguments)
            return
        wants_intercept = self.module.bias == "auto"
        if not self._has_start and (wants_intercept or not self.module.use_observed_lib_size):
            start = start_of(datamodule, self.summary_stats.n_batch, has_size_factors=self.module.use_size_factor_key)
            if not self.module.use_observed_lib_size:
                self.module.set_library_prior(start.log_means, start.log_variances)
            if wants_intercept:
                self.module.start_intercept(torch.from_numpy(start.mean_expression))
        self._has_start = True

    def _library_prior(self, n_batch: int, observed: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Prior of the log library; a placeholder where there are no counts to compute it from."""
        if observed:
            return None, None
        manager = self.adata_manager
        if manager is None or self.minified_data_type == ADATA_MINIFY_TYPE.LATENT_POSTERIOR:
            return library_prior(None, None, n_batch)
        batch_n = manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()
        return library_prior(manager.get_from_registry(REGISTRY_KEYS.X_KEY), batch_n, n_batch)

    def _mean_expression(self) -> np.ndarray:
        """Share of each gene in all counts, or mean counts per size factor; at least that of half a count, shape (genes,)."""
        counts = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        size_n = None
        if self.module.use_size_factor_key:
            size_n = self.adata_manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY).ravel()
        return mean_expression(counts, size_n)

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        batch_key: str | None = None,
        labels_key: str | None = None,
        layer: str | None = None,
        *,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
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
        size_factor_key
            Column of ``adata.obs`` with a positive size factor of each cell. The mean of a count is then the size factor
            times softplus of the linear predictor, as in ``scvi.model.SCVI``, and no library size is inferred.
        categorical_covariate_keys
            Categorical columns of ``adata.obs`` other than the batch; each level shifts the logits of all genes.
        continuous_covariate_keys
            Numeric columns of ``adata.obs``; each has one coefficient for each gene in the logits. A warning follows where
            mean or standard deviation are above 10: standardise such columns.
        **kwargs
            For scvi-tools itself: ``source_registry``, ``extend_categories``, ``allow_missing_labels``.

        Raises
        ------
        KeyError
            If a layer or a column does not exist.
        ValueError
            If counts are negative, NaN, infinite or all zero, a column has NaN, or a size factor is not positive. Nothing
            is written then.

        Examples
        --------
        >>> ldvae_ext.model.LDVAE.setup_anndata(adata, batch_key="phase")
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        unknown = sorted(set(kwargs) - {"source_registry", "extend_categories", "allow_missing_labels"})
        if unknown:
            msg = f"`setup_anndata` has no argument {listed(unknown)}; it takes {listed(inspect.signature(cls.setup_anndata).parameters, 20)}."
            raise TypeError(msg)
        for name in SETUP_ARGUMENTS:
            if not setup_method_args[SETUP_ARGS_KEY].get(name):
                setup_method_args[SETUP_ARGS_KEY].pop(name, None)
        check_given_anndata(adata)
        check_names_last("adata.var_names", adata.var_names)
        minify_type = adata_minify_type(adata)
        counts_of(adata, layer)
        if minify_type is None:
            is_opened = "source_registry" in kwargs and not kwargs.get("extend_categories", False)
            check_counts(adata, layer, may_be_empty=is_opened)
        if not adata.var_names.is_unique:
            again = adata.var_names[adata.var_names.duplicated()][0]
            warn(
                f"`adata.var_names` are not unique; {again!r} occurs more than once. The model trains, but cannot be read by the "
                "names of genes: `adata.var_names_make_unique()` before the set-up."
            )
        for name, key in (("batch_key", batch_key), ("labels_key", labels_key)):
            check_categories(adata, name, key)
        categorical = checked_keys("categorical_covariate_keys", categorical_covariate_keys)
        continuous = checked_keys("continuous_covariate_keys", continuous_covariate_keys)
        both = [key for key in continuous if key in categorical]
        if both:
            msg = f"{listed(both)}: a covariate is either categorical or continuous, but both arguments name it."
            raise ValueError(msg)
        for key in categorical:
            check_categories(adata, "categorical_covariate_keys", key)
        for key in continuous:
            check_numbers(adata, "continuous_covariate_keys", key)
            if "source_registry" not in kwargs:
                check_scale(adata, key)
        if size_factor_key is not None:
            check_numbers(adata, "size_factor_key", size_factor_key, positive=True)
        check_levels_fit(adata, kwargs.get("source_registry"), extend=kwargs.get("extend_categories", False))
        fields: list[Any] = [
            CountsField(REGISTRY_KEYS.X_KEY, layer),
            LevelsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            LevelsField(REGISTRY_KEYS.LABELS_KEY, labels_key),
            # Also without columns, as in SCVI: other models of scvi-tools read the empty fields.
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False),
            CovariatesField(REGISTRY_KEYS.CAT_COVS_KEY, categorical),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous),
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
        check_unchanged(manager)

    def get_var_names(self, legacy_mudata_format: bool = False) -> np.ndarray:
        """Names of the genes at the set-up, to which loadings belong whatever ``adata.var_names`` are now.

        Parameters
        ----------
        legacy_mudata_format
            As in scvi-tools.

        Returns
        -------
        Shape (genes,).

        Examples
        --------
        >>> names = model.get_var_names()  # of 765 genes
        """
        names = state_of(self.registry, REGISTRY_KEYS.X_KEY).get("column_names")
        return super().get_var_names(legacy_mudata_format) if names is None else np.asarray(names)

    def _check_type(self, adata: Any) -> None:
        check_is_anndata(adata)

    def _check_unchanged(self, adata: AnnData) -> None:
        """Raise if the data are no longer those that were registered."""
        check_unchanged(self.get_anndata_manager(adata, required=True))

    def _check_has_counts(self, method: str) -> None:
        """Raise if the data were minified without the counts that a method needs."""
        if self.minified_data_type == ADATA_MINIFY_TYPE.LATENT_POSTERIOR:
            msg = (
                f"`{method}` needs counts, which data minified as {ADATA_MINIFY_TYPE.LATENT_POSTERIOR!r} do not have; "
                f"`minify_adata({ADATA_MINIFY_TYPE.LATENT_POSTERIOR_WITH_COUNTS!r})` keeps them."
            )
            raise ValueError(msg)

    @property
    def latent_names(self) -> list[str]:
        """The latent dimensions in the network's order, ``Z_0`` first."""
        return [f"Z_{i}" for i in range(self.n_latent)]

    @property
    def rotation(self) -> Rotation | None:
        """The rotation that is in force, see :meth:`LDVAE.rotate`; None on the network's own axes."""
        if self.rotation_ is None:
            return None
        return Rotation(matrix_kk=self.rotation_["matrix"], method=self.rotation_["method"])

    @property
    def final_kl_weight(self) -> float:
        """Weight of the KL term in the last step of training; NaN if it is not known (untrained, or from LinearSCVI)."""
        return np.nan if self.kl_weight_ is None else self.kl_weight_

    @property
    def _has_own_order(self) -> bool:
        """True if the numbering of factors is an order to keep: by explained deviance, or that of a consensus."""
        return self.is_ordered_ if self.rotation is None else self.rotation.method in ("deviance", CONSENSUS)

    @property
    def factor_names(self) -> list[str]:
        """Names of the factors of the rotation, ``F_0``, ``F_1``, ..., or of the latents without a rotation."""
        return self.latent_names if self.rotation is None else self.rotation.names


def _own_kwargs(module_cls: type, model_kwargs: dict[str, Any], of_data: dict[str, Any]) -> dict[str, Any]:
    """Options of the network from the user; raises on unknown options and on those that the data determine."""
    decided = [
        name for name in model_kwargs if name in of_data and not np.array_equal(model_kwargs[name], of_data[name])
    ]
    if decided:
        msg = f"{listed(decided)}: the registered data decide; see `setup_anndata`."
        raise TypeError(msg)
    allowed = sorted(set(inspect.signature(module_cls).parameters) - set(of_data) - {"n_layers_encoder"})
    unknown = sorted(set(model_kwargs) - set(allowed) - set(of_data))
    if unknown:
        msg = f"LDVAE has no argument {listed(unknown)}; its network takes {listed(allowed, 50)}."
        raise TypeError(msg)
    return {name: value for name, value in model_kwargs.items() if name not in of_data}


def _warn_about_intercept(use_batch_norm: bool | str = True, bias: bool | str = False, **_others: Any) -> None:
    _, in_decoder = batch_norm_where(use_batch_norm)
    if not in_decoder and not bias:
        warn(
            f"`use_batch_norm={use_batch_norm!r}` without `bias` leaves genes without an intercept: at z = 0 all are expressed "
            "alike. `bias='auto'` adds one that starts at the log mean expression."
        )
    if in_decoder and bias and bias != "auto":
        warn(
            "`bias=True` before a batch norm does nothing: the batch norm subtracts the mean and has an intercept of its "
            "own. Set `use_batch_norm=False` or `bias=False`."
        )
