"""How Sphinx builds these pages. The figures of the gallery are drawn; nothing is downloaded."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

project = "ldvae_ext"
author = "The ldvae_ext developers"
project_copyright = author
release = installed_version("ldvae-ext")
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "generated", "**.ipynb_checkpoints"]
needs_sphinx = "8.1"
# References to scvi-tools, numpy and others stay plain text: their inventories are not at hand offline.
nitpicky = False

# Notebooks are shown with the outputs that are saved in them.
nb_execution_mode = "off"
# No script from elsewhere for the widgets of progress bars.
nb_ipywidgets_js = {}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
autosummary_generate = False
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
# Keeps "adata, indices, batch_size" together, as the docstrings have them.
napoleon_use_param = False
napoleon_use_rtype = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = f"{project} {release}"
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["ldvae_ext.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}


def prose_returns(_app: object, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Make one description of a `Returns` section that is prose, which napoleon takes for one type in each line."""
    for start in range(len(lines) - 1):
        if lines[start].strip() != "Returns" or not lines[start + 1].strip().startswith("---"):
            continue
        first = end = start + 2
        while end < len(lines) and not (end + 1 < len(lines) and lines[end + 1].strip().startswith("---")):
            end += 1
        if not any(line.startswith(" ") for line in lines[first:end]):
            lines[first:end] = [":", *("    " + line if line else line for line in lines[first:end])]
        return


def draw_gallery(_app: object) -> None:
    """Draw the figures of the gallery, once."""
    sys.path.insert(0, str(Path(__file__).parent))
    from gallery import draw

    draw()


def setup(app: object) -> None:
    """Run before napoleon, whose priority is 500."""
    app.connect("builder-inited", draw_gallery)
    app.connect("autodoc-process-docstring", prose_returns, priority=400)
