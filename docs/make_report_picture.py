"""Draws the picture of the report in docs/run.md, from the bundled example: `python docs/make_report_picture.py`; needs a Chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import ldvae_ext

PICTURE = Path(__file__).parent / "_static" / "report.png"


def main() -> None:
    adata = ldvae_ext.datasets.pbmc68k()
    result = ldvae_ext.run(adata, groupby="bulk_labels")
    browser = shutil.which("chromium") or "google-chrome"
    with tempfile.TemporaryDirectory() as folder:
        page = result.report(Path(folder) / "report.html")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1330"]
        subprocess.run([browser, *options, f"--screenshot={PICTURE}", page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
