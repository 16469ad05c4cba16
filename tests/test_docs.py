"""Every public name has its place in the reference, and every notebook in the index."""

import inspect
import json
import pathlib
import re

import pytest

import jaxbo

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def documented() -> list[str]:
  pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
  return re.findall(r"^\.\. auto(?:function|class):: (\w+)$", pages, flags=re.MULTILINE)


def test_reference_lists_every_public_name_once():
  assert sorted(documented()) == sorted(jaxbo.__all__)


@pytest.mark.parametrize("name", jaxbo.__all__)
def test_every_public_name_has_a_docstring_of_its_own(name):
  """A NamedTuple without one would show Python's default, ``Name(field, ...)``."""
  member = getattr(jaxbo, name)
  doc = inspect.getdoc(member)
  assert doc
  assert not doc.startswith(f"{name}(")
  if inspect.isfunction(member):
    assert ">>> " in doc, f"{name} has no doctest"
    for section in ("Args:", "Returns:") if inspect.signature(member).parameters else ("Returns:",):
      assert section in doc, f"{name} has no section {section}"


def test_notebooks_are_in_the_index_and_kept_without_outputs():
  """The docs build runs them; outputs in the repository would be older than the code."""
  notebooks = sorted((DOCS / "tutorials").glob("*.ipynb"))
  listed = re.findall(r"^tutorials/(\w+)$", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
  assert [notebook.stem for notebook in notebooks] == listed
  for notebook in notebooks:
    for cell in json.loads(notebook.read_text())["cells"]:
      assert not cell.get("outputs"), f"{notebook.name}: run `jupyter nbconvert --clear-output`"
      assert cell.get("execution_count") is None
