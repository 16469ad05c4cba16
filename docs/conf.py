"""Sphinx configuration: `uv run --extra docs sphinx-build -W docs docs/_build`.

A build needs no network: MathJax comes from PyPI, and `inventories/` says where other projects
document what we refer to.
"""

import json
import pathlib
import re
import tomllib

import jax
import optax
from sphinx.util.typing import stringify_annotation

import jaxbo

here = pathlib.Path(__file__).parent
about = tomllib.loads((here.parent / "pyproject.toml").read_text())["project"]

project = "jaxbo"
author = "The jaxbo authors"
release = jaxbo.__version__

extensions = [
  "myst_nb",
  "sphinx-mathjax-offline",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.intersphinx",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
  "sphinx_design",
  "sphinxext.opengraph",
]
exclude_patterns = ["_build", "jupyter_execute", ".jupyter_cache"]
html_theme = "furo"
html_title = "jaxbo"
html_show_copyright = False
html_baseurl = about["urls"]["Documentation"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_theme_options = {
  "source_repository": about["urls"]["Source"],
  "source_branch": "main",
  "source_directory": "docs/",
}
ogp_site_url = html_baseurl
ogp_image = html_baseurl + "_static/card.png"
ogp_image_alt = "jaxbo: gradients go in, better gradients come out"
ogp_social_cards = {"enable": False}

intersphinx_mapping = {
  name: (f"https://{site}/en/latest", str(here / f"inventories/{name}.inv"))
  for name, site in {
    "jax": "docs.jax.dev",
    "optax": "optax.readthedocs.io",
    "flax": "flax.readthedocs.io",
  }.items()
}

autosummary_generate = False
suppress_warnings = ["autosummary.import_cycle"]  # Tables show whole names.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell; most of it is compilation
nb_merge_streams = True

# Types under the names by which users import them; unions by theirs.
_NAMES = {
  stringify_annotation(of, mode): mark + name
  for mode, mark in (("smart", "~"), ("fully-qualified-except-typing", ""))
  for name, of in {
    "optax.Params": optax.Params,
    "jax.typing.ArrayLike": jax.typing.ArrayLike,
    "jax.typing.DTypeLike": jax.typing.DTypeLike,
    "jax.Array": jax.Array,
  }.items()
} | {"optax._src.base.": "optax."}
_PRIVATE = re.compile(r"~?(?:jaxbo\._types|collections\.abc)\.")


def renamed(types):
  """The text of a type annotation without the modules in which types happen to be defined."""
  for internal, name in _NAMES.items():
    types = types.replace(internal, name)
  return _PRIVATE.sub("", types)


def rename_hints(app, *_):
  """Renames the types of arguments."""
  for hints in app.env.current_document.autodoc_annotations.values():
    hints.update({name: renamed(hint) for name, hint in hints.items()})


def rename_attributes(app, what, name, obj, options, lines):
  """Renames the types of attributes, which napoleon has written into the docstring."""
  lines[:] = [renamed(line) if line.startswith((":type", ":vartype")) else line for line in lines]


def add_summary(app, page, source):
  """Puts a table of its functions behind the introduction of each page of the reference."""
  functions = re.findall(r"^\.\. autofunction:: (\S+)$", source[0], flags=re.MULTILINE)
  if page.startswith("api/") and functions:
    names = "".join(f"   {name}\n" for name in functions)
    table = f"```{{eval-rst}}\n.. autosummary::\n   :nosignatures:\n\n{names}```\n\n"
    start = re.search(r"^(## |```{eval-rst}\n\.\. auto)", source[0], flags=re.MULTILINE).start()
    source[0] = source[0][:start] + table + source[0][start:]


def add_links(app, page, source):
  """Puts a download and a link to Colab below the title of each notebook."""
  if not page.startswith("tutorials/") or page == "tutorials/index":
    return
  file, repository = f"{pathlib.Path(page).name}.ipynb", about["urls"]["Source"]
  colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
  notebook = json.loads(source[0])
  title, *text = notebook["cells"][0]["source"]
  links = f"""
{{download}}`Download this notebook <{file}>`, or
[open it in Colab]({colab}/blob/main/docs/{page}.ipynb).
"""
  notebook["cells"][0]["source"] = [title, links, *text]
  source[0] = json.dumps(notebook)


def setup(app):
  """Connects what is above."""
  app.connect("source-read", add_summary)
  app.connect("source-read", add_links)
  app.connect("autodoc-process-docstring", rename_attributes, priority=600)  # after napoleon
  app.connect("object-description-transform", rename_hints, priority=400)  # before they are shown
