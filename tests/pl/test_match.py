from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ldvae_ext import pl, tl
from tests.pl.helpers import assert_legible


def tables(n_first: int, n_second: int, *, noise: float = 0.5, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Loadings of two models whose factors are the same but for order, signs and noise, some without a partner."""
    rng = np.random.default_rng(seed)
    n = max(n_first, n_second)
    common = rng.normal(size=(120, n))
    genes = [f"gene {g}" for g in range(120)]
    first = pd.DataFrame(common[:, :n_first], genes, [f"F_{k}" for k in range(n_first)])
    mixed = common[:, rng.permutation(n)[:n_second]] * rng.choice([-1, 1], n_second)
    second = pd.DataFrame(mixed + noise * rng.normal(size=mixed.shape), genes, [f"Z_{k}" for k in range(n_second)])
    return first, second


def labels(ax) -> tuple[list[str], list[str]]:
    return [label.get_text() for label in ax.get_yticklabels()], [label.get_text() for label in ax.get_xticklabels()]


@pytest.mark.parametrize(("n_first", "n_second"), [(5, 5), (6, 3), (3, 6), (1, 1)])
def test_cells_are_the_cosines_and_pairs_lie_on_the_diagonal_in_frames(n_first, n_second):
    match = tl.match_factors(*tables(n_first, n_second))
    ax = pl.match(match, show=False)
    rows, columns = labels(ax)
    np.testing.assert_array_equal(ax.images[0].get_array(), match.cosine.loc[rows, columns])
    n_pairs = min(n_first, n_second)
    assert list(zip(rows, columns))[:n_pairs] == list(zip(match.pairs["first"], match.pairs["second"]))
    assert (sorted(rows), sorted(columns)) == (sorted(match.cosine.index), sorted(match.cosine.columns))
    frames = [(frame.get_xy(), frame.get_width(), frame.get_height(), frame.get_fill()) for frame in ax.patches]
    assert frames == [((i - 0.5, i - 0.5), 1, 1, False) for i in range(n_pairs)]


def test_factors_without_a_partner_come_last_in_their_order():
    first, second = tables(6, 3)
    match = tl.match_factors(first, second)
    rows, _ = labels(pl.match(match, show=False))
    assert rows[3:] == [name for name in first.columns if name not in set(match.pairs["first"])]
    assert rows != first.columns.tolist()


def test_numbers_are_those_of_the_cells_with_their_sign():
    match = tl.match_factors(*tables(4, 4))
    ax = pl.match(match, show=False)
    rows, columns = labels(ax)
    assert len(ax.texts) == 16
    for text in ax.texts:
        x, y = text.get_position()
        assert float(text.get_text().replace("\N{MINUS SIGN}", "-")) == round(match.cosine.loc[rows[y], columns[x]], 2)


def test_colours_are_of_the_same_scale_whatever_occurs():
    first, second = tables(3, 3, noise=3)
    ax = pl.match(tl.match_factors(first, second), show=False)
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (-1, 1)
    assert ax.figure.axes[1].get_ylim() == (-1, 1)
    red, _, blue, _ = ax.images[0].to_rgba(np.array([[1.0]]))[0, 0]
    assert red > blue


def test_the_title_says_how_alike_pairs_are_and_what_is_left_after_a_rotation():
    first, second = tables(5, 5)
    match = tl.match_factors(first, second)
    ax = pl.match(match, show=False)
    cosine = [abs(np.corrcoef(first[a], second[b])[0, 1]) for a, b in zip(match.pairs["first"], match.pairs["second"])]
    a, b = (table.to_numpy() - table.to_numpy().mean(axis=0) for table in (first, second))
    scaled = [value / np.linalg.norm(value) for value in (a, b)]
    distance = 1 - np.linalg.svd(scaled[0].T @ scaled[1], compute_uv=False).sum() ** 2
    assert ax.get_title() == f"Median |cosine| of pairs: {np.median(cosine):.2f}\nProcrustes distance: {distance:.2f}"
    assert ax.figure.axes[1].get_ylabel() == "Cosine of loadings\n(120 shared genes)"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("Factor of the first", "Factor of the second")


def test_scores_have_correlations_and_no_distance():
    ax = pl.match(tl.match_factors(*tables(3, 3), by="scores"), show=False)
    assert ax.get_title().startswith("Median |correlation| of pairs: ")
    assert "\n" not in ax.get_title()
    assert ax.figure.axes[1].get_ylabel() == "Correlation of scores\n(120 shared cells)"


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_factors", [1, 2, 5, 10, 30])
def test_all_labels_are_legible(n_factors):
    assert_legible(pl.match(tl.match_factors(*tables(n_factors, n_factors)), return_fig=True))


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_factors", [2, 10, 30])
def test_long_names_are_legible(n_factors):
    first, second = tables(n_factors, n_factors)
    first.columns = [f"interferon response of the first donor, part {k}" for k in range(n_factors)]
    second.columns = [f"cell cycle of another donor, part {k}" for k in range(n_factors)]
    assert_legible(pl.match(tl.match_factors(first, second), return_fig=True))


def test_only_a_match_can_be_drawn(exported):
    with pytest.raises(TypeError, match=r"`match` must be a `FactorMatch`, from `tl.match_factors`; got AnnData"):
        pl.match(exported())
    assert not plt.get_fignums()


def test_labels_name_what_was_compared():
    first, second = tables(4, 3)
    for by, label in (
        ("gene_scores", "Cosine of gene scores\n(120 shared genes)"),
        ("loadings", "Cosine of loadings\n(120 shared genes)"),
    ):
        ax = pl.match(tl.match_factors(first, second, by=by), show=False)
        assert ax.images[0].colorbar.ax.get_ylabel() == label
        plt.close(ax.figure)
