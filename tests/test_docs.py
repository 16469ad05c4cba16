"""Every public name has its place in the reference."""

import inspect
import pathlib
import re

import pytest

import jaxbo

API = pathlib.Path(__file__).parents[1] / "docs" / "api"


def documented() -> list[str]:
  pages = "\n".join(page.read_text() for page in API.glob("*.md"))
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
