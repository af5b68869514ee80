from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import pearsonr

from ldvae_ext import get, pl
from tests.helpers import counts, untrained
from tests.pl.helpers import assert_legible


def panel(ax) -> tuple[np.ndarray, list[str]]:
    return np.asarray(ax.images[0].get_array()), [label.get_text() for label in ax.get_xticklabels()]


def rows(figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.fixture
def model():
    model = untrained(counts(n_genes=30), n_latent=4)
    model.rotate()
    model.export_to_anndata()
    return model


def test_left_are_the_loadings_of_the_network_and_right_those_of_the_factors(model):
    figure = pl.rotation(model.adata, n_genes=2, return_fig=True)
    network = model.get_loadings()
    network = network - network.mean(axis=0)
    before, latents = panel(figure.axes[0])
    for values, name in zip(before.T, latents, strict=True):
        sign = -1 if name.startswith("\N{MINUS SIGN}") else 1
        np.testing.assert_allclose(values, sign * network.loc[rows(figure), name.lstrip("\N{MINUS SIGN}")], atol=1e-5)
    after, factors = panel(figure.axes[1])
    assert factors == get.factors(model.adata).index.tolist()
    np.testing.assert_array_equal(after, get.loadings(model.adata).loc[rows(figure), factors].to_numpy(np.float64))


def test_each_latent_stands_once_and_points_as_the_factor_beside_it(rotated):
    adata = rotated(6)
    figure = pl.rotation(adata, n_genes=79, return_fig=True)
    (before, latents), (after, _) = map(panel, figure.axes[:2])
    assert len(before) == 79
    assert sorted(name.lstrip("\N{MINUS SIGN}") for name in latents) == [f"Z_{k}" for k in range(6)]
    assert any(name.startswith("\N{MINUS SIGN}") for name in latents)
    unit = [value / np.linalg.norm(value, axis=0) for value in (after, before)]
    cosine = unit[0].T @ unit[1]
    assert (np.diag(cosine) > 0).all()
    # No two latents would fit better the other way round.
    for i in range(6):
        for j in range(i):
            swapped = abs(cosine[i, j]) + abs(cosine[j, i])
            assert cosine[i, i] + cosine[j, j] >= swapped - 1e-9


@pytest.mark.parametrize("rank_by", ["loading", "information", "regression"])
def test_genes_are_the_largest_of_each_factor_each_once(model, rank_by):
    adata = model.adata
    figure = pl.rotation(adata, n_genes=3, rank_by=rank_by, return_fig=True)
    score = get.gene_scores(adata, kind=rank_by).abs()
    top = {gene for factor in score for gene in score[factor].nlargest(3).index}
    assert set(rows(figure)) == top
    assert len(rows(figure)) == len(top)


def test_genes_that_go_up_come_first_in_the_order_of_the_factors(rotated):
    after, _ = panel(pl.rotation(rotated(), n_genes=3, return_fig=True).axes[1])
    peak = np.abs(after).argmax(axis=1)
    value = after[np.arange(len(after)), peak]
    key = list(zip(value < 0, peak, -value))
    assert key == sorted(key)
    assert len(set(value < 0)) == 2


def test_both_sides_have_the_same_colours(rotated):
    figure = pl.rotation(rotated(), return_fig=True)
    images = [ax.images[0] for ax in figure.axes[:2]]
    values = np.concatenate([image.get_array() for image in images])
    largest = np.abs(values).max()
    assert {(image.norm.vmin, image.norm.vmax) for image in images} == {(-largest, largest)}
    assert figure.axes[2].get_ylim() == (values.min(), values.max())
    assert len({image.get_cmap().name for image in images}) == 1


def test_below_stands_how_much_of_each_gene_is_in_one_column(model):
    figure = pl.rotation(model.adata, n_genes=1, return_fig=True)
    network = model.get_loadings()
    shares = []
    for table in (network - network.mean(axis=0), get.loadings(model.adata)):
        square = table.to_numpy(np.float64) ** 2
        shares.append(f"{sum(max(row) for row in square) / square.sum():.0%}")
    assert figure.get_supxlabel().endswith(f"\n{shares[0]} before, {shares[1]} after")
    assert int(shares[0][:-1]) < int(shares[1][:-1])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["Before: latents", "After: varimax"]


def test_numbers_are_written_for_few_factors_and_signs_for_many(rotated):
    few = pl.rotation(rotated(3), return_fig=True)
    for ax in few.axes[:2]:
        values, _ = panel(ax)
        assert len(ax.texts) == values.size
        written = [float(text.get_text().replace("\N{MINUS SIGN}", "-")) for text in ax.texts]
        np.testing.assert_allclose(written, values.ravel(), atol=0.006)
    many = pl.rotation(rotated(30), return_fig=True)
    largest = max(np.abs(panel(ax)[0]).max() for ax in many.axes[:2])
    for ax in many.axes[:2]:
        values, _ = panel(ax)
        marked = {text.get_position()[::-1] for text in ax.texts}
        assert marked == set(zip(*np.nonzero(np.round(values, 2) < -0.1 * largest)))
        assert {text.get_text() for text in ax.texts} == {"\N{MINUS SIGN}"}


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_latent", [1, 2, 5, 8, 10, 30])
def test_all_labels_are_legible(rotated, n_latent):
    assert_legible(pl.rotation(rotated(n_latent), return_fig=True))


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_latent", [2, 10, 30])
def test_long_names_are_legible(rotated, n_latent):
    adata = rotated(n_latent)
    adata.uns["ldvae"]["names"] = np.array([f"interferon response of some cells, part {k}" for k in range(n_latent)])
    adata.var_names = [f"{gene}_of_a_rather_verbose_reference_genome" for gene in adata.var_names]
    assert_legible(pl.rotation(adata, return_fig=True))


def test_genes_without_loadings_are_left_out(rotated):
    adata = rotated()
    adata.var["ldvae"] = True
    assert get.loadings(adata).isna().any(axis=None)
    figure = pl.rotation(adata, n_genes=79, return_fig=True)
    assert set(rows(figure)) == set(adata.var_names[1:])
    assert np.isfinite(panel(figure.axes[0])[0]).all()
    assert "nan" not in figure.get_supxlabel()


def test_one_factor_is_what_it_was(rotated):
    figure = pl.rotation(rotated(1), return_fig=True)
    (before, _), (after, _) = map(panel, figure.axes[:2])
    assert pearsonr(before.ravel(), after.ravel()).statistic == pytest.approx(1)
    assert "100% before, 100% after" in figure.get_supxlabel()


def test_an_export_without_a_rotation_says_how_to_have_one(exported):
    with pytest.raises(KeyError, match=r"own axes; `LDVAE.rotate`"):
        pl.rotation(exported())
    assert not plt.get_fignums()


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_the_number_of_genes_must_be_a_count(rotated, wrong):
    with pytest.raises(ValueError, match="`n_genes` must be an integer of at least 1"):
        pl.rotation(rotated(), n_genes=wrong)


def test_the_ranking_must_be_known(rotated):
    with pytest.raises(ValueError, match="`rank_by` must be one of 'regression', 'information', 'loading'"):
        pl.rotation(rotated(), rank_by="size")
    assert not plt.get_fignums()
