"""How benchmarks report: tables in Markdown that read well as text, and the hardware."""

import math
import os
import platform
from pathlib import Path

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
