"""The only file that spells an AnnData key."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_KEY = "ldvae"
ORDERED_KEY = "ordered_latent"


@dataclass(frozen=True)
class ExportKeys:
    """Keys of one export in an AnnData."""

    latent: str
    """``obsm``: posterior means, cells x factors."""
    variance: str
    """``obsm``: posterior variances, cells x factors."""
    loadings: str
    """``varm``: canonical loadings, genes x factors."""
    loadings_error: str
    """``varm``: standard errors of the loadings, genes x factors."""
    scores: str
    """``varm``: gene scores by regression, genes x factors."""
    errors: str
    """``varm``: their standard errors."""
    genes: str
    """``var``: True for the genes of the model."""
    library: str
    """``obs``: library size of each cell, or its size factor."""
    fit: str
    """``obs``: deviance of each cell relative to its expectation, in a projection."""
    converged: str
    """``obs``: True for cells whose posterior mode was found, in a projection."""
    logits: str
    """``obsm``: posterior means of u under ``"ln"``, cells x factors."""
    network_variance: str
    """``obsm``: posterior variances of the network's latents if the factors are rotated, cells x latents."""
    info: str
    """``uns``: names, order, signs, statistics, decoder, versions."""


def check_key_added(key_added: object) -> None:
    """Raise if the key is not valid in an AnnData."""
    if not isinstance(key_added, str) or not key_added or "/" in key_added or "\0" in key_added:
        msg = f"`key_added` must be a non-empty string without '/' and NUL, which AnnData and its files refuse in keys; got {key_added!r}."
        raise ValueError(msg)


def export_keys(key_added: str | None = None) -> ExportKeys:
    """Keys of one export; ``key_added`` renames all of them together."""
    key = DEFAULT_KEY if key_added is None else key_added
    check_key_added(key)
    return ExportKeys(
        latent=f"X_{key}",
        variance=f"X_{key}_var",
        loadings=f"{key}_loadings",
        loadings_error=f"{key}_loadings_error",
        scores=f"{key}_scores",
        errors=f"{key}_scores_error",
        genes=key,
        library=f"{key}_library",
        fit=f"{key}_fit",
        converged=f"{key}_converged",
        logits=f"X_{key}_u",
        network_variance=f"X_{key}_network_var",
        info=key,
    )


PCA_LATENT, PCA_LOADINGS, PCA_INFO = "X_pca", "PCs", "pca"
MINIFIED_INFO = "_scvi_adata_minify_type"
"""``uns``: scvi-tools' mark of minified data."""
MINIFIED_WITHOUT_COUNTS = "latent_posterior_parameters"
ABLATION_INFO = "ldvae_ablation"
GROUPS_INFO = "rank_factors_groups"
POPULATION_LOADINGS = "ldvae_population_loadings"
"""``varm``: genes x factors x populations; ``uns``: names of factors and populations."""
CONSENSUS_KEY = "ldvae_consensus"


@dataclass(frozen=True)
class ConsensusKeys:
    """Keys of the consensus of an ensemble in an AnnData."""

    loadings: str
    """``varm``: consensus loadings, genes x factors."""
    spread: str
    """``varm``: standard deviation of the loadings over runs."""
    info: str
    """``uns``: names, reproducibility, flags, agreement of runs."""


def consensus_keys(key_added: str = CONSENSUS_KEY) -> ConsensusKeys:
    """Keys of one consensus."""
    check_key_added(key_added)
    return ConsensusKeys(loadings=key_added, spread=f"{key_added}_spread", info=key_added)


PROGRAMS_KEY = "ldvae_programs"


@dataclass(frozen=True)
class ProgramKeys:
    """Keys of additive programs in an AnnData."""

    usages: str
    """``obsm``: usages, cells x programs."""
    profiles: str
    """``varm``: profiles, genes x programs."""
    scores: str
    """``varm``: gene scores, genes x programs."""
    errors: str
    """``varm``: standard errors of the scores."""
    residual: str
    """``obs``: residual of each cell."""
    info: str
    """``uns``: names, stability, relations to factors, curve."""


def program_keys(key_added: str = PROGRAMS_KEY) -> ProgramKeys:
    """Keys of one set of programs."""
    check_key_added(key_added)
    return ProgramKeys(
        usages=f"X_{key_added}",
        profiles=key_added,
        scores=f"{key_added}_scores",
        errors=f"{key_added}_scores_error",
        residual=f"{key_added}_residual",
        info=key_added,
    )


SIMULATED_LATENT = "z_true"
SIMULATED_USAGE, SIMULATED_PROGRAM = "usage_true", "program_true"
ABUNDANCE = "da_log_probs"
