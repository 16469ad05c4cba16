"""Pictures of adversarial training: what is in them."""

import json

import jax
import numpy as np
import pandas as pd
import pytest

from scripts.adversarial_training import plots
from scripts.adversarial_training.methods import DONE, LABELS
from scripts.adversarial_training.train import Workplace
from scripts.common import plots as common_plots
from tests.scripts.adversarial_training import small


def test_gains_are_of_pairs_of_one_seed(monkeypatch):
  drawn = []
  monkeypatch.setattr(common_plots, "save", lambda fig, path, **_: drawn.append(fig))

  def row(method, seed, first, second, loss):
    return {"set": "long_tailed", "method": method, "seed": seed, "robust/a": first,
            "robust/b": second, "tail_loss": loss, "tail_loss_calibrated": 1.0}  # fmt: skip

  rows = [row("at", 0, 50.0, 20.0, 3.0), row("at", 1, 60.0, 30.0, 4.0),
          row(DONE, 0, 51.0, 18.0, 2.0), row(DONE, 1, 63.0, 24.0, 3.5),
          row("fat", 0, 0.0, 0.0, 0.0)]  # fmt: skip
  counts = {"long_tailed": np.array([9, 2])}
  plots.draw_gains(pd.DataFrame(rows), counts, ("a", "b"), None)
  [figure] = drawn
  above, below = figure.axes
  for axes, means, errors in (
    (above, [2.0, -4.0], [1.0, 2.0]),  # Gains of 1 and 3, and of -2 and -6.
    (below, [-0.75, 0.0], [0.25, 0.0]),
  ):
    [of_done] = axes.containers
    assert of_done.get_label() == LABELS[DONE]
    line, _, [bars] = of_done.lines
    np.testing.assert_allclose(line.get_ydata(orig=False), means)
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(np.diff(ends)[:, 0] / 2, errors, atol=1e-12)
  assert [tick.get_text() for tick in above.get_xticklabels()] == ["a\n9", "b\n2"]
  plots.draw_gains(pd.DataFrame(rows[2:]), counts, ("a", "b"), None)
  assert len(drawn) == 1  # Nothing to subtract.


@pytest.mark.slow
def test_weights_are_those_at_the_chosen_rates(tmp_path, monkeypatch):
  small.patch(monkeypatch.setattr)
  file = tmp_path / "rates.json"
  config = small.config(tmp_path / "out").but(rates_file=file)
  spreads = []
  for temperature in (0.5, 50.0):
    chosen = {"mnist": {"long_tailed": {"at_kl": {"temperature": temperature}}}}
    file.write_text(json.dumps(chosen))
    place = Workplace(config)
    weights, margins = plots.weights_and_margins(place, place.init(jax.random.key(0)))
    spreads.append(np.ptp(weights[LABELS["at_kl"]]))
  assert len(margins) == len(weights[LABELS["at_kl"]])
  assert spreads[0] > 10 * spreads[1] > 0
