"""How benchmarks report: tables in Markdown that read well as text, and the hardware."""

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax


def markdown(columns: list[str], rows: list[list[str]]) -> str:
  """A table, aligned as text too: the first column to the left."""
  table = [columns, *rows]
  widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
  lines = [
    "| " + " | ".join(f"{cell:{'<>'[i > 0]}{widths[i]}}" for i, cell in enumerate(row)) + " |"
    for row in table
  ]
  rule = "|" + "|".join("-" * (width + 1) + "-:"[i > 0] for i, width in enumerate(widths)) + "|"
  return "\n".join([lines[0], rule, *lines[1:]])


def number(value: float, digits: int = 3) -> str:
  """``digits`` significant digits; a dash for NaN."""
  return "-" if math.isnan(value) else f"{value:,.{digits}g}" if value < 1e3 else f"{value:,.0f}"


def hardware() -> str:
  """What the numbers were measured on."""
  device = jax.devices()[0]
  name = device.device_kind
  if device.platform == "cpu":
    cpuinfo = Path("/proc/cpuinfo")
    models = [
      line.split(":")[1].strip()
      for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
      if line.startswith("model name")
    ]
    name = f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"
  return f"{name}; Python {platform.python_version()}, jax {jax.__version__}"


def save(path: Path | None, text: str, data: Any) -> None:
  """Writes ``text`` to ``path`` with the suffix .md and ``data`` with .json; nothing for None."""
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


def show(path: Path | None, columns: list[str], rows: list[list[str]], data: Any) -> None:
  """Prints a table under the hardware, and saves it with ``data``."""
  text = f"{hardware()}\n\n{markdown(columns, rows)}\n"
  print(text)
  save(path, text, data)


def arguments(description: str | None, **counts: tuple[int, str]) -> argparse.Namespace:
  """The command line of a benchmark: numbers of at least 1, with defaults and help, and --save."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, (default, text) in counts.items():
    parser.add_argument(f"--{name}", type=int, default=default, help=text)
  parser.add_argument("--save", type=Path, help="path without suffix, for .md and .json")
  args = parser.parse_args()
  for name in counts:
    if getattr(args, name) < 1:
      parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
  return args
