"""What a program costs: operations by hand and by XLA, memory, and the arithmetic of timings."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from benchmarks import measure


def test_operations_of_a_matrix_product_and_of_elementwise_functions():
  a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
  assert measure.count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5
  assert measure.count_flops(lambda a: jnp.sin(a) * a, a) == 2 * 12
  assert measure.count_flops(lambda a: jnp.sum(a, axis=0), a) == 12
  assert measure.count_flops(lambda a: jnp.reshape(a, -1)[::2].astype(jnp.bfloat16), a) == 0


def test_loops_count_once_a_step_however_nested():
  a = jnp.ones((4, 4))
  step = jax.jit(lambda a: a @ a)
  scan = lambda length, body: (
    lambda a: jax.lax.scan(lambda carry, _: (body(carry), None), a, length=length)[0]
  )
  assert measure.count_flops(scan(3, scan(5, step)), a) == 15 * 128
  loop = lambda a: jax.lax.while_loop(lambda a: jnp.bool_(True), step, a)
  assert measure.count_flops(loop, a, while_steps=7) == 7 * 128
  either = lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: step(step(a)), step, a)
  assert measure.count_flops(either, a) == pytest.approx(2 * 128, abs=1)  # And the comparison.


def test_what_no_output_depends_on_counts_if_asked_for():
  two = lambda a: (a @ a, a + 1)[1]
  a = jnp.ones((4, 4))
  assert measure.count_flops(two, a) == 128 + 16
  assert measure.count_flops(two, a, dead_code=False) == 16


def test_a_mark_is_counted_for_every_value_and_gradient_but_no_product():
  def loss(y):
    return jnp.sum(jnp.cos(checkpoint_name(y, "here")))

  y, count = jnp.ones(3), functools.partial(measure.count_marks, mark="here")
  assert count(loss, y) == count(jax.grad(loss), y) == count(jax.value_and_grad(loss), y) == 1
  assert measure.count_marks(loss, y, mark="elsewhere") == 0
  product = lambda y: jax.jvp(jax.grad(loss), (y,), (y,))[1]
  assert count(product, y) == 1  # of the gradient that is differentiated
  scan = lambda y: jax.lax.scan(lambda y, _: (jax.grad(loss)(y), None), y, length=5)[0]
  assert count(lambda y: scan(y) + jax.jit(jax.grad(loss))(y), y) == 6
  loop = lambda y: jax.lax.while_loop(lambda y: jnp.bool_(True), jax.grad(loss), y)
  assert count(loop, y, while_steps=7) == 7


def test_the_count_agrees_with_xla_where_there_are_no_loops():
  def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2)

  w, x = jnp.ones((64, 32)), jnp.ones((128, 64))
  program = jax.grad(loss)
  cost = jax.jit(program).lower(w, x).compile().cost_analysis()
  assert cost is not None
  assert measure.count_flops(program, w, x) == pytest.approx(cost["flops"], rel=0.05)


def test_the_count_of_convolutions_agrees_with_xla():
  def loss(kernel, images):
    out = jax.lax.conv_general_dilated(
      images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.sum(out**2)

  kernel, images = jnp.ones((3, 3, 4, 8)), jnp.ones((2, 10, 10, 4))
  cost = jax.jit(loss).lower(kernel, images).compile().cost_analysis()
  assert cost is not None
  assert measure.count_flops(loss, kernel, images) == pytest.approx(cost["flops"], rel=0.05)
  by_hand = 2 * (3 * 3 * 4) * (2 * 8 * 8 * 8)
  assert measure.count_flops(jax.grad(loss), kernel, images) == pytest.approx(2 * by_hand, rel=0.1)


def test_temporary_bytes_are_those_of_what_has_to_be_kept():
  x = jnp.ones((256, 256))
  in_place = jax.jit(lambda x: x + 1).lower(x).compile()
  product = jax.jit(lambda x: (x @ x) @ (x @ x + 1)).lower(x).compile()
  assert measure.temporary_bytes(in_place) == 0
  assert measure.temporary_bytes(product) >= 4 * 256 * 256


def test_ratios_are_taken_within_a_round(monkeypatch):
  """The machine halves its speed from round to round; the ratio does not see it."""
  clock = {"now": 0.0, "speed": 1.0}
  calls = itertools.count()

  def work(seconds):
    def program():
      if next(calls) % 2 == 0:
        clock["speed"] *= 2
      clock["now"] += seconds * clock["speed"]
      return jnp.float32(0.0)

    return program

  monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
  timings = measure.time_together({"one": work(1.0), "three": work(3.0)}, num_rounds=5, calls=1)
  assert timings["one"].ratio == 1.0
  assert timings["three"].ratio == pytest.approx(3.0)
  assert timings["three"].spread == pytest.approx(0.0)
  assert timings["one"].seconds == 16.0  # the median of 4, 8, 16, 32 and 64; the first call is free
