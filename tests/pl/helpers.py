"""What figures are asked about: the texts that are drawn, whether they touch, whether they fit."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that a reader sees: titles, axis and tick labels within the view, annotations and legends."""
    figure.draw_without_rendering()
    texts = list(figure.texts)
    children = [child for ax in figure.axes for child in ax.child_axes]
    for ax in [*figure.axes, *children]:
        texts += [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis in filter(Artist.get_visible, (ax.xaxis, ax.yaxis)):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in axis.get_major_ticks():
                if low - slack <= tick.get_loc() <= high + slack:
                    texts += [label for label in (tick.label1, tick.label2) if label.get_visible()]
    for legend in [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]:
        texts += [legend.get_title(), *legend.get_texts()]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def assert_legible(figure: Figure) -> None:
    """No text touches another, and none leaves the figure."""
    texts = drawn_texts(figure)
    boxes = np.array([text.get_window_extent().extents for text in texts])
    (left, bottom), (right, top) = boxes[:, :2].T, boxes[:, 2:].T
    width, height = figure.bbox.size
    cut = np.flatnonzero((left < 0) | (bottom < 0) | (right > width) | (top > height))
    assert not cut.size, f"cut off: {[texts[i].get_text() for i in cut]}"
    apart = (left[:, None] >= right) | (bottom[:, None] >= top)
    touching = np.argwhere(np.triu(~(apart | apart.T), 1))
    assert not touching.size, f"overlapping: {[(texts[i].get_text(), texts[j].get_text()) for i, j in touching]}"


def panel_inches(figure: Figure) -> np.ndarray:
    """Width and height of the first panel."""
    figure.draw_without_rendering()
    return figure.axes[0].get_window_extent().size / figure.dpi
