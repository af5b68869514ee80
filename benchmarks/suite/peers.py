"""Rows beside other tools for the same job. No targets: they answer other questions, in other ways."""

from __future__ import annotations

from functools import partial

from ldvae_ext.model import LDVAE
from suite.lab import TRAIN, Lab, of_class
from suite.measure import STOCK, race, threads
from suite.registry import Found, Row, Unavailable, case
from suite.training import LARGE_BATCH, LARGE_LR, epochs

N_EPOCHS = 50


def _drvi() -> type:
    try:
        from scvi.external import DRVI
    except ImportError as error:
        msg = "this scvi-tools has no DRVI"
        raise Unavailable(msg) from error
    return DRVI


@case(
    Row(
        "drvi-epoch",
        "epoch, 10 latents; `scvi.external.DRVI`, whose decoder is not linear, with its defaults",
        against="DRVI",
    )
)
def drvi_epoch(lab: Lab, rows: tuple[Row, ...]) -> Found:
    adata = lab.counts()
    contestants = {
        STOCK: epochs(_drvi(), adata, lab, n_latent=10),
        "drvi-epoch": epochs(LDVAE, adata, lab, n_latent=10),
    }
    with threads(1):
        return race(
            contestants,
            rows,
            min(2, lab.rounds),
            own_clock=True,
            warm_up=False,
            spare_seconds=0,
        )


@case(
    Row(
        "drvi-effects",
        "effect of each latent, `get_reconstruction_effect_of_each_split()` or `ablate()`",
        against="DRVI",
    )
)
def drvi_effects(lab: Lab, rows: tuple[Row, ...]) -> Found:
    drvi = of_class(_drvi(), lab.counts(), n_latent=10)
    with threads(1):
        drvi.train(1, **TRAIN)
        ours = lab.pair()[1]
        contestants = {
            STOCK: drvi.get_reconstruction_effect_of_each_split,
            "drvi-effects": ours.ablate,
        }
        note = "DRVI's effect is a change of decoder outputs, not of the likelihood of the counts."
        return race(contestants, rows, min(2, lab.rounds), note=note, spare_seconds=0)


@case(
    Row("nmf", "`NMF` of scikit-learn, 10 components, squared error; 50 epochs of LDVAE", against="NMF"),
    Row("nmf-kl", "the same, Kullback-Leibler divergence (that of a Poisson), at most 200 updates", against="NMF"),
)
def nmf(lab: Lab, rows: tuple[Row, ...]) -> Found:
    """Once each, NMF until it converges or has done 200 updates."""
    from sklearn.decomposition import NMF

    adata = lab.counts()

    def ours() -> None:
        plan = {"lr": LARGE_LR, "n_epochs_kl_warmup": N_EPOCHS // 2}
        of_class(LDVAE, adata, n_latent=10).train(N_EPOCHS, batch_size=LARGE_BATCH, plan_kwargs=plan, **TRAIN)

    options = {"nmf": {}, "nmf-kl": {"solver": "mu", "beta_loss": "kullback-leibler"}}
    note = "LDVAE with minibatches of 256 and a learning rate of 2e-2."
    out = {}
    with threads(1):
        for row in rows:
            theirs = NMF(10, init="nndsvda", random_state=0, **options[row.name])
            contestants = {STOCK: partial(theirs.fit_transform, adata.X), row.name: ours}
            out |= race(contestants, (row,), 1, warm_up=False, spare_seconds=0, note=note)
    return out
