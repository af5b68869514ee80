"""The report as one HTML file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from anndata import AnnData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ldvae_ext._files import check_place, replacing
from ldvae_ext._keys import DEFAULT_KEY, export_keys
from ldvae_ext._report._content import (
    FEW_OF_POPULATION,
    LEAST_EFFECT,
    LEAST_RATIO,
    N_TABLE_GENES,
    Content,
    Factor,
    content_of,
)
from ldvae_ext._validate import printable

_WIDTH, _HEIGHT, _MARGIN = 640, 260, 46
_CURVE_COLORS = ("#0072B2", "#D55E00")


def report(
    adata: AnnData,
    path: str | Path,
    *,
    groupby: str | None = None,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    ablation: AnnData | None = None,
    history: Any = None,
    settings: Mapping[str, Any] | None = None,
    reproduce: str | None = None,
    title: str | None = None,
    key: str = DEFAULT_KEY,
) -> Path:
    """Write a report of an export to one HTML file, which needs no network.

    It has a table of all factors, the ablation by population, a plot of the cells, a card for each factor, the training
    curves, and the settings.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` or :func:`ldvae_ext.tl.project` wrote to. Ablations need
        its raw counts. ``obsm["X_umap"]`` or ``obsm["X_tsne"]`` is shown if there is one, else the first two factors.
    path
        File to write.
    groupby
        Column of ``obs`` with populations; none are shown if None. Colours are those in ``uns["<groupby>_colors"]``.
    gene_sets
        Gene sets by name; the one that fits each factor best is shown.
    ablation
        Effect of each factor in each cell, from :func:`ldvae_ext.tl.ablate` for all cells; computed if None.
    history
        ``model.history``, for the training curves.
    settings
        Further lines of the last section, by name.
    reproduce
        Code or a command with which the result can be computed again.
    title
        Title of the page.
    key
        ``key_added`` of the export.

    Returns
    -------
    The path.

    Raises
    ------
    KeyError
        If there is no such export or column.
    ValueError
        If ``ablation`` has other cells or factors.

    Examples
    --------
    >>> ldvae_ext.report(adata, "report.html", groupby="bulk_labels").name
    'report.html'
    """
    return write_report(
        adata,
        path,
        reproduce=reproduce,
        key=key,
        groupby=groupby,
        gene_sets=gene_sets,
        ablation=ablation,
        history=history,
        settings=settings,
        title=title,
    )


def write_report(
    adata: AnnData,
    path: str | Path,
    *,
    notes: Sequence[str] = (),
    reproduce: str | None = None,
    key: str = DEFAULT_KEY,
    **options: Any,
) -> Path:
    """Write the report, see :func:`report`.

    Parameters
    ----------
    adata, path, reproduce, key
        As there.
    notes
        Warnings that come first.
    **options
        Other arguments of :func:`report`.
    """
    path = Path(path)
    check_place(path)
    content = content_of(adata, key=key, **options)
    content.notes[:0] = notes
    has_slopes = export_keys(key).scores in adata.varm
    text = _html(content, reproduce, has_slopes=has_slopes)
    with replacing(path) as work:
        work.write_text(text, encoding="utf-8")
    return path


class _Card:
    """A factor with the scales of its bars."""

    def __init__(self, factor: Factor) -> None:
        self._factor = factor
        self.scale = max([abs(value) for _, value in factor.up + factor.down], default=1.0) or 1.0
        self.lost_scale = max([value for _, value in factor.lost_genes], default=1.0) or 1.0
        ends = [value for p in factor.populations for value in (p.low, p.high)]
        self._low, high = min([*ends, 0.0]), max([*ends, 0.0])
        self._span = (high - self._low) or 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._factor, name)

    def at(self, value: float) -> float:
        """Position of a value of the factor on its track, in percent."""
        return 2 + 96 * (value - self._low) / self._span


def _html(content: Content, reproduce: str | None, *, has_slopes: bool) -> str:
    environment = Environment(
        loader=PackageLoader("ldvae_ext._report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        # Control characters are not allowed in a page.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    cards = [_Card(factor) for factor in content.factors]
    effects = [p.effect for factor in content.factors for p in factor.populations if p.effect is not None]

    def has(name: str) -> bool:
        return any(getattr(factor, name) is not None for factor in content.factors)

    environment.filters["floor2"] = _floor
    view = _View(content, cards)
    return environment.get_template("template.html.j2").render(
        c=view,
        version=version("ldvae-ext"),
        n_table=N_TABLE_GENES,
        has_ablation=bool(effects),
        largest_effect=max([*effects, 1e-12]),
        has_flags=has("flag"),
        has_deviance=has("explained_deviance"),
        has_marks=has("marks"),
        has_sets=has("gene_set"),
        ranking="the slope of their log-normalised expression on it"
        if has_slopes
        else "the information of their counts about it",
        curves_svg=_curves_svg(content.curves),
        reproduce=reproduce,
        data={
            "scatter": content.scatter,
            "in_population": content.in_population,
            # The population that a card shows first: the one that is marked, else the one that is affected most.
            "own": [_own_population(factor) for factor in content.factors],
        },
        is_sorted=all(a.kl >= b.kl for a, b in itertools.pairwise(content.factors)),
        has_affected=has("most_affected"),
        few_cells=FEW_OF_POPULATION,
        least_effect=LEAST_EFFECT,
        least_ratio=LEAST_RATIO,
        script=Markup((files("ldvae_ext._report") / "script.js").read_text(encoding="utf-8")),
    )


def _own_population(factor: Factor) -> str | None:
    if factor.marks is not None and factor.marks.is_clear:
        return factor.marks.high
    return None if factor.first_affected is None else factor.first_affected.name


def _floor(value: float) -> str:
    """Two digits, rounded down: 0.798 is below a threshold of 0.8."""
    return f"{math.floor(100 * value + 1e-9) / 100:.2f}"


class _View:
    """The content with cards in the place of its factors."""

    def __init__(self, content: Content, cards: list[_Card]) -> None:
        self._content, self.factors = content, cards

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)


def _curves_svg(curves: dict[str, list[tuple[float, float]]]) -> Markup:
    """Curves by epoch, on a scale that leaves out the steep beginning."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return Markup()
    last = max(x for x, _ in points)
    late = [y for x, y in points if x >= 0.1 * last]
    low, high = min(late), max(late)
    span = (high - low) or 1.0
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="Training curves">',
        f'<text x="{_MARGIN - 6}" y="16" text-anchor="end">{high:.0f}</text>',
        f'<text x="{_MARGIN - 6}" y="{_HEIGHT - 34}" text-anchor="end">{low:.0f}</text>',
        f'<text x="{_MARGIN}" y="{_HEIGHT - 16}">0</text>',
        f'<text x="{_WIDTH - 110}" y="{_HEIGHT - 16}" text-anchor="end">{last:.0f} epochs</text>',
    ]
    for (name, curve), color in zip(curves.items(), _CURVE_COLORS, strict=False):
        place = [
            (
                _MARGIN + (_WIDTH - _MARGIN - 110) * x / (last or 1.0),
                10 + (_HEIGHT - 48) * (1 - min(max((y - low) / span, 0.0), 1.0)),
            )
            for x, y in curve
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
        offset = 4 if color == _CURVE_COLORS[0] else -8
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{_WIDTH - 104}" y="{place[-1][1] + offset:.1f}" style="fill: {color}">{name}</text>')
    return Markup("".join([*parts, "</svg>"]))
