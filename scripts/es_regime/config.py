"""What the experiment can be told, and what names a cell."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import model_validator

from scripts.common.config import FREE, Among, Count, Several
from scripts.common.tuning import TunedConfig
from scripts.es_regime.methods import IN_JAX, METHODS, REFERENCES, RUNS, SEARCHES
from scripts.es_regime.problem import Settings

PARALLEL = 8  # Trials of a search that run at once in JAX; TPE found less one after the other.


class Cellmate(NamedTuple):
  """What a cell is of."""

  run: str
  sources: int
  method: str
  seed: int

  def parallel(self) -> int:
    """How many trials a search runs at once."""
    return PARALLEL if self.run in IN_JAX else 1

  def steps(self, budget: int) -> int:
    """The steps for a budget of inner runs."""
    if self.method in REFERENCES:
      return 0
    searches = self.method in SEARCHES
    cost = self.parallel() if searches else METHODS[self.method].cost(self.sources)
    return max(1, budget // cost)


class Config(TunedConfig):
  """When an ES response pays: few outer variables, runs that are long or have no derivative."""

  smallest: ClassVar = {
    "seeds": 1, "sources": (4,), "budget": 16, "inner_steps": 20,
    "methods": ("alike", "itd", "esj", "random"),
  }  # fmt: skip

  runs: Annotated[tuple[str, ...], Among(RUNS), FREE] = tuple(RUNS)
  """Which inner runs."""
  methods: Annotated[tuple[str, ...], Among(METHODS), FREE] = tuple(METHODS)
  """Which methods; each is run where it can be."""
  sources: Annotated[Several[Count], FREE] = (4, 16, 64)
  """How many sources of labels there are, and so outer variables: divisors of 192."""
  seeds: Count = 5
  """How many seeds; each draws the split, the bad sources and the wrong labels. The rates were
  chosen on another one, 100."""
  budget: Count = 160
  """What a method may spend, in times of one inner run."""
  inner_steps: Count | None = None
  """Steps of a run, instead of 1,000."""
  output_dir: Annotated[Path, FREE] = Path("runs/es_regime")
  """Where results go."""

  @model_validator(mode="after")
  def _sources_divide(self) -> Self:
    examples = Settings().num_train
    if wrong := [number for number in self.sources if number < 2 or examples % number]:
      raise ValueError(f"sources should be divisors of {examples} above 1, got {wrong}")
    return self

  def name(self) -> str:
    """The name of the table of rates."""
    return "digits"

  def settings(self) -> Settings:
    """The settings, with what was given instead."""
    return self.override(Settings())

  def in_full(self) -> dict[str, Any]:
    """The settings."""
    return self.settings_in_full(settings=self.settings())

  def cells(self, seeds: range) -> list[Cellmate]:
    """All of them, in the order in which they run: a seed after the other."""
    return [
      Cellmate(run, sources, method, seed)
      for seed in seeds
      for run in self.runs
      for sources in self.sources
      for method in self.methods
      if run in METHODS[method].runs
    ]

  def rate_of(self, cell: Cellmate) -> float:
    """The chosen rate of Adam, or half the width of the box.

    Raises:
      ValueError: if none was chosen.
    """
    method = METHODS[cell.method].rate_of or cell.method
    of_run = self.rates_tables().get(self.name(), {}).get(cell.run, {})
    if method not in of_run:
      raise ValueError(f"no rate was chosen for {method} on {cell.run}: choose it with --tune")
    return of_run[method]
