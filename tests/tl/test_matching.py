"""Factors of two models side by side, whatever they come as."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
from scipy.stats import ortho_group
from scvi.model import LinearSCVI

from ldvae_ext import get, tl
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core.matching import match_columns, procrustes
from ldvae_ext.model import LDVAE, Ensemble, fit_ensemble
from tests.helpers import TRAIN, counts, untrained


def table(n_genes=60, n_factors=4, seed=0, names="F"):
    """Loadings with a longer tail, uncentred."""
    rng = np.random.default_rng(seed)
    value = (rng.random((n_genes, n_factors)) < 0.2) * rng.gamma(4.0, 0.5, (n_genes, n_factors))
    value = value + 0.1 * rng.normal(size=value.shape) + rng.normal(size=n_factors)
    return pd.DataFrame(
        value, index=[f"gene{i}" for i in range(n_genes)], columns=[f"{names}_{k}" for k in range(n_factors)]
    )


def correlation(a, b):
    return np.corrcoef(a.to_numpy().T, b.to_numpy().T)[: a.shape[1], a.shape[1] :]


@pytest.fixture(scope="module")
def models():
    """Two models of the same cells, one of them rotated."""
    adata = counts(100, n_batches=3)
    first = untrained(adata, seed=1)
    second = untrained(ad.AnnData(adata.X.copy(), adata.obs.copy(), adata.var.copy()), seed=2)
    second.rotate()
    return first, second


class TestGeneScores:
    def test_exports_programs_and_tables_are_matched_by_the_slopes_of_genes(self, models):
        model, _ = models
        adata = ad.AnnData(model.adata.X.copy(), model.adata.obs.copy(), model.adata.var.copy())
        model.export_to_anndata(adata)
        score = get.gene_scores(adata, kind="regression")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*additive programs reproduce")
            programs = model.get_programs(3)
        got = tl.match_factors(adata, programs, by="gene_scores")
        unit = [value / np.linalg.norm(value, axis=0) for value in (score.to_numpy(), programs.scores.to_numpy())]
        np.testing.assert_allclose(got.cosine, unit[0].T @ unit[1], atol=1e-6)
        assert got.pairs["aligned"].isna().all()
        assert np.isnan(got.procrustes_distance)
        assert "shared genes" in repr(got)
        of_tables = tl.match_factors(score, programs.scores, by="gene_scores")
        np.testing.assert_allclose(of_tables.cosine, got.cosine, atol=1e-12)

    def test_what_has_none_is_named(self, models):
        with pytest.raises(TypeError, match=r"Gene scores come from .*; got LDVAE"):
            tl.match_factors(models[0], models[0], by="gene_scores")


class TestLoadings:
    def test_numbers_are_those_of_the_definition(self):
        a, b = table(seed=0), table(n_factors=3, seed=1, names="G")
        got = tl.match_factors(a, b)
        expected = correlation(a, b)
        np.testing.assert_allclose(got.cosine, expected, atol=1e-12)
        assert got.cosine.index.tolist() == a.columns.tolist()
        assert got.cosine.columns.tolist() == b.columns.tolist()
        match = match_columns(expected)
        assert got.pairs["first"].tolist() == [f"F_{k}" for k in match.first]
        assert got.pairs["second"].tolist() == [f"G_{k}" for k in match.second]
        np.testing.assert_allclose(got.pairs["cosine"], expected[match.first, match.second])
        assert len(got.pairs) == 3
        assert got.n_shared == 60
        assert got.by == "loadings"
        centred = [(value - value.mean()).to_numpy() for value in (a, b)]
        rotation, distance = procrustes(*centred)
        np.testing.assert_allclose(got.procrustes_distance, distance)
        aligned = centred[1] @ rotation
        expected = [np.corrcoef(centred[0][:, k], aligned[:, k])[0, 1] for k in match.first]
        np.testing.assert_allclose(got.pairs["aligned"], expected, atol=1e-12)

    def test_order_and_signs_of_the_same_factors(self):
        a = table()
        b = (a * [1, -1, 1, -1])[["F_2", "F_0", "F_3", "F_1"]]
        got = tl.match_factors(a, b)
        assert got.pairs["first"].tolist() == got.pairs["second"].tolist() == ["F_0", "F_1", "F_2", "F_3"]
        np.testing.assert_allclose(got.pairs["cosine"], [1, -1, 1, -1])
        np.testing.assert_allclose(got.pairs["aligned"], 1)
        np.testing.assert_allclose(got.procrustes_distance, 0, atol=1e-12)

    def test_a_rotated_copy_is_no_other_subspace(self):
        a = table()
        rotation = ortho_group.rvs(4, random_state=0)
        got = tl.match_factors(a, pd.DataFrame(7 * a.to_numpy() @ rotation, index=a.index))
        assert got.pairs["cosine"].abs().median() < 0.9
        np.testing.assert_allclose(got.pairs["aligned"], 1)
        np.testing.assert_allclose(got.procrustes_distance, 0, atol=1e-12)
        other = tl.match_factors(a, table(seed=9))
        assert other.procrustes_distance > 0.5
        assert (other.pairs["aligned"] < 0.9).all()
        assert got.pairs["second"].isin(["0", "1", "2", "3"]).all(), "names are strings"

    def test_a_constant_per_factor_does_not_matter(self):
        a, b = table(), table(seed=1)
        got, shifted = tl.match_factors(a, b), tl.match_factors(a + [5.0, -3.0, 0.0, 9.0], b - 4)
        np.testing.assert_allclose(shifted.cosine, got.cosine, atol=1e-12)
        np.testing.assert_allclose(shifted.procrustes_distance, got.procrustes_distance, atol=1e-12)

    def test_genes_go_by_name_and_those_that_both_have_count(self):
        a, b = table(), table(seed=1)
        expected = tl.match_factors(a, b)
        shuffled = b.sample(frac=1, random_state=0)
        pd.testing.assert_frame_equal(tl.match_factors(a, shuffled).pairs, expected.pairs)
        shared = a.index[10:40]
        more = pd.concat([b.loc[shared].iloc[::-1], table(5, seed=3).set_axis(list("vwxyz"), axis=0)])
        got = tl.match_factors(a, more)
        assert got.n_shared == 30
        np.testing.assert_allclose(got.cosine, correlation(a.loc[shared], b.loc[shared]), atol=1e-12)

    def test_swapping_the_two_swaps_the_pairs(self):
        a, b = table(), table(n_factors=6, seed=1)
        got, back = tl.match_factors(a, b), tl.match_factors(b, a)
        pairs = {(row["first"], row["second"]): row["cosine"] for _, row in got.pairs.iterrows()}
        swapped = {(row["second"], row["first"]): row["cosine"] for _, row in back.pairs.iterrows()}
        assert pairs.keys() == swapped.keys()
        np.testing.assert_allclose([pairs[key] for key in pairs], [swapped[key] for key in pairs])
        np.testing.assert_allclose(back.procrustes_distance, got.procrustes_distance, atol=1e-12)

    def test_it_says_what_it_found(self):
        text = repr(tl.match_factors(table(), table()))
        assert text == "FactorMatch(4 pairs, 60 shared genes, median |cosine| 1.00, Procrustes distance 0.00)"
        scores = repr(tl.match_factors(table(), table(), by="scores"))
        assert scores == "FactorMatch(4 pairs, 60 shared cells, median |cosine| 1.00)"


class TestSources:
    def test_a_model_is_its_canonical_loadings_through_its_rotation(self, models):
        first, second = models
        got = tl.match_factors(first, second)
        a, b = first.get_loadings(), second.get_loadings(canonical=True)
        np.testing.assert_allclose(np.abs(got.cosine), np.abs(correlation(a, b)), atol=1e-6)
        assert got.cosine.index.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
        assert got.cosine.columns.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        # In canonical signs.
        canonical = first.get_loadings(canonical=True)[["Z_0", "Z_1", "Z_2", "Z_3"]]
        np.testing.assert_allclose(got.cosine, correlation(canonical, b), atol=1e-6)
        unrotated = tl.match_factors(second.get_decoder(), second)
        np.testing.assert_allclose(unrotated.procrustes_distance, 0, atol=1e-9)
        np.testing.assert_allclose(unrotated.pairs["aligned"], 1, atol=1e-9)
        assert unrotated.pairs["cosine"].abs().min() < 0.999

    def test_models_of_other_genes_in_another_order(self, models):
        first, _ = models
        adata = counts(50, n_batches=3)[:, [7, 3, 15, 0, 1, 19, 8, 2, 11]].copy()
        small = untrained(adata, seed=5)
        got = tl.match_factors(first, small)
        shared = small.get_loadings().index
        assert got.n_shared == 9
        expected = correlation(first.get_loadings().loc[shared], small.get_loadings())
        np.testing.assert_allclose(np.abs(got.cosine), np.abs(expected), atol=1e-6)

    def test_linear_scvi(self, models):
        first, _ = models
        adata = ad.AnnData(first.adata.X.copy(), first.adata.obs[["batch"]].copy(), first.adata.var.copy())
        LinearSCVI.setup_anndata(adata, batch_key="batch")
        stock = LinearSCVI(adata, n_latent=4)
        stock.module.load_state_dict(first.module.state_dict())
        stock.module.eval()
        stock.is_trained_ = True
        got = tl.match_factors(stock, first)
        np.testing.assert_allclose(got.pairs["cosine"].abs(), 1, atol=1e-6)
        assert got.pairs["first"].tolist() == got.pairs["second"].tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
        scores = tl.match_factors(stock, first, by="scores")
        np.testing.assert_allclose(scores.pairs["cosine"], 1, atol=1e-5)
        assert scores.cosine.index.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]

    def test_decoders_of_any_origin(self, models):
        first, second = models
        rng = np.random.default_rng(0)
        nmf = LinearDecoder(
            weight_gk=rng.gamma(0.3, 1.0, (20, 3)),
            intercept_bg=np.zeros((1, 20)),
            genes=first.get_decoder().genes[::-1],
            batches=["0"],
            factors=["NMF/0", "NMF/1", "NMF/2"],
            likelihood="poisson",
        )
        got = tl.match_factors(nmf, second)
        loading = pd.DataFrame(nmf.weight_gk, index=nmf.genes).loc[first.get_decoder().genes]
        np.testing.assert_allclose(
            np.abs(got.cosine), np.abs(correlation(loading, second.get_loadings(rotated=True))), atol=1e-6
        )
        assert got.pairs["first"].tolist() == ["NMF/0", "NMF/1", "NMF/2"]

    def test_exports_in_anndata(self, models, tmp_path):
        first, second = models
        a = ad.AnnData(first.adata.X.copy(), first.adata.obs[["batch"]].copy(), first.adata.var.copy())
        first.export_to_anndata(a)
        second.export_to_anndata(a, key_added="other")
        expected = tl.match_factors(first, second)
        got = tl.match_factors(a, a, key_b="other")
        assert got.cosine.index.tolist() == get.factors(a).index.tolist()
        of_models = expected.cosine.loc[got.cosine.index, got.cosine.columns]
        np.testing.assert_allclose(got.cosine, of_models, atol=1e-5)
        np.testing.assert_allclose(got.procrustes_distance, expected.procrustes_distance, atol=1e-6)
        np.testing.assert_allclose(tl.match_factors(a, second, key="ldvae").cosine, of_models, atol=1e-5)
        np.testing.assert_allclose(
            tl.match_factors(first, a, key="other").cosine, expected.cosine[got.cosine.columns], atol=1e-5
        )
        # Genes that the model does not know are no genes of its factors.
        wide = ad.AnnData(obs=a.obs.copy(), var=pd.DataFrame(index=["unknown", *a.var_names]))
        with pytest.warns(UserWarning, match="by their names only"):
            first.export_to_anndata(wide)
        assert tl.match_factors(wide, first).n_shared == 20
        a.write_h5ad(tmp_path / "a.h5ad")
        back = ad.read_h5ad(tmp_path / "a.h5ad")
        pd.testing.assert_frame_equal(tl.match_factors(back, back, key_b="other").pairs, got.pairs, check_dtype=False)

    def test_scores_of_models_and_exports(self, models):
        first, second = models
        got = tl.match_factors(first, second, by="scores")
        z = first.get_latent_representation().astype(float)
        f = second.get_latent_representation().astype(float) @ second.rotation.matrix_kk
        np.testing.assert_allclose(got.cosine, np.corrcoef(z.T, f.T)[:4, 4:], atol=1e-6)
        assert got.cosine.columns.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        assert np.isnan(got.procrustes_distance)
        assert got.pairs["aligned"].isna().all()
        assert got.by == "scores"
        assert got.n_shared == 100
        a = ad.AnnData(first.adata.X.copy(), first.adata.obs[["batch"]].copy(), first.adata.var.copy())
        first.export_to_anndata(a)
        some = a[[40, 3, 77, 20, 9, 8]].copy()
        of_some = tl.match_factors(some, second, by="scores")
        assert of_some.n_shared == 6
        rows = [40, 3, 77, 20, 9, 8]
        expected = np.corrcoef(z[rows].T, f[rows].T)[:4, 4:]
        expected = pd.DataFrame(expected, index=first.latent_names, columns=second.factor_names)
        signs = get.factors(a)["sign"]
        np.testing.assert_allclose(
            of_some.cosine, expected.loc[of_some.cosine.index].mul(signs, axis=0).loc[of_some.cosine.index], atol=1e-5
        )


@pytest.fixture(scope="module")
def ensemble():
    adata = counts(80, n_batches=3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    return fit_ensemble(adata, 2, n_latent=3, max_epochs=2, train_kwargs={**TRAIN, "kl_warmup": 1}, silent=True)


class TestConsensus:
    def test_an_ensemble_is_its_consensus(self, ensemble):
        assert isinstance(ensemble, Ensemble)
        got = tl.match_factors(ensemble, ensemble.models[0])
        expected = correlation(ensemble.loadings, ensemble.models[0].get_loadings(canonical=True))
        np.testing.assert_allclose(got.cosine, expected, atol=1e-6)
        assert got.cosine.index.tolist() == ["C_0", "C_1", "C_2"]
        with pytest.raises(TypeError, match=r"Scores come from a model with data.*got Ensemble"):
            tl.match_factors(ensemble, ensemble, by="scores")

    def test_a_consensus_in_anndata_stands_beside_an_export(self, ensemble):
        adata = ad.AnnData(
            ensemble.models[0].adata.X.copy(),
            ensemble.models[0].adata.obs[["batch"]].copy(),
            pd.DataFrame(index=ensemble.genes),
        )
        extended = ad.concat(
            [adata, ad.AnnData(np.zeros((80, 2)), obs=adata.obs, var=pd.DataFrame(index=["x", "y"]))], axis=1
        )
        extended.obs = adata.obs.copy()
        ensemble.export_to_anndata(extended)
        ensemble.models[1].export_to_anndata(adata)
        got = tl.match_factors(extended, adata, key="ldvae_consensus", key_b="ldvae")
        expected = tl.match_factors(ensemble, ensemble.models[1])
        assert got.n_shared == len(ensemble.genes)
        np.testing.assert_allclose(got.cosine, expected.cosine[got.cosine.columns], atol=1e-5)
        assert got.cosine.index.tolist() == ["C_0", "C_1", "C_2"]
        pd.testing.assert_frame_equal(
            get.consensus_loadings(extended), ensemble.loadings, check_dtype=False, atol=1e-6, check_names=False
        )
        with_itself = tl.match_factors(extended, extended, key="ldvae_consensus")
        assert with_itself.n_shared == len(ensemble.genes), "the two others have no loadings"
        np.testing.assert_allclose(with_itself.pairs["cosine"], 1)
        with pytest.raises(KeyError, match="has no export 'ldvae_consensus' with latents of cells"):
            tl.match_factors(extended, adata, by="scores", key="ldvae_consensus", key_b="ldvae")


class TestErrors:
    def test_what_has_no_factors(self):
        with pytest.raises(TypeError, match=r"Factors come from a model.*got ndarray"):
            tl.match_factors(np.zeros((9, 2)), table())
        with pytest.raises(TypeError, match=r"Scores come from a model with data.*got ndarray"):
            tl.match_factors(table(), np.zeros((9, 2)), by="scores")
        decoder = LinearDecoder(
            weight_gk=np.zeros((2, 1)),
            intercept_bg=np.zeros((1, 2)),
            genes=["a", "b"],
            batches=["0"],
            factors=["x"],
            likelihood="poisson",
        )
        with pytest.raises(TypeError, match="got LinearDecoder"):
            tl.match_factors(decoder, table(), by="scores")

    def test_other_sources_of_factors_than_there_are(self):
        with pytest.raises(ValueError, match="`by` must be one of 'loadings', 'gene_scores', 'scores'; got 'genes'"):
            tl.match_factors(table(), table(), by="genes")
        with pytest.raises(KeyError, match="No export 'ldvae'"):
            tl.match_factors(ad.AnnData(np.zeros((3, 2))), table())
        with pytest.raises(KeyError, match="has no export 'mine' with latents"):
            tl.match_factors(table(), ad.AnnData(np.zeros((3, 2))), by="scores", key_b="mine")

    @pytest.mark.parametrize("n_shared", [0, 3, 4])
    def test_too_few_shared_genes(self, n_shared):
        a, b = table(), table(seed=1)
        b.index = [*b.index[:n_shared], *(f"other{i}" for i in range(60 - n_shared))]
        with pytest.raises(ValueError, match=f"`a` and `b` share {n_shared} genes.*more than 4 are needed"):
            tl.match_factors(a, b)
        with pytest.raises(ValueError, match=f"share {n_shared} cells"):
            tl.match_factors(a, b, by="scores")

    def test_one_more_gene_is_enough(self):
        a, b = table(), table(seed=1)
        b.index = [*b.index[:5], *(f"other{i}" for i in range(55))]
        assert tl.match_factors(a, b).n_shared == 5

    @pytest.mark.parametrize("which", ["a", "b"])
    def test_values_that_are_no_numbers(self, which):
        broken = table()
        broken.iloc[3, 1] = np.nan
        given = {"a": table(), "b": table(), which: broken}
        with pytest.raises(ValueError, match=f"`{which}` holds values that are NaN or infinite"):
            tl.match_factors(**given)

    @pytest.mark.parametrize("which", ["a", "b"])
    def test_a_factor_that_comes_twice(self, which):
        twice = table()
        twice.columns = ["same", *twice.columns[1:-1], "same"]
        given = {"a": table(), "b": table(), which: twice}
        with pytest.raises(ValueError, match=f"`{which}`: names must be unique; 'same' occurs more than once"):
            tl.match_factors(**given)

    @pytest.mark.parametrize("which", ["a", "b"])
    def test_a_gene_that_comes_twice(self, which):
        twice = table()
        twice.index = ["gene1", *twice.index[1:]]
        given = {"a": table(), "b": table(), which: twice}
        with pytest.raises(ValueError, match=f"`{which}`: names must be unique; 'gene1' occurs more than once"):
            tl.match_factors(**given)
