"""The command, from its options to the folder that it leaves."""

from __future__ import annotations

import shutil
import subprocess
import sys

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from typer.testing import CliRunner

import ldvae_ext
from ldvae_ext import _run, _run_command, get
from ldvae_ext.cli import app
from ldvae_ext.model import LDVAE
from tests.helpers import counts

TABLES = ["ablation_cells", "ablation_groups", "factors", "loadings", "top_genes"]
FIGURES = ["ablation", "embedding_factors", "factor_scree", "latent_pairs", "loadings", "training_curves"]


@pytest.fixture(autouse=True)
def _no_windows(monkeypatch, tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)


def invoke(*arguments):
    runs = () if "--runs" in arguments else ("--runs", "1")
    return CliRunner().invoke(app, ["run", *map(str, arguments), *runs])


def only_rehearsals(monkeypatch):
    """Fail if all cells are trained on."""
    train = _run_command.train_and_export

    def checked(adata, *arguments, **options):
        return pytest.fail("trained") if adata.n_obs >= 80 else train(adata, *arguments, **options)

    monkeypatch.setattr(_run_command, "train_and_export", checked)


def write_cells(path):
    adata = counts(n_cells=80, n_genes=40, n_batches=3)
    adata.layers["raw_counts"] = adata.X.copy()
    adata.write_h5ad(path)
    return path


@pytest.fixture
def h5ad(tmp_path):
    return write_cells(tmp_path / "counts.h5ad")


@pytest.fixture(scope="module")
def results_of_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    result = invoke(write_cells(folder / "counts.h5ad"), "--max-epochs", 1, "--out", folder / "res")
    assert result.exit_code == 0, result.output
    return folder / "res"


@pytest.fixture
def results(results_of_once, tmp_path):
    """A folder with the results of `h5ad`."""
    return shutil.copytree(results_of_once, tmp_path / "res")


@pytest.fixture
def no_rehearsal(monkeypatch):
    monkeypatch.setattr(_run_command, "_rehearse", lambda *_: None)


@pytest.mark.slow
def test_the_bundled_example_runs_to_the_end(tmp_path):
    result = invoke("--max-epochs", 4, "--runs", 2, "--quiet")
    assert result.exit_code == 0, result.output
    out = tmp_path / "ldvae-ext-run"
    assert sorted(p.stem for p in (out / "tables").glob("*.csv")) == TABLES
    assert sorted(p.stem for p in (out / "figures").glob("*.png")) == FIGURES
    adata = ad.read_h5ad(out / "adata.h5ad")
    sc.pp.neighbors(adata, use_rep="X_ldvae", n_pcs=5)
    assert adata.obsm["X_ldvae"].shape == (700, 10)
    groups = pd.read_csv(out / "tables" / "ablation_groups.csv")
    assert "CD4+/CD25 T Reg" in set(groups["group"])
    model = LDVAE.load(str(out / "model"), adata=adata)
    assert model.final_kl_weight == 1
    assert len(result.output.strip().splitlines()) <= 25
    assert result.output.index("report.html") < result.output.index("adata.h5ad") < result.output.index("figures")
    assert "the population that each marks best" in result.output
    assert "The largest number of epochs, 4, ended 2 of 2 trainings" in result.output
    assert "Signaling Trainer" not in result.output
    assert "litlogger" not in result.output
    factors = pd.read_csv(out / "tables" / "factors.csv", index_col=0)
    assert {"reproducibility", "flag", "explained_deviance", "population", "auroc", "up", "down"} <= set(factors)
    assert (out / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_options_reach_the_model_and_results_come_in_exported_order(tmp_path, h5ad):
    arguments = [
        h5ad,
        "--layer",
        "raw_counts",
        "--batch-key",
        "batch",
        "--groupby",
        "batch",
        "--n-latent",
        3,
        "--max-epochs",
        2,
    ]
    result = invoke(*arguments, "--n-top-genes", 25, "--seed", 7, "--out", tmp_path / "a" / "res")
    assert result.exit_code == 0, result.output
    out = tmp_path / "a" / "res"
    adata = ad.read_h5ad(out / "adata.h5ad")
    assert adata.shape == (80, 40), "the full object"
    assert adata.var["ldvae"].sum() == 25
    assert np.isnan(adata.varm["ldvae_loadings"][~adata.var["ldvae"]]).all()
    order = get.factors(adata).index.tolist()
    cells = pd.read_csv(out / "tables" / "ablation_cells.csv", index_col=0)
    assert cells.columns.tolist() == order
    model = LDVAE.load(str(out / "model"), adata=adata[:, adata.var["ldvae"]].copy())
    assert model.n_latent == 3
    assert model.registry["setup_args"]["layer"] == "raw_counts"
    assert model.summary_stats.n_batch == 3
    np.testing.assert_allclose(model.ablate().to_df()[order], cells, rtol=1e-3, atol=1e-3)
    top = pd.read_csv(out / "tables" / "top_genes.csv")
    first = top[(top["factor"] == order[0]) & (top["direction"] == "up")]["gene"].tolist()
    assert first == get.gene_scores(adata, kind="regression")[order[0]].nlargest(len(first)).index.tolist()
    assert [p.name for p in out.parent.iterdir()] == ["res"], "no temporary folder is left"


@pytest.mark.slow
@pytest.mark.usefixtures("no_rehearsal")
def test_the_same_seed_gives_the_same_tables(tmp_path, h5ad):
    for name in ("one", "two"):
        assert invoke(h5ad, "--max-epochs", 2, "--seed", 5, "--out", tmp_path / name).exit_code == 0
    one, two = ((tmp_path / name / "tables" / "loadings.csv").read_text() for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_without_groups_all_cells_are_one_population(results):
    assert set(pd.read_csv(results / "tables" / "ablation_groups.csv")["group"]) == {"all cells"}


@pytest.mark.slow
def test_only_results_are_replaced(tmp_path, h5ad, results):
    out = results
    result = invoke(h5ad, "--max-epochs", 1, "--out", out)
    assert result.exit_code == 1
    assert "exists; use --overwrite to replace results. Name another folder with --out." in result.output
    assert invoke(h5ad, "--max-epochs", 1, "--out", out, "--overwrite", "--n-latent", 2).exit_code == 0
    assert ad.read_h5ad(out / "adata.h5ad").obsm["X_ldvae"].shape == (80, 2)
    (out / "model" / "thesis.docx").write_text("years of work")
    result = invoke(h5ad, "--max-epochs", 1, "--out", out, "--overwrite")
    assert result.exit_code == 1
    assert "thesis.docx, which is in it. Name another folder" in result.output
    assert "Epoch" not in result.output, "before the training"
    assert (out / "model" / "thesis.docx").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["counts.h5ad", "res"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path, h5ad):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    result = invoke(h5ad, "--max-epochs", 1, "--out", out, "--overwrite")
    assert result.exit_code == 1
    assert "chapter.txt, which is in it" in result.output
    assert (out / "chapter.txt").read_text() == "years of work"
    result = invoke(h5ad, "--max-epochs", 1, "--out", tmp_path, "--overwrite")
    assert result.exit_code == 1
    assert "cannot be replaced, since" in result.output
    assert h5ad.exists()


@pytest.mark.slow
def test_the_current_folder_is_never_replaced(h5ad, results, monkeypatch):
    monkeypatch.chdir(results)
    result = invoke(h5ad, "--max-epochs", 1, "--out", ".", "--overwrite")
    assert result.exit_code == 1
    assert "cannot be replaced, since it contains" in result.output


@pytest.mark.slow
@pytest.mark.usefixtures("no_rehearsal")
def test_a_failure_after_the_training_leaves_the_model_and_old_results(tmp_path, h5ad, results, monkeypatch):
    def fail(*_args, **_kwargs):
        msg = "disk full"
        raise OSError(msg)

    out, before = results, (results / "tables" / "loadings.csv").read_text()
    monkeypatch.setattr(_run_command, "_write_results", fail)
    result = invoke(h5ad, "--max-epochs", 1, "--n-latent", 3, "--out", out, "--overwrite")
    assert result.exit_code == 1
    kept = tmp_path / "res-incomplete-1"
    assert (
        f"Error: The results could not be written (OSError: disk full). The trained model is in {kept / 'model'}."
        in (result.output)
    )
    assert LDVAE.load(str(kept / "model"), adata=ad.read_h5ad(h5ad)).n_latent == 3
    assert "disk full" in (kept / "error.txt").read_text()
    assert (out / "tables" / "loadings.csv").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["counts.h5ad", "res", kept.name]


@pytest.mark.usefixtures("no_rehearsal")
def test_an_interruption_leaves_nothing(tmp_path, h5ad, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_run_command, "_write_results", interrupt)
    assert invoke(h5ad, "--max-epochs", 1, "--out", tmp_path / "res").exit_code != 0
    assert [p.name for p in tmp_path.iterdir()] == ["counts.h5ad"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_rehearsal")
def test_of_two_runs_into_one_folder_the_second_says_so_and_keeps_its_results(tmp_path, h5ad, monkeypatch):
    out, train = tmp_path / "res", _run_command.train_and_export

    def train_while_another_run_finishes(*arguments, **options):
        monkeypatch.setattr(_run_command, "train_and_export", train)
        assert invoke(h5ad, "--max-epochs", 1, "--n-latent", 2, "--out", out).exit_code == 0
        return train(*arguments, **options)

    monkeypatch.setattr(_run_command, "train_and_export", train_while_another_run_finishes)
    result = invoke(h5ad, "--max-epochs", 1, "--n-latent", 3, "--out", out)
    assert result.exit_code == 1
    assert f"res exists; use --overwrite to replace results.). The trained model is in {tmp_path}" in result.output
    assert ad.read_h5ad(out / "adata.h5ad").obsm["X_ldvae"].shape == (80, 2)
    assert ad.read_h5ad(tmp_path / "res-incomplete-1" / "adata.h5ad").obsm["X_ldvae"].shape == (80, 3)


def negative(adata):
    adata.X = -adata.X


def fractions_of(adata):
    adata.X = sparse.csr_matrix(adata.X.toarray() * np.nan)


def logged(adata):
    adata.layers["raw"] = adata.X.copy()
    adata.X = np.log1p(adata.X)


def twice(adata):
    adata.obs_names = ["same"] * adata.n_obs


def nan_batch(adata):
    adata.obs["batch"] = pd.Categorical([None, *adata.obs["batch"][1:]])


def numbers(adata):
    adata.obs["batch"] = np.arange(adata.n_obs) / 7


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (negative, [], "`adata.X` must hold counts, but holds negative values"),
        (fractions_of, [], "must hold counts, but holds NaN or infinite values"),
        (logged, [], "Counts are in 'raw': name it with `--layer`."),
        (logged, ["--layer", "counts"], "`--layer`: 'counts' is not a layer of the input, which has 'raw'."),
        (twice, [], "The cell name 'same' occurs more than once; make cell names unique first."),
        (nan_batch, ["--batch-key", "batch"], "is NaN for 1 of 150 cells"),
        (
            numbers,
            ["--groupby", "batch"],
            "`--groupby`: 'batch' has 150 different values; name a column of 1 to 100 groups.",
        ),
        (None, ["--groupby", "type"], "`--groupby`: 'type' is not a column of `adata.obs`, which has 'batch'."),
        (None, ["--batch-key", "lane"], "`--batch-key`: 'lane' is not a column"),
        (None, ["--batch", "lane"], "`--batch-key`: 'lane' is not a column"),
        (None, ["--layer", "raw"], "`--layer`: 'raw' is not a layer of the input, which has none."),
    ],
)
def test_bad_data_end_with_one_sentence_and_no_folder(tmp_path, spoil, arguments, message):
    adata = counts(n_cells=150, n_batches=3)
    if spoil is not None:
        spoil(adata)
    adata.write_h5ad(tmp_path / "bad.h5ad")
    result = invoke(tmp_path / "bad.h5ad", *arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["bad.h5ad"]


def test_bad_files_end_with_one_sentence(tmp_path):
    result = invoke(tmp_path / "none.h5ad")
    assert result.exit_code == 1
    assert "There is no file" in result.output
    (tmp_path / "text.h5ad").write_text("not a file of that kind")
    result = invoke(tmp_path / "text.h5ad")
    assert result.exit_code == 1
    assert "cannot be read as an .h5ad file" in result.output
    (tmp_path / "text.txt").write_text("not a file of that kind")
    result = invoke(tmp_path / "text.txt")
    assert result.exit_code == 1
    assert result.output.count("cannot be read") == 1


def test_files_of_a_folder_are_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.h5ad", "a.h5ad", "c.txt"):
        (folder / name).touch()
    result = invoke(folder)
    assert result.exit_code == 1
    assert f"{folder} is a folder without matrix.mtx; give one of its files: 'a.h5ad', 'b.h5ad'." in result.output


def test_names_are_checked_without_loading_torch(h5ad):
    code = "import sys; from ldvae_ext.cli import app; app(sys.argv[1:], standalone_mode=False); print('torch' in sys.modules)"
    for arguments in (["--layer", "none"], ["--batch-key", "none"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "run", str(h5ad), *arguments], capture_output=True, text=True, check=False
        )
        assert "none" in done.stderr
        assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--n-latent", 0), ("--max-epochs", 0), ("--n-top-genes", -1), ("--seed", -1), ("--seed", 2**32)],
)
def test_impossible_numbers_are_usage_errors(option, value):
    assert invoke(option, value).exit_code == 2


def test_folders_that_cannot_be_made_are_named_before_training(tmp_path, h5ad):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, message in (
        ("file/sub", "cannot be created (Not a directory). Name another folder"),
        ("link", "is a link"),
        ("file", "is a file"),
        ("n" * 300, "cannot be created (File name too long)"),
        ("/", "exists; use --overwrite"),
    ):
        result = invoke(h5ad, "--out", tmp_path / out)
        assert result.exit_code == 1
        assert message in result.output


def test_too_little_data_is_named(tmp_path, h5ad):
    assert "must be 0 or at least 2; got 1" in invoke(h5ad, "--n-top-genes", 1, "--out", tmp_path / "res").output
    counts(n_cells=2).write_h5ad(tmp_path / "two.h5ad")
    assert "The input has 2 cells and 20 genes; at least 3 and 2 are needed" in invoke(tmp_path / "two.h5ad").output


@pytest.mark.slow
@pytest.mark.parametrize("n_latent", [1, 2])
def test_one_or_two_latents_will_do(tmp_path, h5ad, n_latent):
    result = invoke(h5ad, "--max-epochs", 2, "--n-latent", n_latent, "--out", tmp_path / "res")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.usefixtures("no_rehearsal")
def test_genes_are_chosen_where_there_are_many(monkeypatch, tmp_path, h5ad):
    monkeypatch.setattr(_run, "MANY_GENES", 30)
    monkeypatch.setattr(_run, "N_TOP_GENES", 10)
    for arguments, n in (([], 10), (["--n-top-genes", 0], 40)):
        assert invoke(h5ad, "--max-epochs", 1, "--out", tmp_path / "res", "--overwrite", *arguments).exit_code == 0
        assert ad.read_h5ad(tmp_path / "res" / "adata.h5ad").var["ldvae"].sum() == n


def test_the_entry_point_answers_without_loading_torch():
    code = "import sys; from ldvae_ext.cli import app; app(['--version'], standalone_mode=False); print('torch' in sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert lines == [ldvae_ext.__version__, "False"]


def slash_in_a_column(adata, path):
    adata.obs["TMP"] = 1.0
    adata.write_h5ad(path)
    with h5py.File(path, "a") as file:  # as anndata before 0.12 wrote it
        obs = file["obs"]
        del obs["TMP"]
        column = obs.create_dataset("nCount/nFeature", data=np.ones(80))
        column.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        order = [{"TMP": "nCount/nFeature"}.get(name, name) for name in obs.attrs["column-order"]]
        obs.attrs["column-order"] = np.array(order, dtype=object)


def column_of_var(adata, path):
    adata.var["ldvae"] = "mine"
    adata.write_h5ad(path)


def column_of_obs(adata, path):
    adata.obs["ldvae_library"] = "lane 1"
    adata.write_h5ad(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (slash_in_a_column, "`adata.obs` has the name 'nCount/nFeature' with a slash"),
        (column_of_var, "`adata.var['ldvae']` exists and is no export's"),
        (column_of_obs, "`adata.obs['ldvae_library']` exists and is no library size"),
    ],
)
def test_what_cannot_be_written_is_named_before_the_training(tmp_path, h5ad, monkeypatch, write, message):
    only_rehearsals(monkeypatch)
    write(ad.read_h5ad(h5ad), tmp_path / "input.h5ad")
    result = invoke(tmp_path / "input.h5ad", "--out", tmp_path / "res")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "res").exists()


@pytest.mark.parametrize(
    "labels",
    [[1, 2, 3], [True, False], ["$a$ x", "b$^$"], [r"\\frac", "x_{"], ["a/b", "CD4+/CD25"]],
)
@pytest.mark.slow
def test_labels_of_any_kind_are_written(tmp_path, h5ad, labels):
    adata = ad.read_h5ad(h5ad)
    adata.obs["label"] = np.resize(np.array(labels), adata.n_obs)
    adata.var_names = [f"$gene_{i}^$" for i in range(adata.n_vars)]
    adata.write_h5ad(tmp_path / "input.h5ad")
    result = invoke(
        tmp_path / "input.h5ad", "--groupby", "label", "--max-epochs", 1, "--n-latent", 2, "--out", tmp_path / "res"
    )
    assert result.exit_code == 0, result.output
    groups = pd.read_csv(tmp_path / "res" / "tables" / "ablation_groups.csv", dtype=str, keep_default_na=False)["group"]
    assert set(groups) == set(map(str, np.array(labels).tolist()))


@pytest.mark.parametrize("dtype", ["f2", ">f4"])
def test_counts_of_other_types_are_read(tmp_path, h5ad, dtype):
    adata = ad.read_h5ad(h5ad)
    adata.X = adata.X.toarray().astype(dtype)
    adata.write_h5ad(tmp_path / "input.h5ad")
    result = invoke(tmp_path / "input.h5ad", "--max-epochs", 1, "--n-latent", 1, "--out", tmp_path / "res")
    assert result.exit_code == 0, result.output


def test_a_rehearsal_does_not_change_the_training(tmp_path, h5ad, monkeypatch):
    seen = []
    for rehearse in (_run_command._rehearse, lambda *_: None):
        monkeypatch.setattr(_run_command, "_rehearse", rehearse)
        result = invoke(h5ad, "--max-epochs", 1, "--n-latent", 2, "--out", tmp_path / f"res{len(seen)}")
        assert result.exit_code == 0, result.output
        seen.append(pd.read_csv(tmp_path / f"res{len(seen)}" / "tables" / "loadings.csv", index_col=0))
    pd.testing.assert_frame_equal(*seen)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1.5, 2.0], "holds numbers such as 1.5, not groups"), (["", "b"], "distinct and not empty")],
)
def test_labels_that_are_no_groups_are_named_before_the_training(tmp_path, h5ad, monkeypatch, labels, message):
    only_rehearsals(monkeypatch)
    adata = ad.read_h5ad(h5ad)
    adata.obs["label"] = np.resize(np.array(labels), adata.n_obs)
    adata.write_h5ad(tmp_path / "input.h5ad")
    result = invoke(tmp_path / "input.h5ad", "--groupby", "label", "--out", tmp_path / "res")
    assert result.exit_code == 1
    assert message in result.output
