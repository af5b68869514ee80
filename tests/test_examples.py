"""Examples in docstrings: everything public has one, and each shows what it really does."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import logging
import re

import numpy as np
import pytest

import ldvae_ext
from tests.golden.make_public_api import ROOMS
from tests.test_docstrings import documented

PROGRESS_BAR = re.compile(r"\r[^\n]*\n?")


def public():
    """Name and docstring of every public function and class, and of the methods that the package defines for LDVAE."""
    rooms = [ldvae_ext, *(getattr(ldvae_ext, name) for name in ROOMS)]
    for where in rooms:
        for name in where.__all__:
            thing = getattr(where, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{where.__name__}.{name}", thing.__doc__
    for name, method in inspect.getmembers(ldvae_ext.model.LDVAE, inspect.isroutine):
        if not name.startswith("_") and (method.__module__ or "").startswith("ldvae_ext"):
            yield f"ldvae_ext.model.LDVAE.{name}", method.__doc__


def has_example(doc):
    """True if a docstring has a section with examples."""
    return doc is not None and "Examples\n" in doc and ">>> " in doc


def lacking(docs):
    """Names whose docstring has no example."""
    return [name for name, doc in docs if not has_example(doc)]


class Checker(doctest.OutputChecker):
    """Compares output without the progress bars of trainings."""

    def check_output(self, want, got, optionflags):
        return super().check_output(want, PROGRESS_BAR.sub("", got), optionflags)


def failures(name, doc, names):
    """What doctest says of the examples of a docstring; an empty string if they are right."""
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    runner.run(doctest.DocTestParser().get_doctest(inspect.cleandoc(doc), names, name, None, 0), out=said.append)
    return "".join(said) if runner.failures else ""


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What examples start from, made once; `docs/api/index.md` states it."""
    from scvi import settings

    settings.seed = 0
    training = {"kl_warmup": "auto", "plan_kwargs": {"lr": 5e-3}}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    adata = ldvae_ext.datasets.pbmc68k()
    options = {"n_runs": 2, "n_latent": 5, "max_epochs": 20}
    result = ldvae_ext.run(adata.copy(), groupby="bulk_labels", umap=False, silent=True, **options)
    # Compiling UMAP takes longer than all of this; figures can do with any two columns.
    result.adata.obsm["X_umap"] = result.adata.obsm["X_ldvae"][:, :2]
    ldvae_ext.model.LDVAE.setup_anndata(adata)
    model = ldvae_ext.model.LDVAE(adata, n_latent=5)
    model.train(50, **training, **quiet)
    model.export_to_anndata()
    models = ldvae_ext.model.fit_ensemble(adata, resample="halves", train_kwargs=training, silent=True, **options)
    folder = tmp_path_factory.mktemp("model")
    model.save(folder, overwrite=True)
    return {"adata": adata, "folder": folder, "ablation": model.ablate(), "result": result, "models": models}


@pytest.fixture
def names(made, tmp_path, monkeypatch, caplog):
    """Names for one example, which may change the AnnData and the model, and write to the working directory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    caplog.set_level(logging.WARNING, "scvi")
    monkeypatch.chdir(tmp_path)
    adata, result = made["adata"].copy(), made["result"]
    model = ldvae_ext.model.LDVAE.load(made["folder"], adata)
    yield {
        "np": np,
        "ldvae_ext": ldvae_ext,
        "adata": adata,
        "model": model,
        "decoder": model.get_decoder(),
        "ablation": made["ablation"].copy(),
        "result": dataclasses.replace(result, adata=result.adata.copy()),
        "models": made["models"],
    }
    plt.close("all")


def test_everything_public_has_an_example():
    assert lacking(public()) == []


@pytest.mark.parametrize(
    ("name", "doc"),
    [pytest.param(name, doc, id=name) for name, doc in documented() if has_example(doc)],
)
def test_an_example_shows_what_it_does(name, doc, names):
    said = failures(name, doc, names)
    assert not said, said


def test_a_wrong_or_missing_example_is_found():
    assert "Expected:\n    3" in failures("wrong", "Examples\n--------\n>>> 1 + 1\n3\n", {})
    assert "NameError" in failures("broken", "Examples\n--------\n>>> nothing\n", {})
    assert failures("right", "Examples\n--------\n>>> 1 + 1\n2\n", {}) == ""
    docs = [("no_docstring", None), ("no_example", "Says nothing."), ("has_one", "Examples\n--------\n>>> 1\n1\n")]
    assert lacking(docs) == ["no_docstring", "no_example"]
