"""Numbers that may be schedules, and counters that stay at their largest value."""

import jax.numpy as jnp
import pytest

from jaxbo import _check, _schedule


def test_a_number_and_a_schedule_have_a_value_at_a_count():
  assert _schedule.value_at(0.5, jnp.int32(3), jnp.bfloat16) == 0.5
  value = _schedule.value_at(lambda count: count / 2, jnp.int32(3), jnp.float32)
  assert (value, value.dtype) == (1.5, jnp.float32)


def test_the_next_count_is_one_more_and_the_largest_one_stays():
  assert _schedule.after(jnp.int32(0)) == 1
  largest = jnp.iinfo(jnp.int32).max
  after = _schedule.after(jnp.int32(largest))
  assert (after, after.dtype) == (largest, jnp.int32)


def test_numbers_are_checked_and_schedules_must_take_a_count():
  _schedule.check("rate", 0.5, _check.positive)
  _schedule.check("rate", lambda count: -1.0, _check.positive)
  with pytest.raises(ValueError, match="rate must be positive and finite, got -1"):
    _schedule.check("rate", -1.0, _check.positive)
  with pytest.raises(TypeError, match=r"rate\(count\)"):
    _schedule.check("rate", lambda: 0.5, _check.positive)
