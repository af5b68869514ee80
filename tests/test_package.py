"""What is built and installed: the wheel and the sdist, without the source folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = shutil.which("uv")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(UV is None, reason="needs uv to build")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a wheel and an sdist."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run([UV, "build", "--out-dir", out, ROOT], capture_output=True, text=True, check=False)
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip("the build backend cannot be fetched")
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_has_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ldvae_ext"}
    for name in ("py.typed", "_report/template.html.j2", "_report/script.js", "cli.py"):
        assert f"ldvae_ext/{name}" in names
    assert not [name for name in names if "test" in name or name.endswith((".h5ad", ".nbi", ".pyc"))]
    assert wheel.stat().st_size < 1_000_000


def test_the_sdist_builds_the_same_package(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/ldvae_ext/py.typed"} <= names


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_an_installation_imports_and_has_the_command(built, tmp_path, kind):
    (archive,) = built.glob(f"*.{kind}")
    done = subprocess.run(
        [UV, "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, archive],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip("the build backend cannot be fetched")
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = (
        "import sys, ldvae_ext; from ldvae_ext import core, get, pl, tl; "
        "print(ldvae_ext.__file__); print('torch' in sys.modules or 'scvi' in sys.modules)"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    ).stdout.split()
    assert Path(lines[0]).is_relative_to(tmp_path)
    assert lines[1] == "False"
    command = "from ldvae_ext.cli import main; main()"
    told = subprocess.run(
        [sys.executable, "-c", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert "run" in told.stdout
    assert "project" in told.stdout
    assert (tmp_path / "bin" / "ldvae-ext").exists()
