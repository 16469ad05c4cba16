"""DONE's gradient is that of the solution of its lower level, and its limits are known methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbo
from jaxbo.adversarial import Box
from jaxbo.adversarial import barrier as lower_level
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON

pytestmark = pytest.mark.slow

# The specification's problem: a softplus network 6-8-3, five examples, epsilon 0.1, r = 0.5.
DIM, NUM, R = 6, 5, 0.5


def network(params, images):
  hidden = jax.nn.softplus(images @ params["w"] + params["b"][None])
  return hidden @ params["v"]


def make(dtype=jnp.float64):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  images = rng.uniform(-0.2, 1.2, (NUM, DIM)).clip(0, 1)
  labels = jnp.asarray(rng.integers(0, 3, NUM), jnp.int32)
  return {"w": draw(DIM, 8), "b": draw(8), "v": draw(8, 3)}, (jnp.asarray(images, dtype), labels)


def loss(params, images, labels):
  return optax.softmax_cross_entropy_with_integer_labels(network(params, images), labels)


def margin(params, images, labels):
  """Another objective than the loss: the label's logit against a smooth maximum of the others."""
  logits = network(params, images)
  is_label = jax.nn.one_hot(labels, 3, dtype=bool)
  others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=1)
  return jnp.sum(jnp.where(is_label, logits, 0), axis=1) - others


def opposite(params, images, labels):
  return -loss(params, images, labels)


CURVATURE = 20.0


def linearised(params, images, labels):
  """Fast-BAT's lower level, around the clean images."""
  center = make(images.dtype)[1][0]
  slope = jax.grad(lambda x: jnp.sum(margin(params, x, labels)))(center)
  move = images - center
  return jnp.sum(slope * move + CURVATURE / 2 * move**2, axis=1)


@functools.cache
def compiled(name, inverse):
  """``(params, barrier) -> (robust value, gradient, its explicit part, info)``."""
  attack_loss = {"margin": margin, "opposite": opposite, "linearised": linearised}[name]
  options = {"curvature": CURVATURE} if name == "linearised" else {}
  options["inverse"] = jaxbo.conjugate_gradient(2 * DIM) if inverse == "cg" else inverse
  tx = jaxbo.reweight(jaxbo.dro.kl(R))

  @jax.jit
  def value_and_grad(params, barrier=1e-2):
    sizes = {"box": Box(0.1), "barrier": barrier, "num_steps": 1500, "step_size": 1 / CURVATURE}
    options.update(margin=1e-9)
    grads = jaxbo.adversarial.done_grad(loss, attack_loss, **sizes, **options)(params, make()[1])
    gradient, state = tx.update(grads, tx.init(params), params)
    weights = jax.nn.softmax(grads.losses / R)
    of_params = lambda p: jnp.sum(weights * loss(p, grads.aux.perturbed, make()[1][1]))
    return state.info.objective, gradient, jax.grad(of_params)(params), grads.aux

  return value_and_grad


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def by_differences(value_and_grad, params, direction, size=1e-5):
  ends = [
    value_and_grad(jax.tree.map(lambda p, d, s=s: np.add(p, s * size * d), params, direction))[0]
    for s in (1, -1)
  ]
  return float(ends[0] - ends[1]) / (2 * size)


def directions(params):
  rng = np.random.default_rng(1)
  for _ in range(3):
    yield jax.tree.map(lambda p: rng.normal(size=p.shape), params)


def along(gradient, direction):
  leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
  return sum(float(np.vdot(a, b)) for a, b in leaves)


@pytest.mark.parametrize("name, inverse", [("margin", "cg"), ("linearised", "diagonal")])
def test_the_gradient_is_that_of_finite_differences(name, inverse, x64):
  params, _ = make()
  value_and_grad = compiled(name, inverse)
  _, gradient, without, info = value_and_grad(params)
  assert info.last_step.max() < 1e-11
  assert info.residual.max() < 1e-9
  worst = 0.0
  for direction in directions(params):
    expected = by_differences(value_and_grad, params, direction)
    assert along(gradient, direction) == pytest.approx(expected, abs=1e-8)
    worst = max(worst, abs(along(without, direction) - expected))
  assert worst > 1e-3  # the implicit term is not small


def test_the_diagonal_is_near_where_the_hessian_is_left_out(x64):
  params, _ = make()
  _, exact, none, _ = compiled("margin", "cg")(params)
  near = compiled("margin", "diagonal")(params)[1]
  error = lambda a: norm(jax.tree.map(np.subtract, a, exact))
  assert 1e-6 < error(near) < 0.3 * error(none)


def test_the_implicit_term_of_the_same_loss_vanishes_with_the_barrier(x64):
  """The envelope theorem; for another attack objective it stays."""
  params, _ = make()
  shares = {"opposite": [], "linearised": []}
  for name, values in shares.items():
    inverse = "diagonal" if name == "linearised" else "cg"
    for barrier in (1e-1, 1e-2, 1e-3):
      _, whole, explicit, _ = compiled(name, inverse)(params, barrier)
      term = jax.tree.map(np.subtract, whole, explicit)
      values.append(norm(term) / norm(explicit))
  assert shares["opposite"][2] < 0.3 * shares["opposite"][0]
  assert shares["opposite"][2] < 0.01
  assert shares["linearised"][2] > 3 * shares["opposite"][2]


def test_fast_bat_is_the_limit_of_a_vanishing_barrier(x64):
  """Its mask off the walls, and its gradient, with the linearised attack at the same point."""
  params, (images, labels) = make()
  box = Box(0.1).bounds(images)
  v_at = jax.grad(lambda delta: jnp.sum(loss(params, images + delta, labels)))

  @jax.jit
  def find_mask():
    slope = jax.grad(lambda x: jnp.sum(margin(params, x, labels)))(images)
    minimum = box.project(-slope / CURVATURE)
    return lower_level.solve_active_set(v_at(minimum), minimum, box, CURVATURE)

  @jax.jit
  def exact_at(delta, barrier):
    return lower_level.solve_diagonal(v_at(delta), delta, box, barrier, CURVATURE)

  mask = find_mask()
  assert 0.2 < np.mean(mask == 0) < 0.8
  errors = []
  for barrier in (1e-4, 1e-5, 1e-6):
    delta = compiled("linearised", "diagonal")(params, barrier)[3].perturbed - images
    exact = exact_at(delta, barrier)
    errors.append(np.linalg.norm(exact - mask) / np.linalg.norm(mask))
  assert errors[0] > 3 * errors[1] > 9 * errors[2]
  assert errors[2] < 2e-3


def test_fast_bat_is_its_formula(x64):
  """Every piece by reverse-mode derivatives of its own."""
  params, (images, labels) = make()
  options = {"box": Box(0.1), "step_size": 0.05, "curvature": CURVATURE, "tolerance": 0.02}
  weights, key = jnp.linspace(0.1, 0.5, NUM), jax.random.key(3)

  @jax.jit
  def ours(params, images):
    grad = jaxbo.adversarial.fast_bat_grad(loss, margin, **options)
    grads = grad(params, (images, labels), jax.random.clone(key))
    return grads.pullback(weights), grads.losses, grads.aux

  @jax.jit
  def expected(params):
    box = Box(0.1).bounds(images)
    slope = jax.grad(lambda x, p: jnp.sum(margin(p, x, labels)))
    z = box.low + jax.random.uniform(key, images.shape, images.dtype) * (box.high - box.low)
    z = box.project(z - 0.05 * slope(images + z, params))
    delta = box.project(z - 0.05 * slope(images + z, params))
    v = jax.grad(lambda x: jnp.sum(loss(params, x, labels)))(images + delta)
    off = (delta > box.low + 0.02) & (delta < box.high - 0.02)
    q = jnp.where(off, v, 0) / CURVATURE

    def surrogate(p):
      cross = jnp.sum(slope(images + z, p) * q, axis=1)
      return jnp.sum(weights * (loss(p, images + delta, labels) - cross))

    last_step = jnp.max(jnp.abs(delta - z), axis=1)
    values = loss(params, images + delta, labels)
    return jax.grad(surrogate)(params), values, images + delta, off, last_step

  gradient, losses, info = ours(params, jnp.where(images == 1, 7.0, images))  # It is clipped.
  reference, values, perturbed, off, last_step = expected(params)
  assert (images == 1).any()
  np.testing.assert_allclose(info.last_step, last_step, atol=1e-12)
  assert 0 < off.sum() < off.size
  np.testing.assert_allclose(info.perturbed, perturbed, atol=1e-12)
  np.testing.assert_allclose(losses, values, rtol=1e-12)
  for mine, theirs in zip(*map(jax.tree.leaves, (gradient, reference)), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-12)


# On images, in float32.

PARAMS, BATCH = problem.params(), problem.batch()
OPTIONS = {"box": Box(EPSILON), "barrier": 1e-2, "num_steps": 8, "step_size": 1.0}
CLEAN = np.asarray(BATCH[0])
LOW, HIGH = np.maximum(CLEAN - EPSILON, 0), np.minimum(CLEAN + EPSILON, 1)
WEIGHTS = jnp.linspace(0.05, 0.2, problem.BATCH)


def pulled(loss=problem.loss, attack_loss=problem.margin_attack_loss, rate=1.0, r=R, **options):
  """``(params, batch, key, step_size, barrier)`` to all that is asked of a gradient."""
  tx = jaxbo.done(1.0, temperature=r, rate=rate)

  @jax.jit
  def pull(params, batch, key=None, step_size=1.0, barrier=1e-2):
    sizes = {"step_size": step_size, "barrier": barrier}
    grad = jaxbo.adversarial.done_grad(loss, attack_loss, **{**OPTIONS, **sizes, **options})
    grads, state = grad(params, batch, key), tx.init(params)
    for _ in range(2):  # The second time too: at rate 1 nothing is remembered.
      updates, state = tx.update(grads, state, params)
    mean = lambda p: jnp.mean(loss(p, grads.aux.perturbed, batch[1]))
    pullback = grads.pullback
    soft = jax.nn.softmax(grads.losses / R)
    return {
      "updates": updates,
      "softmax": jax.tree.map(jnp.negative, pullback(soft)),
      "plain": jax.tree.map(jnp.negative, jax.grad(mean)(params)),
      "gradient": pullback(WEIGHTS),
      "losses": grads.losses,
      "info": grads.aux,
    }

  return pull


DIAGONAL, ADAM = pulled(), pulled(direction="adam", inverse="none", r=1e8, rate=0.5)


def close(a, b, rtol=1e-4, atol=1e-5):
  for mine, theirs in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=rtol, atol=atol)


@pytest.mark.parametrize("pull, step_size", [(DIAGONAL, 1e3), (ADAM, 0.05)], ids=["plain", "adam"])
def test_perturbations_are_strictly_inside_also_at_pixels_0_and_1(pull, step_size):
  assert (BATCH[0] == 0).any()
  assert (BATCH[0] == 1).any()
  for key in (None, jax.random.key(0)):
    found = pull(PARAMS, BATCH, key, step_size, 1e-6)
    assert np.all(found["info"].perturbed > LOW)
    assert np.all(found["info"].perturbed < HIGH)
    assert np.mean(found["losses"]) > np.mean(problem.loss(PARAMS, *BATCH))
    assert found["info"].num_not_finite == 0
  start = pull(PARAMS, BATCH, None, 1e-12, 1e-6)["info"]
  np.testing.assert_allclose(start.perturbed, (LOW + HIGH) / 2, atol=1e-6)
  outside = jnp.where(BATCH[0] == 1, 7.0, BATCH[0]), BATCH[1]  # Under jit they are clipped.
  clipped, found = (pull(PARAMS, b, None, step_size, 1e-6) for b in (outside, BATCH))
  ones = np.any(BATCH[0] == 1, axis=(1, 2, 3))
  np.testing.assert_array_equal(clipped["info"].clipped, ones)
  assert clipped["info"].num_clipped == ones.sum() > found["info"].num_clipped == 0
  clipped["info"] = clipped["info"]._replace(clipped=found["info"].clipped)
  close(clipped, found)


def test_the_margin_keeps_away_from_the_walls():
  grad = jaxbo.adversarial.done_grad(
    problem.loss, problem.margin_attack_loss, margin=0.2, **OPTIONS
  )
  perturbed = jax.jit(lambda params: grad(params, BATCH).aux.perturbed)(PARAMS)
  share = (perturbed - LOW) / (HIGH - LOW)
  assert share.min() == pytest.approx(0.2, abs=1e-4)
  assert share.max() == pytest.approx(0.8, abs=1e-4)


def test_weights_are_a_softmax_at_rate_1():
  found = DIAGONAL(PARAMS, BATCH)
  close(found["updates"], found["softmax"])


def test_adversarial_training_is_the_limit_without_weights_and_implicit_term():
  found = ADAM(PARAMS, BATCH, None, 0.01, 1e-2)
  close(found["updates"], found["plain"])
  with_term = DIAGONAL(PARAMS, BATCH)
  difference = jax.tree.map(np.subtract, with_term["softmax"], with_term["plain"])
  assert norm(difference) > 1e-2  # neither is what the other is by chance


def test_narrow_parameters_and_microbatches_give_the_same():
  whole = DIAGONAL(PARAMS, BATCH)
  narrow, batch = problem.params(jnp.bfloat16), problem.batch(dtype=jnp.bfloat16)
  rounded = pulled(microbatch_size=4)(narrow, batch)
  assert rounded["info"].perturbed.dtype == jnp.float32
  np.testing.assert_allclose(rounded["losses"], whole["losses"], rtol=0.1, atol=0.05)
  for a, b in zip(*map(jax.tree.leaves, (whole["gradient"], rounded["gradient"])), strict=True):
    assert b.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(b, np.float32) - a) < 0.1 * np.linalg.norm(a)


def test_eight_devices_give_the_gradient_of_one():
  """The full system of each example too, with the replication check on."""
  options = {**OPTIONS, "inverse": jaxbo.conjugate_gradient(3)}
  tx = {axis: jaxbo.done(1.0, R, axis_name=axis) for axis in (None, "d")}
  grad = jaxbo.adversarial.done_grad(problem.loss, problem.margin_attack_loss, **options)

  def step(images, labels, axis):
    state = tx[axis].init(PARAMS)
    return tx[axis].update(grad(PARAMS, (images, labels)), state, PARAMS)[0]

  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(
    functools.partial(step, axis="d"),
    mesh=mesh,
    in_specs=PartitionSpec("d"),
    out_specs=PartitionSpec(),
  )
  alone = jax.jit(functools.partial(step, axis=None))
  close(jax.jit(sharded)(*BATCH), alone(*BATCH))
  # And under jit, on a mesh as JAX makes it.
  mesh = jax.make_mesh((8,), ("d",))
  with jax.set_mesh(mesh):
    close(alone(*jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("d")))), alone(*BATCH))


def test_a_gradient_that_is_not_finite_leaves_the_example_alone():
  """The square root has no slope at zero: the attack breaks on image 2, the loss on image 5."""

  def spoil(function, index):
    def spoilt(params, images, labels):
      nothing = jax.lax.stop_gradient(images) - images
      spoiled = jnp.arange(problem.BATCH) == index
      bad = jnp.sqrt(jnp.where(spoiled, jnp.sum(nothing, axis=(1, 2, 3)), 1.0))
      return function(params, images, labels) + jnp.where(spoiled, bad, 0)

    return spoilt

  losses = spoil(problem.loss, 5), spoil(problem.margin_attack_loss, 2)
  found, sound = (
    pull(PARAMS, BATCH, jax.random.key(0), 1.0, 1e-2) for pull in (pulled(*losses), DIAGONAL)
  )
  assert np.flatnonzero(found["info"].not_finite).tolist() == [2, 5]
  assert found["info"].num_not_finite == 2
  others = np.arange(problem.BATCH) != 2
  found, sound = jax.device_get((found, sound))
  close(found["info"].perturbed[others], sound["info"].perturbed[others])
  start = LOW + jax.random.uniform(jax.random.key(0), LOW.shape) * (HIGH - LOW)
  np.testing.assert_allclose(found["info"].perturbed[2], start[2], atol=1e-5)
  np.testing.assert_allclose(found["losses"][others], sound["losses"][others], rtol=1e-4)
  assert np.isnan(found["losses"][2])  # It has no implicit term.
  none = jaxbo.adversarial.done_grad(*losses, **{**OPTIONS, "inverse": "none"})
  kept = jax.jit(lambda params: none(params, BATCH).losses)(PARAMS)
  assert np.flatnonzero(np.isnan(kept)).tolist() == [2]  # The attack, which stood still.
  # Fast-BAT looks at the outer loss once.
  fast_grad = jaxbo.adversarial.fast_bat_grad(*losses, box=Box(EPSILON), step_size=1.0)
  fast = jax.jit(lambda params: fast_grad(params, BATCH, 0).aux)(PARAMS)
  assert np.flatnonzero(fast.not_finite).tolist() == [2, 5]
  np.testing.assert_allclose(fast.perturbed[2], start[2], atol=1e-5)


def test_the_running_normaliser_follows_its_rate():
  """Step 4 and 5 of the algorithm, by hand: weights exp(l / r - log u) / n."""
  tx = jaxbo.done(1.0, temperature=R, rate=0.3)
  gradient = lambda losses: jaxbo.per_example_grad(lambda p, b: p * b)(jnp.float32(1.0), losses)
  state, log_u = tx.init(jnp.float32(1.0)), None
  for losses in (jnp.array([1.0, 2.0]), jnp.array([3.0, 0.5])):
    updates, state = tx.update(gradient(losses), state, jnp.float32(1.0))
    log_g = np.log(np.mean(np.exp(np.asarray(losses, np.float64) / R)))
    log_u = log_g if log_u is None else np.logaddexp(np.log(0.7) + log_u, np.log(0.3) + log_g)
    weights = np.exp(np.asarray(losses) / R - log_u) / 2
    assert float(updates) == pytest.approx(-float(np.sum(weights * losses)), rel=1e-5)


@pytest.mark.parametrize("inverse", ["diagonal", "none"])
def test_batch_statistics_come_out_and_change_nothing(inverse, x64):
  params, batch = make()
  with_mean = lambda *arguments: (loss(*arguments), {"mean": jnp.mean(arguments[1], axis=0)})
  options = {"barrier": 1e-3, "num_steps": 5, "step_size": 0.5, "inverse": inverse}
  plain, told = (
    jax.jit(
      lambda params, loss_fn=loss_fn, has_aux=has_aux: (
        lambda grads: (grads.losses, grads.pullback(jnp.ones(NUM) / NUM), grads.aux)
      )(
        jaxbo.adversarial.done_grad(loss_fn, margin, Box(EPSILON), has_aux=has_aux, **options)(
          params, batch
        )
      )
    )(params)
    for loss_fn, has_aux in ((loss, False), (with_mean, True))
  )
  for found, expected in zip(jax.tree.leaves(told[:2]), jax.tree.leaves(plain[:2]), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-12)
  np.testing.assert_allclose(told[2].aux["mean"], np.mean(told[2].perturbed, axis=0), rtol=1e-12)
  assert plain[2].aux is None


def test_errors_name_the_argument():
  make = functools.partial(jaxbo.adversarial.done_grad, problem.loss, problem.margin_attack_loss)
  cases = {
    "epsilon must be positive": {"box": Box(0.0)},
    "barrier must be positive": {"barrier": 0.0},
    "step_size must be positive": {"step_size": -1.0},
    "num_steps must be at least 1": {"num_steps": 0},
    "curvature must be non-negative": {"curvature": -1.0},
    "inverse must be one of 'diagonal', 'cg', 'none'": {"inverse": "dense"},
    "direction must be one of": {"direction": "sign"},
    "margin must be in": {"margin": 0.5},
    "low must be below high": {"box": Box(0.1, low=1.0)},
    "norm must be one of 'linf'": {"box": Box(0.1, norm="l2")},
  }
  for message, change in cases.items():
    with pytest.raises(ValueError, match=message):
      make(**{**OPTIONS, **change})
  with pytest.raises(TypeError, match="attack_loss must be a function"):
    jaxbo.adversarial.done_grad(problem.loss, lambda params: 0.0, **OPTIONS)
  with pytest.raises(ValueError, match=r"images must be from low=0\.0 to high=1\.0, got values"):
    make(**OPTIONS)(PARAMS, (BATCH[0] * 255, BATCH[1]))
  sound = problem.loss, problem.margin_attack_loss
  mean = lambda p, x, y: jnp.mean(problem.loss(p, x, y))
  whole = lambda p, x, y: jnp.argmax(problem.model(p, x), axis=1)
  for place, name in enumerate(("loss_fn", "attack_loss")):
    with_mean, with_whole = ([*sound[:place], bad, *sound[place + 1 :]] for bad in (mean, whole))
    for inverse in ("diagonal", "none"):
      message = rf"{name} must return \(8,\), one loss for each image, got \(\)"
      with pytest.raises(ValueError, match=f"^{message}"):
        jaxbo.adversarial.done_grad(*with_mean, inverse=inverse, **OPTIONS)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=f"^{message}"):
      jaxbo.adversarial.fast_bat_grad(*with_mean, box=Box(0.1), step_size=1.0)(PARAMS, BATCH, 0)
    with pytest.raises(TypeError, match=f"^{name} must be real floats, got dtype int32"):
      jaxbo.adversarial.done_grad(*with_whole, **OPTIONS)(PARAMS, BATCH)
  fast = functools.partial(
    jaxbo.adversarial.fast_bat_grad, problem.loss, problem.margin_attack_loss
  )
  for name in ("epsilon", "step_size", "curvature"):
    options = {"box": Box(0.1), "step_size": 1.0}
    options |= {"box": Box(0.0)} if name == "epsilon" else {name: 0.0}
    with pytest.raises(ValueError, match=f"{name} must be positive"):
      fast(**options)
