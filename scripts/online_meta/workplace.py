"""Where online meta-learning is run: pre-training, programs, runs that are kept, sweeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from scripts.online_meta import model as meta_model
from scripts.online_meta import report as meta_report
from scripts.online_meta import runs as meta_runs
from scripts.online_meta.config import Config
from scripts.online_meta.data import Domains
from scripts.online_meta.methods import METHODS, Rates
from scripts.online_meta.plots import Sweep
from scripts.online_meta.report import Runs
from scripts.online_meta.runs import Program, Run, Trace

SWITCH_FACTORS = (0.0, 0.4, 0.7, 1.0, 1.5, 2.0, 4.0)
SHIFT_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Workplace:
  """What all runs share: images on the device, pre-trained models, compiled programs, files."""

  def __init__(self, config: Config, domains: Domains, progress: Progress):
    self.config, self.domains, self.progress = config, domains, progress
    reported = domains.validation if config.validation else domains.test
    self.arrays = tuple(jax.device_put((domains.validation, reported)))
    self.trained: dict[str, Any] = {}
    self.programs: dict[tuple[str, bool], Program] = {}
    self.task = progress.add_task("", total=1, loss="")

  def say(self, what: str, now: str = "", advance: int = 0) -> None:
    """Moves the bar."""
    self.progress.update(self.task, description=what, loss=now, advance=advance)

  def path(self, name: str, seed: int) -> Path:
    """Where a result is kept."""
    return self.config.output_dir / "checkpoints" / name / str(seed)

  def begin(self, begins: str) -> Any:
    """The pre-trained model of a kind, trained when it is first asked for."""
    if begins in self.trained or begins == "random":
      return self.trained.get(begins)
    config = self.config
    model = config.model("head" if begins == "anil" else "all")
    path, key = self.path(begins, 0), jax.random.key(0)
    if path.exists():
      self.trained[begins] = meta_runs.load_params(path, jax.eval_shape(model.init, key))
      return self.trained[begins]
    what = f"pre-training, {begins.upper()}"
    self.say(what, "compiling")
    on_epoch = lambda epoch, value: self.say(what, f"epoch {epoch + 1}: accuracy {value:.3f}")
    self.trained[begins], _ = meta_model.pretrain(
      model, config.pretraining(), self.domains.train, self.domains.early, key, on_epoch
    )
    if not config.tune:
      save(path, meta_runs.save_params, self.trained[begins])
    return self.trained[begins]

  def play(
    self, name: str, rates: Rates, stay_probability: float, seeds: Any, *, test: bool
  ) -> Run:
    """Plays a stream, of the images that are reported or of those that are not."""
    config, method = self.config, METHODS[name]
    model = config.model("head" if method.begins == "anil" else "all")
    self.begin(method.begins)
    xs = meta_runs.initial(model, method.begins, self.trained, seeds)
    rounds = config.rounds if test else config.tune_rounds
    stream = config.stream(self.arrays[test], stay_probability)
    if (name, test) not in self.programs:
      self.say(method.label, "compiling")
      x = jax.tree.map(lambda leaf: leaf[0], xs)
      self.programs[name, test] = meta_runs.make_program(
        name, model, config.switches(), rounds, x, stream, seeds
      )
    self.say(f"{method.label}, p = {stay_probability:g}, seed {seeds[0]}")
    run = meta_runs.play(self.programs[name, test], rates, xs, stream, seeds)
    self.say(method.label, f"accuracy {100 * np.mean(run.trace.before):.1f} %", 1)
    return run

  def kept(self, folder: str, name: str, rates: Rates, stay_probability: float, seeds: Any) -> Run:
    """A run of the reported images, from its file if there is one."""
    path = self.path(folder, int(seeds[0]))
    if path.exists():
      self.say(folder, advance=1)
      return meta_runs.load_run(path)
    run = self.play(name, rates, stay_probability, seeds, test=True)
    save(path, meta_runs.save_run, run)
    return run


def save(path: Path, write: Callable[[Path, Any], None], value: Any) -> None:
  """Keeps a value in a folder that may not be there yet."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write(path, value)


def best_losses(place: Workplace) -> dict[float, np.ndarray]:
  """The losses of the best fixed model of each task, ``[seeds, rounds]`` for each stream."""
  config, model, x = place.config, place.config.model(), place.begin("maml")
  find = jax.jit(
    lambda x, stream, keys: meta_runs.best_losses(model, x, stream, keys, config.rounds)
  )
  result = {}
  for p in config.stay_probabilities:
    stream, rows = config.stream(place.arrays[1], p), []
    for seeds in config.groups():
      path = place.path(f"{p:g}_best", int(seeds[0]))
      if not path.exists():
        place.say(f"best fixed models, p = {p:g}, seed {seeds[0]}")
        losses = np.asarray(find(x, stream, meta_runs.keys_of(seeds)))
        save(path, lambda path, value: meta_runs.save(path, losses=value), losses)
      with np.load(path) as arrays:
        rows.append(arrays["losses"])
    result[p] = np.concatenate(rows)
  return result


def sweep_all(place: Workplace, rates: Rates, runs: Runs) -> dict[str, Sweep]:
  """LEEDS with other thresholds, on the first stream and the first seed."""
  config = place.config
  p, seeds = config.stay_probabilities[0], config.groups()[0]
  base = Trace(*(leaf[0] for leaf in runs[p, "leeds"].trace))
  at_switches = base.shift_score[base.switch]
  tried = {
    "switch": np.unique([factor * rates.switch for factor in SWITCH_FACTORS]),
    "shift": np.unique([rates.shift, *np.quantile(at_switches, SHIFT_LEVELS)]),
  }
  place.progress.update(
    place.task, total=sum(map(len, tried.values())), completed=0, description="thresholds"
  )
  result = {}
  for kind, values in tried.items():
    rows = []
    for i, value in enumerate(values):
      other = rates._replace(**{kind: float(value)})
      run = place.kept(f"{p:g}_sweep_{kind}_{i}", "leeds", other, p, seeds)
      rows.append(Trace(*(leaf[0] for leaf in run.trace)))
    judge = lambda trace, kind=kind: meta_report.qualities(trace)[kind == "shift"]
    qualities = [judge(row) for row in rows]
    result[kind] = Sweep(
      values,
      getattr(rates, kind),
      np.array([row.before.mean() for row in rows]),
      np.array([row.before[row.domain != 0].mean() for row in rows]),
      np.array([quality.precision for quality in qualities]),
      np.array([quality.recall for quality in qualities]),
      logged_quality(base, kind, values),
    )
  return result


def logged_quality(trace: Trace, kind: str, values: np.ndarray) -> np.ndarray:
  """Precision and recall of thresholds on the scores that were logged, ``[thresholds, 2]``."""

  def judge(value):
    if kind == "switch":
      return meta_report.qualities(trace._replace(switch=trace.switch_score > value))[0]
    flags = trace.switch & (trace.shift_score > value)
    return meta_report.qualities(trace._replace(shift=flags))[1]

  quality = jax.jit(jax.vmap(judge))(jnp.asarray(values, jnp.float32))
  return np.stack([quality.precision, quality.recall], axis=1)
