"""Who may import whom: the library and benchmarks no experiment, and no experiment another one."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ("bilevel", "online", "dro", "adversarial", "tasks", "models", "benchmarks")


def imports(*folders):
  """``(path, names)`` of every file, with the dotted names of all that it imports as parts."""
  for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
    path = path.relative_to(ROOT)
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
      if isinstance(node, ast.Import):
        names += [alias.name.split(".") for alias in node.names]
      elif isinstance(node, ast.ImportFrom):  # ``from a import b`` is ``a.b``.
        above = path.parts[: len(path.parts) - node.level] if node.level else ()
        module = node.module.split(".") if node.module else []
        names += [[*above, *module, alias.name] for alias in node.names]
    yield path, names


def room_of(parts):
  """The room below ``scripts`` or ``tests/scripts``; ``None`` elsewhere, and of ``common``."""
  below = {"scripts": parts[1:2], "tests": parts[2:3] if parts[1:2] == ["scripts"] else []}
  room = "".join(below.get(parts[0], []))
  return room if room != "common" and (ROOT / "scripts" / room / "__init__.py").exists() else None


def test_library_benchmarks_and_their_tests_import_no_script():
  seen = dict(imports("jaxbo", "models", "benchmarks", *(f"tests/{name}" for name in LIBRARY)))
  assert len(seen) > 200
  wrong = [
    f"{path}: {'.'.join(n)}" for path, names in seen.items() for n in names if "scripts" in n
  ]
  assert wrong == []


def test_no_room_imports_from_another_room():
  """And what rooms have in common imports from none."""
  wrong = [
    f"{path}: {'.'.join(name)}"
    for path, names in imports("scripts", "tests/scripts")
    for name in names
    if room_of(name) not in (None, "", room_of(list(path.parts)))
  ]
  assert wrong == []
