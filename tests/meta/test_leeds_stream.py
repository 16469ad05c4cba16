"""LEEDS on streams: a network against a loop by hand, 10,000 rounds, corrupted switches."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo

pytestmark = pytest.mark.slow

WAYS, DIM, RATE, STEPS = 3, 4, 0.2, 2


def features():
  """Three domains of vectors, whose classes are Gaussians around means of their own."""
  rng = np.random.default_rng(0)
  sizes = [(12, 20), (3, 40), (5, 10)]
  return [
    (rng.normal(size=(c, 1, DIM)) + 0.3 * rng.normal(size=(c, n, DIM)) + 2 * i).astype(np.float32)
    for i, (c, n) in enumerate(sizes)
  ]


STREAM = jaxbo.tasks.osaka_stream(
  features(),
  num_ways=WAYS,
  num_shots=2,
  num_queries=2,
  stay_probability=0.8,
  domain_probabilities=[0.5, 0.25, 0.25],
)


def network(params, inputs):
  hidden = jnp.tanh(inputs @ params["in"] + jnp.tile(params["bias"][None], (len(inputs), 1)))
  return hidden @ params["out"]


def task_loss(params, batch, model=network):
  inputs, labels = batch
  logits = model(params, inputs)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), logits


def loss(x, y, batch):
  return task_loss(optax.tree.add(x, y), batch)


def accuracy(logits, batch):
  return jnp.mean(jnp.argmax(logits, axis=-1) == batch[1])


def initial():
  keys = jax.random.split(jax.random.key(1), 2)
  return {
    "in": 0.5 * jax.random.normal(keys[0], (DIM, 8)),
    "bias": jnp.zeros(8),
    "out": 0.5 * jax.random.normal(keys[1], (8, WAYS)),
  }


INNER = jaxbo.inner_solver(lambda *args: loss(*args)[0], optax.sgd(RATE), STEPS)


def learner(detector, optimizer, **options):
  outer = optax.chain(
    jaxbo.add_unrolled_response(INNER), jaxbo.gate_by_detection(optimizer, 0.25, 1.0)
  )
  return jaxbo.meta.online_meta_learner(loss, INNER, outer, detector, metric=accuracy, **options)


def test_a_network_with_an_oracle_equals_a_loop_by_hand(x64):
  """Adam inside the gate, plain jax.grad through the inner steps outside of the library."""
  rounds, optimizer = 25, optax.adam(0.05)
  double = jax.tree.map(lambda leaf: leaf.astype(float), initial())
  method = learner(jaxbo.meta.oracle_detector(), optimizer)
  state = method.init(double, stream=STREAM, key=3)

  @jax.jit
  def run(state):
    def body(state, _):
      stream_state, batch = STREAM.step(state.stream_state)
      state, info = method.step(state._replace(stream_state=stream_state), batch)
      return state, (batch, info)

    return jax.lax.scan(body, state, length=rounds)

  end, (batches, info) = jax.device_get(run(state))

  def descend(params, batch):
    for _ in range(STEPS):
      grads = jax.grad(lambda p: task_loss(p, batch)[0])(params)
      params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    return params

  @jax.jit
  def adapted(params, batch):
    after = descend(params, batch)
    return after, task_loss(after, batch)[1]

  meta_gradient = jax.jit(jax.grad(lambda p, s, q: task_loss(descend(p, s), q)[0]))
  evaluate, update = jax.jit(task_loss), jax.jit(optimizer.update)
  correct = jax.jit(accuracy)
  theta = phi = double
  opt_state, found = optimizer.init(theta), []
  for t in range(rounds):
    batch = jax.tree.map(lambda leaf, t=t: leaf[t], batches)
    before, logits = evaluate(phi, batch.train)
    phi, after_logits = adapted(theta if batch.task_switch else phi, batch.train)
    energy = -np.mean(np.log(np.sum(np.exp(np.asarray(after_logits)), axis=1)))
    after, query_logits = evaluate(phi, batch.val)
    found.append(
      (
        before,
        correct(logits, batch.train),
        after,
        correct(query_logits, batch.val),
        energy,
      )
    )
    if batch.task_switch:
      scale = 1.0 if batch.domain != 0 else 0.25
      updates, opt_state = update(meta_gradient(theta, batch.train, batch.val), opt_state)
      theta = jax.tree.map(lambda p, u, scale=scale: p + scale * u, theta, updates)
  columns = (
    info.before.loss,
    info.before.metric,
    info.after.loss,
    info.after.metric,
    info.detection.scores.shift,
  )
  for column, expected in zip(columns, zip(*found, strict=True), strict=True):
    np.testing.assert_allclose(column, expected, rtol=0, atol=1e-9)
  task = optax.tree.add(end.task.x, end.task.y)
  for ours, expected in ((end.meta_params, theta), (task, phi)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), ours, expected)
  assert 2 < np.sum(batches.task_switch) < rounds - 2
  assert np.any(info.detection.shift)
  moved = optax.tree.norm(optax.tree.sub(end.meta_params, double))
  assert moved > 0.1


def test_ten_thousand_rounds_are_one_scan_that_resumes_bit_for_bit():
  """Softmax regression with Adam and running quantiles; the five pieces are one program."""
  linear = lambda x, y, batch: task_loss(optax.tree.add(x, y), batch, lambda w, u: u @ w)
  inner = jaxbo.inner_solver(lambda *args: linear(*args)[0], optax.sgd(RATE), 1)
  gate = jaxbo.gate_by_detection(optax.adam(0.01), 0.25, 1.0)
  method = jaxbo.meta.online_meta_learner(
    linear,
    inner,
    optax.chain(jaxbo.drop_response(), gate),
    jaxbo.meta.threshold_detector(
      jaxbo.meta.quantile_threshold(0.8, 25), jaxbo.meta.quantile_threshold(0.5, 10)
    ),
    metric=accuracy,
  )
  run = jax.jit(chex.assert_max_traces(method.run, n=2), static_argnums=2)
  start = method.init(jnp.zeros((DIM, WAYS)), stream=STREAM, key=0)
  whole, history = run(start, STREAM, 10_000)
  state, pieces = start, []
  for _ in range(5):
    state = jax.tree.map(jnp.asarray, jax.device_get(state))  # Whatever a checkpoint does.
    state, piece = run(state, STREAM, 2_000)
    pieces.append(piece)
  jax.tree.map(np.testing.assert_array_equal, state, whole)
  joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
  jax.tree.map(np.testing.assert_array_equal, joined, history)
  rounds = run.trace(start, STREAM, 10_000).jaxpr  # As it was traced above.
  scans = [eqn for eqn in rounds.jaxpr.eqns if eqn.primitive.name == "scan"]
  assert [eqn.params["length"] for eqn in scans] == [10_000]
  # Switches are flagged more often than others, and a known task is predicted better.
  switches, found = (np.asarray(v) for v in (history.extra.task_switch, history.detection.switch))
  assert found[switches].mean() > found[~switches].mean() + 0.2
  right = np.asarray(history.before.metric)
  assert right[~switches].mean() > right[switches].mean() + 0.1


def test_corrupted_switches_cost_the_more_the_more_they_are(x64):
  """Each flag is flipped with probability q; the loss of prediction rises with q."""
  clean = jaxbo.tasks.moving_gaussian_stream(2, 5, stay_probability=0.9, domain_step=0.0)

  def mean_loss(x, y, samples):
    miss = x + y - jnp.mean(samples, axis=0)
    return 0.5 * jnp.sum(miss**2), miss

  inner = jaxbo.inner_solver(lambda *args: mean_loss(*args)[0], optax.sgd(0.2), 1)
  method = jaxbo.meta.online_meta_learner(
    mean_loss,
    inner,
    None,
    jaxbo.meta.oracle_detector(lambda batch: batch.extra.task_switch, lambda batch: False),
    shift_score=jnp.linalg.norm,
  )

  @jax.jit
  @jax.vmap
  def losses(q):
    def step(state):
      after, batch = clean.step(state)
      key = jax.random.fold_in(jax.random.key(7), state.num_rounds)
      flip = jax.random.uniform(key) < q
      told = batch.extra._replace(task_switch=batch.extra.task_switch ^ flip)
      return after, batch._replace(extra=told)

    stream = jaxbo.tasks.Stream(clean.init, step)
    state = method.init(jnp.full(2, -5.0), stream=stream, key=0)
    return method.run(state, stream, 4000)[1].before.loss

  found = np.asarray(losses(jnp.array([0.0, 0.1, 0.3, 0.5])))
  for less, more in itertools.pairwise(found):
    difference = (more - less).reshape(-1, 40).mean(axis=1)  # Blocks are longer than tasks.
    assert difference.mean() > 4 * difference.std() / np.sqrt(len(difference))
