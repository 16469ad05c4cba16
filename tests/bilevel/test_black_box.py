"""A black box as an inner solver: any run, for the responses that need nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbo
from tests.bilevel.es_estimates import assert_within_standard_errors, estimates
from tests.cases import cases


def linear(x, batch):
  """``batch @ x``, in NumPy or in JAX, with any leading axes."""
  return {"y": (batch @ x[..., None])[..., 0]}


BATCH = np.arange(6.0, dtype=np.float32).reshape(2, 3)
Y0 = {"y": jnp.zeros(2)}


def solved(inner, x, batch=None, y0=None):
  y = inner.solve(x, inner.init(jnp.zeros_like(x) if y0 is None else y0), batch)
  return y, (jnp.zeros_like(x), jax.tree.map(jnp.ones_like, y.params))


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_response_of_a_quantised_run_is_the_slope_of_its_smoothing(difference, x64):
  """The sign of x + mu u has the mean 2 Phi(x / mu) - 1, and so the slope 2 phi(x / mu) / mu."""
  inner = jaxbo.black_box(lambda x, batch: jnp.sign(x))
  x, mu = jnp.float64(0.3), 0.5
  y, grads = solved(inner, x)
  samples = estimates(inner, x, y, grads, 400, num_samples=50, smoothing=mu, difference=difference)
  expected = 2 * np.exp(-0.5 * (x / mu) ** 2) / np.sqrt(2 * np.pi) / mu
  assert_within_standard_errors(samples[:, 0], expected)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"sample_batch_size": 2},
    {"sample_batch_size": 3, "redraw": False},
    {"difference": "central"},
  ],
  ids=str,
)
@pytest.mark.parametrize("vmap_method", ["sequential", "expand_dims", "broadcast_all"])
def test_a_function_of_numpy_is_the_same_function_of_jax(vmap_method, options):
  """The solution and the response; the host gets NumPy arrays."""
  shapes = []

  def on_host(x, batch):
    assert type(x) is type(batch) is np.ndarray
    shapes.append((x.shape, batch.shape))
    return linear(x, batch)

  results = []
  for inner in (
    jaxbo.black_box(linear),
    jaxbo.black_box(on_host, host=True, vmap_method=vmap_method),
  ):
    head = jaxbo.add_es_response(inner, 5, **options)

    @jax.jit
    def respond(x, inner=inner, head=head):
      y, grads = solved(inner, x, BATCH, Y0)
      return y, head.update(grads, head.init(x), x, solution=y, batch=BATCH)

    results.append(jax.device_get(respond(jnp.array([1.0, -2.0, 0.5]))))
  (y, response), (host_y, host_response) = results
  np.testing.assert_allclose(host_y.params["y"], y.params["y"], rtol=1e-6)
  np.testing.assert_allclose(host_response[0], response[0], rtol=1e-4)
  assert host_response[1].info.num_finite == 5
  several = max(len(shape) for shape, _ in shapes) > 1
  assert several == (vmap_method != "sequential")
  wide = any(shape[0] > 1 for _, shape in shapes if len(shape) > 2)
  assert wide == (vmap_method == "broadcast_all")


def test_many_numbers_reach_the_host():
  inner = jaxbo.black_box(lambda x, batch: np.sum(x * batch), host=True)
  x = jnp.ones(1_000_000)
  y = jax.jit(inner.solve)(x, inner.init(jnp.float32(0.0)), x)
  assert y.params == 1_000_000


@pytest.mark.parametrize("host", [False, True])
def test_tasks_with_their_own_directions(host, x64):
  """With as many orthogonal directions as parameters the response is exact."""
  run = lambda x, batch: batch * x**2
  inner = jaxbo.over_tasks(jaxbo.black_box(run, host=host), 2)
  x, batch = jnp.array([1.0, 3.0]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
  y, grads = solved(inner, x, batch)
  np.testing.assert_allclose(y.params, np.asarray(batch) * np.asarray(x) ** 2)
  for per_task in (False, True):
    head = jaxbo.add_es_response(
      inner, 2, directions="orthogonal", difference="central", per_task=per_task
    )
    h, _ = head.update(grads, head.init(x), x, solution=y, batch=batch)
    np.testing.assert_allclose(h, 2 * x * batch.sum(0), rtol=1e-9)


def test_the_loop_descends_through_the_host():
  """A ridge regression in NumPy, whose best ridge is none."""
  rng = np.random.default_rng(0)
  a = rng.normal(size=(20, 3)).astype(np.float32)
  train, val = ({"a": a, "b": a @ np.ones(3, np.float32)} for _ in range(2))

  def ridge(x, batch):
    gram = batch["a"].T @ batch["a"] + np.exp(x) * np.eye(3)
    return np.linalg.solve(gram, batch["a"].T @ batch["b"])

  inner = jaxbo.black_box(ridge, host=True)
  outer = jaxbo.esj(optax.adam(0.5), inner, 2, difference="central")
  fit = lambda x, y, batch: jnp.mean((batch["a"] @ y - batch["b"]) ** 2)
  init, step = jaxbo.bilevel_loop(fit, inner, outer)
  state = init(jnp.float32(3.0), jnp.zeros(3))
  losses = []
  step = jax.jit(step)
  for _ in range(20):
    state, info = step(state, train, val)
    losses.append(float(info.outer_loss))
  assert losses[-1] < 0.01 * losses[0]
  assert state.x < 0
  assert info.inner_losses is None
  assert info.inner_finite
  assert info.response_finite


def test_a_condition_of_the_users_own_gives_an_implicit_response():
  """The root of y^3 = x: dy/dx = 1 / (3 y^2)."""
  inner = jaxbo.black_box(lambda x, batch: np.cbrt(x), host=True)
  head = jaxbo.add_implicit_response(
    inner, jaxbo.conjugate_gradient(5), condition=lambda x, y, batch: y**3 - x
  )
  x = jnp.array([1.0, 8.0, 27.0])
  y, grads = solved(inner, x)
  h, state = head.update(grads, head.init(x), x, solution=y, batch=None)
  np.testing.assert_allclose(h, [1 / 3, 1 / 12, 1 / 27], rtol=1e-4)
  assert state.info.linear_residual < 1e-5


def test_a_run_that_fails_is_left_out():
  inner = jaxbo.black_box(lambda x, batch: np.where(x > 0, x, np.nan), host=True)
  good = inner.solve(jnp.float32(2.0), inner.init(jnp.float32(0.0)), None)
  bad = inner.solve(jnp.float32(-1.0), good, None)
  assert (bad.params, bool(bad.info.finite)) == (2.0, False)
  head = jaxbo.add_es_response(inner, 20, 1.0)
  x = jnp.float32(0.5)
  y, grads = solved(inner, x)
  _, state = head.update(grads, head.init(x), x, solution=y, batch=None)
  assert 0 < state.info.num_finite < 20
  h, state = head.update(grads, head.init(x), x, solution=bad, batch=None)
  assert (h, state.info.num_finite) == (0.0, 0)


def test_low_precision_runs_in_single_precision():
  seen = []

  def run(x, batch):
    seen.append(x.dtype)
    return 2 * x

  inner = jaxbo.black_box(run, host=True)
  x = jnp.ones(3, jnp.bfloat16)
  y, grads = solved(inner, x)
  head = jaxbo.add_es_response(inner, 3, directions="orthogonal")
  h, _ = head.update(grads, head.init(x), x, solution=y, batch=None)
  assert y.params.dtype == h.dtype == jnp.bfloat16
  np.testing.assert_allclose(h.astype(jnp.float32), 2.0, rtol=1e-2)
  assert seen[0] == jnp.bfloat16
  assert set(seen[1:]) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("host", [False, True])
def test_what_a_run_returns_gets_the_dtype_of_y0(host, x64):
  """Labels of a classifier are ints, and NumPy computes in double precision."""
  for run in (lambda x, batch: (x > 0).astype(int), lambda x, batch: x.astype(float)):
    inner = jaxbo.black_box(run, host=host)
    y = inner.solve(jnp.ones(2, jnp.float32), inner.init(jnp.zeros(2, jnp.float32)), None)
    assert y.params.dtype == jnp.float32
    np.testing.assert_array_equal(y.params, 1.0)


@cases(
  ("make", "who"),
  [
    (jaxbo.add_unrolled_response, "add_unrolled_response"),
    (lambda inner: jaxbo.itd(0.1, inner), "add_unrolled_response"),
    (lambda inner: jaxbo.aid(0.1, inner), "add_implicit_response without a condition"),
    (jaxbo.add_finite_difference_response, "add_finite_difference_response"),
    (lambda inner: jaxbo.add_es_response(inner, difference="exact"), "add_es_response with"),
    (lambda inner: inner.loss(1.0, 1.0, None), "what needs the inner loss"),
    (lambda inner: jaxbo.over_tasks(inner, 2).loss(1.0, jnp.ones(2), jnp.ones(2)), "what needs"),
    (lambda inner: jaxbo.aid(0.1, jaxbo.over_tasks(inner, 2)), "add_implicit_response without"),
  ],
)
def test_what_needs_more_than_the_run_is_refused(make, who):
  with pytest.raises(
    ValueError, match=rf"inner must not be a black_box for {who}.*add_es_response"
  ):
    make(jaxbo.black_box(lambda x, batch: x))


def test_bad_runs_are_refused(as_users_run):
  with pytest.raises(TypeError, match=r"path must be a function path\(x, batch\), got one with"):
    jaxbo.black_box(lambda x: x)
  with pytest.raises(ValueError, match=r"vmap_method must be one of 'sequential', .* got 'legacy'"):
    jaxbo.black_box(linear, host=True, vmap_method="legacy")
  with pytest.raises(ValueError, match="vmap_method must be 'sequential' without host=True"):
    jaxbo.black_box(linear, vmap_method="expand_dims")
  x = jnp.ones(3)
  inner = jaxbo.black_box(linear)
  with pytest.raises(TypeError, match="y0 must be real floats, got dtype int32"):
    inner.init(jnp.arange(2))
  for wrong in ({"y": jnp.zeros(3)}, jnp.zeros(2)):
    with pytest.raises(ValueError, match=r"what path returns must have the structure .* of y0"):
      inner.solve(x, inner.init(wrong), BATCH)
  on_host = jaxbo.black_box(linear, host=True)
  with pytest.raises(Exception, match="path must return the structure of y0"):
    on_host.solve(x, on_host.init(jnp.zeros(2)), BATCH).params.block_until_ready()
  with pytest.raises(Exception, match=r"Expected: \(3,\), Actual: \(2,\)"):
    on_host.solve(x, on_host.init({"y": jnp.zeros(3)}), BATCH).params["y"].block_until_ready()
  blind = jaxbo.black_box(lambda _, batch: x)
  y, grads = solved(blind, x)
  head = jaxbo.add_es_response(blind)
  with pytest.raises(ValueError, match="path must use its argument x"):
    head.update(grads, head.init(x), x, solution=y, batch=None)


@pytest.mark.slow
def test_penalty_and_kernel_width_of_a_support_vector_machine():
  """scikit-learn's SVC on two moons with noise, from a kernel far too wide, by five fits a step."""
  datasets = pytest.importorskip("sklearn.datasets")
  svm = pytest.importorskip("sklearn.svm")
  points, labels = datasets.make_moons(400, noise=0.3, random_state=0)
  signs = np.float32(2 * labels - 1)
  train, val = {"a": points[:200], "b": signs[:200]}, {"a": points[200:], "b": signs[200:]}

  def margins(x, batch):
    machine = svm.SVC(C=np.exp(x["penalty"]), gamma=np.exp(x["width"]))
    return machine.fit(batch["a"], batch["b"]).decision_function(val["a"])

  inner = jaxbo.black_box(margins, host=True)
  outer_loss = lambda x, y, batch: jnp.mean(jax.nn.softplus(-2 * batch["b"] * y))
  head = jaxbo.add_es_response(inner, 2, 0.1, directions="orthogonal", difference="central")
  init, step = jaxbo.bilevel_loop(outer_loss, inner, optax.chain(head, optax.adam(0.3)))
  step = jax.jit(step)
  state = init({"penalty": jnp.float32(-3.0), "width": jnp.float32(-4.0)}, jnp.zeros(200))
  train = {name: np.float32(value) for name, value in train.items()}
  losses = []
  for _ in range(25):
    state, info = step(state, train, val)
    losses.append(float(info.outer_loss))
  right = np.mean(np.sign(state.solution.params) == val["b"])
  assert losses[0] > 0.65
  assert losses[-1] < 0.35
  assert right > 0.85
