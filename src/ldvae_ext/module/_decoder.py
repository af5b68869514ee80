"""Linear decoder as a layer: scvi-tools' decoder without unused computations."""

from __future__ import annotations

import torch
from scvi.nn import FCLayers, LinearDecoderSCVI


class LinearDecoderLayer(LinearDecoderSCVI):
    """``scvi.nn.LinearDecoderSCVI`` with a choice of the link, and with heads that are computed only if they are used.

    Parameters
    ----------
    n_input, n_output, n_cat_list, use_batch_norm, bias
        As in scvi-tools.
    softplus
        True for a softplus link, False for softmax.
    dropout
        True if the likelihood is zero-inflated. If not, ``px_dropout_decoder`` exists, so that parameters have LinearSCVI's
        names, but it has no gradient and is not computed.
    dispersion
        True if the log dispersion of each cell is linear in the input (``dispersion="gene-cell"``): adds ``px_r_decoder``.
    """

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_cat_list: list[int],
        *,
        use_batch_norm: bool,
        bias: bool,
        softplus: bool,
        dropout: bool,
        dispersion: bool,
    ) -> None:
        super().__init__(
            n_input, n_output, n_cat_list=n_cat_list, use_batch_norm=use_batch_norm, use_layer_norm=False, bias=bias
        )
        self.softplus, self.has_dropout, self.has_dispersion = softplus, dropout, dispersion
        if not dropout:
            self.px_dropout_decoder.requires_grad_(requires_grad=False)
        if dispersion:
            self.px_r_decoder = FCLayers(
                n_input,
                n_output,
                n_cat_list=n_cat_list,
                n_layers=1,
                use_activation=False,
                use_batch_norm=False,
                dropout_rate=0,
            )

    def forward(
        self, dispersion: str, z: torch.Tensor, library: torch.Tensor, *cat_list: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Scale, log dispersion (``"gene-cell"`` only), rate and dropout logits (zero inflation only).

        Parameters
        ----------
        dispersion
            Kind of dispersion, as scvi-tools passes it; which heads there are was decided at construction.
        z
            Latents and continuous covariates, and a batch embedding if there is one.
        library
            Log of the library size or size factor.
        *cat_list
            Codes of the categorical covariates.
        """
        scale = self.scale(z, *cat_list)
        log_theta = self.px_r_decoder(z, *cat_list) if self.has_dispersion else None
        dropout = self.px_dropout_decoder(z, *cat_list) if self.has_dropout else None
        return scale, log_theta, torch.exp(library) * scale, dropout

    def scale(self, z: torch.Tensor, *cat_list: torch.Tensor) -> torch.Tensor:
        """Expression for a library of 1, shape (cells, genes).

        Parameters
        ----------
        z, *cat_list
            As in :meth:`forward`.
        """
        logits = self.factor_regressor(z, *cat_list)
        return torch.nn.functional.softplus(logits) if self.softplus else torch.softmax(logits, dim=-1)
