"""The benchmark of adversarial training: the same step by hand, what attacks cost, its report."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import adversarial, measure
from benchmarks.adversarial import BASELINE, BY_HAND, Config, make_steps
from benchmarks.adversarial_methods import LABELS, make_methods
from benchmarks.hypergradient import Step

pytestmark = pytest.mark.slow

CONFIG = Config(attack_steps=10, rounds=1, calls=1)


@pytest.fixture(scope="module")
def steps():
  methods = ("at", "done", "done_adam", "at_kl", "fast_bat")
  return make_steps(dataclasses.replace(CONFIG, methods=methods), 4)


@pytest.fixture(scope="module")
def gflop(steps):
  return {
    name: measure.count_flops(step.fn, *step.args, while_steps=0, dead_code=False)
    for name, step in steps.items()
  }


def test_adversarial_training_by_hand_is_the_same_step():
  of = make_steps(dataclasses.replace(CONFIG, attack_steps=2, methods=()), 4)
  assert list(of) == [BASELINE, BY_HAND]
  (params, _, loss), (by_hand, _, same_loss) = (of[name]() for name in (BASELINE, BY_HAND))
  chex.assert_trees_all_close(params, by_hand, rtol=1e-4, atol=1e-6)
  assert float(loss) == pytest.approx(float(same_loss), rel=1e-5)
  changed = jax.tree.map(lambda a, b: np.any(np.not_equal(a, b)), params, of[BASELINE].args[0])
  assert all(jax.tree.leaves(changed))


def test_plain_training_takes_k_plus_one_passes_and_done_a_third_more_at_most(gflop):
  assert gflop[BY_HAND] < gflop[BASELINE] < 1.05 * gflop[BY_HAND]
  for name in ("done", "done_adam"):
    assert gflop[BASELINE] < gflop[name] < 1.35 * gflop[BASELINE]
  assert gflop["at_kl"] < 1.01 * gflop[BASELINE]
  assert gflop["fast_bat"] < 0.7 * gflop[BASELINE]


# -- Attacks take no gradients of the parameters.

INPUTS, HIDDEN, CLASSES, BATCH = 12, 7, 5, 3
KERNELS = [(INPUTS, HIDDEN), (HIDDEN, CLASSES)]


def model(params, images):
  return jnp.tanh(images.reshape(len(images), -1) @ params[0]) @ params[1]


def products_like_parameters(jaxpr, in_loop=False):
  """Matrix products of the shape of a kernel, inside of loops and outside of them."""
  inside, outside = 0, 0
  for equation in jaxpr.eqns:
    loop = in_loop or equation.primitive.name in ("scan", "while")
    for sub in measure.sub_jaxprs(equation.params):
      more = products_like_parameters(sub, loop)
      inside, outside = inside + more[0], outside + more[1]
    shapes = [var.aval.shape for var in equation.outvars]
    if equation.primitive.name == "dot_general" and shapes[0] in (
      *KERNELS,
      *(shape[::-1] for shape in KERNELS),
    ):
      inside, outside = inside + in_loop, outside + (not in_loop)
  return inside, outside


@pytest.mark.parametrize("name", LABELS)
def test_no_attack_takes_gradients_of_the_parameters(name):
  """The loss does, one for each kernel and forward and backward derivative, outside of loops."""
  method = make_methods(model, 0.1, 4)[name]
  params = [jnp.ones(shape) for shape in KERNELS]
  batch = jnp.full((BATCH, 2, 6, 1), 0.5), jnp.zeros(BATCH, jnp.int32)

  def gradients(params, batch):
    grads, _ = method.gradients(params, batch, jax.random.key(0))
    return grads.pullback(jnp.ones(BATCH))

  jaxpr = jax.make_jaxpr(gradients)(params, batch).jaxpr
  inside, outside = products_like_parameters(jaxpr)
  assert inside == 0
  # TRADES and MART have two logits, DONE and Fast-BAT a slope along q.
  few, many = {
    "trades": (4, 4), "mart": (4, 4), "done": (4, 6), "done_adam": (4, 6), "fast_bat": (4, 6)
  }.get(name, (2, 2))  # fmt: skip
  assert few <= outside <= many


# -- The report.


def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch):
  fixed = lambda programs, *args: {
    name: measure.Timing(0.5, 1.4 if name == "done" else 1.0, 0.0) for name in programs
  }
  monkeypatch.setattr(measure, "time_together", fixed)
  monkeypatch.setattr(measure, "temporary_bytes", lambda compiled: 2**20)
  monkeypatch.setattr(measure, "count_flops", lambda fn, *args, **options: 10**12)
  names = [BASELINE, "done", BY_HAND]
  idle = {name: Step(jax.jit(lambda x: x), (jnp.ones(()),)) for name in names}
  monkeypatch.setattr(adversarial, "make_steps", lambda config, size: idle)
  adversarial.main(dataclasses.replace(CONFIG, batches=(4, 8), save=tmp_path / "out"))
  text = (tmp_path / "out.md").read_text()
  assert text in capsys.readouterr().out
  data = json.loads((tmp_path / "out.json").read_text())
  assert [row["step"] for row in data["tables"]["8"]] == ["AT", "DONE, GD", BY_HAND]
  assert data["tables"]["8"][0]["images/s"] == 16
  assert data["tables"]["8"][0]["Tflop/s"] == 2
  verdicts = [(target["measured"], target["verdict"]) for target in data["targets"]]
  assert verdicts == 2 * [(1.0, "PASS"), (1.0, "PASS"), (1.4, "MISSED"), (1.0, "PASS")]


def test_the_preset_for_gpus_is_preact_resnet_18_in_bfloat16():
  config = Config(preset="resnet18", attack_steps=1)
  assert config.all_batches() == (128, 256)
  assert config.all_methods()[0] == BASELINE
  model = adversarial.PRESETS["resnet18"].model(
    num_classes=10, dtype=getattr(jnp, config.all_dtype())
  )
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), images)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_172_170
  assert list(params) == ["params"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"attack_steps": 0}, "attack_steps must be at least 1, got 0"),
    ({"batches": (1,)}, r"batches must be numbers of at least 2, got \(1,\)"),
    ({"methods": ("magic",)}, "methods must be among at, trades, .*; got at magic"),
  ],
)
def test_what_cannot_run_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Config(**changes).check()
