"""How Sphinx builds these pages. Nothing is executed and nothing is downloaded."""

from __future__ import annotations

from importlib.metadata import version as installed_version

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
