"""Sphinx's settings: `sphinx-build -W docs build/docs`."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from avb_jax import __version__
from experiments.configs.fields import OTHERS, TRAINING

project, author, release = "avb_jax", "the avb_jax authors", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"avb_jax {release}"
exclude_patterns = ["launch"]
nb_execution_mode = "off"  # the tests run the notebooks, at tiny size
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
intersphinx_mapping = {}
nitpicky = False


def _fields_page(app):
    """The page of a config's fields, from the config."""
    lines = [
        "# Fields of a config\n",
        "Every training's config has these; `--config.FIELD=VALUE` changes one. `--help` prints an experiment's own values.\n",
        "| field | default | |",
        "| --- | --- | --- |",
    ]
    rows = [(name, f"`{field.default!r}`", field.text) for name, field in TRAINING.items()]
    rows += [(name, "the experiment's", text) for name, text in OTHERS.items()]
    for name, default, text in sorted(rows):
        lines.append(f"| `{name}` | {default} | {text.replace('|', chr(92) + '|')} |")
    pathlib.Path(__file__).with_name("guides").joinpath("fields.md").write_text("\n".join(lines) + "\n")


def _plain(app, what, name, obj, options, lines):
    """Docstrings are plain text: shapes as [B, *x] and norms as |z| are no markup, and `names` are code."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...", ".. ")):
            continue
        parts = re.split(r"(`[^`]+`)", line)
        parts = [f"`{part}`" if part.startswith("`") else re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts]
        lines[i] = "".join(parts)


def setup(app):
    """Writes what is derived before it is read."""
    app.connect("builder-inited", _fields_page)
    app.connect("autodoc-process-docstring", _plain, priority=600)
