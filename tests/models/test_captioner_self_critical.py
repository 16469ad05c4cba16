"""Self-critical training: advantages, masks, and the policy gradient against enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxbo_models import captioner

from tests.cases import cases
from tests.models.captioner_setup import BOS, EOS, FEATURES, draw_params

pytestmark = pytest.mark.slow

V, T, S = 4, 2, 400
MODEL = captioner.GuidedCaptioner(V, embed_dim=3, hidden_dim=3, attention_dim=2)
REFERENCES = [0, 3, 3]
BATCH = {"features": jnp.asarray(FEATURES, jnp.float32)}


def reward(candidates, references):
  """Counts a wanted token, and rewards an end."""
  return [c.count(r) + 0.5 * (c[-1] == EOS) for c, r in zip(candidates, references, strict=True)]


@functools.cache
def setup():
  return draw_params(MODEL), jax.jit(jax.grad(mean_loss))


def mean_loss(params, batch):
  return jnp.mean(captioner.self_critical_losses(MODEL)(params, batch))


def maker(**options):
  options = {"bos_id": BOS, "eos_id": EOS, "max_length": T, "num_samples": S} | options
  return captioner.self_critical_batch(MODEL, options.pop("reward", reward), **options)


@functools.cache
def exact_gradient():
  """That of the expected reward, over all captions of all images."""
  captions = [c for c in itertools.product(range(V), repeat=T) if c[0] != EOS]
  captions.append((EOS, EOS))
  read = np.array([(BOS, *c) for c in captions], np.int32)
  mask = np.ones(read.shape, bool)
  mask[-1, 2] = False

  cut = [[EOS] if c[0] == EOS else list(c) for c in captions]
  rewards = np.concatenate([reward(cut, [reference] * len(read)) for reference in REFERENCES])
  batch = {
    "features": np.repeat(BATCH["features"], len(read), axis=0),
    "tokens": np.tile(read, (len(REFERENCES), 1)),
    "mask": np.tile(mask, (len(REFERENCES), 1)),
  }

  def expected_reward(params, batch):
    losses = captioner.caption_losses(MODEL)(params, batch)
    return jnp.dot(jnp.exp(-losses), rewards) / len(REFERENCES)

  return jax.jit(jax.grad(expected_reward))(setup()[0], batch)["output_bias"]


@pytest.mark.parametrize("baseline", ["greedy", "leave_one_out"])
def test_its_gradient_is_on_average_that_of_minus_the_expected_reward(baseline):
  params, gradient = setup()
  exact = exact_gradient()
  draw = maker(baseline=baseline)
  draws = np.stack(
    [
      gradient(params, draw(params, BATCH, REFERENCES, jax.random.key(seed)))["output_bias"]
      for seed in range(16)
    ]
  )
  error = draws.std(axis=0, ddof=1) / 4
  assert np.abs(exact).max() > 20 * error.max()
  assert (np.abs(draws.mean(axis=0) + exact) < 4 * error + 1e-6).all()


def test_a_batch_has_the_captions_their_masks_and_advantages():
  params, _ = setup()
  seen = []

  def noted(candidates, references):
    seen.append((candidates, references))
    return reward(candidates, references)

  cell_mask = jnp.ones((3, 4), bool)
  batch = maker(num_samples=2, reward=noted)(
    params, BATCH | {"cell_mask": cell_mask}, REFERENCES, jax.random.key(0)
  )
  ((candidates, references),) = seen
  assert references == [r for r in REFERENCES for _ in range(3)]
  assert all(EOS not in c[:-1] and 1 <= len(c) <= T for c in candidates)
  scores = np.array(reward(candidates, references)).reshape(3, 3)
  np.testing.assert_allclose(batch["advantages"], (scores[:, :2] - scores[:, 2:]).reshape(-1))
  drawn = [candidates[3 * image + s] for image in range(3) for s in range(2)]
  for row, mask, candidate in zip(batch["tokens"], batch["mask"], drawn, strict=True):
    assert np.asarray(row)[np.asarray(mask)].tolist() == [BOS, *candidate]
  np.testing.assert_array_equal(batch["features"], np.repeat(BATCH["features"], 2, axis=0))
  assert batch["cell_mask"].shape == (6, 4)


def test_images_divided_on_an_explicit_mesh_are_drawn_for_as_on_one_device():
  params, _ = setup()
  draw, key = maker(num_samples=2), jax.random.key(0)
  mesh = jax.make_mesh((3,), ("d",), devices=jax.devices()[:3])
  with jax.set_mesh(mesh):
    divided = {"features": jax.device_put(np.asarray(BATCH["features"]), PartitionSpec("d"))}
    ours = draw(jax.device_put(params, PartitionSpec()), divided, REFERENCES, key)
  assert ours["features"].sharding.spec[0] == "d"
  for name, expected in draw(params, BATCH, REFERENCES, key).items():
    np.testing.assert_array_equal(ours[name], expected)


@cases(
  "options, message",
  [
    ({"baseline": "mean"}, "baseline must be one of .*, got 'mean'"),
    ({"num_samples": 0}, "num_samples must be at least 1 for 'greedy', got 0"),
    ({"num_samples": 1, "baseline": "leave_one_out"}, "at least 2 for 'leave_one_out', got 1"),
  ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    maker(**options)


def test_rewards_and_references_of_another_kind_are_refused():
  params, _ = setup()
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="references must be one for each of 3 images, got 2"):
    maker(num_samples=1)(params, BATCH, [0, 1], key)
  for bad in (lambda c, r: 1.0, lambda c, r: [np.nan] * len(c)):
    with pytest.raises(ValueError, match="reward must return 6 finite numbers"):
      maker(num_samples=1, reward=bad)(params, BATCH, REFERENCES, key)
