"""Minified data: cells as their posteriors."""

from __future__ import annotations

from ldvae_ext._scvi import ADATA_MINIFY_TYPE
from ldvae_ext.model._cells import stream_cells
from ldvae_ext.model._tasks import TasksMixin


class MinifiedMixin(TasksMixin):
    """Minification also where the library size is latent, which scvi-tools refuses."""

    def minify_adata(
        self,
        minified_data_type: str = ADATA_MINIFY_TYPE.LATENT_POSTERIOR,
        use_latent_qzm_key: str = "X_latent_qzm",
        use_latent_qzv_key: str = "X_latent_qzv",
    ) -> None:
        """Replace the model's data by a copy that holds each cell's posterior, with or without its counts.

        A latent library size is kept as exp of the posterior mean of its logarithm, in the field that scvi-tools has for
        the observed one.

        Parameters
        ----------
        minified_data_type
            ``"latent_posterior_parameters"`` drops the counts, ``"latent_posterior_parameters_with_counts"`` keeps them,
            which likelihoods and ablations need.
        use_latent_qzm_key, use_latent_qzv_key
            Keys of ``adata.obsm`` with means and variances of the posteriors, as ``get_latent_representation(return_dist=True)``
            returns them. Where neither exists, they are computed. (scvi-tools needs them to be there.)
        """
        keys = (use_latent_qzm_key, use_latent_qzv_key)
        computed = not any(key in self.adata.obsm for key in keys)
        if computed:
            posterior = self.get_latent_representation(return_dist=True)
            self.adata.obsm.update(dict(zip(keys, posterior, strict=True)))
        whole = self.adata
        try:
            self._minify(minified_data_type, *keys)
        finally:
            if computed:
                for key in keys:
                    del whole.obsm[key]

    def _minify(self, minified_data_type: str, *keys: str) -> None:
        if self.module.use_observed_lib_size:
            super().minify_adata(minified_data_type, *keys)
            return
        with stream_cells(self) as cells:
            library = [size for chunk in cells.chunks for size in chunk.library]
        # scvi-tools refuses by this flag, and fills the field with totals.
        self.module.use_observed_lib_size = True
        try:
            super().minify_adata(minified_data_type, *keys)
        finally:
            self.module.use_observed_lib_size = False
        self.adata.obs[self._OBSERVED_LIB_SIZE_KEY] = library
