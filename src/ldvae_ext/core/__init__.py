"""The mathematics of a linear decoder: numpy and scipy only, no AnnData, no torch, no pandas."""

from __future__ import annotations

from ldvae_ext.core._design import Covariate
from ldvae_ext.core._expression import population_expression
from ldvae_ext.core.ablation import ablation_effects
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.fold import BatchNorm, RawLinear
from ldvae_ext.core.ledger import InformationLedger, information_ledger
from ldvae_ext.core.likelihood import log_likelihood
from ldvae_ext.core.matching import consensus_loadings, match_columns, procrustes
from ldvae_ext.core.populations import path_attribution, within_directions
from ldvae_ext.core.posterior import kl_per_dimension
from ldvae_ext.core.programs import AdditivePrograms, fit_programs, program_direction
from ldvae_ext.core.projection import CellPosteriors, posterior_of
from ldvae_ext.core.rotation import Rotation, promax, varimax
from ldvae_ext.core.scores import GeneScores, SlopeSums
from ldvae_ext.core.shrinkage import LoadingInformation, Shrunken, shrink

__all__ = [
    "AdditivePrograms",
    "BatchNorm",
    "CellPosteriors",
    "Covariate",
    "GeneScores",
    "InformationLedger",
    "LinearDecoder",
    "LoadingInformation",
    "RawLinear",
    "Rotation",
    "Shrunken",
    "SlopeSums",
    "ablation_effects",
    "consensus_loadings",
    "fit_programs",
    "information_ledger",
    "kl_per_dimension",
    "log_likelihood",
    "match_columns",
    "path_attribution",
    "population_expression",
    "posterior_of",
    "procrustes",
    "program_direction",
    "promax",
    "shrink",
    "varimax",
    "within_directions",
]
