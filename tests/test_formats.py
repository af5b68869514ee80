"""Written formats: examples of each version open and say what they said; a format changes only with a new number."""

from __future__ import annotations

import json
import shutil
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.callbacks import LambdaCallback
from packaging.version import Version

from ldvae_ext import _formats, get
from ldvae_ext._folder import FolderError, check_can_be_written
from ldvae_ext.core import LinearDecoder
from ldvae_ext.model import LDVAE, Ensemble
from tests.golden.make_formats import EXAMPLES, FORMATS, TRAIN, cells, ensemble_in, number_of, resumed
from tests.golden.schemas import schema_of

FOLDERS = sorted(path.relative_to(FORMATS).as_posix() for path in FORMATS.glob("*/*"))
# Examples were written by networks in float32.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


# scvi-tools pickles the history of a training, a pandas object.
OPENS_PICKLES = Version(pd.__version__) >= Version("3")
NO_PICKLES = "pickles of pandas 3 do not open under pandas 2, in scvi-tools or here"
needs_pickles = pytest.mark.skipif(not OPENS_PICKLES, reason=NO_PICKLES)


def expected_of(folder):
    values = json.loads((folder / "expected.json").read_text())
    return {name: np.array(value) if isinstance(value, list) else value for name, value in values.items()}


def codes(adata):
    return adata.obs["batch"].astype(str).to_numpy()


def check_decoder(folder, expected):
    decoder = LinearDecoder.load(folder / "decoder.npz")
    covariates = {name: expected[name] for name in ("age", "group") if name in expected} or None
    given = {} if covariates is None else {"covariates": covariates}
    np.testing.assert_allclose(decoder.scale(expected["z"], expected["batch"], **given), expected["scale"], **CLOSE)
    theta = decoder.theta_bg[[decoder.batches.tolist().index(name) for name in expected["batch"]]]
    np.testing.assert_allclose(theta, expected["theta"], **CLOSE)


def check_export(folder, expected):
    adata = ad.read_h5ad(folder / "adata.h5ad")
    table, decoder = get.factors(adata), get.decoder(adata)
    assert table.index.tolist() == expected["names"].tolist()
    order, sign = table["dimension"].to_numpy(), table["sign"].to_numpy()
    np.testing.assert_allclose(adata.obsm["X_ldvae"], expected["mean"][:, order] * sign, **CLOSE)
    np.testing.assert_allclose(adata.obsm["X_ldvae_var"], expected["variance"][:, order], **CLOSE)
    np.testing.assert_allclose(decoder.scale(adata.obsm["X_ldvae"], codes(adata)), expected["scale"], **CLOSE)
    # The logarithm of decoded expression is linear: its slope is the loading, but for a constant of each factor.
    z = np.concatenate([np.zeros((1, 2)), np.eye(2)])
    log_scale = np.log(decoder.scale(z, np.repeat(decoder.batches[0], 3)))
    slope = (log_scale[1:] - log_scale[0]).T
    np.testing.assert_allclose(get.loadings(adata).to_numpy(), slope - slope.mean(axis=0), rtol=1e-4, atol=1e-5)


def check_ablation(folder, expected):
    effects = ad.read_h5ad(folder / "adata.h5ad")
    np.testing.assert_allclose(effects.X, expected["effect"], rtol=1e-3, atol=2e-4)
    table = get.ablation_df(effects, "group")
    for (group, factor), mean in table.set_index(["group", "factor"])["mean"].items():
        own = np.asarray(effects[effects.obs["group"] == group, factor].X)
        assert mean == pytest.approx(own.mean())


def check_ranking(folder, expected):
    adata = ad.read_h5ad(folder / "adata.h5ad")
    table = get.rank_factors_groups_df(adata).set_index(["group", "factor"])
    assert sorted(set(table.index.get_level_values(0))) == sorted(expected["groups"])
    factors = adata.uns["rank_factors_groups"]["factors"].tolist()
    for (group, factor), area in table["auroc"].items():
        z, own = adata.obsm["X_ldvae"][:, factors.index(factor)], (adata.obs["group"] == group).to_numpy()
        difference = z[own][:, None] - z[~own][None, :]
        assert area == pytest.approx((np.sign(difference) + 1).mean() / 2)
        assert table.loc[(group, factor), "mean_difference"] == pytest.approx(z[own].mean() - z[~own].mean(), abs=1e-6)


def check_populations(folder, expected):
    adata = ad.read_h5ad(folder / "adata.h5ad")
    table = get.population_loadings_df(adata).set_index(["group", "factor", "gene"])["value"].sort_index()
    z, loadings = adata.obsm["X_ldvae"].astype(float), adata.varm["ldvae_loadings"].astype(float)
    names = adata.uns["ldvae_population_loadings"]["names"].tolist()
    for group in expected["groups"]:
        own = (adata.obs["group"] == group).to_numpy()
        for factor in (name for name in names if name != "batch"):
            k = names.index(factor)
            found = table.loc[group, factor][adata.var_names].to_numpy()
            product = (z[own, k].mean() - z[~own, k].mean()) * loadings[:, k]
            np.testing.assert_allclose(found - found.mean(), product, rtol=1e-4, atol=1e-6)


def check_consensus(folder, expected):
    adata = ad.read_h5ad(folder / "adata.h5ad")
    np.testing.assert_allclose(get.stability(adata)["reproducibility"], expected["reproducibility"], **CLOSE)
    np.testing.assert_allclose(get.consensus_loadings(adata), expected["loadings"], **CLOSE)


def check_programs(folder, expected):
    adata = ad.read_h5ad(folder / "adata.h5ad")
    usages = get.programs(adata, "usages")
    np.testing.assert_allclose(usages, expected["usages"], **CLOSE)
    np.testing.assert_allclose(usages.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(get.programs(adata, "profiles"), expected["profiles"], **CLOSE)
    np.testing.assert_allclose(get.programs(adata, "stats")["stability"], expected["stability"], **CLOSE)


def check_saved_model(folder, expected):
    ways = [True] * OPENS_PICKLES + [False] * (folder / "model" / "model.json").exists()
    if not ways:
        pytest.skip(NO_PICKLES)
    for trusted in ways:
        model = LDVAE.load(str(folder / "model"), cells(), accelerator="cpu", trusted=trusted)
        mean, variance = model.get_latent_representation(return_dist=True)
        np.testing.assert_allclose(mean, expected["mean"], **CLOSE)
        np.testing.assert_allclose(variance, expected["variance"], **CLOSE)
        np.testing.assert_allclose(model.get_loadings(), expected["loadings"], **CLOSE)


def check_ensemble(folder, expected):
    adata, trained = cells(), []
    training = {**TRAIN, "callbacks": [LambdaCallback(on_train_start=lambda *_: trained.append(1))]}
    for models in (
        Ensemble.load(folder / "ensemble", adata),
        ensemble_in(folder / "ensemble", adata, train_kwargs=training),
    ):
        for model, mean, variance in zip(models.models, expected["mean"], expected["variance"], strict=True):
            own_mean, own_variance = model.get_latent_representation(return_dist=True)
            np.testing.assert_allclose(own_mean, mean, **CLOSE)
            np.testing.assert_allclose(own_variance, variance, **CLOSE)
        np.testing.assert_allclose(models.consensus.loading_gk, expected["loadings"], **CLOSE)
        np.testing.assert_allclose(models.stats["reproducibility"], expected["reproducibility"], **CLOSE)
    # All runs were in the folder.
    assert not trained


def check_checkpoint(folder, expected):
    for n_epochs in (2, 3):
        trained = []
        callbacks = [LambdaCallback(on_train_epoch_end=lambda *_, trained=trained: trained.append(1))]
        model = resumed(folder / "training.ckpt", n_epochs, callbacks=callbacks)
        assert len(trained) == n_epochs - 2
        elbo = model.history["elbo_train"]["elbo_train"]
        assert elbo.index.tolist() == list(range(n_epochs))
        np.testing.assert_array_equal(elbo[:2], expected["elbo"])
        mean, _ = model.get_latent_representation(return_dist=True)
        assert np.allclose(mean, expected["mean"], **CLOSE) == (n_epochs == 2)


def check_results(folder, expected):
    # The folder is known as one with results, which may be replaced.
    check_can_be_written(folder / "run", overwrite=True)
    (folder / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match="did not write"):
        check_can_be_written(folder / "run", overwrite=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_examples_of_all_versions_say_what_they_said(name, tmp_path):
    # A copy: nothing may be written beside the examples.
    folder = shutil.copytree(FORMATS / name, tmp_path / "example")
    globals()[f"check_{name.split('/')[0]}"](folder, expected_of(folder))


@pytest.mark.parametrize("name", EXAMPLES)
def test_there_is_an_example_of_each_version(name):
    versions = {int(path.name.split("-")[0]) for path in (FORMATS / name).iterdir()}
    assert versions == set(range(1, number_of(name) + 1))


def test_examples_are_small():
    assert max(path.stat().st_size for path in FORMATS.rglob("*") if path.is_file()) < 100_000


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_format_changes_only_with_a_new_number(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        EXAMPLES[name][1](tmp_path)
    committed = json.loads((FORMATS / name / str(number_of(name)) / "schema.json").read_text())
    assert json.loads(json.dumps(schema_of(tmp_path))) == committed, (
        f"The format {name!r} has changed. Raise {EXAMPLES[name][0]} in `ldvae_ext/_formats.py`, add a reader for version "
        f"{number_of(name)}, and run `python -m tests.golden.make_formats`."
    )


def test_each_format_writes_its_number():
    for name, (number, _) in EXAMPLES.items():
        written = json.dumps(json.loads((FORMATS / name / str(number_of(name)) / "schema.json").read_text()))
        assert '"format"' in written or "saved_format_" in written, f"{name} has no {number}"


def newer(value):
    """The value with 99 as the number of its format."""
    return {**value, "format": 99}


NEWER = r"has format 99, and this version of ldvae_ext reads formats up to \d+: .* Update ldvae_ext"
READERS = {
    "decoder": lambda a: get.decoder(a),
    "export": lambda a: get.factors(a),
    "consensus": lambda a: get.stability(a),
    "programs": lambda a: get.programs(a),
    "ranking": lambda a: get.rank_factors_groups_df(a),
    "populations": lambda a: get.population_loadings_df(a),
    "ablation": lambda a: get.ablation_df(a),
}


@pytest.mark.parametrize("name", READERS)
def test_a_newer_number_is_refused_with_what_to_do(name):
    folder = FORMATS / ("export" if name == "decoder" else name)
    adata = ad.read_h5ad(folder / "2" / "adata.h5ad")
    key = {
        "consensus": "ldvae_consensus",
        "programs": "ldvae_programs",
        "ranking": "rank_factors_groups",
        "populations": "ldvae_population_loadings",
        "ablation": "ldvae_ablation",
    }.get(name, "ldvae")
    READERS[name](adata)
    part = {"decoder": "decoder", "ranking": "params"}.get(name)
    if part is None:
        adata.uns[key] = newer(adata.uns[key])
    else:
        adata.uns[key][part] = newer(adata.uns[key][part])
    with pytest.raises(ValueError, match=NEWER):
        READERS[name](adata)


@needs_pickles
@pytest.mark.parametrize("trusted", [True, False])
def test_a_model_of_a_newer_version_is_refused_with_what_to_do(trusted, tmp_path):
    model = LDVAE.load(str(FORMATS / "saved_model" / "2" / "model"), cells(), accelerator="cpu")
    model.saved_format_ = 99
    model.save(str(tmp_path / "model"))
    for load in (LDVAE.load, LDVAE.load_query_data) if trusted else (LDVAE.load,):
        options = {"trusted": False} if not trusted else {}
        arguments = (str(tmp_path / "model"), cells()) if load == LDVAE.load else (cells(), str(tmp_path / "model"))
        with pytest.raises(ValueError, match=NEWER):
            load(*arguments, accelerator="cpu", **options)


def test_the_layout_of_plain_files_is_numbered_too(tmp_path):
    folder = shutil.copytree(FORMATS / "saved_model" / "2" / "model", tmp_path / "model")
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(newer(content)))
    with pytest.raises(ValueError, match=NEWER):
        LDVAE.load(str(folder), cells(), accelerator="cpu", trusted=False)


@needs_pickles
def test_an_old_model_is_saved_in_the_present_format(tmp_path):
    model = LDVAE.load(str(FORMATS / "saved_model" / "1-0.1.0" / "model"), cells(), accelerator="cpu")
    model.save(str(tmp_path / "model"))
    assert LDVAE.load(str(tmp_path / "model"), cells(), accelerator="cpu").saved_format_ == _formats.SAVED_MODEL
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert ["saved_format_", _formats.SAVED_MODEL] in description["attributes"]["dict"]


@pytest.mark.parametrize("found", ["x", 0, -1, 1.5, float("nan"), float("inf"), [1, 2]], ids=str)
def test_a_number_that_is_none_is_refused(found):
    with pytest.raises(ValueError, match="no positive integer"):
        _formats.check_format("It", found, 2)


@pytest.mark.parametrize("found", [None, 1, 2, np.int64(2), np.array(2)])
def test_present_and_earlier_numbers_are_read(found):
    assert _formats.check_format("It", found, 2) == (1 if found is None else int(found))
