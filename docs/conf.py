"""Settings of the documentation. Build it with `sphinx-build docs build/docs`."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here / "extensions"))
sys.path.insert(0, str(here.parent))

from hpc_xvr import __version__  # noqa: E402

project = "hpc_xvr"
author = "The hpc_xvr developers"
copyright = "2026, the hpc_xvr developers"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_design",
    "attribute_text",
    "command_help",
    "value_tables",
]
exclude_patterns = ["extensions", "jupyter_execute"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs; the tests run them

default_role = "literal"  # docstrings write `name`
smartquotes = False  # of help texts: --option has two hyphens
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"  # most objects are made by functions, not by hand
autodoc_default_options = {"exclude-members": "__init__, __new__"}
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_generate = False
napoleon_numpy_docstring = False

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = f"hpc_xvr {version}"
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version", "theme-version"],
}
html_sidebars = {"project/*": []}
