"""Writes the tables of kept results into the pages that quote them.

A page has ``<!-- results: hyper_cleaning digits -->`` and ``<!-- end of results -->`` where the
tables of ``scripts/hyper_cleaning/results/digits`` belong; ``... digits 2`` is the second of them
alone. What stands between is replaced.

  python -m scripts.common.pages            writes them
  python -m scripts.common.pages --check    says which pages are stale, with status 1
"""

import functools
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import tyro

from scripts.common import folder
from scripts.common.study import Results, Study

ROOT = Path(__file__).parents[2]
MARKERS = re.compile(r"(<!-- results: (\w+) (\S+)( \d+)? -->\n).*?(<!-- end of results -->)", re.S)


def load(study: Study[Any], name: str) -> Results[Any]:
  """The results that a study kept under a name."""
  path = study.room() / "results" / name
  saved = json.loads((path / folder.CONFIG).read_text())
  lines, rows, notes = folder.read(path)
  config = study.config.of(saved["identity"], **saved["runs"][-1]["seeds"])
  return Results(config, lines, rows, notes)


@functools.cache
def tables(room: str, name: str) -> tuple[list[str], str]:
  """The tables of kept results in Markdown, and a line that says where they were measured."""
  module = importlib.import_module(f"scripts.{room}.__main__")
  saved = json.loads((ROOT / "scripts" / room / "results" / name / folder.CONFIG).read_text())
  study: Study[Any] = getattr(module, saved["study"])()
  shown = [f"{table.title}\n\n{table.markdown()}\n" for table in study.tables(load(study, name))]
  ran = saved["runs"][-1]
  cores = f"{ran['cores']} core" + ("s" if ran["cores"] > 1 else "")
  where = f"{ran['num_devices']} x {ran['device']}, {cores}"
  source = f"commit {str(ran['commit'])[:9]}, jax {ran['jax']}, {where}, {ran['date'][:10]}"
  return shown, f"(`{ran['command']}`, {source}; rows in `scripts/{room}/results/{name}`)\n"


def rebuilt(page: str) -> str:
  """The text of a page with its tables as the kept results have them."""

  def replace(match: re.Match[str]) -> str:
    begin, room, name, number, end = match.groups()
    shown, source = tables(room, name)
    chosen = [shown[int(number) - 1]] if number else shown
    return begin + "\n" + "\n".join([*chosen, source]) + "\n" + end

  return MARKERS.sub(replace, page)


def main(check: bool = False) -> int:
  """Writes the tables; with ``--check`` only says which pages are stale.

  Args:
    check: writes nothing.
  """
  status = 0
  for path in sorted((ROOT / "docs" / "experiments").glob("*.md")):
    text = path.read_text()
    new = rebuilt(text)
    if new != text:
      print(f"{path.relative_to(ROOT)} {'is stale' if check else 'was written'}")
      status = 1 if check else 0
      if not check:
        path.write_text(new)
  return status


if __name__ == "__main__":
  sys.exit(tyro.cli(main))
