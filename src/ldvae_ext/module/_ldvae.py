"""The network of an LDVAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module import LDVAE as ScviLDVAE
from scvi.module import VAE
from scvi.module.base import auto_move_data
from scvi.nn import Encoder

from ldvae_ext.backends.batch_norm import fold_batch_norm
from ldvae_ext.backends.inference import CellPosterior, posterior_by_layers
from ldvae_ext.module._decoder import LinearDecoderLayer
from ldvae_ext.module._generative import GenerativeModule
from ldvae_ext.module._loading import StrictLoading
from ldvae_ext.module._marginal import log_marginal
from ldvae_ext.module._modes import evaluating
from ldvae_ext.module._options import batch_norm_where, check_options, layer_norm_in_encoder
from ldvae_ext.module._query import QueryModule
from ldvae_ext.module._truncation import TruncationModule


class LDVAEModule(StrictLoading, QueryModule, TruncationModule, GenerativeModule, ScviLDVAE):
    """The network of the linearly decoded VAE: ``scvi.module.LDVAE`` with every option of ``scvi.module.VAE``.

    With the options that LinearSCVI has it is the same network: same parameters under the same names, same random draws.
    Heads that a configuration never uses (dropout without zero inflation, the library encoder with an observed library or
    size factors, the dispersion of a Poisson) keep their parameters, which need no gradient, and are never computed.

    Parameters
    ----------
    n_input, n_batch, n_labels
        Numbers of genes, batches and labels.
    n_hidden, n_latent, n_layers_encoder, dropout_rate
        Sizes and dropout rate of the encoder.
    dispersion
        ``"gene"``, ``"gene-batch"``, ``"gene-label"``, or ``"gene-cell"``: log theta linear in the latent.
    log_variational
        True if the input of the encoder is ``log(1 + counts)``, False for counts.
    gene_likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
    use_batch_norm
        True or ``"both"``; False or ``"encoder"``; ``"decoder"``; ``"none"``.
    bias
        True if the decoder has an intercept before its batch norm, if any. ``"auto"``: a gene intercept (that of the batch
        norm if there is one), which :meth:`start_intercept` sets.
    latent_distribution
        ``"normal"`` or ``"ln"``.
    use_observed_lib_size
        True to use the total of a cell as library size, False for a latent variable.
    n_continuous_cov, n_cats_per_cov
        Number of continuous covariates; number of levels of each categorical one.
    encode_covariates
        True if batch and covariates are inputs of the encoders.
    deeply_inject_covariates
        True if they are inputs of each hidden layer, False for the first only.
    batch_representation
        ``"one-hot"`` or ``"embedding"``.
    use_layer_norm
        ``"none"`` or ``"encoder"``.
    use_size_factor_key
        True if cells have size factors; the link is then softplus.
    extra_payload_autotune
        True to add the outputs for scvi-tools' autotune to the loss.
    library_log_means, library_log_vars
        Prior of the log library of each batch, shape (1, batches).
    var_activation
        Activation that makes the variances of the encoders positive; ``torch.exp`` if None.
    extra_decoder_kwargs
        Must be empty: the linear decoder takes none.
    extra_encoder_kwargs, batch_embedding_kwargs
        Passed to ``scvi.nn.Encoder`` and ``scvi.nn.Embedding``.

    Examples
    --------
    >>> from ldvae_ext.module import LDVAEModule
    >>> network = LDVAEModule(n_input=765, n_latent=5, use_observed_lib_size=True)
    >>> network.get_loadings().shape
    (765, 5)
    """

    def __init__(
        self,
        n_input: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers_encoder: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        log_variational: bool = True,
        gene_likelihood: str = "nb",
        use_batch_norm: bool | str = True,
        bias: bool | str = False,
        latent_distribution: str = "normal",
        use_observed_lib_size: bool = False,
        *,
        n_continuous_cov: int = 0,
        n_cats_per_cov: Sequence[int] | None = None,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        batch_representation: str = "one-hot",
        use_layer_norm: str = "none",
        use_size_factor_key: bool = False,
        extra_payload_autotune: bool = False,
        library_log_means: np.ndarray | None = None,
        library_log_vars: np.ndarray | None = None,
        var_activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        extra_encoder_kwargs: dict[str, Any] | None = None,
        extra_decoder_kwargs: dict[str, Any] | None = None,
        batch_embedding_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_options(locals())
        encoder_norm, decoder_norm = batch_norm_where(use_batch_norm)
        encoder_layer_norm = layer_norm_in_encoder(use_layer_norm)
        has_theta = gene_likelihood != "poisson"
        # Not LDVAE's own __init__, which would build encoder and decoder without most of the options. The same layers are
        # drawn in the same order, so that a seed gives LinearSCVI's parameters.
        VAE.__init__(
            self,
            n_input=n_input,
            n_batch=n_batch,
            n_labels=n_labels,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers_encoder,
            n_continuous_cov=n_continuous_cov,
            n_cats_per_cov=list(n_cats_per_cov or []),
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            log_variational=log_variational,
            gene_likelihood=gene_likelihood,
            latent_distribution=latent_distribution,
            encode_covariates=encode_covariates,
            deeply_inject_covariates=deeply_inject_covariates,
            batch_representation=batch_representation,
            use_size_factor_key=use_size_factor_key,
            use_observed_lib_size=use_observed_lib_size,
            extra_payload_autotune=extra_payload_autotune,
            library_log_means=library_log_means,
            library_log_vars=library_log_vars,
            batch_embedding_kwargs=batch_embedding_kwargs,
        )
        self.use_batch_norm = decoder_norm
        self.bias = bias = bias if isinstance(bias, str) else bool(bias)
        levels = list(n_cats_per_cov or [])
        n_embedded = 0
        if batch_representation == "embedding":
            n_embedded = self.get_embedding(REGISTRY_KEYS.BATCH_KEY).embedding_dim
        else:
            levels = [n_batch, *levels]
        self.n_cats_per_cov, self.n_continuous_cov = list(n_cats_per_cov or []), n_continuous_cov
        encoder_options = {
            "n_cat_list": levels if encode_covariates else None,
            "n_hidden": n_hidden,
            "dropout_rate": dropout_rate,
            "inject_covariates": deeply_inject_covariates,
            "use_batch_norm": encoder_norm,
            "use_layer_norm": encoder_layer_norm,
            "var_activation": var_activation,
            "return_dist": True,
            **(extra_encoder_kwargs or {}),
        }
        n_encoded = n_input + (n_continuous_cov + n_embedded) * encode_covariates
        self.z_encoder = Encoder(
            n_encoded, n_latent, n_layers=n_layers_encoder, distribution=latent_distribution, **encoder_options
        )
        self.l_encoder = Encoder(n_encoded, 1, n_layers=1, **encoder_options)
        self.decoder = LinearDecoderLayer(
            n_latent + n_continuous_cov + n_embedded,
            n_input,
            levels,
            use_batch_norm=decoder_norm,
            bias=bias is True or (bias == "auto" and not decoder_norm),
            softplus=use_size_factor_key,
            dropout=gene_likelihood == "zinb",
            dispersion=has_theta and dispersion == "gene-cell",
        )
        if self.use_observed_lib_size:
            self.l_encoder.requires_grad_(requires_grad=False)
        if not has_theta and dispersion != "gene-cell":
            self.px_r.requires_grad_(requires_grad=False)

    @torch.no_grad()
    def start_intercept(self, mean_g: torch.Tensor) -> None:
        """Start the gene intercept at the log of the mean expression, for ``bias="auto"``.

        Parameters
        ----------
        mean_g
            Mean expression of each gene, positive, shape (genes,): its share of counts, or counts per size factor.
        """
        layer, batch_norm = self.decoder.factor_regressor.fc_layers[0][:2]
        start_g = torch.log(mean_g)
        if self.use_size_factor_key:
            # The inverse of softplus, log(e^m - 1) = m + log(1 - e^-m), which the first form overflows on.
            start_g = mean_g + torch.log(-torch.expm1(-mean_g))
        (layer if batch_norm is None else batch_norm).bias.copy_(start_g)

    @torch.no_grad()
    def set_library_prior(self, log_means: np.ndarray, log_variances: np.ndarray) -> None:
        """Prior of the log library of each batch.

        Parameters
        ----------
        log_means, log_variances
            Shape (1, batches).
        """
        self.library_log_means.copy_(torch.from_numpy(log_means))
        self.library_log_vars.copy_(torch.from_numpy(log_variances))

    def evaluating(self, layers: type[torch.nn.Module] = torch.nn.Module) -> AbstractContextManager[None]:
        """Evaluation mode inside, and the modes of all layers as they were afterwards.

        Parameters
        ----------
        layers
            Class of the layers that change their mode.

        Examples
        --------
        >>> with model.module.evaluating():
        ...     print(model.module.training)
        False
        """
        return evaluating(self, layers)

    def posterior(self, tensors: dict[str, torch.Tensor]) -> CellPosterior:
        """Posterior of the cells of a minibatch; deterministic, and without changing torch's random state.

        Parameters
        ----------
        tensors
            A minibatch as scvi-tools' data loaders make it, minified or not; counts may be a CSR tensor.
        """
        return posterior_by_layers(self, tensors)

    @torch.inference_mode()
    @auto_move_data
    def marginal_ll(
        self,
        tensors: dict[str, torch.Tensor],
        n_mc_samples: int,
        return_mean: bool = False,
        n_mc_samples_per_pass: int = 1,
    ) -> torch.Tensor | float:
        """Marginal log-likelihood of each cell by importance sampling from its posterior, in nats.

        ``log mean_s p(x | u_s, l_s) p(u_s) p(l_s) / (q(u_s | x) q(l_s | x))``. scvi-tools' own for a normal latent. Under
        ``"ln"``, with z = softmax(u), the densities are those of u; scvi-tools evaluates them at z.

        Parameters
        ----------
        tensors
            A minibatch as scvi-tools' data loaders make it.
        n_mc_samples
            Number of samples.
        return_mean
            True to return the mean over cells.
        n_mc_samples_per_pass
            Samples that are held at once.
        """
        if self.latent_distribution != "ln":
            return super().marginal_ll(tensors, n_mc_samples, return_mean, n_mc_samples_per_pass)
        result = log_marginal(self, tensors, n_mc_samples, n_mc_samples_per_pass)
        return result.mean().item() if return_mean else result.cpu()

    def decoder_penalty(self, l1: float = 0.0, l2: float = 0.0) -> torch.Tensor:
        """Penalty ``l1 sum |w| + l2 / 2 sum w^2`` on the loadings w, folded with the batch norm of the decoder if it has one.

        Parameters
        ----------
        l1, l2
            Weights, in nats per cell.

        Returns
        -------
        A scalar with a gradient. The running variance of the batch norm counts as a constant.
        """
        weight_pg, _ = fold_batch_norm(*self.decoder.factor_regressor.fc_layers[0][:2])
        weight_kg = weight_pg[: self.n_latent]
        return l1 * weight_kg.abs().sum() + 0.5 * l2 * weight_kg.square().sum()

    @torch.inference_mode()
    def get_loadings(self) -> np.ndarray:
        """Weights of the linear decoder, folded with its batch norm if it has one; shape (genes, latents).

        Examples
        --------
        >>> model.module.get_loadings().shape
        (765, 5)
        """
        weight_pg, _ = fold_batch_norm(*self.decoder.factor_regressor.fc_layers[0][:2])
        # A copy: without batch norm this would be the network's own memory, which the next training step overwrites.
        return weight_pg[: self.n_latent].t().detach().cpu().numpy().copy()
