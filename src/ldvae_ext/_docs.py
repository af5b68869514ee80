"""Shared parts of docstrings: the arguments that all ablations have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_PLACEHOLDER = re.compile(r"^( *)%\((\w+)\)s$", flags=re.MULTILINE)

# Entries of the section "Parameters". A docstring may go on with sentences of its own, indented by four spaces.
FRAGMENTS = {
    "adata_of_model": """\
adata
    AnnData with the cells; the model's own if None. Unseen cells are encoded. The AnnData is not written to.""",
    "adata_of_export": """\
adata
    AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to, with the raw counts of the model's genes. It may
    be backed by a file and is not written to.""",
    "batch_size": """\
batch_size
    Cells per minibatch; ``scvi.settings.batch_size`` if None. The result does not depend on it.""",
    "chunk_size": """\
chunk_size
    Cells held in memory at a time. The result does not depend on it.""",
    "dataloader": """\
dataloader
    Minibatches of cells, instead of ``adata``. It has no ``obs``: cells are named by position, and there are no groups.""",
    "groupby": """\
groupby
    Column of ``obs`` with the groups; cells without a value are left out. All cells are one group if None.
    ``mode="group_mean"`` uses these groups, too.""",
    "groupby_of_mode": """\
groupby
    Column of ``obs`` with the groups of ``mode="group_mean"``.""",
    "indices": """\
indices
    Cells of ``adata`` to ablate, as positions or a mask; all if None.""",
    "key": """\
key
    ``key_added`` of the export.""",
    "latents": """\
latents
    Latents to take out, one at a time: names (``"Z_3"``; ``"F_3"`` under a rotation) or positions; all if None. A mapping
    from a name to several latents takes out each of these sets as a whole. With ``scheme="keep_top"``, the order in which
    latents are kept.""",
    "layer": """\
layer
    Layer with the counts; if None, the layer that the model was set up with, or ``X``.""",
    "mode": """\
mode
    Replacement of a latent (of u under ``latent_distribution="ln"``, where z = softmax(u)):

    * ``"zero"``: 0, the prior mean;
    * ``"mean"``: mean over all cells of ``adata``, also those outside ``indices``. Removes the variation between cells;
    * ``"group_mean"``: mean over all cells of ``adata`` in the cell's group of ``groupby``. Removes the variation inside
      the group; NaN for a cell without a group;
    * ``"permute"``: value of another cell of ``adata``, drawn without replacement, one donor for all latents of a cell.
      Keeps the marginal distribution and breaks the link to the cell;
    * ``"prior"``: a standard normal draw, independent for each latent, also under oblique axes;
    * ``"value"``: the argument ``value``;
    * ``"drop"``: z = 0, and the other latents renormalised to sum to 1; only under ``"ln"``.""",
    "n_samples": """\
n_samples
    Draws for ``use_posterior="samples"``; 10 if None.""",
    "refit_heads": """\
refit_heads
    True if dropout logits (``"zinb"``) and dispersion (``"gene-cell"``) follow the replaced latents. By default they are
    those of the unablated cell.""",
    "scheme": """\
scheme
    ``"leave_out"``: the named latents are replaced. ``"leave_in"``: all other latents are replaced. ``"keep_top"``: all
    but the first j latents are replaced, for j from 0 (from 1 for ``mode="drop"``) to the number of latents.""",
    "seed": """\
seed
    Seed of random draws (``"permute"``, ``"prior"`` and posterior samples). A draw depends only on the seed and the
    position of the cell in ``adata``.""",
    "silent": """\
silent
    True to hide the progress bar, False to show it at once; if None, it is shown after five seconds.""",
    "store": """\
store
    Folder in which the result is written as zarr while it is computed, for any number of cells. It must not exist. ``X`` of the
    returned AnnData is then an array of dask that reads the folder; :func:`anndata.read_zarr` opens it again.""",
    "transform_batch": """\
transform_batch
    Name of the batch, or names of several, in which cells are decoded on both sides; each cell's own batch if None. Effects
    are averaged over several batches.""",
    "use_posterior": """\
use_posterior
    ``"mean"``: latents are the posterior means. ``"samples"``: mean effect over draws from the posterior of each cell,
    with the same draws on both sides (common random numbers); latents of donors are drawn from the donors' posteriors. The
    library size is not drawn.""",
    "value": """\
value
    For ``mode="value"``: one number, one for each latent, or a mapping from names to numbers.""",
}


def fill_docstring[F: Callable[..., Any]](function: F) -> F:
    """Replace each line ``%(...)s`` in the docstring of a function by the fragment of that name, at its indentation.

    A function without a docstring, as under ``python -OO``, is returned as it is.

    Raises
    ------
    KeyError
        If there is no such fragment.
    """
    if function.__doc__ is not None:
        function.__doc__ = _PLACEHOLDER.sub(_indented, function.__doc__)
    return function


def _indented(found: re.Match[str]) -> str:
    indent, name = found.groups()
    return "\n".join(indent + line if line else "" for line in FRAGMENTS[name].split("\n"))
