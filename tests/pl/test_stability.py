from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from ldvae_ext import get, pl
from ldvae_ext.model import LDVAE, fit_ensemble
from tests.helpers import TRAIN, counts
from tests.pl.helpers import assert_legible

FLAGS = ("stable", "uncertain", "unstable")


def drawn(ax) -> dict[str, PathCollection]:
    """Points by what they are."""
    return {points.get_label(): points for points in ax.collections if isinstance(points, PathCollection)}


def look(points: PathCollection) -> tuple[str, bytes]:
    return to_hex(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes()


def test_a_dot_for_each_run_lies_at_its_cosine_above_its_factor(exported, consensus):
    adata = consensus(exported(), 5, 4)
    ax = pl.stability(adata, show=False)
    x, y = drawn(ax)["run"].get_offsets().T.reshape(2, 4, 5)
    np.testing.assert_array_equal(y, adata.uns["ldvae_consensus"]["cosine"])
    np.testing.assert_array_equal(np.rint(x), np.tile(np.arange(5), (4, 1)))
    # From left to right in the order of the runs, the same for all factors.
    assert (np.diff(x, axis=0) > 0).all()
    assert np.ptp(x - np.arange(5), axis=1).max() < 1e-12
    assert [label.get_text() for label in ax.get_xticklabels()] == get.stability(adata).index.tolist()
    assert ax.get_xticks().tolist() == list(range(5))


def test_the_mean_of_each_factor_has_the_look_of_its_flag(exported, consensus):
    adata = consensus(exported(), 8)
    table = get.stability(adata)
    ax = pl.stability(adata, show=False)
    points = drawn(ax)
    assert set(table["flag"]) == set(FLAGS)
    for flag in FLAGS:
        x, y = points[flag].get_offsets().T
        at = np.flatnonzero(table["flag"] == flag)
        assert x.tolist() == at.tolist()
        np.testing.assert_array_equal(y, table["reproducibility"].to_numpy()[at])
    looks = [look(points[flag]) for flag in FLAGS]
    assert len({color for color, _ in looks}) == len({shape for _, shape in looks}) == 3


def test_flags_are_those_that_were_stored(exported, consensus):
    adata = consensus(exported())
    adata.uns["ldvae_consensus"]["flag"] = np.array(["unstable"] * 5)
    points = drawn(pl.stability(adata, show=False))
    assert [len(points[flag].get_offsets()) for flag in FLAGS] == [0, 0, 5]


def test_bands_end_at_the_thresholds_and_are_named_with_their_markers(exported, consensus):
    adata = consensus(exported())
    ax = pl.stability(adata, show=False)
    dashed = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [0.6, 0.8]
    assert ax.get_ylim() == (0, 1)
    names = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert list(names) == list(FLAGS)
    assert names["unstable"] < 0.6 < names["uncertain"] < 0.8 < names["stable"]
    markers = {line.get_ydata()[0]: line for line in ax.lines if line.get_marker() not in ("None", "", None)}
    for flag, height in names.items():
        color, _ = look(drawn(ax)[flag]) if len(drawn(ax)[flag].get_offsets()) else (None, None)
        assert color in (None, to_hex(markers[height].get_color()))
    adata.uns["ldvae_consensus"]["thresholds"] = np.array([0.5, 0.9])
    other = pl.stability(adata, show=False)
    assert [line.get_ydata()[0] for line in other.lines if line.get_linestyle() == "--"] == [0.5, 0.9]


@pytest.mark.parametrize(
    ("resample", "said"),
    [
        ("none", "same cells, other seeds\n(no information about other cells)"),
        ("halves", "two disjoint halves of the cells"),
        ("bootstrap", "cells drawn with replacement"),
    ],
)
def test_the_title_says_how_runs_differ(exported, consensus, resample, said):
    ax = pl.stability(consensus(exported(), resample=resample), show=False)
    assert ax.get_title() == f"{said}\ndots: 4 runs; large: their mean"
    failed = pl.stability(consensus(exported(), resample=resample, n_failed=2), show=False)
    assert "4 runs (2 failed)" in failed.get_title()


def test_several_consensuses_stand_side_by_side_on_one_scale(exported, consensus):
    adata = consensus(exported(), 5)
    consensus(adata, 3, 6, resample="halves", key="halves")
    figure = pl.stability(adata, key=["halves", "ldvae_consensus"], return_fig=True)
    left, right = figure.axes
    assert left.get_title().startswith("halves\ntwo disjoint halves")
    assert right.get_title().startswith("ldvae_consensus\nsame cells, other seeds")
    for ax, key in ((left, "halves"), (right, "ldvae_consensus")):
        cosine = adata.uns[key]["cosine"]
        np.testing.assert_array_equal(drawn(ax)["run"].get_offsets()[:, 1], cosine.ravel())
    assert left.get_shared_y_axes().joined(left, right)
    assert (len(left.texts), len(right.texts)) == (0, 3)
    np.testing.assert_allclose(left.get_window_extent().size, right.get_window_extent().size, rtol=0.01)


def test_a_list_of_one_key_is_a_figure_with_one_panel(exported, consensus):
    figure = pl.stability(consensus(exported()), key=["ldvae_consensus"], show=False)
    assert isinstance(figure, plt.Figure)
    assert figure.axes[0].get_title().startswith("ldvae_consensus\n")


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_factors", [1, 2, 5, 10, 30])
@pytest.mark.parametrize("n_keys", [1, 3])
def test_all_labels_are_legible(exported, consensus, n_factors, n_keys):
    adata = exported()
    for i, resample in enumerate(("none", "halves", "bootstrap")):
        consensus(adata, n_factors, resample=resample, key=f"consensus {i}", n_failed=1)
    key = "consensus 0" if n_keys == 1 else [f"consensus {i}" for i in range(n_keys)]
    assert_legible(pl.stability(adata, key=key, return_fig=True))


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_factors", [2, 10, 30])
def test_long_names_are_legible(exported, consensus, n_factors):
    key = "consensus_of_runs_on_two_halves_of_all_the_cells_of_donor_1"
    adata = consensus(exported(), n_factors, key=key)
    adata.uns[key]["names"] = np.array([f"interferon response of some cells, part {k}" for k in range(n_factors)])
    assert_legible(pl.stability(adata, key=key, return_fig=True))
    assert_legible(pl.stability(adata, key=[key, key], return_fig=True))


def test_dots_at_the_ends_of_the_scale_are_drawn_whole(exported, consensus):
    ax = pl.stability(consensus(exported()), show=False)
    assert not any(points.get_clip_on() for points in drawn(ax).values())


def test_a_value_that_is_not_known_has_no_point(exported, consensus):
    adata = consensus(exported(), 3)
    adata.uns["ldvae_consensus"]["cosine"][0, 1] = np.nan
    adata.uns["ldvae_consensus"]["statistics"]["reproducibility"][1] = np.nan
    points = drawn(pl.stability(adata, show=False))
    unknown = sum(np.ma.getmaskarray(of.get_offsets()).any(axis=1).sum() for of in points.values())
    known = sum((~np.isnan(np.ma.filled(of.get_offsets(), np.nan)).any(axis=1)).sum() for of in points.values())
    assert (known, unknown) == (4 * 3 - 1 + 2, 2)


def test_what_an_ensemble_writes_is_drawn():
    adata = counts(n_genes=30)
    LDVAE.setup_anndata(adata)
    ensemble = fit_ensemble(
        adata, 2, n_latent=3, resample="halves", max_epochs=4, train_kwargs=TRAIN | {"batch_size": 30}, silent=True
    )
    ensemble.export_to_anndata(adata)
    ax = pl.stability(adata, show=False)
    assert ax.get_title() == (
        "two disjoint halves of the cells\ndots: 2 runs; large: their mean\n"
        f"bold: the {ensemble.n_replicated} that replicate between the halves"
    )
    means = np.concatenate([drawn(ax)[flag].get_offsets() for flag in FLAGS])
    np.testing.assert_allclose(means[np.argsort(means[:, 0]), 1], ensemble.stats["reproducibility"])


def test_a_missing_consensus_says_how_to_make_one(exported, consensus):
    with pytest.raises(KeyError, match=r"No consensus 'ldvae_consensus'.*fit_ensemble"):
        pl.stability(exported())
    with pytest.raises(KeyError, match="No consensus 'other'"):
        pl.stability(consensus(exported()), key=["ldvae_consensus", "other"])
    with pytest.raises(ValueError, match="`key` must name at least one"):
        pl.stability(consensus(exported()), key=[])
    assert not plt.get_fignums()


def test_given_axes_have_room_for_one_consensus(exported, consensus):
    ax = plt.figure().subplots()
    with pytest.raises(ValueError, match="`ax` has room for one consensus"):
        pl.stability(consensus(exported()), key=["ldvae_consensus"], ax=ax)
    assert not ax.collections


def test_factors_that_replicate_between_halves_are_bold(exported, consensus):
    adata = consensus(exported(), 4, resample="halves")
    statistics = adata.uns["ldvae_consensus"]["statistics"]
    statistics |= {
        "scores": np.array([0.9, 0.7, 0.95, 0.85]),
        "top_genes": np.zeros(4),
        "usages": np.array([0.95, 0.95, 0.8, 0.92]),
    }
    ax = pl.stability(adata, show=False)
    bold = [label.get_fontweight() == "bold" for label in ax.get_xticklabels()]
    assert bold == get.stability(adata)["replicates"].tolist() == [True, False, False, True]
    assert "bold: the 2 that replicate between the halves" in ax.get_title()
