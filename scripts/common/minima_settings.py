"""The settings that ``scripts/tune_multiple_minima.py`` chose, on seeds 100 and 101."""

from typing import Any

CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
  "digits": {
    "pdbo": {"outer": 0.1, "num_steps": 1, "slack": 0.01, "dual_learning_rate": 1.0},
    "proximal_pdbo": {"outer": 0.1, "num_steps": 5, "slack": 0.01, "outer_weight": 0.001},
    "bome": {"outer": 0.1, "num_steps": 1, "barrier_rate": 0.5, "phi": "gradient"},
    "v_pbgd": {"outer": 0.3, "num_steps": 5, "multiplier": 1.0, "ramp": 50},
    "f2sa": {"outer": 0.1, "num_steps": 1, "growth": 0.01, "alternate": None},
    "itd": {"outer": 0.1, "inner": 0.03, "num_steps": 5},
    "aid": {"outer": 0.3, "num_steps": 1, "inner": 0.1, "damping": 0.1, "linear_steps": 5},
    "esj": {"outer": 0.1, "inner": 0.03, "num_steps": 1, "num_samples": 16},
  },
}
CHOSEN["mnist"] = CHOSEN["digits"]
