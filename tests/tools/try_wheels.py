"""Tries what PyPI would hold, in an environment with both wheels and nothing else of the project.

Usage: ``uv build --all-packages --out-dir DIST``, then
``uv run --isolated --no-project --with DIST/jaxbo-*.whl --with DIST/jaxbo_models-*.whl python
tests/tools/try_wheels.py``
"""

import doctest
import importlib.metadata
import re
import sys

import jaxbo_models

import jaxbo


def main() -> None:
  """Runs the examples of the pages that PyPI would show, and looks at their links."""
  for module, name in ((jaxbo, "jaxbo"), (jaxbo_models, "jaxbo-models")):
    assert "site-packages" in str(module.__file__), f"{name} comes from {module.__file__}"
    text = importlib.metadata.metadata(name).json["description"]
    assert isinstance(text, str)
    links = re.findall(r"\]\((?!https:)[^)]*\)", text)
    assert not links, f"the page of {name} on PyPI would have relative links: {links}"
    page = doctest.DocTestParser().get_doctest(text, {}, f"the page of {name}", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(page)
    if runner.summarize().failed:
      sys.exit(1)
  print(f"jaxbo {jaxbo.__version__} runs from its wheel.")


if __name__ == "__main__":
  main()
