from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ldvae_ext import get, pl, tl
from ldvae_ext.core import LinearDecoder
from ldvae_ext.pl._attribution import Folds
from ldvae_ext.pl._figure import BLUE, ORANGE
from tests.pl.conftest import POPULATIONS
from tests.pl.helpers import assert_legible, drawn_texts

NAIVE = POPULATIONS[0]
MINUS = "\N{MINUS SIGN}"


@pytest.fixture
def paths(readable):
    """Makes an export with population loadings along paths."""

    def make(n_latent=5, n_groups=4, *, n_batches=1, link="softmax", **kwargs):
        adata = readable(n_latent, n_groups, n_batches=n_batches, link=link)
        tl.population_loadings(adata, "population", "path", **kwargs)
        return adata

    return make


def bars(ax):
    """Label, start and width of each bar, from top to bottom."""
    rows = sorted(ax.patches, key=lambda bar: bar.get_y())
    names = [label.get_text() for label in ax.get_yticklabels()]
    for bar, at in zip(rows, ax.get_yticks(), strict=True):
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(at)
    return names, np.array([bar.get_x() for bar in rows]), np.array([bar.get_width() for bar in rows])


def parts_of(adata, gene, group):
    table = get.population_loadings_df(adata, group=group)
    return table[table["gene"] == gene].set_index("factor")["value"]


def log_ratio(adata, gene, group, reference):
    """Of the expression at the mean latents and mean intercepts, from the decoder and the cells."""
    info = adata.uns["ldvae"]
    decoder = LinearDecoder.from_arrays(info["decoder"])
    z = (adata.obsm["X_ldvae"].astype(float) * info["signs"])[:, np.argsort(info["order"])]
    inside = (adata.obs["population"] == group).to_numpy()
    other = (adata.obs["population"] == reference).to_numpy() if reference in POPULATIONS else ~inside
    batch = np.zeros(adata.n_obs, dtype=int)
    if len(decoder.batches) > 1:
        batch = np.array([decoder.batches.tolist().index(lane) for lane in adata.obs["lane"]])
    logs = []
    for cells in (inside, other):
        logits = decoder.weight_gk @ z[cells].mean(axis=0) + decoder.intercept_bg[batch[cells]].mean(axis=0)
        logs.append(np.log(decoder.apply_link(logits[None])[0]))
    if reference == "prior":
        logits = decoder.intercept_bg[batch[inside]].mean(axis=0)
        logs[1] = np.log(decoder.apply_link(logits[None])[0])
    return (logs[0] - logs[1])[decoder.genes.tolist().index(gene)]


@pytest.mark.parametrize("link", ["softmax", "softplus"])
@pytest.mark.parametrize("n_batches", [1, 3])
@pytest.mark.parametrize("reference", ["rest", "prior", "CD34+"])
def test_bars_start_at_zero_follow_on_each_other_and_end_at_the_log_ratio(paths, link, n_batches, reference):
    adata = paths(12, n_batches=n_batches, link=link, reference=reference)
    gene = adata.var_names[7]
    names, start, width = bars(pl.attribution(adata, gene, "B", n_factors=4, show=False))
    expected = log_ratio(adata, gene, "B", reference)
    assert names[-1] == "total"
    assert start[0] == start[-1] == 0
    np.testing.assert_allclose(start[1:-1], (start + width)[:-2])
    assert (start + width)[-2] == pytest.approx(expected, abs=1e-5)
    assert width[-1] == pytest.approx(expected, abs=1e-5)
    assert ("batch" in names) == (n_batches > 1 and reference != "prior")


def test_factors_descend_and_the_small_ones_are_pooled(paths):
    adata = paths(12, n_batches=2)
    gene = adata.var_names[9]
    names, _, width = bars(pl.attribution(adata, gene, NAIVE, n_factors=4, show=False))
    parts = parts_of(adata, gene, NAIVE)
    batch = parts.pop("batch")
    order = parts.abs().sort_values(ascending=False).index
    assert names == [*order[:4], "8 others", "batch", "total"]
    np.testing.assert_allclose(width[:4], parts[order[:4]])
    np.testing.assert_allclose(width[4:6], [parts[order[4:]].sum(), batch])


@pytest.mark.parametrize(("n_factors", "n_drawn"), [(3, 3), (4, 5), (5, 5), (8, 5)])
def test_a_single_factor_is_not_pooled(paths, n_factors, n_drawn):
    adata = paths(5)
    names, _, _ = bars(pl.attribution(adata, adata.var_names[4], "B", n_factors=n_factors, show=False))
    assert len(names) == n_drawn + (n_drawn < 5) + 1
    assert any(name.endswith("others") for name in names) == (n_drawn < 5)


def test_colours_tell_up_from_down_and_batches_from_factors(paths):
    adata = paths(8, n_batches=2)
    ax = pl.attribution(adata, adata.var_names[9], "B", show=False)
    names, _, width = bars(ax)
    colors = [to_hex(bar.get_facecolor()) for bar in sorted(ax.patches, key=lambda bar: bar.get_y())]
    assert (width[:-2] < 0).any()
    assert colors[:-2] == [(BLUE if value < 0 else ORANGE).lower() for value in width[:-2]]
    assert names[-2] == "batch"
    red, green, blue = (int(colors[-2][i : i + 2], 16) for i in (1, 3, 5))
    assert red == green == blue
    assert colors[-1] not in colors[:-1]


def test_lines_connect_the_end_of_each_bar_with_the_next(paths):
    adata = paths()
    ax = pl.attribution(adata, adata.var_names[9], "B", show=False)
    _, start, width = bars(ax)
    (lines,) = ax.collections
    at = ax.get_yticks()
    for i, line in enumerate(lines.get_segments()):
        assert line[:, 0].tolist() == pytest.approx([start[i] + width[i]] * 2)
        assert at[i] < line[0, 1] < line[1, 1] < at[i + 1]
    assert len(lines.get_segments()) == len(at) - 1


@pytest.mark.parametrize("times", [0.1, 1, 100])
def test_numbers_are_written_at_the_bars_with_three_digits_of_the_largest_or_three_decimals(paths, times):
    adata = paths()
    adata.varm["ldvae_population_loadings"] *= times
    ax = pl.attribution(adata, adata.var_names[9], "B", show=False)
    _, start, width = bars(ax)
    texts = sorted(ax.texts, key=lambda text: text.xy[1])
    written = [float(text.get_text().replace(MINUS, "-")) for text in texts]
    np.testing.assert_allclose(written, width, atol=max(0.005 * np.abs(width).max(), 0.0005) + 1e-9)
    assert max(len(text.get_text().rpartition(".")[2]) for text in texts) == {0.1: 3, 1: 3, 100: 2}[times]
    np.testing.assert_allclose([text.xy[0] for text in texts], np.maximum(start, start + width))
    assert texts[-1].get_fontweight() == "bold"
    assert ax.get_yticklabels()[-1].get_fontweight() == "bold"


def test_the_upper_axis_says_the_same_as_fold_changes(paths):
    adata = paths()
    figure = pl.attribution(adata, adata.var_names[9], "B", return_fig=True)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    (folds,) = ax.child_axes
    assert folds.get_xlim() == ax.get_xlim()
    assert "natural" in ax.get_xlabel()
    assert folds.get_xlabel() == "Fold change"
    ticks = folds.get_xticks()
    assert len(ticks) >= 2
    np.testing.assert_allclose([float(label.get_text()) for label in folds.get_xticklabels()], np.exp(ticks), rtol=1e-5)


@pytest.mark.parametrize("n", [2, 4, 6])
@pytest.mark.parametrize(
    ("low", "high"), [(-0.01, 0.02), (0, 0.4), (-1, 0.5), (-1.5, 0.3), (-3, 3), (0, 9), (-20, 1), (-60, 80)]
)
def test_fold_changes_are_few_round_and_inside(low, high, n):
    at = np.array(Folds(n).tick_values(low, high))
    assert 1 <= len(at) <= n + 1
    assert ((at >= low) & (at <= high)).all()
    assert all(len(f"{fold:g}") <= 6 for fold in np.exp(at))
    assert (np.diff(at) > 0).all()
    if high - low > np.log(5):
        are_powers = np.allclose(at / np.log(10), np.round(at / np.log(10)))
        assert are_powers or (np.diff(at) < np.log(3.4)).all()


def test_the_title_names_gene_population_and_reference(paths):
    adata = paths(reference=NAIVE)
    gene = adata.var_names[9]
    assert pl.attribution(adata, gene, "B", show=False).get_title().split("\n") == [gene, "B", f"against {NAIVE}"]
    assert pl.attribution(paths(), gene, "B", show=False).get_title().split("\n") == [gene, "B", "against the rest"]


def test_several_genes_have_panels_of_one_scale(paths):
    adata = paths(12)
    genes = adata.var_names[[7, 3, 9, 30]].tolist()
    figure = pl.attribution(adata, [*genes, genes[0]], "B", n_factors=4, ncols=3, show=False)
    assert isinstance(figure, Figure)
    assert [ax.get_title() for ax in figure.axes] == genes
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    assert figure.get_suptitle() == "B\nagainst the rest"
    for ax, gene in zip(figure.axes, genes, strict=True):
        low, high = ax.get_xlim()
        names, start, width = bars(ax)
        alone = bars(pl.attribution(adata, gene, "B", n_factors=4, show=False))
        assert names == alone[0]
        np.testing.assert_array_equal([start, width], alone[1:])
        assert low < min(start.min(), (start + width).min())
        assert high > max(start.max(), (start + width).max())
    tops = [ax.get_window_extent().y1 for ax in figure.axes]
    assert tops[0] == pytest.approx(tops[2])
    assert tops[3] < tops[0] - 1
    assert_legible(figure)


def test_a_list_makes_a_figure_and_a_name_axes(paths):
    adata = paths()
    assert isinstance(pl.attribution(adata, [adata.var_names[4]], "B", show=False), Figure)
    assert isinstance(pl.attribution(adata, adata.var_names[4], "B", show=False), Axes)


def test_a_figure_of_several_genes_is_shown_and_closed(paths, shown):
    adata = paths()
    assert pl.attribution(adata, adata.var_names[[4, 5]], "B", show=True) is None
    assert [len(open_) for open_ in shown] == [1]
    assert not plt.get_fignums()


@pytest.mark.grid(0)
@pytest.mark.parametrize(
    ("n_latent", "n_genes", "n_factors"), [(1, 1, 8), (2, 3, 8), (3, 2, 8), (30, 1, 8), (30, 1, 30), (30, 7, 12)]
)
@pytest.mark.parametrize("group", ["B", NAIVE])
def test_no_text_overlaps_another_or_is_cut_off(paths, n_latent, n_genes, n_factors, group):
    adata = paths(n_latent, n_batches=2, reference="CD34+")
    genes = adata.var_names[3 : 3 + n_genes].tolist()
    figure = pl.attribution(adata, genes if n_genes > 1 else genes[0], group, n_factors=n_factors, return_fig=True)
    assert_legible(figure)
    assert len(drawn_texts(figure)) > n_genes * 2 * min(n_factors, n_latent)


def test_a_gene_that_no_factor_moves_can_be_drawn(paths):
    adata = paths()
    adata.varm["ldvae_population_loadings"][5] = 0
    figure = pl.attribution(adata, adata.var_names[5], "B", return_fig=True)
    assert {text.get_text() for text in figure.axes[0].texts} == {"0"}
    assert_legible(figure)


def test_another_key_is_read(paths):
    adata = paths(key_added="other")
    assert pl.attribution(adata, adata.var_names[5], "B", key="other", return_fig=True).axes
    with pytest.raises(KeyError, match=r"No population loadings 'ldvae_population_loadings'.*tl\.population_loadings"):
        pl.attribution(adata, adata.var_names[5], "B")


@pytest.mark.parametrize("kind", ["gradient", "contribution", "within"])
def test_another_kind_is_named_before_anything_is_drawn(readable, kind):
    adata = readable()
    tl.population_loadings(adata, "population", kind, key_added="k")
    with pytest.raises(ValueError, match=rf"`key='k'` has population loadings of kind '{kind}'; use kind 'path'"):
        pl.attribution(adata, adata.var_names[5], "B", key="k")
    assert not plt.get_fignums()


@pytest.mark.parametrize("gene", ["CD4", ["CD4"], "unknown", []])
def test_unknown_genes_are_named(paths, gene):
    adata = paths()
    gene = adata.var_names[0] if gene == "unknown" else gene
    with pytest.raises(ValueError, match=r"`gene` must name genes of the model; got ('|none)"):
        pl.attribution(adata, gene, "B")
    assert not plt.get_fignums()


@pytest.mark.parametrize("group", ["T", "CD34+", ["B"], None])
def test_anything_but_one_of_the_populations_is_named(paths, group):
    adata = paths(reference="CD34+")
    with pytest.raises(ValueError, match=r"`group` must be one of .*'B'; got "):
        pl.attribution(adata, adata.var_names[5], group)
    assert not plt.get_fignums()


def test_given_axes_hold_one_gene(paths):
    adata = paths()
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="`ax` has room for one gene"):
        pl.attribution(adata, [adata.var_names[5]], "B", ax=ax)
    assert not ax.has_data()


def test_numbers_stay_inside_given_axes(paths):
    adata = paths(12)
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    for ax, gene in zip(axes, adata.var_names[[7, 9]], strict=True):
        pl.attribution(adata, gene, "B", ax=ax, show=False)
    assert_legible(figure)
    for ax in axes:
        assert max(text.get_window_extent().x1 for text in ax.texts) < ax.get_window_extent().x1


@pytest.mark.parametrize("argument", ["n_factors", "ncols"])
def test_sizes_are_counts(paths, argument):
    adata = paths()
    with pytest.raises(ValueError, match=f"`{argument}` must be an integer of at least 1"):
        pl.attribution(adata, adata.var_names[5], "B", **{argument: 0})
