"""Losses of captions: values, derivatives, padding, terms, and what jaxbo does with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from jaxbo_models import captioner

import jaxbo
from tests.cases import cases
from tests.catalogue import assert_same_on_meshes
from tests.models import captioner_oracle as oracle
from tests.models.captioner_setup import FEATURES, TOKENS, batch, draw_params, make

pytestmark = pytest.mark.slow

MASK = np.arange(6)[None] < np.array([6, 4, 2])[:, None]
CELL_MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1]], bool)
WORDS = (3, 5, 7, 9)
TERMS = {
  "attributes": WORDS,
  "discriminative_weight": 0.7,
  "score_penalty": 0.3,
  "attention_penalty": 0.2,
}


@functools.cache
def setup():
  """A model with scores, and the losses and weighted gradient of everything, compiled once."""
  model = make(num_attributes=4)
  loss_fn = captioner.caption_losses(model, **TERMS)

  def weighted(params, batch, weights):
    losses = loss_fn(params, batch)
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0)), losses

  run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
  return model, draw_params(model), run


def everything(tokens=TOKENS, mask=MASK, features=FEATURES, cell_mask=CELL_MASK):
  return {
    "features": jnp.asarray(features, jnp.float32),
    "tokens": jnp.asarray(tokens),
    "mask": jnp.asarray(mask),
    "cell_mask": jnp.asarray(cell_mask),
  }


def test_captions_divided_on_a_mesh_give_the_gradient_of_one_device():
  _, params, run = setup()
  eight = {name: jnp.resize(leaf, (8, *leaf.shape[1:])) for name, leaf in everything().items()}
  specs = PartitionSpec(), PartitionSpec("d"), PartitionSpec("d")

  def recurrent(params, batch, weights):
    """Rows meet a kernel in each step; JAX 0.12 refuses the gradient without ``set_mesh``."""
    del weights
    step = lambda rows, _: (rows, rows @ params["cells"]["kernel"])
    return jax.lax.scan(step, batch["features"].mean(axis=1), length=2)[1].sum()

  arguments = params, eight, jnp.arange(8.0)
  assert_same_on_meshes(run, arguments, specs, plain=jax.grad(recurrent))


def test_values_and_derivatives_are_those_of_numpy_and_of_finite_differences(x64):
  model = make(num_attributes=4, dtype=jnp.float64)
  params = draw_params(model, dtype=np.float64)
  loss_fn = captioner.caption_losses(model, **TERMS)
  arguments = everything() | {"features": jnp.asarray(FEATURES)}
  weights = np.array([1.0, -2.0, 3.0])

  def weighted(params):
    losses = loss_fn(params, arguments)
    return jnp.dot(losses, weights), losses

  run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
  (_, losses), gradient = run(params)

  logits, attention, guide = oracle.captioner(
    model, jax.tree.map(np.asarray, params), FEATURES, TOKENS[:, :-1], CELL_MASK
  )
  expected = oracle.caption_losses(logits, TOKENS, MASK)
  there = MASK[:, 1:]
  for b in range(3):
    steps = there[b]
    scores = oracle.dense(params["attributes"], guide[b][steps].max(0))
    said = [word in TOKENS[b][MASK[b]] for word in WORDS]
    for j in range(4):
      for i in range(4):
        if said[j] and not said[i]:
          expected[b] += 0.7 * max(0, 1 - (scores[j] - scores[i])) / 4
    expected[b] += 0.3 * sum(0.5 * s**2 if abs(s) < 1 else abs(s) - 0.5 for s in scores)
    seen = attention[b][steps].sum(0)[CELL_MASK[b]]
    expected[b] += 0.2 * ((1 - seen) ** 2).sum()
  assert losses.dtype == np.float64
  np.testing.assert_allclose(losses, expected, rtol=1e-10)

  rng = np.random.default_rng(3)
  for _ in range(3):
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    move = lambda size, d=direction: jax.tree.map(lambda x, y: np.add(x, size * y), params, d)
    size = 1e-6
    difference = (run(move(size))[0][0] - run(move(-size))[0][0]) / (2 * size)
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    np.testing.assert_allclose(slope, difference, rtol=1e-5)


def test_padding_absent_cells_and_other_captions_change_neither_losses_nor_gradients():
  _, params, run = setup()
  weights = jnp.array([1.0, 2.0, 3.0])
  (_, losses), gradient = run(params, everything(), weights)
  assert losses.min() > 1
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  junk = np.where(CELL_MASK[:, :, None], FEATURES, np.nan)
  for token in (0, 10**6, -100):
    tokens = np.where(MASK, TOKENS, token)
    (_, padded), padded_gradient = run(params, everything(tokens, features=junk), weights)
    close(padded, losses)
    jax.tree.map(close, padded_gradient, gradient)
  # One caption less, and a padded column less.
  model = setup()[0]
  loss_fn = jax.jit(captioner.caption_losses(model, **TERMS))
  rows = {name: np.asarray(value)[1:] for name, value in everything().items()}
  rows |= {"tokens": rows["tokens"][:, :4], "mask": rows["mask"][:, :4]}
  close(loss_fn(params, rows), losses[1:])


def test_an_empty_caption_has_the_loss_0_and_no_gradient_and_an_unknown_token_nan():
  _, params, run = setup()
  mask = MASK.copy()
  mask[2] = False
  weights = jnp.ones(3)
  (_, losses), gradient = run(params, everything(mask=mask), weights)
  assert losses[2] == 0
  (_, _), expected = run(params, everything(mask=mask), jnp.array([1.0, 1.0, 0.0]))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), gradient, expected)
  for unknown, column in ((11, 2), (-1, 5)):  # the last one is no input, but a target
    tokens = TOKENS.copy()
    tokens[0, column] = unknown
    (_, losses), _ = run(params, everything(tokens), weights)
    np.testing.assert_array_equal(np.isnan(losses), [True, False, False])


def test_the_loss_is_the_sum_over_tokens_or_their_mean_and_terms_are_off_by_default():
  model, params, _ = setup()

  @jax.jit
  def run(mask):
    arguments = everything() | {"mask": mask}
    output = model.apply(
      {"params": params},
      arguments["features"],
      jnp.asarray(TOKENS[:, :-1]),
      mask[:, 1:],
      cell_mask=arguments["cell_mask"],
    )
    losses = captioner.token_losses(output.logits, jnp.asarray(TOKENS[:, 1:]), mask[:, 1:])
    reduced = [
      captioner.caption_losses(model, name)(params, arguments) for name in ("sum", "token_mean")
    ]
    no_mask = {k: v for k, v in arguments.items() if k != "mask"}
    return losses, *reduced, captioner.caption_losses(model)(params, no_mask)

  losses, total, mean, whole = run(jnp.asarray(MASK))
  np.testing.assert_allclose(total, losses.sum(1), rtol=1e-5)
  np.testing.assert_allclose(mean, losses.sum(1) / np.array([5, 3, 1]), rtol=1e-5)
  assert total.shape == (3,)
  np.testing.assert_array_equal(np.asarray(losses) > 0, MASK[:, 1:])
  np.testing.assert_allclose(whole[0], total[0], rtol=1e-5)
  assert (whole[1:] > total[1:]).all()


def test_dropout_is_on_where_the_batch_has_a_key():
  model = make(dropout=0.5, guide="none", attention_query="hidden")
  params = draw_params(model)
  loss_fn = captioner.caption_losses(model)
  run = jax.jit(lambda seed: loss_fn(params, batch(key=jax.random.key(seed))))
  first, other = run(0), run(1)
  np.testing.assert_array_equal(first, run(0))
  assert np.abs(first - other).min() > 1e-4


def test_discriminative_losses_are_those_of_pytorch():
  """``MultiLabelMarginLoss`` on its documented example: 0.25 * (0.4 + 0.6 + 0.8 + 0.4 + ...)."""
  scores = jnp.array([[0.1, 0.2, 0.4, 0.8]])
  occurs = jnp.array([[True, False, False, True]])
  expected = 0.25 * ((1 - (0.1 - 0.2)) + (1 - (0.1 - 0.4)) + (1 - (0.8 - 0.2)) + (1 - (0.8 - 0.4)))
  losses = jax.jit(captioner.discriminative_losses)
  np.testing.assert_allclose(losses(scores, occurs), [expected], rtol=1e-6)
  for words in (np.zeros((1, 4), bool), np.ones((1, 4), bool)):
    assert losses(scores, words) == 0


def test_a_robust_step_follows_the_worst_captions():
  model, params, run = setup()
  loss_fn = captioner.caption_losses(model, **TERMS)
  tx = jaxbo.reweight(jaxbo.dro.kl(5.0))

  @jax.jit
  def step(params, batch):
    grads = jaxbo.per_example_grad(loss_fn)(params, batch)
    robust, _ = tx.update(grads, tx.init(params), params)
    weights = jax.nn.softmax(grads.losses / 5.0)
    each = jax.vmap(
      lambda row: jax.grad(lambda p: loss_fn(p, jax.tree.map(lambda x: x[None], row))[0])(params)
    )(batch)
    return robust, jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), each), weights

  robust, summed, weights = step(params, everything())
  assert np.ptp(weights) > 0.1
  _, expected = run(params, everything(), weights)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, robust, expected)
  jax.tree.map(close, summed, expected)


def test_a_caption_without_a_target_does_not_count_by_itself():
  loss_fn = captioner.caption_losses(make())
  tokens, mask = jnp.ones((3, 4), int), jnp.ones((3, 4), bool).at[1, 1:].set(False).at[2].set(False)
  there = loss_fn.example_mask({"tokens": tokens, "mask": mask})
  assert there.tolist() == [True, False, False]
  assert loss_fn.example_mask({"tokens": tokens}).all()


def test_it_is_the_inner_loss_of_a_bilevel_problem():
  """Weights of captions, by an implicit response: the Hessian's products go through the scan."""
  model = make(guide="none", attention_query="hidden")
  params = draw_params(model)
  loss_fn = captioner.caption_losses(model, "token_mean")

  def inner_loss(x, y, batch):
    weights = jax.nn.sigmoid(x)
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
    return jnp.dot(weights, loss_fn(y, batch)) + 0.5 * penalty

  inner = jaxbo.inner_solver(inner_loss, optax.sgd(0.1), num_steps=1)
  solver = jaxbo.conjugate_gradient(num_steps=2)
  head = jaxbo.add_implicit_response(inner, solver)

  @jax.jit
  def hypergradient(x, batch):
    solution = inner.solve(x, inner.init(params), batch)
    outer = lambda x, y: jnp.mean(loss_fn(y, batch)) + 0 * jnp.sum(x)
    grads = jax.grad(outer, (0, 1))(x, solution.params)
    return head.update(grads, head.init(x), x, solution=solution, batch=batch)[0]

  gradient = hypergradient(jnp.zeros(3), batch())
  assert np.isfinite(gradient).all()
  assert np.abs(gradient).max() > 1e-4


@cases(
  "reduction, options, message",
  [
    ("mean", {}, "reduction must be 'sum' or 'token_mean', got 'mean'"),
    ("sum", {"discriminative_weight": -1.0}, "discriminative_weight must not be negative, got -1"),
    ("sum", {"score_penalty": -1.0}, "score_penalty must not be negative, got -1"),
    ("sum", {"attention_penalty": -1.0}, "attention_penalty must not be negative, got -1"),
    ("sum", {"score_penalty": 1.0}, "as many words as num_attributes .*, got 0 and 4"),
    ("sum", {"discriminative_weight": 1.0, "attributes": (1, 2)}, "got 2 and 4"),
  ],
)
def test_losses_that_do_not_exist_are_refused(reduction, options, message):
  with pytest.raises(ValueError, match=message):
    captioner.caption_losses(make(num_attributes=4), reduction, **options)
