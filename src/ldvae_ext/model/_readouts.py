"""Ways to read a model: additive gene programs, and shrunken loadings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anndata import AnnData

from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._shrinkage import ShrunkenLoadings, shrunken_loadings
from ldvae_ext.model.programs import Programs, additive_programs


class ReadoutsMixin(LDVAEBase):
    """Programs and shrunken loadings."""

    def get_programs(
        self,
        n_programs: int | Sequence[int] | None = None,
        groupby: str | None = None,
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        max_cells: int = 5000,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> Programs:
        """Additive, non-negative gene programs of the decoded expression.

        The expression that the model decodes at the posterior mean, as shares of genes in an average batch, is factorised as
        ``expression_n = sum_k usage_nk profile_k``; profiles and usages are not negative and sum to one. The unit of a gene is the standard
        deviation of its normalised counts, and scaled expression is capped at its 99.9 % quantile. Usages are
        non-negative least squares. Genes are scored by the slope of their standardised log-normalised counts on the standardised usage.
        Programs suit populations and processes that add to them; effects that multiply expression are factors,
        see :meth:`rotate`.

        Parameters
        ----------
        n_programs
            Number of programs, or several to choose from; eight from 2 to ``n_latent + 2`` if None. The smallest number is chosen that
            has a mean stability of at least 0.8 and reproduces 90 % of the variance; if there is none, the largest that is
            stable; else the most stable. ``curve`` has all of them.
        groupby
            Column of ``obs``: programs are related to factors in each of its groups; in all cells together if None.
        adata, indices
            Cells with counts, as in :meth:`get_explained_deviance`; the model's own if None.
        max_cells
            Cells that programs are fitted to, drawn at random from more. Usages and scores are computed from all cells.
        seed
            Of that draw; ``scvi.settings.seed`` if None, or 0.
        batch_size
            Cells that are encoded at once.

        Returns
        -------
        A :class:`ldvae_ext.model.Programs` with ``profiles``, ``usages``, ``scores``, ``stats``, ``relations`` to factors, and
        ``curve``. Stability compares two halves of the cells that this model decodes: low values are a warning, high values only
        say that the factorisation is clear. :meth:`Ensemble.programs <ldvae_ext.model.Ensemble.programs>`
        averages several runs, which replicates better.

        Raises
        ------
        KeyError, ValueError
            If there is no such column, a number is out of range, there are fewer than two cells for each program, or the model has no
            counts.

        Warns
        -----
        UserWarning
            If the programs reproduce less than 85 % of the variance of scaled decoded expression.

        Examples
        --------
        >>> programs = model.get_programs(n_programs=5)
        >>> programs.names
        ['P_0', 'P_1', 'P_2', 'P_3', 'P_4']
        """
        return additive_programs(
            [self], n_programs, groupby, adata, indices, max_cells=max_cells, seed=seed, batch_size=batch_size
        )

    def get_shrunken_loadings(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        level: float = 0.95,
        max_cells: int = 5000,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> ShrunkenLoadings:
        """Loadings shrunk towards 0 by adaptive shrinkage, with intervals.

        The largest loadings of a factor often belong to genes with few counts, whose loadings are known badly. Here the
        loadings of each factor have a prior, a mixture of normal distributions around 0 that is estimated from all genes, and a
        standard error from the Fisher information of the counts (:class:`ldvae_ext.core.shrinkage.LoadingInformation`). Posterior
        means, intervals and local false sign rates follow (Stephens 2017, 10.1093/biostatistics/kxw041). The model stays as it is.

        Standard errors hold the latents fixed at the posterior means, and take the loadings for maximum-likelihood
        estimates, which those of a training with ``decoder_penalty`` are not. They leave out the uncertainty of the axes, which :func:`ldvae_ext.model.fit_ensemble` measures.

        Parameters
        ----------
        adata, indices, batch_size
            Cells that the loadings were estimated from, as in :meth:`get_latent_representation`. Their counts are not used.
        level
            Posterior probability of the intervals.
        max_cells
            Of more cells a random sample of this size gives the standard errors, scaled to all of them.
        seed
            Seed of the sample; ``scvi.settings.seed`` if None, or 0.

        Returns
        -------
        A :class:`ShrunkenLoadings`, with factors as numbered (``F_0``, ... under a rotation).

        Raises
        ------
        ValueError
            If there are no cells, ``level`` is not between 0 and 1, or the latent is logistic-normal: its loadings have no
            standard errors, since the latents of a cell sum to 1.

        Examples
        --------
        >>> shrunken = model.get_shrunken_loadings()
        >>> shrunken.mean.shape, shrunken.level
        ((765, 5), 0.95)
        """
        return shrunken_loadings(self, adata, indices, level, max_cells, seed, batch_size)
