"""Arguments of LinearSCVI, and their meaning there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scvi.model import LinearSCVI

from ldvae_ext._scvi import MODEL_NAME_KEY

# Options of the network that LinearSCVI accepts and ignores, since it builds its encoders and decoder anew.
_IGNORED = (
    "batch_embedding_kwargs",
    "batch_representation",
    "deeply_inject_covariates",
    "encode_covariates",
    "extra_decoder_kwargs",
    "extra_encoder_kwargs",
    "n_cats_per_cov",
    "n_continuous_cov",
    "n_labels",
    "use_layer_norm",
    "var_activation",
)


def is_of_linear_scvi(registry: Mapping[str, Any] | None) -> bool:
    """True if a registry was written by LinearSCVI."""
    return registry is not None and registry.get(MODEL_NAME_KEY) == LinearSCVI.__name__


def saved_arguments(init_params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model from ``init_params_``, in which scvi-tools keeps those of ``**kwargs`` apart."""
    arguments = dict(init_params["non_kwargs"])
    for group in init_params["kwargs"].values():
        arguments.update(group)
    return arguments


def as_linear_scvi_meant(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of LinearSCVI without those that it ignores; ``use_batch_norm`` and ``bias`` as booleans, as it reads them."""
    kept = {name: value for name, value in arguments.items() if name not in _IGNORED}
    return {name: bool(value) if name in ("use_batch_norm", "bias") else value for name, value in kept.items()}


def as_linear_scvi_knows(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same network in arguments that LinearSCVI can read, if there are any.

    The start of the intercept has been applied when the network exists, so that its argument is not needed.
    """
    known = dict(arguments)
    if known.get("use_batch_norm") in ("both", "encoder"):
        known["use_batch_norm"] = known["use_batch_norm"] == "both"
    if known.get("bias") == "auto":
        known["bias"] = known.get("use_batch_norm", True) in (False, "none")
    return known
