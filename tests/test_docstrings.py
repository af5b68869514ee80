"""Docstrings with shared parts: filled, complete, and absent where Python removes docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest

import ldvae_ext
from ldvae_ext._docs import FRAGMENTS, fill_docstring
from ldvae_ext.model import LDVAE

ABLATIONS = [
    ldvae_ext.tl.ablate,
    ldvae_ext.tl.ablate_genes,
    LDVAE.ablate,
    LDVAE.ablate_genes,
    LDVAE.get_explained_deviance,
    LDVAE.get_ablated_expression,
]


def documented():
    """Name and docstring of every module, class and function of the package."""
    for found in pkgutil.walk_packages(ldvae_ext.__path__, "ldvae_ext."):
        module = importlib.import_module(found.name)
        yield found.name, module.__doc__
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", None) == found.name:
                yield f"{found.name}.{name}", thing.__doc__
                if inspect.isclass(thing):
                    yield from (
                        (f"{found.name}.{name}.{member}", getattr(value, "__doc__", None))
                        for member, value in vars(thing).items()
                    )


def described(doc):
    """Names of the arguments in the section on parameters."""
    section = doc.split("Parameters\n----------\n")[1].split("\n\nReturns\n")[0]
    return {name for line in re.findall(r"^\S.*$", section, flags=re.MULTILINE) for name in line.split(", ")}


def words(text):
    return " ".join(text.split())


def test_no_docstring_has_an_unfilled_placeholder():
    docs = dict(documented())
    assert "ldvae_ext.tl._ablation.ablate" in docs
    assert "ldvae_ext.model._ablation.AblationMixin.ablate" in docs
    assert [name for name, doc in docs.items() if doc and re.search(r"%\(\w+\)s", doc)] == []


@pytest.mark.parametrize("function", ABLATIONS, ids=lambda f: f"{f.__module__.split('.')[1]}.{f.__name__}")
def test_an_ablation_describes_each_of_its_arguments(function):
    doc = inspect.getdoc(function)
    assert described(doc) == set(inspect.signature(function).parameters) - {"self"}
    for name in ("mode", "value"):
        assert words(FRAGMENTS[name]) in words(doc)
    if "scheme" in inspect.signature(function).parameters:
        for name in ("latents", "scheme", "refit_heads", "use_posterior", "n_samples", "seed", "transform_batch"):
            assert words(FRAGMENTS[name]) in words(doc), name


def test_every_fragment_is_used():
    docs = words(" ".join(inspect.getdoc(function) for function in ABLATIONS))
    assert [name for name, fragment in FRAGMENTS.items() if words(fragment) not in docs] == []


def test_a_fragment_is_indented_like_its_placeholder(monkeypatch):
    monkeypatch.setitem(FRAGMENTS, "two", "argument\n    First:\n\n    * second.")

    @fill_docstring
    def function():
        """Summary.

        Parameters
        ----------
        %(two)s
            Third.
        """

    expected = "Summary.\n\nParameters\n----------\nargument\n    First:\n\n    * second.\n    Third."
    assert inspect.getdoc(function) == expected


def test_an_unknown_fragment_is_an_error():
    def function():
        """Summary.

        %(nothing)s
        """

    with pytest.raises(KeyError, match="nothing"):
        fill_docstring(function)


@pytest.mark.slow
def test_functions_without_docstrings_are_left_alone():
    def function(): ...

    assert fill_docstring(function) is function
    code = "import ldvae_ext; print(ldvae_ext.tl.ablate.__doc__)"
    out = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "None"
