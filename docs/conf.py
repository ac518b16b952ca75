"""Settings of the documentation's builder: `make docs`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import torchrl_wm

from sphinx.util.inspect import stringify_signature

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # code_links.py

project = "torchrl_wm"
author = "The torchrl_wm developers"
copyright = "2026, The torchrl_wm developers"
version = release = torchrl_wm.__version__

extensions = [
    "myst_nb",  # myst_parser, and notebooks that are run
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "code_links",  # `WorldModelEnv` on a page is a link to the reference
]
#: The tables that other pages include, which are no pages.
TABLES = [
    str(path.relative_to(DOCS))
    for path in sorted(DOCS.glob("benchmarks/**/*.md"))
    if not path.read_text(encoding="utf-8").startswith("# ")
]
exclude_patterns = ["_build", *TABLES]
nitpicky = False

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_merge_streams = True  # one box for what a cell prints
nb_output_stderr = "remove"  # notes of other packages, with paths of the machine
nb_execution_timeout = 1200  # a cell takes seconds, but not on a busy machine

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "none"  # the docstrings name the types
# Our classes extend TorchRL's: what they do not document themselves is TorchRL's to show.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"torchrl_wm {version}"


def show_init_signature(app, what, name, obj, options, signature, returns):
    """Show a class's own ``__init__``, not the ``__call__`` of TorchRL's metaclasses."""
    if what != "class" or "__init__" not in vars(obj):
        return None
    parameters = inspect.signature(obj.__init__)
    own = list(parameters.parameters.values())[1:]
    parameters = parameters.replace(parameters=own, return_annotation=parameters.empty)
    return stringify_signature(parameters, show_annotation=False), returns


def skip_borrowed_members(app, what, name, obj, skip, options):
    """Skip what carries TorchRL's docstring, written for TorchRL's own pages."""
    obj = getattr(obj, "fget", obj)
    module = getattr(obj, "__module__", None) or "torchrl_wm"
    return True if module.split(".")[0] != "torchrl_wm" else None


def setup(app):
    """Connect the hooks above."""
    app.connect("autodoc-skip-member", skip_borrowed_members)
    app.connect("autodoc-process-signature", show_init_signature)
