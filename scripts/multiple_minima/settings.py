"""The settings of ``scripts.multiple_minima`` for hyper-cleaning.

From ``chosen.json`` of ``python -m scripts.multiple_minima.tune``: for each method the best of 16
points on seeds 100 and 101 of the digits, which the script does not report. MNIST has the settings
of the digits: nothing was chosen on it.
"""

from typing import Any

_OF_DIGITS: dict[str, dict[str, Any]] = {
  "pdbo": {"outer": 0.1, "num_steps": 1, "slack": 0.01, "dual_learning_rate": 1.0},
  "proximal_pdbo": {"outer": 0.1, "num_steps": 5, "slack": 0.01, "outer_weight": 0.001},
  "bome": {"outer": 0.1, "num_steps": 1, "barrier_rate": 0.5, "phi": "gradient"},
  "v_pbgd": {"outer": 0.3, "num_steps": 5, "multiplier": 1.0, "ramp": 50},
  "f2sa": {"outer": 0.1, "num_steps": 1, "growth": 0.1, "alternate": 4},
  "itd": {"outer": 0.1, "inner": 0.03, "num_steps": 5},
  "aid": {"outer": 0.1, "num_steps": 5, "inner": 0.03, "damping": 0.1, "linear_steps": 5},
  "esj": {"outer": 0.1, "inner": 0.03, "num_steps": 1, "num_samples": 4},
}
CHOSEN = {"digits": _OF_DIGITS, "mnist": _OF_DIGITS}
