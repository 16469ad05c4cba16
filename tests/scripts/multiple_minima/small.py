"""Small problems, and times that are not measured."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp

from scripts.multiple_minima import __main__ as script
from scripts.multiple_minima import methods, toys, training

SETTINGS = dataclasses.replace(methods.DATASETS["digits"], num_train=40, num_val=20, hidden=(8,))
BUDGET = 40


def config(folder, **more):
  """Two methods on hyper-cleaning, and on one toy."""
  names = {"methods": ("pdbo", "itd"), "toys": ("T1",)}
  return script.Config(output_dir=folder, seeds=1, budget=BUDGET, **names | more)


def patch(setattr, setitem):
  """Two baselines; "retrained" is the spread of the logits of the weights, zero at the start."""
  setitem(methods.DATASETS, "digits", SETTINGS)
  setattr(script, "BASELINES", ("everything", "validation"))
  setattr(training, "retrained_accuracy", lambda settings, x, key, problem: jnp.std(x))
  for name, toy in toys.TOYS.items():
    setitem(toys.TOYS, name, toy._replace(num_updates=20))

  def seconds(call):
    parts = call.args[0].parts
    return parts.steps * parts.gradients * (2.0 if parts.gradients > 1.5 else 1.0)

  def time_together(programs, **options):
    return {name: SimpleNamespace(seconds=seconds(call)) for name, call in programs.items()}

  setattr(script.measure, "time_together", time_together)
