"""Ablation, populations and differential expression through rotated axes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from ldvae_ext import get, tl
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.rotation import Rotation
from tests import rotated
from tests.core.brute_force import own_and_new
from tests.helpers import untrained
from tests.network_ablation import counts_distribution, encoded
from tests.rotated import fresh, grouped, grouped_model, seeded, turn_at_random


@pytest.fixture(autouse=True, params=["orthogonal", "oblique"])
def axes(request, monkeypatch):
    """Kind of the axes that are drawn at random."""
    monkeypatch.setattr(rotated, "random_axes", getattr(rotated, request.param))
    return request.param


@pytest.fixture
def model():
    """The trained model on its own axes; tests may rotate it, and nothing else."""
    trained = grouped_model()
    trained.rotate("none")
    yield trained
    trained.rotate("none")


VALUE = np.array([0.3, -1.0, 0.0, 2.0])
NEEDED = {"group_mean": {"groupby": "type"}, "permute": {"seed": 3}, "prior": {"seed": 3}, "value": {"value": VALUE}}
WAYS = [
    ("zero", "mean"),
    ("mean", "mean"),
    ("group_mean", "mean"),
    ("permute", "mean"),
    ("prior", "mean"),
    ("value", "mean"),
    ("zero", "samples"),
    ("permute", "samples"),
    ("prior", "samples"),
    ("mean", "samples"),
]


def ablation_through_the_network(model, mode, rotation, sets, *, n_samples=0, seed=0, refit=False):
    """z to factors, some of them replaced, and back to z, which scvi-tools' own network decodes in float64."""
    adata, cells = model.adata, encoded(model, model.adata)
    codes = adata.obs["type"].cat.codes.to_numpy() if "type" in adata.obs else None
    x, out = torch.as_tensor(cells.x), np.zeros((*cells.x.shape, len(sets)))
    pairs = list(
        own_and_new(cells.mean, cells.variance, mode, group_n=codes, value_k=VALUE, n_samples=n_samples, seed=seed)
    )
    for own, new in pairs:
        factors = own @ rotation
        # What a factor is set to, or drawn for it, is said of the factor; latents of other cells are rotated as well.
        new_factors = new if mode in ("zero", "prior", "value") else new @ rotation
        full = counts_distribution(model, cells, own)
        for s, members in enumerate(sets):
            moved = factors.copy()
            moved[:, members] = new_factors[:, members]
            px = counts_distribution(model, cells, np.nan_to_num(moved) @ np.linalg.inv(rotation))
            if model.module.gene_likelihood == "zinb" and not refit:
                px.zi_logits = full.zi_logits
            out[:, :, s] += (full.log_prob(x) - px.log_prob(x)).numpy() / len(pairs)
    if mode == "group_mean":
        out[codes < 0] = np.nan
    return out


def assert_equal_to(got, expected, tolerance):
    """To a share of the largest effect."""
    largest = np.nanmax(np.abs(expected))
    assert largest > 0
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


ONE_BY_ONE = [[0], [1], [2], [3]]


class TestAblation:
    @pytest.mark.grid(1)
    @pytest.mark.parametrize(("mode", "use_posterior"), WAYS)
    @pytest.mark.parametrize("likelihood", ["nb", "zinb"])
    def test_equals_scvi_tools_network_and_the_export(self, model, mode, use_posterior, likelihood):
        if likelihood == "zinb":
            model = untrained(grouped(40), gene_likelihood="zinb", dispersion="gene-batch")
            with torch.no_grad():  # posteriors as wide as trained ones
                for head in (model.module.z_encoder.mean_encoder, model.module.z_encoder.var_encoder):
                    head.weight *= 0.1
        rotation = turn_at_random(model)
        arguments = {"mode": mode, "use_posterior": use_posterior, **NEEDED.get(mode, {})}
        sampled = {}
        if use_posterior == "samples":
            sampled = {"n_samples": 3, "seed": arguments.setdefault("seed", 3)}
            arguments["n_samples"] = 3
        got = model.ablate(**arguments)
        expected = ablation_through_the_network(
            model, mode, rotation, ONE_BY_ONE, **{"seed": arguments.get("seed", 0), **sampled}
        ).sum(axis=1)
        assert got.var_names.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        assert_equal_to(got.X, expected, 1e-5)
        adata = fresh(model)
        model.export_to_anndata(adata)
        if mode == "value":
            table = get.factors(adata)
            arguments["value"] = dict(zip(table.index, VALUE[table["dimension"]] * table["sign"]))
        of_export = tl.ablate(adata, **arguments)
        assert of_export.var_names.tolist() == get.factors(adata).index.tolist()
        assert_equal_to(of_export[:, got.var_names].X, got.X, 1e-6)

    @pytest.mark.parametrize("scheme", ["leave_in", "keep_top"])
    @pytest.mark.parametrize("mode", ["zero", "permute"])
    def test_schemes_and_sets(self, model, scheme, mode):
        rotation = turn_at_random(model)
        arguments = {"mode": mode, "scheme": scheme, **NEEDED.get(mode, {})}
        seed = arguments.get("seed", 0)
        got = model.ablate(**arguments)
        if scheme == "leave_in":
            sets = [[k for k in range(4) if k != kept] for kept in range(4)]
        else:
            mean, variance = (v.astype(float) for v in model.get_latent_representation(return_dist=True))
            order = np.argsort(-kl_per_dimension(mean @ rotation, variance @ rotation**2).mean(axis=0))
            sets = [sorted(order[j:]) for j in range(5)]
            assert got.uns["ldvae_ablation"]["order"].tolist() == [f"F_{k}" for k in order]
        assert_equal_to(got.X, ablation_through_the_network(model, mode, rotation, sets, seed=seed).sum(axis=1), 1e-5)
        both = model.ablate(latents={"a/b": ["F_3", 0]}, mode=mode, **NEEDED.get(mode, {}))
        expected = ablation_through_the_network(model, mode, rotation, [[0, 3]], seed=seed).sum(axis=1)
        assert_equal_to(both.X, expected, 1e-5)
        # All factors together are all latents together.
        whole = model.ablate(latents={"all": range(4)}, mode=mode, **NEEDED.get(mode, {})).X
        model.rotate("none")
        assert_equal_to(model.ablate(latents={"all": range(4)}, mode=mode, **NEEDED.get(mode, {})).X, whole, 1e-6)

    def test_names_are_those_of_the_factors_alone(self, model):
        model.rotate()
        assert model.ablate(latents="F_2").var_names.tolist() == ["F_2"]
        for method in (model.ablate, model.ablate_genes, model.get_explained_deviance):
            with pytest.raises(ValueError, match="'Z_0' is no latent of this model; allowed are 'F_0', 'F_1'"):
                method(latents=["Z_0"])
        with pytest.raises(ValueError, match="'Z_0' is no latent"):
            model.get_ablated_expression("Z_0")
        with pytest.raises(ValueError, match="`factors`: 'Z_0' is no latent"):
            model.differential_expression(idx1=[0, 1], factors=["Z_0"])

    @pytest.mark.parametrize("mode", ["zero", "permute"])
    def test_numbers_do_not_depend_on_minibatches_or_on_which_cells_are_asked_for(self, model, mode):
        turn_at_random(model)
        arguments = {"mode": mode, "use_posterior": "samples", "seed": 1, "n_samples": 2}
        whole = model.ablate(**arguments, batch_size=120).X
        assert_equal_to(model.ablate(**arguments, batch_size=13).X, whole, 1e-6)
        assert_equal_to(model.ablate(indices=[100, 3], **arguments).X, whole[[100, 3]], 1e-6)
        adata = fresh(model)
        model.export_to_anndata(adata)
        assert_equal_to(
            tl.ablate(adata, indices=[100, 3], chunk_size=1, **arguments)[:, model.factor_names].X,
            whole[[100, 3]],
            1e-6,
        )

    @pytest.mark.parametrize(("mode", "use_posterior"), [("zero", "mean"), ("permute", "samples"), ("mean", "mean")])
    def test_a_data_loader_brings_the_same_cells(self, model, mode, use_posterior):
        turn_at_random(model)
        arguments = {"mode": mode, "use_posterior": use_posterior}
        loader = model._make_data_loader(model.adata, batch_size=33)
        got = model.ablate(dataloader=loader, **arguments)
        assert got.var_names.tolist() == model.factor_names
        assert_equal_to(got.X, model.ablate(**arguments).X, 1e-6)

    def test_genes_add_up_and_equal_the_network(self, model):
        rotation = turn_at_random(model)
        codes = model.adata.obs["type"].cat.codes.to_numpy()
        change = ablation_through_the_network(model, "mean", rotation, ONE_BY_ONE)
        got = model.ablate_genes("type", mode="mean")
        assert_equal_to(got.X, np.concatenate([change[codes == p].mean(axis=0) for p in range(3)]), 1e-5)
        assert got.var_names.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        adata = fresh(model)
        model.export_to_anndata(adata)
        assert_equal_to(tl.ablate_genes(adata, "type", mode="mean")[got.obs_names, got.var_names].X, got.X, 1e-6)

    def test_refitted_heads_follow_the_rotated_factors(self):
        model = untrained(grouped(30), gene_likelihood="zinb")
        rotation = turn_at_random(model)
        expected = ablation_through_the_network(model, "zero", rotation, ONE_BY_ONE, refit=True).sum(axis=1)
        assert_equal_to(model.ablate(refit_heads=True).X, expected, 1e-5)

    def test_the_identity_changes_nothing_but_names(self, model):
        expected = {way: model.ablate(mode=way[0], use_posterior=way[1], **NEEDED.get(way[0], {})).X for way in WAYS}
        model.rotation_ = {"matrix": np.eye(4), "method": "varimax"}
        for (mode, use_posterior), value in expected.items():
            got = model.ablate(mode=mode, use_posterior=use_posterior, **NEEDED.get(mode, {}))
            assert_equal_to(got.X, value, 1e-9)


class TestOtherReadings:
    def test_explained_deviance_is_that_of_the_factors(self, model):
        plain = model.get_explained_deviance()
        rotation = turn_at_random(model)
        table = model.get_explained_deviance(latents=["F_0", "F_1", "F_2", "F_3"])
        assert table["factor"].tolist() == ["F_0", "F_1", "F_2", "F_3"]
        # All of them, and none of them, are what they were.
        np.testing.assert_allclose(table["cumulative"].iloc[-1], plain["cumulative"].iloc[-1], rtol=1e-8)
        np.testing.assert_allclose(table["without_latents"], plain["without_latents"], rtol=1e-8)
        lost = ablation_through_the_network(model, "zero", rotation, [*ONE_BY_ONE, [1, 2, 3], [2, 3], [3], range(4)])
        lost = 2 * lost.sum(axis=(0, 1))
        explained = table["cumulative"].iloc[-1]
        null = -lost[-1] / (table["without_latents"].iloc[0] - explained)
        np.testing.assert_allclose(table["explained_deviance"], lost[:4] / null, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(table["cumulative"].iloc[:3], explained - lost[4:7] / null, rtol=1e-4, atol=1e-7)

    def test_the_deviance_rotation_explains_more_with_the_first_factors(self, model):
        cumulative = {}
        for method in ("deviance", "varimax"):
            model.rotate(method)
            cumulative[method] = model.get_explained_deviance(latents=model.factor_names)["cumulative"].to_numpy()
        assert (cumulative["deviance"] >= cumulative["varimax"] - 1e-3).all()
        assert cumulative["deviance"][0] > cumulative["varimax"][0]

    @pytest.mark.parametrize("mode", ["zero", "mean", "group_mean", "permute", "value"])
    def test_ablated_expression_is_decoded_without_the_factors(self, model, mode):
        rotation = turn_at_random(model)
        got = model.get_ablated_expression(["F_1", 3], mode, **NEEDED.get(mode, {}))
        cells = encoded(model, model.adata)
        codes = model.adata.obs["type"].cat.codes.to_numpy()
        ((own, new),) = own_and_new(
            cells.mean, cells.variance, mode, group_n=codes, value_k=VALUE, seed=NEEDED.get(mode, {}).get("seed", 0)
        )
        new = new if mode in ("zero", "value") else new @ rotation
        moved = own @ rotation
        moved[:, [1, 3]] = new[:, [1, 3]]
        expected = counts_distribution(model, cells, np.nan_to_num(moved) @ np.linalg.inv(rotation)).scale.numpy()
        known = (codes >= 0) | (mode != "group_mean")
        np.testing.assert_allclose(got.to_numpy()[known], expected[known], atol=1e-6)
        assert np.isnan(got.to_numpy()[~known]).all()
        nothing_lost = model.get_ablated_expression(["F_0", "F_1", "F_2", "F_3"], "zero")
        model.rotate("none")
        np.testing.assert_allclose(nothing_lost, model.get_ablated_expression(range(4), "zero"), atol=1e-6)

    @pytest.mark.parametrize("kind", ["gradient", "contribution", "path", "within"])
    def test_population_loadings_are_those_of_the_factors(self, model, kind):
        options = {"reference": "NK"} if kind in ("contribution", "path") else {}
        plain = model.get_population_loadings("type", kind, **options)
        rotation = turn_at_random(model)
        rotated = model.get_population_loadings("type", kind, **options)
        assert list(rotated) == list(plain)
        z = model.get_latent_representation().astype(float)
        decoder = model.get_decoder(rotated=True)
        for group, table in rotated.items():
            inside = (model.adata.obs["type"] == group).to_numpy()
            if kind == "gradient":
                assert table.columns.tolist() == ["F_0", "F_1", "F_2", "F_3"]
                # A slope along a factor is the sum of slopes along the latents that it is made of.
                np.testing.assert_allclose(table, plain[group].to_numpy() @ np.linalg.inv(rotation).T, atol=1e-8)
            elif kind == "contribution":
                difference = z[inside].mean(axis=0) - z[(model.adata.obs["type"] == "NK").to_numpy()].mean(axis=0)
                weight = decoder.centered().weight_gk
                np.testing.assert_allclose(table, weight * (difference @ rotation), atol=1e-5)
            elif kind == "path":
                assert table.columns.tolist() == ["F_0", "F_1", "F_2", "F_3", "batch"]
                np.testing.assert_allclose(table.sum(axis=1), plain[group].sum(axis=1), atol=1e-6)
            else:
                # Directions of variation are the cells' own and know no axes.
                np.testing.assert_allclose(np.abs(table), np.abs(plain[group]), atol=1e-5)

    def test_directions_say_which_factors_they_are_made_of(self, model):
        plain = model.get_population_directions("type")
        turn_at_random(model)
        table = model.get_population_directions("type")
        assert set(table["factor"]) == {"F_0", "F_1", "F_2", "F_3"}
        np.testing.assert_allclose(table.groupby(["group", "direction"])["share"].sum(), 1, atol=1e-6)
        for name in ("variance", "variance_share"):
            np.testing.assert_allclose(table[name], plain[name], rtol=1e-4)

    def test_the_tool_says_the_same_of_populations(self, model):
        model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata)
        of_model = model.get_population_loadings("type", "contribution", reference="NK")
        tl.population_loadings(adata, "type", kind="contribution", reference="NK")
        table = get.population_loadings_df(adata)
        for group, expected in of_model.items():
            rows = table[table["group"] == group].pivot_table("value", "gene", "factor")
            np.testing.assert_allclose(rows.loc[expected.index, expected.columns], expected, atol=1e-5)

    def compared(self, model, **options):
        return seeded(
            model.differential_expression,
            groupby="type",
            group1="B",
            group2="NK",
            mode="change",
            silent=True,
            n_samples_overall=300,
            **options,
        )

    def test_differences_through_all_factors_are_those_of_the_whole_model(self, model):
        whole = self.compared(model, batch_correction=True)
        turn_at_random(model)
        pd.testing.assert_frame_equal(self.compared(model, batch_correction=True), whole, check_exact=True)
        through_all = self.compared(model, factors=["F_3", "F_0", "F_1", "F_2"]).loc[whole.index]
        for name in whole.select_dtypes("number"):
            # To the rounding of float32; draws at a threshold may fall to the other side.
            atol = 0.01 if name.startswith("proba") else 0.1 if name == "bayes_factor" else 1e-4
            np.testing.assert_allclose(through_all[name], whole[name], rtol=1e-3, atol=atol, err_msg=name)
        nothing = self.compared(model, factors=[])
        np.testing.assert_allclose(nothing["lfc_mean"], 0, atol=1e-4)

    def test_differences_through_one_factor_are_those_that_the_decoder_gives_it(self, model):
        matrix = turn_at_random(model)
        table = self.compared(model, factors=["F_1"])
        # Expression moves along the loading of the factor, and differently for each of them.
        decoder, z = model.get_decoder(rotated=True), model.get_latent_representation().astype(float)
        f = (z @ matrix)[:, 1]
        inside = {group: f[(model.adata.obs["type"] == group).to_numpy()].mean() for group in ("B", "NK")}
        slope = (inside["B"] - inside["NK"]) * decoder.centered().weight_gk[:, 1]
        got = table["lfc_mean"].loc[model.adata.var_names].to_numpy()
        assert np.corrcoef(got, slope)[0, 1] > 0.95
        model.rotate("none")
        other = self.compared(model, factors=["Z_1"])["lfc_mean"].loc[model.adata.var_names].to_numpy()
        assert not np.allclose(got, other, atol=1e-2)
        # A rotation that is a permutation gives the numbers of the latent itself.
        order = [2, 3, 1, 0]
        model.rotation_ = {"matrix": np.eye(4)[:, order], "method": "varimax"}
        permuted = self.compared(model, factors=["F_2"])["lfc_mean"].loc[model.adata.var_names]
        np.testing.assert_allclose(permuted, other, atol=1e-5)

    def test_a_rotation_object_is_what_is_in_force(self, model):
        matrix = turn_at_random(model)
        assert isinstance(model.rotation, Rotation)
        np.testing.assert_array_equal(model.rotation.matrix_kk, matrix)
        model.rotation_ = {"matrix": matrix * 1.1, "method": "varimax"}
        with pytest.raises(ValueError, match="must have unit length"):
            model.ablate()
