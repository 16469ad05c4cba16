"""Tasks: a descent whose step is a compiled program, a search whose step is a few inner runs."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from scripts.common.study import Run
from scripts.common.task import Compiled, Program, Row, Spent, Task
from scripts.es_regime import methods, problem
from scripts.es_regime.config import Cellmate, Config
from scripts.es_regime.methods import Incumbent, Tried
from scripts.es_regime.problem import Data

SURE = 4.0  # The logit of what the oracle knows.


def data_of(run: Run[Config], cell: Cellmate) -> Data:
  """The digits of a seed and a number of sources."""
  split = lambda: problem.split(run.data, run.config.settings(), cell.sources, cell.seed)
  return run.shared(("data", cell.sources, cell.seed), split)


class Judged(Task):
  """A task whose state is ``(what the method keeps, the incumbent, CPU seconds)``."""

  temporary_bytes = -1

  def judge(self, run: Run[Config], cell: Cellmate) -> None:
    """Prepares the judgement."""
    settings, data = run.config.settings(), data_of(run, cell)

    def of_logits(logits, examples):
      loss = problem.cross_entropies(logits, examples.labels).mean()
      return loss, (logits.argmax(axis=0) == examples.labels).mean()

    def in_jax(x, data):
      inner = problem.solver(settings, quantised=cell.run == "quantised")
      y = inner.solve(x, inner.init(problem.init_params()), data).params
      return [of_logits(problem.logits(y, of.images), of) for of in (data.val, data.test)]

    def on_host(x, data):
      logits = lambda of: problem.svm_logits(settings, np.asarray(x), data.train, of.images)
      return [of_logits(logits(of), of) for of in (data.val, data.test)]

    made = (
      on_host if cell.run == "svm" else run.shared(("judge", cell.run), lambda: jax.jit(in_jax))
    )
    self._scores = functools.partial(made, data=data)

  def scores(self, state: Any) -> Row:
    """Of the model that the incumbent trains."""
    (loss, _), (test_loss, accuracy) = self._scores(jnp.asarray(state[1].x))
    return {
      "outer_loss": float(loss), "test_loss": float(test_loss), "test_accuracy": float(accuracy),
    }  # fmt: skip

  def move(self, state: Any, t: int) -> tuple[Any, Any]:
    """A step of the method, ``((what it keeps, the incumbent), what is told)``."""
    raise NotImplementedError

  def step(self, state: Any, t: int) -> tuple[Any, Any]:
    """A step on the clock of the process: a core may be shared, and Optuna thinks on it, too."""
    start = time.process_time()
    after, told = jax.block_until_ready(self.move(state[:2], t))
    return (*after, state[2] + np.float32(time.process_time() - start)), told

  def evaluate(self, state: Any, told: list[Any]) -> Row:
    """The scores on the way."""
    del told
    return self.scores(state) | {"cpu_seconds": float(state[2])}

  def result(self, state: Any, spent: Spent) -> Row:
    """The scores in the end, and what they cost."""
    steps = spent.lines[-1]["step"] if spent.lines else 0
    return self.scores(state) | {
      "steps": steps,
      "cpu_seconds": float(state[2]),
      "temporary_bytes": self.temporary_bytes,
    }


class Reference(Judged):
  """A choice that needs no search: all sources alike, or what only an oracle knows."""

  def __init__(self, run: Run[Config], cell: Cellmate):
    self.judge(run, cell)
    x = np.zeros(cell.sources, np.float32)
    if cell.method == "oracle":
      bad = problem.bad_sources(cell.sources, cell.seed)
      x = np.where(bad, -SURE, SURE).astype(np.float32)
    self.state = (), Incumbent(x, np.float32(np.inf)), np.float32(0)


class Descent(Judged):
  """A response with Adam; a step is an outer step."""

  def __init__(self, run: Run[Config], cell: Cellmate, rate: float):
    self.judge(run, cell)
    settings = run.config.settings()
    state, step = methods.descent(cell.method, cell.run, settings, cell.sources, rate, cell.seed)
    program = run.shared((cell.method, cell.run, cell.sources), lambda: Program(step))
    self._program = Compiled(program, state, data_of(run, cell))
    self.state = (*self._program.state, np.float32(0))
    if cell.run != "svm":
      self.temporary_bytes = program.temporary_bytes

  def move(self, state: Any, t: int) -> tuple[Any, Any]:
    """An outer step."""
    return self._program.step(state, t)


class Search(Judged):
  """Random search or TPE; a step is some trials side by side."""

  def __init__(self, run: Run[Config], cell: Cellmate, rate: float):
    self.judge(run, cell)
    settings, self.cell, self.radius, p = run.config.settings(), cell, rate, cell.sources
    self.data, self.parallel = data_of(run, cell), cell.parallel()
    trials = run.config.budget // self.parallel * self.parallel
    tried = Tried(np.zeros((trials, p), np.float32), np.full(trials, np.inf, np.float32))
    self.state = tried, Incumbent(tried.xs[0], np.float32(np.inf)), np.float32(0)
    self._propose = methods.Tpe() if cell.method == "tpe" else methods.propose_at_random
    self._losses = methods.losses(cell.run, settings)
    if cell.run != "svm":
      self.data = jax.device_put(self.data)
      lower = lambda: jax.jit(self._losses).lower(tried.xs[: self.parallel], self.data).compile()
      self._losses = run.shared(("losses", cell.run, p), lower)
      self.temporary_bytes = measure.temporary_bytes(self._losses)

  def move(self, state: Any, t: int) -> tuple[Any, Any]:
    """The next trials; the first of all is where descents begin."""
    (xs, losses), incumbent = jax.tree.map(np.asarray, state)
    begin, end = t * self.parallel, (t + 1) * self.parallel
    tried = Tried(xs.copy(), losses.copy())
    new = self._propose(tried, begin, self.parallel, self.radius, self.cell.seed)
    new = np.asarray(new, np.float32)
    if t == 0:
      new[0] = 0
    found = np.asarray(self._losses(new, self.data), np.float32)
    tried.xs[begin:end], tried.losses[begin:end] = new, np.where(np.isfinite(found), found, np.inf)
    best = tried.losses[begin:end].argmin() + begin
    if tried.losses[best] < incumbent.loss:
      incumbent = Incumbent(tried.xs[best], tried.losses[best])
    return (tried, incumbent), found.min()
