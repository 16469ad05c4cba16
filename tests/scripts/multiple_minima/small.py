"""Small problems, and settings that are not those of rates.json."""

import dataclasses
import json

import jax.numpy as jnp

from scripts.multiple_minima import config as config_module
from scripts.multiple_minima import methods, toys, training
from scripts.multiple_minima.config import Config

SETTINGS = dataclasses.replace(methods.DATASETS["digits"], num_train=40, num_val=20, hidden=(8,))
BUDGET = 40
CHOSEN = {
  "pdbo": {"outer": 0.1, "num_steps": 1, "slack": 0.01, "dual_learning_rate": 1.0},
  "itd": {"outer": 0.1, "inner": 0.03, "num_steps": 5},
}


def config(folder, **more):
  """Two methods on hyper-cleaning, and on one toy."""
  rates = folder.parent / "rates.json"
  rates.write_text(json.dumps({"digits": CHOSEN}))
  names = {"methods": tuple(CHOSEN), "toys": ("T1",), "seeds": 1, "budget": BUDGET}
  return Config(output_dir=folder, rates_file=rates, **names | more)


def patch(setattr, setitem):
  """Four baselines; "retrained" is the spread of the logits of the weights, zero at the start."""
  setitem(methods.DATASETS, "digits", SETTINGS)
  setattr(config_module, "BASELINES", ("everything", "stopped", "validation", "oracle"))
  setattr(training, "retrained_accuracy", lambda settings, key, problem: jnp.std(problem.x))
  for name, toy in toys.TOYS.items():
    setitem(toys.TOYS, name, toy._replace(num_updates=20))
