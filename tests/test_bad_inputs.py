"""Bad and hostile inputs over every public entry point: a specific error that changes nothing, or a right result."""

from __future__ import annotations

import matplotlib as mpl
import pytest

from tests.bad_inputs import CASES
from tests.bad_inputs.case import assert_expected, digest, run_case
from tests.bad_inputs.make_table import PATH, first_columns, literal, written
from tests.golden.make_public_api import PATH as PUBLIC_API
from tests.helpers import counts

# Public names without a case, and why.
_RESULT = "a value that other functions return; its parts are checked where it is made"
_NOTHING = "takes nothing but the object itself"
_OF_SCVI = "a switch of scvi-tools without data"
NOT_COVERED = {
    "core.LinearDecoder.centered": _NOTHING,
    "core.LinearDecoder.gene_information": _NOTHING,
    "core.LinearDecoder.signs": _NOTHING,
    "core.LinearDecoder.to_arrays": _NOTHING,
    "core.LoadingInformation.add": "takes cells of `LDVAE`'s own stream",
    "core.RawLinear.to_arrays": _NOTHING,
    "core.Rotation.cells": "takes cells of `LDVAE`'s own stream",
    "core.SlopeSums.scores": _NOTHING,
    "model.Ensemble.__init__": _RESULT,
    "model.Ensemble.representative": _NOTHING,
    "model.FactorStats.__init__": _RESULT,
    "model.LDVAE.get_var_names": _OF_SCVI,
    "model.LDVAE.setup_annbatch": "needs packages that are not part of the tests of all installations; has tests of its own",
    "model.NLatentSuggestion.__init__": _RESULT,
    "model.Programs.__init__": _RESULT,
    "model.RefinedPosterior.__init__": _RESULT,
    "model.ShrunkenLoadings.__init__": _RESULT,
    "tl.FactorMatch.__init__": _RESULT,
}
ROOMS = ("core.", "datasets.", "get.", "model.", "pl.", "tl.")


@pytest.fixture(autouse=True)
def _no_windows():
    mpl.use("Agg")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.slow else []) for case in CASES],
)
def test_it_is_a_specific_error_that_changes_nothing_or_a_right_result(case):
    assert_expected(case, run_case(case))


def test_every_public_name_that_takes_data_has_a_case():
    lines = [line for line in PUBLIC_API.read_text().splitlines() if not line.endswith((": class", ": property"))]
    public = {line.partition("(")[0] for line in lines if line.startswith(ROOMS)}
    covered = {case.entry for case in CASES}
    assert sorted(public - covered - set(NOT_COVERED)) == []
    assert sorted(set(NOT_COVERED) & covered) == []
    assert {"run", "report", "cli.run", "cli.project"} <= covered


def test_there_are_enough_cases():
    assert len(CASES) >= 150


def test_the_committed_table_is_of_these_cases():
    rows = written([(case.entry, case.what, "outcome") for case in CASES])
    assert first_columns(PATH.read_text(encoding="utf-8")) == first_columns(rows), (
        "`python -m tests.bad_inputs.make_table` writes it anew"
    )


def test_the_table_shows_markup_as_it_is():
    assert literal("$x_1$ <b> \n\x00 | `a`") == r"`` $x_1$ <b> \n\x00 \| `a` ``"


def test_a_change_is_seen():
    adata = counts()
    before = digest(adata)
    assert digest(adata.copy()) == before
    adata.obs["batch"] = adata.obs["batch"].cat.rename_categories(["b9"])
    assert digest(adata) != before
