"""What does not depend on the machine: a reweighted step has a plain one's operations and bytes."""

import json
import sys

import chex
import jax
import pytest

from benchmarks import dro, measure

pytestmark = pytest.mark.slow


BATCH = 256  # Small, for one that stores per-example gradients.


@pytest.fixture(scope="module")
def steps():
  return dro.make_steps(BATCH)


def flops(step):
  return measure.count_flops(step.fn, *step.args, while_steps=0)


def num_bytes(step):
  return measure.temporary_bytes(step.fn.lower(*step.args).compile())


def test_reweighting_costs_no_operations_and_no_memory(steps):
  plain, reweighted = steps[dro.PLAIN], steps[dro.KL]
  assert flops(plain) > 3 * 2 * BATCH * 512 * 512  # what is counted is the model
  assert flops(reweighted) <= 1.01 * flops(plain)
  temporary = num_bytes(reweighted)
  assert temporary <= 1.01 * num_bytes(plain)
  assert temporary >= BATCH * 512 * 4  # and the memory holds its activations


def test_stored_gradients_cost_the_batch_times_the_parameters(steps):
  step = steps[dro.STORED]
  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(step.args[0]))
  assert num_bytes(step) >= 0.9 * BATCH * num_parameters * 4


def test_streams_count_every_microbatch_and_their_memory_is_flat():
  few, many = dro.make_streams(2), dro.make_streams(16)
  for streams in (few, many):
    plain, one, two = (
      flops(streams[name]) for name in ("plain accumulation", "one pass", "two passes")
    )
    assert one <= 1.01 * plain
    assert two / plain == pytest.approx(4 / 3, abs=0.05)
  assert flops(many["one pass"]) == pytest.approx(8 * flops(few["one pass"]), rel=0.02)
  for name in ("one pass", "two passes"):
    assert num_bytes(many[name]) <= 1.05 * num_bytes(few[name]), name


def test_all_programs_of_a_row_do_the_same(monkeypatch):
  monkeypatch.setattr(dro, "MICROBATCH", 8)
  streams = dro.make_streams(3)
  expected, _ = streams["whole batch"]()
  for name in ("one pass", "two passes"):
    chex.assert_trees_all_close(streams[name]()[0], expected, rtol=1e-3, atol=1e-6)


def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch, steps):
  few = {name: steps[name] for name in (dro.PLAIN, dro.KL)}
  monkeypatch.setattr(dro, "make_steps", lambda: few)
  names = ("plain accumulation", "one pass")
  monkeypatch.setattr(dro, "make_streams", lambda n: dict(zip(names, few.values(), strict=True)))
  monkeypatch.setattr(measure, "temporary_bytes", lambda compiled: 2048)
  fixed = lambda programs, *args: {name: measure.Timing(1e-3, 1.0, 0.0) for name in programs}
  monkeypatch.setattr(measure, "time_together", fixed)
  monkeypatch.setattr(sys, "argv", ["dro", "--save", str(tmp_path / "out")])
  dro.main()
  text = (tmp_path / "out.md").read_text()
  assert text in capsys.readouterr().out
  data = json.loads((tmp_path / "out.json").read_text())
  assert [row["step"] for row in data["tables"]["One batch of 1024"]] == [dro.PLAIN, dro.KL]
  assert len(data["targets"]) == 7
  assert text.count("PASS") + text.count("MISSED") == 7
