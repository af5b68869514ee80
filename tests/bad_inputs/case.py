"""A bad input, what it is expected to lead to, and the check that an error changed nothing."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from scipy import sparse

from ldvae_ext import get, tl
from ldvae_ext.core import LinearDecoder
from ldvae_ext.model import LDVAE, Ensemble, fit_ensemble
from tests.helpers import TRAIN, counts

N_CELLS, N_GENES, N_LATENT = 60, 30, 3


@dataclass(frozen=True)
class Case:
    """An input of an entry point.

    Parameters
    ----------
    entry
        Public name, as in `tests/golden/public_api.txt`; `cli.` and the command for the command line.
    what
        What is bad about the input.
    build
        Prepares the input with a :class:`Bench` and returns the call, which takes no arguments.
    error
        Class of the expected error; None if a right result is expected.
    fragments
        Texts that the message of the error has, or that of a warning before a right result.
    check
        Raises unless the result is right.
    slow
        True if it takes many seconds.
    """

    entry: str
    what: str
    build: Callable[[Bench], Callable[[], Any]]
    error: type[BaseException] | None = None
    fragments: tuple[str, ...] = ()
    check: Callable[[Any], None] | None = None
    slow: bool = False

    @property
    def id(self) -> str:
        return f"{self.entry}: {self.what}"


def bad(
    entry: str,
    what: str,
    build: Callable[[Bench], Callable[[], Any]],
    error: type[BaseException],
    *fragments: str,
) -> Case:
    """A case that ends with an error whose message has these fragments."""
    return Case(entry, what, build, error, fragments)


def right(
    entry: str,
    what: str,
    build: Callable[[Bench], Callable[[], Any]],
    check: Callable[[Any], None],
    *fragments: str,
    slow: bool = False,
) -> Case:
    """A case that has a right result, with warnings that have these fragments."""
    return Case(entry, what, build, None, fragments, check, slow)


class Bench:
    """Small inputs for one case. What it hands out is compared before and after an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._watched: list[Any] = []

    def watch(self, thing: Any) -> Any:
        """Compare this before and after an error, too."""
        self._watched.append(thing)
        return thing

    def counts(self, spoil: Callable[[AnnData], Any] | None = None, **kwargs: Any) -> AnnData:
        """Counts of 60 cells in three batches that no model has seen."""
        adata = counts(**{"n_cells": N_CELLS, "n_genes": N_GENES, "n_batches": 3, **kwargs})
        return self._spoilt(adata, spoil)

    def ready(self, spoil: Callable[[AnnData], Any] | None = None, **setup: Any) -> AnnData:
        """Counts that are set up."""
        adata = self.counts()
        LDVAE.setup_anndata(adata, **{"batch_key": "batch", **setup})
        return self._spoilt(adata, spoil)

    def model(self) -> LDVAE:
        """A trained model, which must not be changed."""
        model = self.watch(trained_model())
        self.watch(model.adata)
        return model

    def own_model(self, **kwargs: Any) -> LDVAE:
        """An untrained model of its own."""
        scvi.settings.seed = 0
        model = self.watch(LDVAE(self.ready(), n_latent=N_LATENT, **kwargs))
        return model

    def exported(self, spoil: Callable[[AnnData], Any] | None = None) -> AnnData:
        """An AnnData with all that exports write."""
        return self._spoilt(all_exports().copy(), spoil)

    def ensemble(self) -> Ensemble:
        """Two trained models."""
        ensemble = trained_ensemble()
        for model in ensemble.models:
            self.watch(model)
        return ensemble

    def halves(self) -> Ensemble:
        """Two models of disjoint halves of the cells."""
        return trained_ensemble("halves")

    def decoder(self) -> LinearDecoder:
        return get.decoder(all_exports())

    def ablation(self, spoil: Callable[[AnnData], Any] | None = None) -> AnnData:
        """Effects of the factors in each cell."""
        return self._spoilt(effects().copy(), spoil)

    def gene_ablation(self, spoil: Callable[[AnnData], Any] | None = None) -> AnnData:
        """Effects of the factors on each gene."""
        return self._spoilt(gene_effects().copy(), spoil)

    def _spoilt(self, adata: AnnData, spoil: Callable[[AnnData], Any] | None) -> AnnData:
        if spoil is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                spoil(adata)
        return self.watch(adata)

    def state(self) -> list[str]:
        """Digests of all inputs, of the folder, and of what is global."""
        files = {str(path.relative_to(self.folder)): path for path in sorted(self.folder.rglob("*"))}
        content = {name: path.read_bytes() if path.is_file() else b"" for name, path in files.items()}
        return [*map(digest, self._watched), digest(content), digest(globals_now())]


def globals_now() -> dict[str, Any]:
    """Global state that no call may leave behind."""
    import matplotlib.pyplot as plt
    import torch

    return {"figures": plt.get_fignums(), "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled()}


def digest(thing: Any) -> str:
    """The same for equal contents."""
    found = hashlib.sha256()
    for part in _parts(thing):
        found.update(part)
    return found.hexdigest()


def _parts(thing: Any) -> Any:
    if isinstance(thing, AnnData):
        slots = ("X", "layers", "obs", "var", "obsm", "varm", "obsp", "varp", "uns")
        thing = {slot: getattr(thing, slot) for slot in slots}
    elif isinstance(thing, LDVAE):
        module = thing.module
        thing = {
            "weights": {name: value.detach().numpy() for name, value in module.state_dict().items()},
            "state": [thing.is_trained_, module.training, str(thing.rotation), sorted(vars(thing))],
        }
    yield type(thing).__name__.encode()
    if isinstance(thing, Mapping):
        for key in thing:
            yield repr(key).encode()
            yield from _parts(thing[key])
    elif isinstance(thing, pd.DataFrame):
        yield repr(thing.index.tolist()).encode()
        for position, name in enumerate(thing):
            column = thing.iloc[:, position]
            yield repr((name, column.dtype, column.astype(object).tolist())).encode()
    elif sparse.issparse(thing):
        coordinates = thing.tocoo()
        yield repr((thing.shape, thing.dtype)).encode()
        yield from (np.ascontiguousarray(a).tobytes() for a in (*coordinates.coords, coordinates.data))
    elif isinstance(thing, np.ndarray) and thing.dtype != object:
        yield repr((thing.shape, thing.dtype)).encode()
        yield np.ascontiguousarray(thing).tobytes()
    elif isinstance(thing, (list, tuple, np.ndarray)):
        for value in thing:
            yield from _parts(value)
    elif isinstance(thing, bytes):
        yield thing
    else:
        yield repr(thing).encode()


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    error: BaseException | None
    message: str
    """Of the error, else of all warnings; without the name of the folder."""
    result: Any
    changed: bool
    """True if the call changed an input, a file or what is global."""


def run_case(case: Case) -> Outcome:
    """Run a case in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        call = case.build(bench)
        before = bench.state()
        scvi.settings.seed = 0
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning\.")
            error, result = None, None
            try:
                result = call()
                if case.check is not None:
                    case.check(result)
            except Exception as raised:  # noqa: BLE001 - the kind of error is what is looked at
                error = raised
        message = " ".join(str(each.message) for each in record if each.category is UserWarning)
        if error is not None:
            message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        return Outcome(error, message.replace(name, "FOLDER"), result, bench.state() != before)


def assert_expected(case: Case, outcome: Outcome) -> None:
    """Raise unless the outcome is the expected one."""
    missing = [fragment for fragment in case.fragments if fragment not in outcome.message]
    problems = {
        f"no right result but {outcome.error!r}": case.error is None and outcome.error is not None,
        f"no error but {outcome.result!r}": case.error is not None and outcome.error is None,
        f"another error, {outcome.error!r}": case.error is not None and type(outcome.error) is not case.error,
        "the error left something changed": case.error is not None and outcome.changed,
        f"{missing} is not in {outcome.message!r}": bool(missing),
    }
    for problem, is_there in problems.items():
        if is_there:
            msg = f"{case.id}: {problem}"
            raise AssertionError(msg) from outcome.error


@cache
def trained_model() -> LDVAE:
    adata = counts(N_CELLS, N_GENES, 3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    return _trained(LDVAE(adata, n_latent=N_LATENT, n_hidden=8))


@cache
def trained_ensemble(resample: str | None = None) -> Ensemble:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_ensemble(
            trained_model().adata,
            2,
            n_latent=N_LATENT,
            resample=resample,
            max_epochs=2,
            seed=0,
            model_kwargs={"n_hidden": 8},
            train_kwargs={"accelerator": "cpu"},
            n_jobs=1,
            silent=True,
        )


@cache
def all_exports() -> AnnData:
    """An AnnData with an export, its rotation, population loadings, groups, a consensus and programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ensemble = trained_ensemble()
        adata = ensemble.models[0].adata.copy()
        model = trained_model()
        model.export_to_anndata(adata, stats=True)
        tl.population_loadings(adata, "batch")
        tl.rank_factors_groups(adata, "batch")
        ensemble.export_to_anndata(adata)
        trained_programs().export_to_anndata(adata)
        return adata


@cache
def trained_programs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained_model().get_programs(2, "batch")


@cache
def effects() -> AnnData:
    return tl.ablate(all_exports())


@cache
def gene_effects() -> AnnData:
    return tl.ablate_genes(all_exports(), "batch")


def _trained(model: LDVAE) -> LDVAE:
    scvi.settings.seed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(2, batch_size=32, **TRAIN)
    return model


def numbered(cases: list[Case]) -> list[Case]:
    """The cases, after a check that no two have one name."""
    for name, same in itertools.groupby(sorted(case.id for case in cases)):
        if len(list(same)) > 1:
            msg = f"two cases are named {name!r}"
            raise ValueError(msg)
    return cases
