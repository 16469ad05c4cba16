"""The registry of public transformations: each is one line, and runs through every catalogue test.

An entry builds a *harness*: a pure pair ``(init, step)`` that uses the transformation the way users
do, on nested parameters with unequal leaves. Every field of the carry is checked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbo

INNER = {"v": jnp.zeros((2, 3)), "c": jnp.zeros(())}


class Harness(NamedTuple):
  """A transformation in use.

  Attributes:
    tx: the transformation.
    init: ``init(params) -> carry``.
    step: ``step(carry, t, **extra) -> carry``; ``t`` is an int that selects the data, and
      ``extra`` goes to ``tx.update``.
  """

  tx: optax.GradientTransformation
  init: Callable[..., Any]
  step: Callable[..., Any]


class Entry(NamedTuple):
  """One line of the registry; ``make`` takes a seed, traced or not, and the inner parameters."""

  name: str
  make: Callable[[Any, Any], Harness]


def params(dtype=jnp.float32):
  """Nested outer parameters with unequal leaves; eight devices can share the last one."""
  shapes = {"scalar": (), "nested": [(3, 4), (2, 3, 5)], "wide": (8, 2)}
  leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  arrays = [jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, leaves, strict=True)]
  return jax.tree.map(lambda a: a.astype(dtype), structure.unflatten(arrays))


def _summary(tree):
  return sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(tree))


def inner_loss(x, y, batch):
  """Smooth and strongly convex in ``y``, and every leaf of ``x`` moves the minimum."""
  target = batch * _summary(x)
  return 0.5 * jnp.sum((y["v"] - target) ** 2) + jnp.sum((y["c"] - 2 * target) ** 2)


def outer_loss(x, y, batch):
  """Depends on both levels."""
  return jnp.sum((y["v"] - batch) ** 2) + jnp.sum(y["c"] ** 2) + 0.1 * _summary(x) ** 2


def plain_solver():
  """A solver without options."""
  return jaxbo.inner_solver(inner_loss, optax.sgd(0.2, momentum=0.5), num_steps=3)


def full_solver():
  """A solver with features, auxiliary outputs and per-step batches."""

  def loss(z, y, batch):
    target = jnp.sum(batch) * z
    value = 0.5 * jnp.sum((y["v"] - target) ** 2) + jnp.sum((y["c"] - 2 * target) ** 2)
    return value, {"target": target, "one": 1}

  return jaxbo.inner_solver(
    loss,
    optax.sgd(0.2),
    num_steps=3,
    per_step_batches=True,
    has_aux=True,
    through=lambda x, batch: jnp.cos(batch) * _summary(x),
  )


def train_batch(solver, value):
  """The scalar ``value`` as a batch of the solver, different for each step and each task."""
  if solver.per_step_batches:
    value = jnp.stack([value, -value, value])
  return value if solver.task is None else jnp.stack([value, value / 2], axis=-1)


def response(
  make_head: Callable[..., optax.GradientTransformation], make_solver=plain_solver
) -> Callable[..., Harness]:
  """The harness of a response: the loop of the contract, written out."""

  def make(seed, inner):
    solver = make_solver()
    tx = optax.with_extra_args_support(make_head(solver, seed, inner))

    def init(x):
      train = train_batch(solver, jnp.zeros((), jax.tree.leaves(inner)[0].dtype))
      return x, solver.init(inner, x, train), tx.init(x)

    def step(carry, t, **extra):
      x, solution, state = carry
      dtype = jax.tree.leaves(inner)[0].dtype
      train, val = train_batch(solver, jnp.cos(t).astype(dtype)), jnp.sin(t).astype(dtype)
      solution = solver.solve(x, solution, train)
      grads = jax.grad(outer_loss, (0, 1))(x, solution.params, val)
      updates, state = tx.update(grads, state, x, solution=solution, batch=train, **extra)
      updates = jax.tree.map(lambda u: -jnp.asarray(0.1, u.dtype) * u, updates)
      return optax.apply_updates(x, updates), solution, state

    return Harness(tx, init, step)

  return make


def value_function(make_tx: Callable[..., optax.GradientTransformation], scale: float = -0.1):
  """The harness of a value-function method: gradients of the outer loss in ``Bilevel`` go in."""

  def make(seed, inner):
    del seed
    tx = optax.with_extra_args_support(make_tx())

    def init(x):
      y = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), inner)
      return x, y, tx.init(jaxbo.Bilevel(x, y))

    def step(carry, t, **extra):
      x, y, state = carry
      params = jaxbo.Bilevel(x, y)
      dtype = jax.tree.leaves(y)[0].dtype
      train, val = jnp.cos(t).astype(dtype), jnp.sin(t).astype(dtype)
      grads = jax.grad(lambda p: outer_loss(p.outer, p.inner, val))(params)
      updates, state = tx.update(grads, state, params, batch=train, **extra)
      updates = jax.tree.map(lambda u: jnp.asarray(scale, u.dtype) * u, updates)
      return *optax.apply_updates(params, updates), state

    return Harness(tx, init, step)

  return make


def online(make_outer: Callable[..., optax.GradientTransformation], solver=None, **options):
  """The harness of a method that needs ``jaxbo.online``: its memory, or both batches."""

  def make(seed, inner):
    del seed
    tx = optax.with_extra_args_support(make_outer(solver))
    loop = jaxbo.online(outer_loss, solver, tx, **options)
    batches = lambda t: (jnp.cos(t), jnp.sin(t))
    cast = lambda batch: jax.tree.map(
      lambda leaf: leaf.astype(jax.tree.leaves(inner)[0].dtype), batch
    )

    def init(x):
      state = loop.init(x, inner, lambda key, t: cast(batches(t)))
      return state.x, state._replace(loop=state.loop._replace(x=()))

    def step(carry, t, **extra):
      x, state = carry
      state = state._replace(loop=state.loop._replace(x=x))
      state, _ = loop.step(state, cast(batches(t)), **extra)
      return state.x, state._replace(loop=state.loop._replace(x=()))

    return Harness(tx, init, step)

  return make


def minimizer(make_tx: Callable[..., optax.GradientTransformation]):
  """The harness of an optimizer that wants the loss as a function."""

  def make(seed, inner):
    del inner
    tx = optax.with_extra_args_support(make_tx(seed))

    def init(x):
      return x, tx.init(x)

    def step(carry, t, **extra):
      x, state = carry
      value_fn = lambda x: (_summary(x) - jnp.cos(t).astype(x["scalar"].dtype)) ** 2
      updates, state = tx.update(jax.grad(value_fn)(x), state, x, value_fn=value_fn, **extra)
      return optax.apply_updates(x, updates), state

    return Harness(tx, init, step)

  return make


def example_losses(x, batch):
  """One loss for each of four examples; every leaf of ``x`` moves them."""
  return (batch * (1 + _summary(x)) - jnp.sin(3 * batch)) ** 2


def robust(
  make_tx: Callable[..., optax.GradientTransformation],
  scale: float = -0.1,
  stored: bool = False,
  repair: bool = False,  # a second backward pass to compile, so for one entry only
):
  """The harness of robust training: per-example gradients go in, lazy or ``stored``."""

  def make(seed, inner):
    del seed, inner
    tx = optax.with_extra_args_support(make_tx())

    def init(x):
      return x, tx.init(x)

    def step(carry, t, **extra):
      x, state = carry
      dtype = jax.tree.leaves(x)[0].dtype
      batch = jnp.cos(t + jnp.arange(4)).astype(dtype)
      options = {"groups": jnp.array([0, 1, 1, 0]), "mask": jnp.arange(4) < 3, **extra}
      if stored:
        one_loss = lambda x, example: example_losses(x, example[None])[0]
        losses, grads = jax.vmap(jax.value_and_grad(one_loss), in_axes=(None, 0))(x, batch)
        options["losses"] = losses
      else:
        grads = jaxbo.per_example_grad(example_losses, repair=repair)(x, batch)
      updates, state = tx.update(grads, state, x, **options)
      updates = jax.tree.map(lambda u: jnp.asarray(scale, u.dtype) * u, updates)
      return optax.apply_updates(x, updates), state

    return Harness(tx, init, step)

  return make


def detected(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """A chain with what an online meta-learner gives it; the three cases follow each other."""
  tx = optax.chain(*parts)

  def update(updates, state, params=None, **extra):
    count, state = state
    scores = jaxbo.Scores(jnp.float32(0.0), jnp.float32(0.0))
    extra["detection"] = jaxbo.Detection(count != 1, count % 3 == 2, scores)
    extra["value"] = jnp.float32(2.0)
    updates, state = tx.update(updates, state, params, **extra)
    return updates, (count + 1, state)

  return optax.GradientTransformationExtraArgs(lambda x: (jnp.int32(0), tx.init(x)), update)


VALUE = {"num_steps": 3, "inner_optimizer": optax.sgd(0.2, momentum=0.5)}
DUAL = {"slack": 0.1, "dual_learning_rate": 0.5, **VALUE}
BOX = {
  f"project_{level}": lambda tree: jax.tree.map(lambda leaf: jnp.clip(leaf, -3, 3), tree)
  for level in ("outer", "inner")
}


def primal_dual(**options):
  """PDBO's head."""
  return jaxbo.add_primal_dual_penalty(inner_loss, **{**DUAL, **options})


COMPOSITIONAL = jaxbo.compositional(jaxbo.kl(optax.linear_schedule(5.0, 0.5, 4)), 0.3)
_cg, _fixed_point = jaxbo.conjugate_gradient, jaxbo.fixed_point

# The aliases at the end stand for their heads without options.
REGISTRY = [
  Entry("drop_response", response(lambda s, k, y: jaxbo.drop_response())),
  Entry("unrolled_last_2", response(lambda s, k, y: jaxbo.add_unrolled_response(s, 2))),
  Entry(
    "implicit_cg_warm",
    response(
      lambda s, k, y: jaxbo.add_implicit_response(s, _cg(3, warm_start=True), inner_params=y)
    ),
  ),
  Entry(
    "implicit_fixed_point",
    response(lambda s, k, y: jaxbo.add_implicit_response(s, _fixed_point(3, 0.3))),
  ),
  Entry(
    "es_in_chunks",
    response(lambda s, k, y: jaxbo.add_es_response(s, 5, sample_batch_size=2, key=k)),
  ),
  Entry(
    "es_orthogonal_central",
    response(
      lambda s, k, y: jaxbo.add_es_response(
        s, 4, directions="orthogonal", difference="central", key=k
      )
    ),
  ),
  Entry(
    "es_exact_one_pass_per_task",
    response(
      lambda s, k, y: jaxbo.add_es_response(
        s, 4, directions="rademacher", difference="exact", redraw=False, per_task=True, key=k
      ),
      lambda: jaxbo.over_tasks(plain_solver(), 2, average_start=True),
    ),
  ),
  Entry(
    "unrolled_full_solver", response(lambda s, k, y: jaxbo.add_unrolled_response(s), full_solver)
  ),
  Entry(
    "implicit_full_solver",
    response(lambda s, k, y: jaxbo.add_implicit_response(s, _cg(3)), full_solver),
  ),
  Entry(
    "es_full_solver", response(lambda s, k, y: jaxbo.add_es_response(s, 4, key=k), full_solver)
  ),
  Entry(
    "es_per_task_full_solver",
    response(
      lambda s, k, y: jaxbo.add_es_response(s, 2, per_task=True, key=k),
      lambda: jaxbo.over_tasks(full_solver(), 2),
    ),
  ),
  Entry("itd", response(lambda s, k, y: jaxbo.itd(0.1, s))),
  Entry("aid", response(lambda s, k, y: jaxbo.aid(0.1, s))),
  Entry("stocbio", response(lambda s, k, y: jaxbo.stocbio(0.1, s, 3, 0.3))),
  Entry("esj", response(lambda s, k, y: jaxbo.esj(0.1, s, 4, key=k))),
  Entry(
    "sobow",
    response(
      lambda s, k, y: optax.chain(
        jaxbo.sobow(-0.1, s, window=3, decay=0.9, inner_params=y),
        jaxbo.window_average(2, normalization="present", storage_dtype=jnp.bfloat16),
        jaxbo.project_params(BOX["project_outer"]),
      )
    ),
  ),
  Entry(
    "average_over_batches",
    online(
      lambda s: jaxbo.average_over_batches(jaxbo.ogd(0.1), outer_loss, 0.9),
      plain_solver(),
      memory=3,
      replay=True,
    ),
  ),
  Entry(
    "oagd",
    online(lambda s: jaxbo.oagd(0.1, s, outer_loss), plain_solver(), memory=1, hyper_at="before"),
  ),
  Entry(
    "corrected_response",
    online(
      lambda s: optax.chain(
        jaxbo.add_corrected_response(
          inner_loss, outer_loss, linear_learning_rate=0.2, correction=0.5, radius=1.0
        ),
        optax.adam(0.1),
      )
    ),
  ),
  Entry(
    "sogd",
    online(
      lambda s: jaxbo.sogd(
        0.1,
        optax.linear_schedule(0.2, 0.1, 4),
        inner_loss,
        outer_loss,
        linear_learning_rate=0.2,
        correction=optax.linear_schedule(1.0, 0.5, 4),
        **BOX,
      )
    ),
  ),
  Entry(
    "leeds",
    response(
      lambda s, k, y: detected(
        jaxbo.leeds(-1.0, s),
        jaxbo.modulate_by_loss(0.5),
        jaxbo.gate_by_detection(optax.sgd(-1.0, momentum=0.9), 0.5, 1.0),
      )
    ),
  ),
  Entry(
    "bayesian_gradient_descent",
    minimizer(lambda k: jaxbo.bayesian_gradient_descent(1.0, 0.1, num_samples=2, key=k)),
  ),
  Entry("primal_dual", value_function(primal_dual)),
  Entry(
    "primal_dual_full",
    value_function(
      lambda: primal_dual(
        value_regularizer=0.1,
        extrapolation=optax.linear_schedule(1.0, 0.0, 3),
        gap_steps=2,
        **BOX,
      )
    ),
  ),
  Entry(
    "dynamic_barrier",
    value_function(lambda: jaxbo.add_dynamic_barrier(inner_loss, barrier_rate=0.5, **VALUE)),
  ),
  Entry(
    "dynamic_barrier_value",
    value_function(
      lambda: jaxbo.add_dynamic_barrier(inner_loss, barrier_rate=0.5, phi="value", **VALUE)
    ),
  ),
  Entry(
    "value_function_penalty",
    value_function(
      lambda: jaxbo.add_value_function_penalty(
        inner_loss, multiplier=optax.linear_schedule(1.0, 3.0, 4), normalize=True, **VALUE
      )
    ),
  ),
  Entry(
    "proximal",
    value_function(
      lambda: jaxbo.add_proximal_terms(
        primal_dual(), outer_weight=0.1, constraint_weight=0.1, period=2
      )
    ),
  ),
  Entry(
    "lagrangian_smoothness",
    value_function(
      lambda: jaxbo.scale_by_lagrangian_smoothness(
        primal_dual(), outer_smoothness=1.0, constraint_smoothness=1.0
      )
    ),
  ),
  Entry(
    "project",
    value_function(
      lambda: optax.chain(primal_dual(), optax.sgd(0.1), jaxbo.project(*BOX.values())), scale=1.0
    ),
  ),
  Entry("pdbo", value_function(lambda: jaxbo.pdbo(0.1, inner_loss, **DUAL, **BOX), 1.0)),
  Entry(
    "proximal_pdbo",
    value_function(
      lambda: jaxbo.proximal_pdbo(
        0.1, inner_loss, outer_weight=0.1, constraint_weight=0.1, period=2, **DUAL
      ),
      1.0,
    ),
  ),
  Entry("bome", value_function(lambda: jaxbo.bome(0.1, inner_loss, **VALUE, **BOX), 1.0)),
  Entry(
    "v_pbgd",
    value_function(
      lambda: jaxbo.v_pbgd(jaxbo.Bilevel(0.1, 0.05), inner_loss, multiplier=3.0, **VALUE), 1.0
    ),
  ),
  Entry(
    "f2sa",
    value_function(
      lambda: jaxbo.f2sa(
        0.1, 0.1, inner_loss, multiplier=optax.linear_schedule(1.0, 3.0, 4), **VALUE
      ),
      1.0,
    ),
  ),
  Entry("reweight_compositional", robust(lambda: jaxbo.reweight(COMPOSITIONAL), repair=True)),
  Entry("ir_dro", robust(lambda: jaxbo.ir_dro(0.1), 1.0)),
  Entry("group_dro", robust(lambda: jaxbo.group_dro(0.1, 2, 0.1), 1.0)),
  Entry("cvar_dro", robust(lambda: jaxbo.cvar_dro(0.1, 0.7), 1.0)),
  Entry("chi2_dro", robust(lambda: jaxbo.chi2_dro(0.1, 0.5), 1.0)),
  Entry("done", robust(lambda: jaxbo.done(0.1, 0.5, rate=0.3), 1.0)),
  Entry("term", robust(lambda: jaxbo.term(0.1, optax.linear_schedule(0.0, -2.0, 4)), 1.0, True)),
]
