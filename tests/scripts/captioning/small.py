"""Captioners that are small, and drawn nowhere."""

from scripts.captioning import plots
from scripts.captioning.__main__ import Config, run

__all__ = ["Config", "run"]
TINY = {"hidden_dim": 8, "embed_dim": 8, "attention_dim": 8, "batch_size": 8, "test_examples": 40}
SMALL = TINY | {"steps": 4, "canonical_steps": 1, "eval_every": 3, "checkpoint_every": 2}
SMALL |= {"orders": ("either",)}
NUM_LINES = 2  # The checkpoint is of step 2, the line of step 4.


def make_small(setattr):
  """Pictures take seconds."""
  setattr(plots, "NUM_EXAMPLES", 2)
  for name in ("draw_attention", "draw_curves"):
    setattr(plots, name, lambda *_: None)
