"""Sphinx's settings: `sphinx-build -W docs build/docs`."""

import pathlib
import re
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from flax.traverse_util import flatten_dict

from avb_jax import __version__
from experiments.configs import celeba, eight_schools, evaluate, mnist, synthetic
from experiments.configs.fields import TRAINING, texts

project, author, release = "avb_jax", "the avb_jax authors", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"avb_jax {release}"
exclude_patterns = ["launch"]
DOCS = pathlib.Path(__file__).parent
# The notebooks are pages, too, and Sphinx reads what lies below docs/.
shutil.copytree(DOCS.parent / "notebooks", DOCS / "notebooks", dirs_exist_ok=True)
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
    """The page of the configs' fields, from the configs."""
    of_experiments = {"synthetic": synthetic, "mnist": mnist, "celeba": celeba}
    trained = {name: flatten_dict(module.get_config().to_dict(), sep=".") for name, module in of_experiments.items()}

    def default(name: str) -> str:
        common = TRAINING[name].default if name in TRAINING else None
        others = {experiment: of[name] for experiment, of in trained.items() if name in of and of[name] != common}
        shown = [f"`{common!r}`"] if name in TRAINING else []
        return "; ".join(shown + [f"{experiment} `{value!r}`" for experiment, value in others.items()])

    parts = {
        "of a training": {name: (default(name), text) for name, text in sorted(texts().items())},
        **{
            f"of `experiments.{name}`": {field: (f"`{given.default!r}`", given.text) for field, given in module.FIELDS.items()}
            for name, module in {"evaluate": evaluate, "eight_schools": eight_schools}.items()
        },
    }
    lines = [
        "# Fields of a config\n",
        "`--config.FIELD=VALUE` changes one, and `--help` prints a command's own values. The first table has the fields of",
        "every training's config, each with its default and what an experiment has in its place, and those of some alone.\n",
    ]
    for title, rows in parts.items():
        lines += [f"## Fields {title}\n", "| field | default | |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {given} | {text.replace('|', chr(92) + '|')} |" for name, (given, text) in rows.items()]
        lines.append("")
    (DOCS / "guides" / "fields.md").write_text("\n".join(lines))


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
