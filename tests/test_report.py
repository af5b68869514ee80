"""The report: what it says, that it needs no network, and that a browser shows it."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import subprocess

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import ldvae_ext
from ldvae_ext import get, tl
from ldvae_ext._report import _build
from ldvae_ext._report._content import Population, content_of
from tests.helpers import counts, untrained

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>window.broken=1</script><b>&\"'"


def exported(n_cells=60, n_genes=30, n_latent=4, rename=True, **options):
    adata = counts(n_cells=n_cells, n_genes=n_genes, n_batches=3)
    if rename:
        adata.var_names = [f"{EVIL}{g}" if g < 3 else name for g, name in enumerate(adata.var_names)]
    adata.obs["type"] = pd.Categorical(np.resize([f"T {EVIL}", "CD4+/CD25 T Reg", "B"], n_cells))
    model = untrained(adata, n_latent=n_latent, **options)
    model.export_to_anndata(stats=True)
    return adata


def with_runs(adata):
    """As after several runs."""
    k = len(get.factors(adata))
    adata.uns["ldvae"]["statistics"]["reproducibility"] = np.linspace(0.95, 0.3, k)
    return adata


def curves():
    return {
        "elbo_train": pd.DataFrame({"elbo_train": np.linspace(900, 700, 30)}),
        "elbo_validation": pd.DataFrame({"elbo_validation": np.linspace(900, 750, 30)}),
    }


def written(tmp_path, adata, **options):
    path = ldvae_ext.report(adata, tmp_path / "report.html", **options)
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_tables(tmp_path):
    adata = with_runs(exported(rename=False))
    content = content_of(adata, groupby="type", gene_sets={"first": adata.var_names[:5].tolist()}, history=curves())
    factors, effects = get.factors(adata), tl.ablate(adata).to_df()
    by_group = effects.groupby(adata.obs["type"].astype(str)).mean()
    latent = pd.DataFrame(adata.obsm["X_ldvae"], index=adata.obs_names, columns=factors.index)
    median = latent.groupby(adata.obs["type"].astype(str)).median()
    for factor in content.factors:
        row = factors.loc[factor.name]
        assert (factor.kl, factor.reproducibility, factor.flag) == (row["kl"], row["reproducibility"], row["flag"])
        for population in factor.populations:
            assert population.effect == pytest.approx(by_group.loc[population.name, factor.name])
            assert population.median == pytest.approx(median.loc[population.name, factor.name], abs=1e-6)
            assert population.n_cells == 20
        scores = get.gene_scores(adata, kind="regression")[factor.name]
        # Genes whose loading points the other way are left out.
        rising = scores[(scores > 0) & (get.loadings(adata)[factor.name] > 0)]
        assert [gene for gene, _ in factor.up] == rising.nlargest(len(factor.up)).index.tolist()
        assert all(value > 0 for _, value in factor.up)
        assert all(value < 0 for _, value in factor.down)
        assert dict(factor.up) == pytest.approx(get.loadings(adata)[factor.name][[g for g, _ in factor.up]].to_dict())
        lost = tl.ablate_genes(adata)
        loss = pd.Series(np.asarray(lost[:, factor.name].X).ravel(), index=lost.obs["gene"].to_numpy())
        assert dict(factor.lost_genes) == pytest.approx(loss.nlargest(len(factor.lost_genes)).to_dict())
    text = written(tmp_path, adata, groupby="type", history=curves())
    for name in factors.index:
        assert f">{name}</a>" in text
    assert f"{factors['kl'].iloc[0]:.2f}" in text


def test_warnings_are_sentences():
    adata = with_runs(exported(rename=False))
    notes, factors = " ".join(content_of(adata).notes), get.factors(adata)
    for flag, advice in (("unstable", "Do not read"), ("uncertain", "Read with care")):
        of_flag = factors.index[factors["flag"] == flag]
        assert f"{advice} {', '.join(map(repr, of_flag))}: " in notes
    assert "These are 60 cells only" in notes
    del adata.uns["ldvae"]["statistics"]["reproducibility"]
    assert "How reproducible the factors are is not known" in " ".join(content_of(adata).notes)
    adata.uns["ldvae"]["kl_weight"] = 0.25
    adata.uns["ldvae"]["statistics"]["kl"][-1] = 0.01
    notes = " ".join(content_of(adata).notes)
    assert "KL weight of 0.25" in notes
    assert f"does not use '{get.factors(adata).index[-1]}'" in notes


def as_consensus(adata, lowest):
    """As the export of the consensus of two runs."""
    k = len(get.factors(adata))
    info = adata.uns["ldvae"]
    info["rotation"] = {"method": "consensus", "matrix": np.eye(k), "latents": np.array([f"Z_{i}" for i in range(k)])}
    adata.uns["ldvae_consensus"] = {
        "cosine": np.stack([np.full(k, 0.95), lowest]),
        "statistics": {"lowest": np.asarray(lowest)},
    }
    return adata


def test_the_order_is_in_words(tmp_path):
    adata = exported(rename=False)
    assert "Factors are in order of KL." in written(tmp_path, adata)
    text = written(tmp_path, as_consensus(with_runs(adata), [0.9, 0.8, 0.7, 0.6]))
    assert "Factors are in the order of the consensus: by KL, mean over runs." in text
    assert "The KL that is shown is that of the exported run" in text
    adata.uns["ldvae"]["order_by"] = "explained_deviance"
    del adata.uns["ldvae"]["rotation"]
    assert "Factors are in the order of <code>explained_deviance</code>." in written(tmp_path, adata)


def test_the_lowest_agreement_is_that_of_the_consensus(tmp_path):
    adata = as_consensus(with_runs(exported(rename=False)), [0.91, 0.83, 0.72, 0.6])
    assert [factor.lowest for factor in content_of(adata).factors] == [0.91, 0.83, 0.72, 0.6]
    assert "Agreement with other trainings: 0.95, lowest 0.91 (runs: 0.95, 0.91)" in written(tmp_path, adata)
    # Runs of a consensus on other axes are not those of the factors.
    adata.uns["ldvae"]["rotation"]["method"] = "promax"
    factors = content_of(adata).factors
    assert {factor.lowest for factor in factors} == {None}
    assert all(factor.runs == [] for factor in factors)


def test_conditions_can_be_chosen():
    adata = exported(rename=False)
    n = adata.n_obs
    adata.obs["donor"] = np.resize(["d1", "d2", None], n)
    adata.obs["treated"] = np.resize([True, False], n)
    adata.obs["constant"] = "same"
    adata.obs["barcode"] = [f"c{i}" for i in range(n)]
    adata.obs["_scvi_batch"] = pd.Categorical(np.resize([0, 1], n))
    adata.obs["depth"] = np.arange(n) % 5
    adata.uns["donor_colors"] = np.array(["#111111", "#222222"])
    columns = content_of(adata, groupby="type").scatter["columns"]
    assert [column["name"] for column in columns] == ["type", "batch", "donor", "treated"]
    codes = {c["name"]: np.frombuffer(base64.b64decode(c["codes"]), dtype=np.int8) for c in columns}
    donor = columns[2]
    assert codes["donor"].tolist() == np.resize([0, 1, -1], n).tolist()
    assert donor["colors"] == ["#111111", "#222222"]
    assert columns[3]["groups"] == ["False", "True"]
    for i in range(12):
        adata.obs[f"more_{i}"] = np.resize(["a", "b"], n)
    names = [column["name"] for column in content_of(adata, groupby="batch").scatter["columns"]]
    assert names[:3] == ["batch", "type", "donor"]
    assert len(names) == 9
    assert content_of(adata).scatter["columns"][0]["name"] == "batch"


@pytest.mark.parametrize(
    ("effects", "expected"), [([1.9, 0.1], None), ([5.0, 4.5], None), ([5.0, 4.0], "a"), ([2.0, -3.0], "a")]
)
def test_the_population_that_a_factor_matters_to_is_clear_or_not_named(effects, expected):
    populations = [
        Population(name=name, n_cells=9, low=0, median=0, high=0, effect=effect)
        for name, effect in zip("ab", effects, strict=True)
    ]
    factor = dataclasses.replace(content_of(exported(rename=False)).factors[0], populations=populations)
    named = factor.most_affected
    assert (named and named.name) == expected


def test_small_populations_are_named(tmp_path):
    adata = exported(n_cells=240, rename=False)
    adata.obs["size"] = ["small"] * 29 + ["large"] * 211
    notes = content_of(adata, groupby="size").notes
    assert any(note.startswith("'small' (29 cells): ") for note in notes)
    assert not any("fewer than 30" in note for note in content_of(adata, groupby="batch").notes)


def test_unstable_factors_are_folded(tmp_path):
    adata = with_runs(exported(rename=False))
    text = written(tmp_path, adata)
    n_unstable = (get.factors(adata)["flag"] == "unstable").sum()
    assert n_unstable
    assert text.count("<details>") == n_unstable
    assert text.count("<article") == len(get.factors(adata))


def test_nothing_comes_from_elsewhere_and_names_are_text(tmp_path):
    text = written(tmp_path, with_runs(exported()), groupby="type", title=EVIL, settings={EVIL: EVIL}, reproduce=EVIL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#)[^"'>\s]+""", text)
    assert "@import" not in text
    assert "fetch(" not in text
    assert "XMLHttpRequest" not in text
    assert EVIL not in text
    assert text.count("<script") == 2


def test_without_counts_groups_or_slopes_there_is_a_report(tmp_path):
    adata = exported(rename=False)
    adata.X = None
    text = written(tmp_path, adata)
    assert "There are no results of ablation, which needs the raw counts" in text
    assert 'id="ablation"' not in text
    for key in ("ldvae_scores", "ldvae_scores_error"):
        del adata.varm[key]
    assert "the information of their counts" in written(tmp_path, adata)
    assert len(written(tmp_path, exported(n_latent=1, rename=False), groupby="type")) > 10_000


def test_an_ablation_that_is_given_is_not_computed_again(tmp_path):
    adata = exported(rename=False)
    effects = tl.ablate(adata)
    effects.X = np.asarray(effects.X) + 100
    (population,) = content_of(adata, ablation=effects).factors[0].populations
    assert population.effect == pytest.approx(np.asarray(effects.X)[:, 0].mean())
    with pytest.raises(ValueError, match="`ablation` must have the 60 cells of `adata` and the factors"):
        written(tmp_path, adata, ablation=effects[:5])


def test_a_projection_has_a_report(tmp_path):
    adata = exported(rename=False, use_observed_lib_size=True)
    query = ad.AnnData(adata.X.copy(), obs=adata.obs[["type", "batch"]].copy(), var=pd.DataFrame(index=adata.var_names))
    reference = get.decoder(adata)
    tl.project(query, reference, batch="mean")
    assert "populations by" in written(tmp_path, query, groupby="type")


def test_many_populations_and_cells_are_cut(monkeypatch, tmp_path):
    from ldvae_ext._report import _content, _scatter

    adata = exported(rename=False)
    adata.obs["many"] = pd.Categorical([f"g{i % 20}" for i in range(adata.n_obs)])
    monkeypatch.setattr(_content, "MAX_GROUPS", 7)
    monkeypatch.setattr(_scatter, "MAX_POINTS", 30)
    content = content_of(adata, groupby="many")
    assert len(content.factors[0].populations) == 7
    assert content.scatter["n"] == 30
    assert "`many` has 20 populations; the 7 largest are shown." in content.notes


@pytest.mark.slow
def test_twenty_thousand_cells_fit_in_three_megabytes(tmp_path):
    adata = with_runs(exported(n_cells=20_000, n_latent=10, rename=False))
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(20_000, 2))
    for i in range(9):
        adata.obs[f"condition_{i}"] = pd.Categorical(np.resize([f"level {j}" for j in range(30)], 20_000))
    written(tmp_path, adata, groupby="type", history=curves())
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    adata = exported(rename=False)
    written(tmp_path, adata)
    before = (tmp_path / "report.html").read_text()

    def fail(*_args, **_kwargs):
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr(_build.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, adata, title="new")
    assert (tmp_path / "report.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


PROBE = """
<script>
const found = { errors: [], width: 0 };
window.addEventListener("error", (event) => found.errors.push(String(event.message)));
window.addEventListener("load", () => {
  const header = [...document.querySelectorAll("#factors th button")];
  found.header = header.map((button) => button.textContent);
  found.arrows = header.every((button) => /[▲▼↕]/.test(getComputedStyle(button, "::after").content));
  const visible = (element) => element.getClientRects().length > 0;
  found.genes = visible(document.querySelector("#factors .genes"));
  const folded = document.querySelector("details");
  found.folded = visible(folded.querySelector("summary h3")) && !folded.open;
  document.querySelector(`#factors a[href="#${folded.parentElement.id}"]`).click();
  found.unfolded = folded.open;
  folded.open = false;
  window.dispatchEvent(new Event("beforeprint"));
  found.printed = [...document.querySelectorAll("details")].every((part) => part.open);
  window.dispatchEvent(new Event("afterprint"));
  found.after = folded.open;
  const names = () => [...document.querySelectorAll("#factors tbody th")].map((cell) => cell.textContent);
  found.before = names();
  document.querySelector("#factors th button").click();
  found.ascending = names();
  document.querySelector("#factors th button").click();
  found.descending = names();
  const kl = [...document.querySelectorAll("#factors th button")].find((button) => button.textContent === "KL");
  kl.click();
  found.byKl = [...document.querySelectorAll("#factors tbody tr")].map((row) => Number(row.children[found.header.indexOf("KL")].dataset.value));
  const color = document.getElementById("color");
  found.colors = [...color.options].map((option) => option.textContent);
  const pixels = () => {
    const canvas = document.getElementById("scatter");
    return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.reduce((a, b) => a + b, 0);
  };
  const each_drawn = ["groups-0", "groups-1", "0"].map((value) => {
    color.value = value;
    color.dispatchEvent(new Event("change"));
    return pixels();
  });
  found.redrawn = each_drawn.every((sum) => sum > 0) && new Set(each_drawn).size === 3;
  color.value = "groups-1";
  color.dispatchEvent(new Event("change"));
  found.legend = [...document.querySelectorAll("#key li")].map((item) => item.textContent);
  const population = document.getElementById("population");
  const genes = () => document.querySelector(".in-population").textContent;
  const ofIndex = (index) => {
    population.selectedIndex = index;
    population.dispatchEvent(new Event("change"));
    return genes();
  };
  const own = genes();
  const each = [1, 2, 3].map(ofIndex);
  found.filled = own.length > 0 && new Set(each).size === 3 && each.includes(own) && ofIndex(0) === own;
  found.broken = window.broken === 1;
  found.width = document.documentElement.scrollWidth;
  found.inner = document.documentElement.clientWidth;
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify(found);
  document.body.replaceChildren(place);
});
</script>
"""


def in_browser(path, width, tmp_path):
    """What the probe finds in the page, in a frame of the given width."""
    page = tmp_path / "probe.html"
    text = path.read_text(encoding="utf-8")
    page.write_text(text.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe src="probe.html" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=4000",
        "--window-size=1600,1000",
        "--dump-dom",
    ]
    # The document of a frame is not part of the dump: its result is copied to the outer one.
    frame.write_text(
        frame.read_text()
        + """<pre id="result"></pre><script>
        const frame = document.querySelector("iframe");
        frame.addEventListener("load", () => {
          document.getElementById("result").textContent = frame.contentDocument.getElementById("found").textContent;
        });
        </script></body>"""
    )
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (found,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    return json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_it(tmp_path, width):
    adata = with_runs(exported(n_latent=12))
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    ldvae_ext.report(adata, tmp_path / "report.html", groupby="type", history=curves(), settings={"long": "x" * 200})
    found = in_browser(tmp_path / "report.html", width, tmp_path)
    assert found["errors"] == []
    assert not found["broken"]
    factors = get.factors(adata)
    assert found["before"] == factors.index.tolist()
    by_name = sorted(factors.index, key=lambda name: int(name[2:]))
    assert found["ascending"] == by_name
    assert found["descending"] == by_name[::-1]
    assert found["byKl"] == sorted(found["byKl"], reverse=True)
    assert found["colors"] == ["type", "batch", *factors.index]
    assert found["legend"] == ["CD4+/CD25 T", "b1", "b2"]
    assert found["header"][:3] == ["Factor", "Marks", "KL"]
    assert found["arrows"]
    assert found["genes"] == (width > 390)
    assert found["folded"]
    assert found["unfolded"]
    assert found["printed"]
    assert not found["after"]
    assert found["redrawn"]
    assert found["filled"]
    # A scroll bar takes some pixels.
    assert found["width"] <= found["inner"] <= width
