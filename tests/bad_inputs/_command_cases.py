"""Bad inputs of `run`, `report` and the command line, and names that are markup, mathtext or paths."""

from __future__ import annotations

import html
from functools import partial
from unittest.mock import patch

import h5py
import matplotlib.pyplot as plt
import numpy as np
from typer.testing import CliRunner

from ldvae_ext import _run, datasets, get, pl, report, run, tl
from ldvae_ext.cli import app
from tests.bad_inputs.case import Case, bad, right


class CommandError(Exception):
    """The line with which a command ended."""


class UsageError(Exception):
    """An option that the command line does not allow."""


def command(*arguments):
    """Run a command; its error as an exception."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    if result.exit_code == 1:
        (line,) = lines
        raise CommandError(line)
    if result.exit_code:
        # Out of the box that is drawn around it.
        box = [line.strip("│ ") for line in result.output.splitlines() if line.startswith("│")]
        raise UsageError(" ".join(box))
    return result.output


def run_file(spoil=None, *options, name="cells.h5ad", written=None):
    """`ldvae-ext run` of a file."""

    def build(b):
        path = b.folder / name
        b.counts(spoil).write_h5ad(path)
        if written is not None:
            written(path)
        return partial(command, "run", path, "--runs", 1, "--max-epochs", 1, "--out", b.folder / "out", *options)

    return build


def run_with_gene_sets(b):
    (b.folder / "sets.gmt").write_text("gene0")
    return run_file(None, "--gene-sets", b.folder / "sets.gmt")(b)


def run_path(*arguments):
    return lambda b: partial(
        command,
        "run",
        *(b.folder / a if isinstance(a, str) and "." in a else a for a in arguments),
        "--out",
        b.folder / "out",
    )


def project_file(reference, spoil=None, *options):
    """`ldvae-ext project`; `reference` writes the file of the reference into a folder and returns its path."""

    def build(b):
        path = b.folder / "cells.h5ad"
        b.counts(spoil).write_h5ad(path)
        return partial(
            command,
            "project",
            path,
            "--reference",
            reference(b),
            "--out",
            b.folder / "out",
            "--batch",
            "mean",
            *options,
        )

    return build


def decoder_file(b):
    b.decoder().save(b.folder / "decoder.npz")
    return b.folder / "decoder.npz"


def text_file(name):
    def write(b):
        (b.folder / name).write_text("no decoder")
        return b.folder / name

    return write


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def without_matrix(path):
    with h5py.File(path, "a") as file:
        del file["X"]


def negative(adata):
    adata.X = -adata.X


def logged(adata):
    adata.X = np.log1p(adata.X)


def put(slot, key, value):
    def spoil(adata):
        getattr(adata, slot)[key] = value

    return spoil


def call_run(spoil=None, **options):
    return lambda b: partial(
        run, b.counts(spoil), **{"n_runs": 1, "max_epochs": 1, "umap": False, "silent": True, **options}
    )


def gmt(content):
    def build(b):
        (b.folder / "sets.gmt").write_bytes(content)
        return partial(
            run, b.counts(), gene_sets=b.folder / "sets.gmt", n_runs=1, max_epochs=1, umap=False, silent=True
        )

    return build


RUNS = [
    bad("run", "a path for the AnnData", lambda b: partial(run, "cells.h5ad"), TypeError, "`adata`", "str"),
    bad("run", "logarithms for counts", call_run(logged), ValueError, "`adata.X`", "counts"),
    bad("run", "negative counts", call_run(negative), ValueError, "`adata.X`", "negative"),
    bad("run", "a layer that does not exist", call_run(layer="raw"), KeyError, "`layer`", "'raw'"),
    bad("run", "a column that does not exist", call_run(groupby="type"), KeyError, "`groupby`", "'type'", "'batch'"),
    bad("run", "a covariate that does not exist", call_run(covariates=["age"]), KeyError, "`covariates`", "'age'"),
    bad("run", "text for the covariates", call_run(covariates="batch"), TypeError, "`covariates`", "'batch'"),
    bad("run", "no runs", call_run(n_runs=0), ValueError, "`n_runs`", "0"),
    bad("run", "a rotation that does not exist", call_run(rotation="ica"), ValueError, "`rotation`", "'varimax'", "'ica'"),
    bad("run", "one gene to train on", call_run(n_top_genes=1), ValueError, "`n_top_genes`", "1"),
    bad("run", "two cells", lambda b: partial(run, b.counts(n_cells=2), n_runs=1, max_epochs=1, umap=False, silent=True), ValueError, "`adata`", "2 cells", "3"),
    bad("run", "a list for the gene sets", call_run(gene_sets=["gene0"]), TypeError, "`gene_sets`", "list"),
    bad("run", "a file of gene sets that does not exist", call_run(gene_sets="none.gmt"), FileNotFoundError, "none.gmt"),
    bad("run", "a file of gene sets of another kind", gmt(b"gene0\n"), ValueError, "sets.gmt", "Line 1"),
    bad("run", "a binary file of gene sets", gmt(b"\xff\xfe\x00"), ValueError, "sets.gmt"),
    bad("run", "groups that are all missing", call_run(put("obs", "type", np.nan), groupby="type"), ValueError, "`groupby`", "type"),
    bad("report", "a path for the AnnData", lambda b: partial(report, "cells.h5ad", b.folder / "r.html"), TypeError, "`adata`", "str"),
    bad("report", "an AnnData without an export", lambda b: partial(report, b.counts(), b.folder / "r.html"), KeyError, "adata.uns"),
    bad("report", "a folder for the file", lambda b: partial(report, b.exported(), b.folder), IsADirectoryError, "FOLDER"),
    bad("report", "a folder that does not exist", lambda b: partial(report, b.exported(), b.folder / "none" / "r.html"), FileNotFoundError, "FOLDER/none"),
    bad("report", "a column that does not exist", lambda b: partial(report, b.exported(), b.folder / "r.html", groupby="type"), KeyError, "`groupby`", "'type'"),
    bad("report", "an ablation of other cells", lambda b: partial(report, b.exported(), b.folder / "r.html", ablation=b.ablation()[:9].copy()), ValueError, "`ablation`"),
    bad("report", "a list for the gene sets", lambda b: partial(report, b.exported(), b.folder / "r.html", gene_sets=["gene0"]), TypeError, "`gene_sets`", "list"),
]  # fmt: skip
COMMANDS = [
    bad("cli.run", "a file that does not exist", run_path("none.h5ad"), CommandError, "There is no file", "none.h5ad"),
    bad("cli.run", "a file of text", run_file(None, written=lambda p: p.write_text("text")), CommandError, "cells.h5ad", "cannot be read"),
    bad("cli.run", "a file that is cut", run_file(None, written=cut), CommandError, "cells.h5ad", "cannot be read"),
    bad("cli.run", "a file without a matrix", run_file(None, written=without_matrix), CommandError, "`adata.X`"),
    bad("cli.run", "negative counts", run_file(negative), CommandError, "`adata.X`", "negative"),
    bad("cli.run", "a layer that does not exist", run_file(None, "--layer", "raw"), CommandError, "`--layer`", "'raw'"),
    bad("cli.run", "a column of path traversal", run_file(None, "--batch-key", "../../etc"), CommandError, "`--batch-key`", "'../../etc'"),
    bad("cli.run", "no latents", run_file(None, "--n-latent", 0), UsageError, "--n-latent"),
    bad("cli.run", "text for the epochs", run_file(None, "--max-epochs", "ten"), UsageError, "--max-epochs", "integer"),
    bad("cli.run", "a rotation that does not exist", run_file(None, "--rotation", "ica"), UsageError, "--rotation", "ica"),
    bad("cli.run", "an option that does not exist", run_file(None, "--epochs", 3), UsageError, "--epochs"),
    bad("cli.run", "gene sets of another kind", run_with_gene_sets, CommandError, "`--gene-sets`", "FOLDER/sets.gmt", "Line 1"),
    bad("cli.run", "a covariate that does not exist", run_file(None, "--covariates", "age"), CommandError, "`--covariates`", "'age'"),
    bad("cli.project", "a reference that does not exist", project_file(lambda b: b.folder / "none.npz"), CommandError, "There is no file", "none.npz"),
    bad("cli.project", "a reference of text", project_file(text_file("decoder.npz")), CommandError, "decoder.npz", "LinearDecoder.save"),
    bad("cli.project", "an .h5ad file without an export", project_file(lambda b: b.folder / "cells.h5ad"), CommandError, "adata.uns"),
    bad("cli.project", "negative counts", project_file(decoder_file, negative), CommandError, "`adata.X`", "negative"),
    bad("cli.project", "a share of NaN", project_file(decoder_file, None, "--min-share", "nan"), UsageError, "--min-share"),
    bad("cli.project", "a share above 1", project_file(decoder_file, None, "--min-share", "2"), UsageError, "--min-share", "1"),
    bad("cli.project", "no reference", lambda b: partial(command, "project", b.folder / "cells.h5ad"), UsageError, "--reference"),
]  # fmt: skip

HOSTILE = [
    "<b>bold</b>",
    "$x_1^2$",
    "$\\frac{",
    "a_b^c",
    "line\nbreak",
    "NUL\x00here",
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "%s%n",
    "\x1b[31mred",
    "\u202eright to left",
]


def hostile(adata):
    """Names of genes and groups that are markup, mathtext, templates, control characters and paths."""
    adata.var_names = HOSTILE + [f"gene{i}" for i in range(len(HOSTILE), adata.n_vars)]
    adata.obs["batch"] = np.resize(np.array(HOSTILE, dtype=object), adata.n_obs)


def exported(b):
    """An export of a model whose genes and batches have these names."""
    from ldvae_ext.model import LDVAE

    adata = b.counts(hostile)
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(adata, n_latent=2, n_hidden=8)
    model.is_trained_ = True
    model.export_to_anndata()
    tl.population_loadings(adata, "batch")
    tl.rank_factors_groups(adata, "batch")
    return adata


def write_report(b):
    adata = exported(b)

    def call():
        report(adata, b.folder / "report.html", groupby="batch")
        assert [path.name for path in b.folder.iterdir()] == ["report.html"]
        return (b.folder / "report.html").read_text(encoding="utf-8")

    return call


def is_literal(page):
    assert "<script>alert(1)" not in page
    assert html.escape("<script>alert(1)</script>") in page
    assert "{{ 7 * 7 }}" in page
    assert "\x00" not in page


FIGURES = {
    "loadings": {},
    "population_loadings": {"factor": "Z_0", "n_genes": 30},
    "latent_pairs": {"color": "batch"},
    "factor_groups": {},
    "factors": {"groupby": "batch"},
}


def figure(name):
    def build(b):
        adata = exported(b)

        def call():
            figure = getattr(pl, name)(adata, show=False, return_fig=True, **FIGURES[name])
            figure.draw_without_rendering()
            figure.savefig(b.folder / "figure.png", dpi=30)
            texts = [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]
            plt.close(figure)
            return texts

        return call

    return build


def shows_names(texts):
    assert any("$" in text for text in texts)
    assert not any("\x00" in text or "\x1b" in text for text in texts)


def tables(b):
    adata = exported(b)
    return lambda: (get.loadings(adata).index.tolist(), get.rank_factors_groups_df(adata)["group"].unique().tolist())


def keeps_names(found):
    genes, groups = found
    assert genes[: len(HOSTILE)] == HOSTILE
    assert set(groups) == set(HOSTILE)


def run_command_with_names(b):
    adata = b.counts(lambda a: (hostile(a), setattr(a, "var_names", [n.replace("\x00", "") for n in a.var_names])))
    adata.obs["batch"] = [name.replace("\x00", "") for name in adata.obs["batch"]]
    adata.write_h5ad(b.folder / "cells.h5ad")

    def call():
        # A UMAP takes half a minute to compile, and shows no names.
        with patch.object(_run, "MAX_UMAP", 0):
            command(
                "run",
                b.folder / "cells.h5ad",
                "--groupby",
                "batch",
                "--runs",
                1,
                "--max-epochs",
                1,
                "--out",
                b.folder / "out",
            )
        return sorted(str(path.relative_to(b.folder)) for path in b.folder.rglob("*") if path.is_file())

    return call


def has_plain_files(names):
    assert all(name == "cells.h5ad" or name.startswith("out/") for name in names)
    assert not any(character in name for name in names for character in "<$\n{%")


NAMES = [
    right("report", "names that are markup, mathtext, templates, control characters and paths", write_report, is_literal),
    right("cli.run", "names that are markup, mathtext, templates, control characters and paths", run_command_with_names, has_plain_files, slow=True),
    right("get.loadings", "names that are markup, mathtext, templates, control characters and paths", tables, keeps_names),
    *(
        right(f"pl.{name}", "names that are markup, mathtext, templates, control characters and paths", figure(name), shows_names)
        for name in FIGURES
    ),
    right("datasets.pbmc68k", "a change of what it returned before", lambda b: _changed_and_read_again, lambda n: np.testing.assert_equal(n, 765)),
]  # fmt: skip


def _changed_and_read_again():
    adata = datasets.pbmc68k()
    adata.var_names = ["x"] * adata.n_vars
    return len(set(datasets.pbmc68k().var_names))


COMMAND_CASES: list[Case] = [*RUNS, *COMMANDS, *NAMES]
