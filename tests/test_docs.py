"""Every public name has its place in the reference, and every notebook in the index."""

import inspect
import json
import pathlib
import re
import tomllib

import jaxbo
from jaxbo import adversarial
from tests import catalogue

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def documented() -> list[str]:
  pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
  return re.findall(r"^\.\. auto(?:function|class):: (jaxbo\.[\w.]+)$", pages, flags=re.MULTILINE)


def test_reference_lists_every_public_name_once():
  assert sorted(documented()) == sorted(catalogue.PUBLIC)


def what_is_missing(name: str) -> list[str]:
  """What the docstring of a public name lacks.

  A NamedTuple without one would show Python's default, ``Name(field, ...)``.
  """
  member = catalogue.PUBLIC[name]
  doc = inspect.getdoc(member)
  if not doc or doc.startswith(f"{member.__name__}("):
    return ["a docstring of its own"]
  if not inspect.isfunction(member):
    return []
  sections = ("Args:", "Returns:") if inspect.signature(member).parameters else ("Returns:",)
  return [part for part in (*sections, ">>> ") if part not in doc]


def test_every_public_name_has_a_docstring_of_its_own():
  found = {name: what_is_missing(name) for name in catalogue.PUBLIC}
  assert not {name: missing for name, missing in found.items() if missing}


def test_every_whole_method_and_weighting_is_among_the_choices():
  """Methods that take a learning rate, weightings and attacks, by name."""
  page = (DOCS / "choose.md").read_text()
  named = [
    name
    for name, member in catalogue.PUBLIC.items()
    if inspect.isfunction(member)
    and (
      "learning_rate" in next(iter(inspect.signature(member).parameters), "")
      or inspect.signature(member).return_annotation in (jaxbo.dro.Weighting, adversarial.Attack)
    )
    and not name.startswith("jaxbo.meta.")
  ]
  assert len(named) > 30
  assert [name for name in named if f"{name}`" not in page] == []


def test_links_of_the_front_page_lead_to_files():
  links = re.findall(r"\]\((?!https:)([^)]+)\)", (DOCS.parent / "README.md").read_text())
  assert len(links) > 30
  assert [link for link in links if not (DOCS.parent / link).exists()] == []


def test_notebooks_are_in_the_index_and_kept_without_outputs():
  """The docs build runs them; outputs in the repository would be older than the code."""
  notebooks = sorted((DOCS / "tutorials").glob("*.ipynb"))
  names = [notebook.stem for notebook in notebooks]
  listed = re.findall(r"^tutorials/(\d\w+)$", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
  gallery = (DOCS / "tutorials/index.md").read_text()
  assert names == listed == re.findall(r"^:link: (\w+)$", gallery, flags=re.MULTILINE)
  assert [f"../images/tutorials/{name}.png" for name in names] == re.findall(
    r":img-top: (.+)", gallery
  )
  for notebook in notebooks:
    for cell in json.loads(notebook.read_text())["cells"]:
      assert not cell.get("outputs"), f"{notebook.name}: run `jupyter nbconvert --clear-output`"
      assert cell.get("execution_count") is None


def test_notebooks_say_how_to_install_what_they_import():
  """A notebook in Colab has nothing but itself."""
  source = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["urls"]["Source"]
  packages = {
    "jaxbo": f"git+{source}\n",
    "jaxbo_models": f'"git+{source}#subdirectory=models"\n',
    "matplotlib": " matplotlib",
    "sklearn": " scikit-learn",
  }
  for notebook in sorted((DOCS / "tutorials").glob("*.ipynb")):
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    imports = set(re.findall(r"^(?:import|from) (\w+)", "\n".join(code), flags=re.MULTILINE))
    installs = {
      name
      for name, package in packages.items()
      if re.search(rf"# %pip install.*{re.escape(package)}", code[0])
    }
    assert imports & set(packages) == installs, notebook.name
