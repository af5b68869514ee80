"""Checks of the network's options, and their meaning."""

from __future__ import annotations

from typing import Any

from ldvae_ext._validate import check_one_of, listed

BATCH_NORM = ("both", "encoder", "decoder", "none")
LAYER_NORM = ("none", "encoder")
CHOICES = {
    "dispersion": ("gene", "gene-batch", "gene-label", "gene-cell"),
    "gene_likelihood": ("nb", "zinb", "poisson", "normal"),
    "latent_distribution": ("normal", "ln"),
    "batch_representation": ("one-hot", "embedding"),
}

# Arguments of the encoders that the network sets.
ENCODER_OPTIONS = (
    "n_input",
    "n_output",
    "n_cat_list",
    "n_layers",
    "n_hidden",
    "dropout_rate",
    "distribution",
    "inject_covariates",
    "use_batch_norm",
    "use_layer_norm",
    "var_activation",
    "return_dist",
)


def batch_norm_where(use_batch_norm: bool | str) -> tuple[bool, bool]:
    """True, for the encoders and for the decoder, if they have batch norm.

    True and False are for the decoder only, as in LinearSCVI, whose encoders always have it; strings are scVI's.
    """
    if use_batch_norm in (True, False, None):
        return True, bool(use_batch_norm)
    check_one_of("use_batch_norm", use_batch_norm, (True, False, *BATCH_NORM))  # type: ignore[arg-type]
    return use_batch_norm in ("both", "encoder"), use_batch_norm in ("both", "decoder")


def layer_norm_in_encoder(use_layer_norm: str) -> bool:
    """True if the encoders have layer norm."""
    if use_layer_norm in ("decoder", "both"):
        msg = (
            f"`use_layer_norm={use_layer_norm!r}`: layer norm divides by a statistic of the cell, so that a decoder with it is "
            "not linear and has no loadings. Allowed are 'none' and 'encoder'."
        )
        raise ValueError(msg)
    check_one_of("use_layer_norm", use_layer_norm, LAYER_NORM)
    return use_layer_norm == "encoder"


def check_options(options: dict[str, Any]) -> None:
    """Raise on a value that no network can have, and on an option that would be accepted and ignored.

    Parameters
    ----------
    options
        Arguments of :class:`LDVAEModule` by name.
    """
    for name, allowed in CHOICES.items():
        check_one_of(name, options[name], allowed)
    if options["bias"] not in (True, False, None, "auto"):
        msg = f"`bias` must be True, False or 'auto'; got {options['bias']!r}."
        raise ValueError(msg)
    if options["extra_decoder_kwargs"]:
        msg = (
            f"`extra_decoder_kwargs` ({options['extra_decoder_kwargs']!r}) are for a decoder with hidden layers; the linear "
            "decoder has none. `bias` and `use_batch_norm` change it."
        )
        raise ValueError(msg)
    doubled = sorted(set(options["extra_encoder_kwargs"] or {}) & set(ENCODER_OPTIONS))
    if doubled:
        msg = f"`extra_encoder_kwargs` may not hold {listed(doubled)}, for which there are arguments."
        raise ValueError(msg)
    if options["batch_embedding_kwargs"] and options["batch_representation"] != "embedding":
        msg = "`batch_embedding_kwargs` are only of use with `batch_representation='embedding'`."
        raise ValueError(msg)
    if options["dispersion"] == "gene-label" and options["n_labels"] < 1:
        msg = "`dispersion='gene-label'` needs `n_labels`."
        raise ValueError(msg)
