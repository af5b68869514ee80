"""The private functions of scvi-tools and Lightning that the package touches are those that it was written for."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version

import pytest

from ldvae_ext import _scvi
from ldvae_ext.backends import choose
from ldvae_ext.model import LDVAE
from tests.golden.make_scvi_contract import PATH, TABLE, TOUCHED, hashes, release_of, table
from tests.helpers import counts

CONTRACT = json.loads(PATH.read_text())


installed_hashes = cache(hashes)


def of_installed(package):
    """Hashes of the installed release, or of the newest known one if the installed one is new."""
    releases = CONTRACT[package]
    return releases.get(version(package)) or releases[max(releases, key=_scvi.Version)]


@pytest.mark.parametrize("name", TOUCHED)
def test_a_touched_function_is_unchanged(name):
    package = release_of(name)
    why, breaks = TOUCHED[name]
    expected, found = of_installed(package)[name], installed_hashes(package)[name]
    assert found, f"{name} is gone ({why}); this breaks: {breaks}"
    assert found == expected, f"{name} changed in {package} {version(package)} ({why}); look at: {breaks}"


def test_the_hash_is_of_the_code_alone(tmp_path):
    package = tmp_path / "scvi" / "module"
    package.mkdir(parents=True)
    code = "class VAE:\n    def loss(self, x):\n        {doc}return x{more}\n"
    texts = {
        "plain": code.format(doc="", more=""),
        "documented": code.format(doc='"""Loss."""\n        ', more=""),
        "changed": code.format(doc="", more=" + 1"),
    }
    found = {}
    for name, text in texts.items():
        (package / "_vae.py").write_text(text)
        found[name] = hashes("scvi-tools", tmp_path)["scvi.module._vae.VAE.loss"]
    assert found["plain"] == found["documented"] != found["changed"]


def test_the_table_in_the_docs_is_that_of_the_contract():
    assert TABLE.read_text() == table()


def test_the_installed_releases_are_tested():
    assert _scvi.untested_releases() == ""
    for package, (first, end) in _scvi.TESTED_RELEASES.items():
        known = [release for release in CONTRACT[package] if _scvi.Version(first) <= _scvi.Version(release)]
        assert any(_scvi.Version(release) < _scvi.Version(end) for release in known), package


@pytest.mark.filterwarnings("ignore:Training ended with a KL weight")
def test_auto_is_scvi_on_a_release_that_was_not_tested_and_warns_once(monkeypatch, recwarn):
    monkeypatch.setattr(_scvi, "version", lambda package: {"scvi-tools": "1.6.2"}.get(package, version(package)))
    monkeypatch.setattr(choose, "_noted", set())
    LDVAE.setup_anndata(adata := counts())
    model = LDVAE(adata, n_latent=3)
    assert choose.choose_backend(model.module).name == "scvi"
    assert choose.choose_backend(model.module).name == "scvi"
    said = [str(w.message) for w in recwarn if "has not been tested" in str(w.message)]
    assert len(said) == 1
    assert "scvi-tools 1.6.2" in said[0]
    # A backend that is asked for by name is used.
    assert choose.choose_backend(model.module, "numba").name == "numba"
