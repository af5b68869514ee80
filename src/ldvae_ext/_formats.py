"""Version numbers of all that is written to files, in one place, and the check of those who read it.

A change of names, types or axes of what is written needs the next number here and a reader for the one before, as `docs/robustness.md`
says; `tests/test_formats.py` fails without. A file without a number is of version 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DECODER = 2
"""Arrays of a decoder: in ``.npz`` files and in ``uns[...]["decoder"]``."""
EXPORT = 2
"""``uns["ldvae"]`` and the fields that it describes, also of :func:`ldvae_ext.model.order_latents`."""
CONSENSUS = 2
"""``uns["ldvae_consensus"]``."""
PROGRAMS = 2
"""``uns["ldvae_programs"]``."""
RANKING = 2
"""``uns["rank_factors_groups"]``; the number is in ``params``."""
POPULATIONS = 2
"""``uns["ldvae_population_loadings"]``."""
ABLATION = 2
"""``uns["ldvae_ablation"]`` of the AnnData that an ablation returns."""
SAVED_MODEL = 2
"""Attributes of a saved model, in ``model.pt`` and ``model.json``."""
PLAIN_MODEL = 1
"""How ``model.json`` and ``weights.safetensors`` hold values; the first release with these files numbered them."""
ENSEMBLE = 1
"""Folder of a saved ensemble, and of ``fit_ensemble(folder=...)``."""
CHECKPOINT = 1
"""What ``train(resume=...)`` adds to a checkpoint of Lightning."""
RESULTS = 1
"""Files and tables in the folder of ``ldvae-ext run`` and ``ldvae-ext project``; numbered from the first release on."""


class NewerFormatError(ValueError):
    """Something was written by a newer version of the package."""


def check_format(what: str, found: Any, newest: int) -> int:
    """Version of what is to be read, or an error if this version of the package does not know it.

    Parameters
    ----------
    what
        What is read, for the message.
    found
        The number in the file; None if there is none.
    newest
        The number of this version of the package.

    Raises
    ------
    NewerFormatError
        If the number is larger.
    ValueError
        If it is no number of a version.
    """
    if found is None:
        return 1
    try:
        # Early numpy converts an array with a single value, too.
        version = int(found) if np.ndim(found) == 0 else 0
        is_number = version >= 1 and version == found
    except (TypeError, ValueError, OverflowError):
        is_number = False
    if not is_number:
        msg = f"{what} has {found!r} as the number of its format, which is no positive integer."
        raise ValueError(msg)
    if version > newest:
        msg = (
            f"{what} has format {version}, and this version of ldvae_ext reads formats up to {newest}: a newer version wrote it. "
            "Update ldvae_ext (`pip install --upgrade ldvae-ext`)."
        )
        raise NewerFormatError(msg)
    return version
