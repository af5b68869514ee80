"""``ldvae-ext``: the main jobs from a shell."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
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


class Rotation(StrEnum):
    """Axes of the factors."""

    varimax = "varimax"
    promax = "promax"
    none = "none"


@app.command()
def run(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT",
            help="Raw counts: .h5ad, .zarr, .h5 of 10x Genomics, or a folder with matrix.mtx; without it, the bundled example.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with the counts; X by default.", show_default=False)] = None,
    batch_key: Annotated[
        str | None,
        typer.Option("--batch-key", "--batch", help="Column of obs with the batch of each cell.", show_default=False),
    ] = None,
    covariates: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of obs with a covariate: continuous if it has numbers. May be given several times.",
            show_default=False,
        ),
    ] = None,
    size_factor: Annotated[
        str | None, typer.Option(help="Column of obs with size factors.", show_default=False)
    ] = None,
    groupby: Annotated[
        str | None,
        typer.Option(
            "--groupby",
            "--labels",
            help="Column of obs with populations, for the ablation, the annotation and the report.",
            show_default=False,
        ),
    ] = None,
    gene_sets: Annotated[
        Path | None,
        typer.Option(metavar="FILE.gmt", help="Gene sets; the best one is named for each factor.", show_default=False),
    ] = None,
    n_top_genes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of highly variable genes to train on; 0 keeps all. 2000 if there are over 5000.",
            show_default=False,
        ),
    ] = None,
    n_latent: Annotated[int, typer.Option(min=1, help="Number of factors.")] = 10,
    runs: Annotated[
        int, typer.Option(min=1, help="Number of trainings whose consensus gives the factors; 1 to be quick.")
    ] = 3,
    rotation: Annotated[
        Rotation,
        typer.Option(help="Axes of the factors; 'none' gives the network's own, which differ between trainings."),
    ] = Rotation.varimax,
    max_epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Largest number of epochs; 400 by default, and fewer if that is enough.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random numbers.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ldvae-ext-run"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it has results of this command and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the messages of scvi-tools.")] = False,
) -> None:
    """Find the factors of single-cell counts that several trainings agree on, and report them."""
    from ldvae_ext._run import Options
    from ldvae_ext._run_command import Job, run_command

    job = Job(
        source=source,
        gene_sets=gene_sets,
        out=out,
        overwrite=overwrite,
        silent=quiet,
        options=Options(
            layer=layer,
            batch_key=batch_key,
            covariates=tuple(covariates or ()),
            size_factor_key=size_factor,
            groupby=groupby,
            n_top_genes=n_top_genes,
            n_latent=n_latent,
            n_runs=runs,
            rotation=rotation.value,
            max_epochs=max_epochs,
            seed=seed,
        ),
    )
    with _errors_and_warnings_as_text(verbose=verbose):
        run_command(job, typer.echo)


@app.command()
def project(
    source: Annotated[Path, typer.Argument(metavar="QUERY.h5ad", help="Cells with raw counts.", show_default=False)],
    reference: Annotated[
        Path,
        typer.Option(
            help="An .h5ad file with an export, such as that of `ldvae-ext run`, or an .npz file with a decoder.",
            show_default=False,
        ),
    ],
    layer: Annotated[str | None, typer.Option(help="Layer with the counts; X by default.", show_default=False)] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Intercepts of the cells: 'mean' over the batches of the reference, 'fit' to these cells, or those of a "
            "batch of the reference. By default, those of each cell's own batch.",
            show_default=False,
        ),
    ] = None,
    batch_key: Annotated[
        str | None, typer.Option(help="Column of obs with the batch of each cell.", show_default=False)
    ] = None,
    size_factor_key: Annotated[
        str | None,
        typer.Option(help="Column of obs with size factors, for models with size factors.", show_default=False),
    ] = None,
    min_share: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of the reference's genes that the cells must have.")
    ] = 0.5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ldvae-ext-project"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it has results of this command and nothing else.")
    ] = False,
) -> None:
    """Score cells with the factors of a reference, without the network."""
    from ldvae_ext._projection import ProjectionJob
    from ldvae_ext._projection import project as run_projection

    job = ProjectionJob(
        source=source,
        reference=reference,
        layer=layer,
        batch=batch,
        batch_key=batch_key,
        size_factor_key=size_factor_key,
        min_share=min_share,
        out=out,
        overwrite=overwrite,
    )
    with _errors_and_warnings_as_text():
        run_projection(job, typer.echo)


@contextmanager
def _errors_and_warnings_as_text(*, verbose: bool = False) -> Iterator[None]:
    """Print errors of the input and warnings as sentences; end with status 1 after an error."""
    from ldvae_ext._command import InputError
    from ldvae_ext._validate import printable

    if not verbose:
        logging.getLogger("scvi").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        # Lightning's warnings about data loaders and loggers are of no use on the command line.
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"Warning: {message}", err=True)
        try:
            yield
        except InputError as error:
            typer.echo(f"Error: {printable(' '.join(str(error).split()))}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted; nothing was written.", err=True)
            raise typer.Exit(130) from None


def main() -> None:
    """Entry point of ``ldvae-ext``."""
    sys.exit(app())


if __name__ == "__main__":
    main()
