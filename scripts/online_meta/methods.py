"""The methods of the online meta-learning experiments, each a few lines over jaxbo."""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import optax

import jaxbo
from scripts.common.config import Among, Count, NonNegative
from scripts.common.tuning import TunedConfig
from scripts.online_meta.model import Model, accuracy

Learner = jaxbo.meta.OnlineMetaLearner


class Rates(NamedTuple):
  """What is chosen on validation streams; numbers that a method does not use are NaN."""

  inner: Any  # the learning rate of the inner steps; of BGD, the first deviation
  outer: Any = math.nan  # that of the meta-updates
  in_scale: Any = math.nan  # how much slower in-distribution tasks are learned
  modulation: Any = math.nan  # lambda of the update modulation
  switch: Any = math.nan  # the threshold of the switch score
  shift: Any = math.nan  # the threshold of the shift score
  level: Any = math.nan  # C-MAML: the quantile of each model's switch scores that is its threshold


class Choices(TunedConfig):
  """Settings that all methods share, and choices that are open in LEEDS."""

  num_ways: Count = 10
  """Classes in a task."""
  num_shots: Count = 5
  """Images of each class in a round."""
  inner_steps: Count = 3
  """Inner steps in a round, for all methods."""
  query: Annotated[str, Among(("same", "given", "next"))] = "same"
  """The images that judge the adapted model in a meta-update: same (the images of its adaptation,
  so that all methods see the same data), given (as many other images) or next (those of the next
  round, as C-MAML always does)."""
  first_order: bool = False
  """Drops the response in all methods."""
  bgd_samples: Count = 2
  """Draws of BGD; 5 in the published code."""
  buffer_size: Count = 101
  """The largest number of rounds that C-MAML's prolonged adaptation collects."""
  switch_score: Annotated[str, Among(("loss", "drop"))] = "loss"
  """LEEDS: the score that detects switches."""
  shift_score: Annotated[str, Among(("energy", "entropy", "max_softmax"))] = "energy"
  """LEEDS: the score that detects shifts."""
  shift_model: Annotated[str, Among(("adapted", "meta", "initial"))] = "adapted"
  """LEEDS: the model whose logits give the shift score."""
  no_switch_scale: NonNegative = 0.0
  """LEEDS: the scale of meta-updates in rounds without a switch."""


class Method(NamedTuple):
  """A method."""

  label: str
  make: Callable[[Model, Rates, Choices], Learner]
  begins: str = "maml"  # what it starts from: that, "anil" or "random"
  moves: tuple[str, ...] = ()  # the rates that it has, beside ``inner``
  thresholds: tuple[str, ...] = ()  # those that are calibrated on its own validation run
  calibrates: bool = False  # whether every run does that anew, for each of its models
  detects: bool = False  # whether there is something to judge


def _sgd(model: Model, rates: Rates, choices: Choices) -> jaxbo.InnerSolver:
  return model.inner(optax.sgd(rates.inner), choices.inner_steps)


def _tune(model: Model, rates: Rates, choices: Choices) -> Learner:
  return jaxbo.meta.fine_tuning(model.loss, _sgd(model, rates, choices), **_options(model))


def _bgd(model: Model, rates: Rates, choices: Choices) -> Learner:
  images = choices.num_ways * choices.num_shots
  bgd = jaxbo.meta.bayesian_gradient_descent(
    10.0, rates.inner, num_samples=choices.bgd_samples, num_examples=images
  )
  return jaxbo.meta.fine_tuning(
    model.loss, model.inner(bgd, choices.inner_steps), **_options(model)
  )


def _frozen(model: Model, rates: Rates, choices: Choices) -> Learner:
  return jaxbo.meta.frozen_maml(model.loss, _sgd(model, rates, choices), **_options(model))


def _scratch(model: Model, rates: Rates, choices: Choices) -> Learner:
  inner, told = _sgd(model, rates, choices), jaxbo.meta.oracle_detector()
  return jaxbo.meta.train_from_scratch(model.loss, inner, told, query="same", **_options(model))


def _meta_ogd(model: Model, rates: Rates, choices: Choices) -> Learner:
  inner = _sgd(model, rates, choices)
  outer = optax.chain(_response(inner, choices), optax.adam(rates.outer))
  return jaxbo.meta.meta_ogd(model.loss, inner, outer, query=choices.query, **_options(model))


def _c_maml(model: Model, rates: Rates, choices: Choices, pap=False, modulated=False) -> Learner:
  inner = _sgd(model, rates, choices)
  options: dict[str, Any] = {"buffer_size": choices.buffer_size} if pap else {}
  return (jaxbo.meta.c_maml_pap if pap else jaxbo.meta.c_maml)(
    model.loss,
    inner,
    optax.adam(rates.outer),
    drop_threshold=rates.switch,
    modulation=rates.modulation if modulated else None,
    response=_response(inner, choices),
    **options,
    **_options(model),
  )


def _leeds(model: Model, rates: Rates, choices: Choices, told=False, learns=True) -> Learner:
  inner = _sgd(model, rates, choices)
  if learns:
    scales = (rates.in_scale, 1.0, choices.no_switch_scale)
    gate = jaxbo.gate_by_detection(optax.adam(rates.outer), *scales)
    thresholds = (rates.switch, rates.shift)
  else:
    gate = jaxbo.gate_by_detection(optax.identity(), 0.0, 0.0)
    thresholds = (rates.switch, math.inf)
  return jaxbo.meta.online_meta_learner(
    model.loss,
    inner,
    optax.chain(_response(inner, choices), gate),
    jaxbo.meta.oracle_detector() if told else jaxbo.meta.threshold_detector(*thresholds),
    query=choices.query,
    switch_score=choices.switch_score,
    shift_score=choices.shift_score,
    shift_model=choices.shift_model,
    **_options(model),
  )


def _options(model: Model) -> dict[str, Any]:
  return {"start": model.start, "metric": accuracy}


def _response(inner: jaxbo.InnerSolver, choices: Choices) -> optax.GradientTransformation:
  return jaxbo.drop_response() if choices.first_order else jaxbo.add_unrolled_response(inner)


def _drop_detector(label: str, make: Any, *moves: str) -> Method:
  """A kind of C-MAML."""
  return Method(label, make, moves=("outer", *moves), thresholds=("switch",), detects=True)


METHODS = {
  "online_sgd": Method("online SGD", _tune, begins="random"),
  "fine_tuning": Method("fine-tuning", _tune),
  "bgd": Method("BGD", _bgd),
  "scratch": Method("from scratch, told", _scratch, begins="random"),
  "maml": Method("MAML", _frozen),
  "anil": Method("ANIL", _frozen, begins="anil"),
  "meta_ogd": Method("MetaOGD", _meta_ogd, moves=("outer",)),
  "c_maml": _drop_detector("C-MAML", _c_maml),
  "c_maml_um": _drop_detector("C-MAML, modulated", partial(_c_maml, modulated=True), "modulation"),
  "c_maml_pap": _drop_detector(
    "C-MAML, mod., prolonged", partial(_c_maml, pap=True, modulated=True), "modulation"
  ),
  "restart": Method(
    "restart", partial(_leeds, learns=False), thresholds=("switch",), calibrates=True, detects=True
  ),
  "restart_told": Method("restart, told", partial(_leeds, told=True, learns=False), detects=True),
  "leeds": Method(
    "LEEDS",
    _leeds,
    moves=("outer", "in_scale"),
    thresholds=("switch", "shift"),
    calibrates=True,
    detects=True,
  ),
  "leeds_told": Method(
    "LEEDS, told", partial(_leeds, told=True), moves=("outer", "in_scale"), detects=True
  ),
}


def state_bytes(state: Any, x: Any) -> int:
  """The bytes that a learner carries from round to round beside the meta-model, stream aside."""
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  return size(state._replace(stream_state=())) - size(x)
