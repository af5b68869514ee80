"""``ldvae-ext``: the main job from a shell."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

import ldvae_ext

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(ldvae_ext.__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Interpret linearly decoded VAEs of single-cell counts."""


@app.command()
def run(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="INPUT.h5ad", help="Raw counts; without it, the bundled example.", show_default=False),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with the counts; X by default.", show_default=False)] = None,
    batch_key: Annotated[
        str | None, typer.Option(help="Column of obs with the batch of each cell.", show_default=False)
    ] = None,
    groupby: Annotated[
        str | None,
        typer.Option(help="Column of obs with populations, for the ablation and the figures.", show_default=False),
    ] = None,
    n_top_genes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of highly variable genes to train on; 0 keeps all. 2000 if there are over 5000.",
            show_default=False,
        ),
    ] = None,
    n_latent: Annotated[int, typer.Option(min=1, help="Number of latent dimensions.")] = 10,
    max_epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of epochs; scvi-tools decides by default (the example: 250).", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random numbers.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ldvae-ext-run"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it has results of this command and nothing else.")
    ] = False,
) -> None:
    """Train an LDVAE, export it in order of information, ablate it, and draw it."""
    from ldvae_ext._run import InputError, Job, run

    job = Job(
        source=source,
        layer=layer,
        batch_key=batch_key,
        groupby=groupby,
        n_top_genes=n_top_genes,
        n_latent=n_latent,
        max_epochs=max_epochs,
        seed=seed,
        out=out,
        overwrite=overwrite,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        # Lightning's warnings about data loaders and loggers are of no use on the command line.
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"Warning: {message}", err=True)
        try:
            run(job, typer.echo)
        except InputError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from None


def main() -> None:
    """Entry point of ``ldvae-ext``."""
    sys.exit(app())
