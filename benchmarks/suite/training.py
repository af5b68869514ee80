"""Rows about training: time per epoch, and time to the same held-out ELBO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anndata import AnnData
from lightning.pytorch.callbacks import Callback
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE, fit_ensemble
from suite.lab import TRAIN, Lab, backend, of_class
from suite.measure import STOCK, Clock, Times, now, race, threads, timed
from suite.registry import Found, Measured, Row, Unavailable, case

LR, LARGE_LR, LARGE_BATCH = 5e-3, 2e-2, 256


def epochs(
    cls: type, adata: AnnData, lab: Lab, *, n_batches: int = 1, train: dict[str, Any] | None = None, **options: Any
) -> Callable[[], list[Times]]:
    """A contestant that trains a fresh model of this class, the same seed each time, and says how long epochs took."""

    def run() -> list[Times]:
        model = of_class(cls, adata, n_batches, **options)
        clock = Clock()
        model.train(lab.n_epochs, callbacks=[clock], plan_kwargs={"lr": LR}, **TRAIN, **(train or {}))
        return clock.epochs()

    return run


@dataclass(frozen=True)
class Size:
    """A configuration whose epochs are timed."""

    n_genes: int | None = None
    n_batches: int = 1
    n_latent: int = 10
    n_threads: int = 1
    likelihood: str = "nb"
    batch_size: int = 128

    def measure(self, lab: Lab, rows: tuple[Row, ...]) -> Found:
        adata = lab.counts(self.n_genes, self.n_batches)
        return self.race_on(adata, lab, rows)

    def race_on(self, adata: AnnData, lab: Lab, rows: tuple[Row, ...]) -> Found:
        options = {"n_batches": self.n_batches, "n_latent": self.n_latent, "gene_likelihood": self.likelihood}
        train = {"batch_size": self.batch_size}
        contestants = {STOCK: epochs(LinearSCVI, adata, lab, train=train, **options)}
        missing: dict[str, Unavailable] = {}
        for row in rows:
            try:
                how = backend("torch") if row.name.endswith("-torch") else {}
            except Unavailable as reason:
                missing[row.name] = reason
            else:
                contestants[row.name] = epochs(LDVAE, adata, lab, train=train | how, **options)
        there = tuple(row for row in rows if row.name not in missing)
        if not there:
            return missing
        with threads(self.n_threads):
            rounds = min(lab.rounds, 2) if adata.n_vars > 5000 else lab.rounds
            return missing | race(contestants, there, rounds, own_clock=True, warm_up=False, spare_seconds=0)


def _register(size: Size, *rows: Row) -> None:
    case(*rows)(size.measure)


_register(
    Size(n_genes=1000),
    Row("epoch-1000", "epoch, 1,000 genes, 1 batch, 10 latents", 5, in_short=True),
)
_register(
    Size(n_genes=1000, n_threads=2),
    Row("epoch-1000-2-threads", "the same, two threads, wall", 4, clock="wall"),
)
_register(
    Size(),
    Row("epoch-2000", "epoch, {genes} genes, 1 batch, 10 latents", 6),
    Row("epoch-2000-torch", 'the same without the compiled kernel, `backend="torch"`', 2.5),
)
_register(
    Size(n_threads=2),
    Row("epoch-2000-2-threads", "epoch, {genes} genes, two threads, wall", 4, clock="wall"),
)
_register(
    Size(batch_size=LARGE_BATCH),
    Row("epoch-2000-large", "epoch, {genes} genes, minibatches of 256 on both sides"),
)
_register(
    Size(n_batches=4, n_latent=30),
    Row("epoch-2000-4-batches", "epoch, {genes} genes, 4 batches, 30 latents", 5),
)
_register(Size(n_genes=10_000), Row("epoch-10000", "epoch, 10,000 genes", 7))
_register(Size(likelihood="zinb"), Row("epoch-zinb", 'epoch, {genes} genes, `gene_likelihood="zinb"`', 2))
_register(Size(likelihood="poisson"), Row("epoch-poisson", 'epoch, {genes} genes, `gene_likelihood="poisson"`', 2))


@case(
    Row(
        "threads",
        "epoch of LDVAE, {genes} genes, two threads, against one thread, wall",
        0.95,
        clock="wall",
        against="one thread",
    )
)
def two_threads(lab: Lab, rows: tuple[Row, ...]) -> Found:
    train = epochs(LDVAE, lab.counts(), lab, n_latent=10)

    def with_threads(n: int) -> list[Times]:
        with threads(n):
            return train()

    contestants = {STOCK: lambda: with_threads(1), "threads": lambda: with_threads(2)}
    return race(contestants, rows, lab.rounds, own_clock=True, warm_up=False, spare_seconds=0)


def further(model: Any, lab: Lab, method: str = "train", **options: Any) -> list[Times]:
    """Epochs of a training of a model that is there already."""
    clock = Clock()
    getattr(model, method)(lab.n_epochs, callbacks=[clock], **TRAIN, **options)
    return clock.epochs()


@case(
    Row("epoch-again", "epoch of a second `train()`", 4.5),
    Row("epoch-evaluation-mode", "the same, `train(evaluation_mode=True)`", 4.5),
    Row("epoch-no-norm", 'epoch without batch norm in the decoder, `bias="auto"`', 4.5),
    Row("epoch-ordered", "epoch of `order_factors()`", 4.5),
    Row("epoch-query", "epoch of a query", 4.5),
    Row("epoch-query-encoded", "the same, `encode_covariates=True`", 4.5),
)
def other_trainings(lab: Lab, rows: tuple[Row, ...]) -> Found:
    """Each against an epoch of LinearSCVI on the same cells, two batches; LinearSCVI has neither queries nor an order."""
    adata = lab.counts(n_batches=2)
    ready: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in ready:
            options: dict[str, Any] = {}
            if name in ("epoch-no-norm", "epoch-ordered"):
                options = {"use_batch_norm": "encoder", "bias": "auto"}
            ready[name] = of_class(LDVAE, adata, 2, n_latent=10, **options)
            ready[name].train(1, **TRAIN)
        return ready[name]

    def query(*, encode: bool) -> Any:
        name = f"query-{encode}"
        if name not in ready:
            cells = adata[: adata.n_obs // 4].copy()
            reference = of_class(LDVAE, cells, 2, n_latent=10, encode_covariates=encode)
            reference.train(1, **TRAIN)
            new = adata.copy()
            new.obs["batch"] = "new"
            ready[name] = LDVAE.load_query_data(new, reference)
        return ready[name]

    contestants = {
        STOCK: epochs(LinearSCVI, adata, lab, n_batches=2, n_latent=10),
        "epoch-again": lambda: further(model("epoch-again"), lab),
        "epoch-evaluation-mode": lambda: further(model("epoch-evaluation-mode"), lab, evaluation_mode=True),
        "epoch-no-norm": lambda: further(model("epoch-no-norm"), lab),
        "epoch-ordered": lambda: further(model("epoch-ordered"), lab, "order_factors"),
        "epoch-query": lambda: further(query(encode=False), lab),
        "epoch-query-encoded": lambda: further(query(encode=True), lab),
    }
    with threads(1):
        return race(contestants, rows, min(2, lab.rounds), own_clock=True, warm_up=False, spare_seconds=0)


@case(
    Row(
        "ensemble",
        "`fit_ensemble(n_runs=5)` against one training of the same length, 60 epochs, wall",
        0.6,
        is_upper_bound=True,
        clock="wall",
    )
)
def ensemble(lab: Lab, rows: tuple[Row, ...]) -> Found:
    """With all processors; the start of processes counts."""
    adata = lab.counts()
    stock = of_class(LinearSCVI, adata, n_latent=10)
    with threads(1):
        of_stock = timed(lambda: stock.train(lab.n_long, plan_kwargs={"lr": LR}, **TRAIN))
        LDVAE.setup_anndata(adata)
        options = {"plan_kwargs": {"lr": LR}, "check_val_every_n_epoch": None, **TRAIN}
        of_ours = timed(
            lambda: fit_ensemble(adata, 5, n_latent=10, max_epochs=lab.n_long, train_kwargs=options, silent=True)
        )
    (row,) = rows
    ratio = of_ours.wall / of_stock.wall
    return {row.name: Measured(stock=of_stock.wall, ours=of_ours.wall, unit="s wall", ratio=ratio, wall_ratio=ratio)}


@case(Row("epoch-kidney", "epoch, real counts: human kidney, 5,685 cells x 2,000 genes"))
def kidney(lab: Lab, rows: tuple[Row, ...]) -> Found:
    return Size().race_on(lab.kidney, lab, rows)


class HeldOut(Callback):
    """Held-out ELBO after each epoch, and the time in training until then, that of the validation itself taken out."""

    def __init__(self, until: float | None = None) -> None:
        self.until = until
        self.elbo: list[float] = []
        self.times: list[Times] = []
        self.with_validation: list[Times] = []
        self._begin = self._validation = Times(0, 0)
        self._validating = 0.0, 0.0

    def on_train_start(self, *_: object) -> None:
        self._begin = now()

    def on_validation_start(self, trainer: Any, *_: object) -> None:
        self._validation = now()

    def on_validation_end(self, trainer: Any, *_: object) -> None:
        end = now()
        cpu, wall = end.cpu - self._begin.cpu, end.wall - self._begin.wall
        spent = self._validating
        self._validating = (
            spent[0] + end.cpu - self._validation.cpu,
            spent[1] + end.wall - self._validation.wall,
        )
        self.with_validation.append(Times(cpu, wall))
        self.times.append(Times(cpu - self._validating[0], wall - self._validating[1]))
        self.elbo.append(float(trainer.callback_metrics["elbo_validation"]))
        if self.until is not None and self.elbo[-1] <= self.until:
            trainer.should_stop = True


def held_out(cls: type, lab: Lab, batch_size: int, lr: float, n_epochs: int, until: float | None) -> HeldOut:
    model = of_class(cls, lab.counts(n_batches=4), 4, n_latent=10)
    seen = HeldOut(until)
    model.train(
        n_epochs,
        batch_size=batch_size,
        plan_kwargs={"lr": lr, "n_epochs_kl_warmup": 10},
        check_val_every_n_epoch=1,
        callbacks=[seen],
        **TRAIN,
    )
    return seen


SLACK = 0.0015


@case(
    Row("same-elbo", "training until the same held-out ELBO, same minibatch (128) and learning rate (5e-3)", 5),
    Row(
        "same-elbo-large",
        "the same; here minibatches of 256 and learning rate 2e-2, LinearSCVI's 128 and 5e-3 (the minibatch is part of it)",
        12,
    ),
)
def same_elbo(lab: Lab, rows: tuple[Row, ...]) -> Found:
    """The target is LinearSCVI's own best held-out ELBO of this training and 0.15 %."""
    with threads(1):
        stock = held_out(LinearSCVI, lab, 128, LR, lab.n_long, None)
        until = min(stock.elbo) * (1 + SLACK)
        at = next(i for i, elbo in enumerate(stock.elbo) if elbo <= until)
        out = {}
        for row in rows:
            batch_size, lr = (LARGE_BATCH, LARGE_LR) if row.name.endswith("large") else (128, LR)
            ours = held_out(LDVAE, lab, batch_size, lr, 2 * lab.n_long, until)
            was_reached = ours.elbo[-1] <= until
            out[row.name] = Measured(
                stock=stock.times[at].cpu,
                ours=ours.times[-1].cpu,
                unit="s",
                ratio=stock.times[at].cpu / ours.times[-1].cpu if was_reached else float("nan"),
                cpu_ratio=stock.times[at].cpu / ours.times[-1].cpu,
                wall_ratio=stock.times[at].wall / ours.times[-1].wall,
                note=f"ELBO {until:.2f}; LinearSCVI after {at + 1} of {lab.n_long} epochs, "
                + (f"LDVAE after {len(ours.elbo)}" if was_reached else f"LDVAE not within {len(ours.elbo)}")
                + "; validation each epoch is not counted, with it "
                + f"{stock.with_validation[at].cpu / ours.with_validation[-1].cpu:.1f}x.",
                more={
                    "stock_elbo": stock.elbo,
                    "ours_elbo": ours.elbo,
                    "stock_cpu_seconds": [t.cpu for t in stock.times],
                    "ours_cpu_seconds": [t.cpu for t in ours.times],
                },
            )
        return out
