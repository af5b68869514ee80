"""What is read from a trained model is what was simulated: a program of one population, and latents without a task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData

from ldvae_ext import datasets, get
from ldvae_ext.core import ablation_effects
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN

N_TRUE = 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def truth():
    return datasets.simulate(
        2700, 300, N_TRUE, n_populations=3, specific_program=True, median_library=2000, theta=10, seed=1
    )


@pytest.fixture(scope="module")
def model(truth):
    """Trained with three latents more than there are factors."""
    adata, _ = truth
    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 1
    model = LDVAE(adata, n_latent=N_TRUE + 3)
    model.train(300, train_size=0.8, kl_warmup="auto", **TRAIN)
    return model


def top(values, n=20):
    return set(np.argsort(-np.abs(values))[:n].tolist())


@pytest.fixture(scope="module")
def program_genes(truth):
    _, decoder = truth
    return top(decoder.weight_gk[:, -1])


def test_the_first_direction_within_a_population_is_its_program_and_no_others(model, program_genes):
    directions = model.get_population_loadings("population", kind="within")
    found = {p: len(top(d["D_0"].to_numpy()) & program_genes) / 20 for p, d in directions.items()}
    assert found["population_0"] >= 0.8
    assert found["population_1"] <= 0.2
    assert found["population_2"] <= 0.2
    # The best single factor of the model, to compare: the program is spread over several.
    weight_gk = model.get_decoder().centered().weight_gk
    best = max(len(top(column) & program_genes) / 20 for column in weight_gk.T)
    assert best < found["population_0"]


def test_inside_a_population_the_ablation_names_the_factor_of_its_program(truth, model):
    adata, _ = truth
    inside = (adata.obs["population"] == "population_0").to_numpy()
    program_n = adata.obsm["z_true"][inside, -1]
    z_nk = model.get_latent_representation()[inside]
    right = int(np.argmax([abs(np.corrcoef(z_n, program_n)[0, 1]) for z_n in z_nk.T]))
    table = get.ablation_df(model.ablate(mode="group_mean", groupby="population"), "population")
    mean_pk = table.pivot_table(index="group", columns="factor", values="mean")[model.latent_names]
    assert mean_pk.loc["population_0"].to_numpy().argmax() == right
    others = mean_pk.iloc[1:, right].max()
    assert mean_pk.loc["population_0"].iloc[right] > 3 * others
    directions = model.get_population_directions("population").query("group == 'population_0' and direction == 'D_0'")
    assert directions["share"].to_numpy().argmax() == right


def test_on_held_out_cells_surplus_latents_do_not_matter_and_the_others_do(model):
    """A latent of a trained model is never quite empty, so that what is tested is an effect that matters."""
    kl_k = model.get_latent_kl().mean().to_numpy()
    surplus, used = kl_k < 0.05, kl_k > 1
    assert surplus.any()
    assert used.sum() == N_TRUE
    effects = model.ablate(indices=np.sort(model.validation_indices))
    table = get.ablation_df(effects, alternative="greater", min_effect=0.1)
    assert (table["q_value"][surplus] > 0.5).all()
    assert (table["q_value"][used] < 1e-6).all()
    assert (table["mean"][surplus].abs() < 0.01 * table["mean"][used].min()).all()


def test_with_the_true_decoder_a_factor_matters_where_it_is_active_and_noise_nowhere(truth):
    adata, decoder = truth
    rng = np.random.default_rng(0)
    with_noise = replace(
        decoder,
        weight_gk=np.column_stack([decoder.weight_gk, rng.normal(0, 0.1, len(decoder.genes))]),
        factors=[*decoder.factors, "noise"],
    )
    z_nk = np.column_stack([adata.obsm["z_true"], rng.normal(0, 0.5, adata.n_obs)])
    counts = adata.X.toarray()
    effect_nk = ablation_effects(with_noise, counts, z_nk, counts.sum(axis=1), None, 0.0, range(N_TRUE + 1))
    effects = AnnData(effect_nk, obs=adata.obs, var=pd.DataFrame(index=with_noise.factors))
    table = get.ablation_df(effects, "population", alternative="greater").set_index(["group", "factor"])
    program = f"Z_{N_TRUE - 1}"
    assert table.loc[("population_0", program), "q_value"] < 1e-50
    assert (effects[effects.obs["population"] != "population_0", program].X == 0).all()
    assert table.loc[("population_1", program), ["p_value", "effect_size"]].isna().all()
    for group in ("population_0", "population_1", "population_2"):
        assert table.loc[(group, "noise"), "p_value"] > 0.05
        inside = adata.obs["population"] == group
        for k in range(N_TRUE - 1):
            assert table.loc[(group, f"Z_{k}"), "q_value"] < 1e-6
            far, near = np.abs(z_nk[inside, k]) > 1, np.abs(z_nk[inside, k]) < 0.3
            if far.any() and near.any():
                assert effect_nk[inside][far, k].mean() > effect_nk[inside][near, k].mean()
