"""Responses and value-function methods in the catalogue (tests/catalogue.py)."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

import jaxbo
from tests.catalogue import (
  Program,
  alias,
  full_solver,
  inner_loss,
  plain_solver,
  response,
  value_function,
)

LOWER = {"num_steps": 3, "inner_optimizer": optax.sgd(0.2, momentum=0.5)}
DUAL = {"slack": 0.1, "dual_learning_rate": 0.5, **LOWER}
clip = lambda tree: jax.tree.map(lambda leaf: jnp.clip(leaf, -3, 3), tree)
clip_inner = lambda tree: jax.tree.map(lambda leaf: jnp.clip(leaf, -2, 2), tree)
BOX = {"project_outer": clip, "project_inner": clip_inner}
RISING = optax.linear_schedule(1.0, 3.0, 4)
BOTH = jaxbo.Bilevel("outer", "inner")


def two_tasks(solver, **options):
  """A solver of a meta-batch of two tasks."""
  return lambda: jaxbo.over_tasks(solver(), 2, **options)


def one_step_solver():
  """The solver of a single loop, which keeps its momentum."""
  return jaxbo.inner_solver(inner_loss, optax.sgd(0.2, momentum=0.5), num_steps=1)


def quantised_run():
  """A run without a derivative, of the sizes of the inner parameters."""

  def path(x, batch):
    target = batch * sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(x))
    steps = jnp.round(64 * target) / 64
    return {"v": jnp.full((2, 3), steps), "c": 2 * steps}

  return jaxbo.black_box(path)


def primal_dual(**options):
  """PDBO's head."""
  return jaxbo.add_primal_dual_penalty(inner_loss, **{**DUAL, **options})


def penalty(**options):
  """The head of V-PBGD and F2SA."""
  return jaxbo.add_value_function_penalty(inner_loss, multiplier=RISING, **{**LOWER, **options})


def barrier(**options):
  """BOME's head."""
  return jaxbo.add_dynamic_barrier(inner_loss, barrier_rate=0.4, **LOWER, **options)


def levels(outer, inner):
  """Descent with a rate for each level."""
  rate = optax.scale_by_learning_rate
  return optax.partition({"outer": rate(outer), "inner": rate(inner)}, BOTH)


_implicit, _es = jaxbo.add_implicit_response, jaxbo.add_es_response
_part = {"scalar": True, "nested": [True, False], "wide": False}
_cg, _neumann, _fixed_point = jaxbo.conjugate_gradient, jaxbo.neumann, jaxbo.fixed_point

ENTRIES = [
  response("drop_response", jaxbo.drop_response()),
  response("unrolled_last_2", lambda solver: jaxbo.add_unrolled_response(solver, 2)),
  response(
    "implicit_cg_warm",
    lambda solver, inner_params: jaxbo.add_implicit_response(
      solver, _cg(3, warm_start=True), inner_params=inner_params
    ),
  ),
  response(
    "implicit_fixed_point", lambda solver: _implicit(solver, _fixed_point(3, 0.3)), slow=True
  ),
  response(
    "finite_difference",
    lambda solver: jaxbo.add_finite_difference_response(solver, 0.1),
    one_step_solver,
  ),
  response(
    "finite_difference_full_solver",
    lambda solver: jaxbo.add_finite_difference_response(solver),
    two_tasks(full_solver),
    slow=True,
  ),
  response(
    "es_in_chunks",
    lambda solver, key: jaxbo.add_es_response(solver, 5, sample_batch_size=2, key=key),
  ),
  response(
    "es_orthogonal_central",
    lambda solver, key: _es(
      solver, 4, directions="orthogonal", difference="central", perturb=_part, key=key
    ),
    slow=True,
  ),
  response(
    "es_exact_one_pass_per_task",
    lambda solver, key: _es(
      solver, 4, directions="rademacher", difference="exact", redraw=False, per_task=True, key=key
    ),
    two_tasks(plain_solver, average_start=True),
  ),
  response("unrolled_full_solver", lambda solver: jaxbo.add_unrolled_response(solver), full_solver),
  response(
    "implicit_full_solver",
    lambda solver: _implicit(solver, _neumann(3, 0.3)),
    full_solver,
    slow=True,
  ),
  response("es_full_solver", lambda solver, key: _es(solver, 4, key=key), full_solver),
  response(
    "es_black_box", lambda solver, key: _es(solver, 4, 0.5, key=key), quantised_run, slow=True
  ),
  response(
    "es_per_task_full_solver",
    lambda solver, key: _es(solver, 2, per_task=True, key=key),
    two_tasks(full_solver),
    slow=True,
  ),
  value_function("primal_dual", primal_dual()),
  value_function(
    "primal_dual_full",
    primal_dual(
      value_regularizer=0.1,
      extrapolation=optax.linear_schedule(1.0, 0.0, 3),
      gap_steps=2,
      **BOX,
    ),
    slow=True,
  ),
  value_function("dynamic_barrier", barrier()),
  value_function(
    "dynamic_barrier_value", barrier(phi="value", project_inner=clip_inner), slow=True
  ),
  value_function("value_function_penalty", penalty(normalize=True)),
  value_function(
    "proximal",
    jaxbo.add_proximal_terms(primal_dual(), outer_weight=0.1, constraint_weight=0.1, period=2),
  ),
  value_function(
    "lagrangian_smoothness",
    jaxbo.scale_by_lagrangian_smoothness(
      primal_dual(), outer_smoothness=1.0, constraint_smoothness=1.0
    ),
  ),
  value_function(
    "project",
    optax.chain(primal_dual(), levels(0.1, 0.05), jaxbo.project(*BOX.values())),
    scale=1.0,
  ),
]

_down = optax.scale_by_learning_rate(0.1)
_boxes = jaxbo.project(*BOX.values())
_key = {"directions": "rademacher", "difference": "central", "redraw": False, "key": 5}
_key["perturb"] = _part

ALIASES = [
  alias(
    response,
    "itd",
    lambda solver: jaxbo.itd(0.1, solver),
    lambda solver: optax.chain(jaxbo.add_unrolled_response(solver), _down),
  ),
  alias(
    response,
    "itd_last_2",
    lambda solver: jaxbo.itd(0.1, solver, 2),
    lambda solver: optax.chain(jaxbo.add_unrolled_response(solver, 2), _down),
  ),
  alias(
    response,
    "aid",
    lambda solver: jaxbo.aid(0.1, solver),
    lambda solver: optax.chain(_implicit(solver, _cg(10)), _down),
  ),
  alias(
    response,
    "aid_warm",
    lambda solver, inner_params: jaxbo.aid(
      0.1, solver, _cg(3, warm_start=True), inner_params=inner_params
    ),
    lambda solver, inner_params: optax.chain(
      _implicit(solver, _cg(3, warm_start=True), inner_params=inner_params), _down
    ),
  ),
  alias(
    response,
    "stocbio",
    lambda solver: jaxbo.stocbio(0.1, solver, 3, 0.2),
    lambda solver: optax.chain(_implicit(solver, _neumann(3, 0.2)), _down),
  ),
  alias(
    response,
    "soba",
    lambda solver, inner_params: jaxbo.soba(0.1, solver, 0.3, inner_params=inner_params),
    lambda solver, inner_params: optax.chain(
      _implicit(solver, _fixed_point(1, 0.3, warm_start=True), inner_params=inner_params), _down
    ),
  ),
  alias(
    response,
    "amigo",
    lambda solver, inner_params: jaxbo.amigo(0.1, solver, 3, 0.3, inner_params=inner_params),
    lambda solver, inner_params: optax.chain(
      _implicit(solver, _fixed_point(3, 0.3, warm_start=True), inner_params=inner_params), _down
    ),
  ),
  alias(
    response,
    "darts",
    lambda solver: jaxbo.darts(0.1, solver, 0.2),
    lambda solver: optax.chain(jaxbo.add_finite_difference_response(solver, 0.2), _down),
  ),
  alias(
    response,
    "esj",
    lambda solver: jaxbo.esj(0.1, solver, 3, 0.1, sample_batch_size=2, **_key),
    lambda solver: optax.chain(_es(solver, 3, 0.1, sample_batch_size=2, **_key), _down),
  ),
  alias(
    value_function,
    "pdbo",
    jaxbo.pdbo(0.1, inner_loss, **DUAL),
    optax.chain(primal_dual(), _down),
  ),
  alias(
    value_function,
    "pdbo_full",
    jaxbo.pdbo(
      jaxbo.Bilevel(0.1, 0.2), inner_loss, extrapolation=RISING, dual_bound=5.0, **BOX, **DUAL
    ),
    optax.chain(primal_dual(extrapolation=RISING, dual_bound=5.0, **BOX), levels(0.1, 0.2), _boxes),
  ),
  alias(
    value_function,
    "proximal_pdbo",
    jaxbo.proximal_pdbo(
      0.1, inner_loss, outer_weight=0.3, constraint_weight=0.2, period=2, **BOX, **DUAL
    ),
    optax.chain(
      jaxbo.add_proximal_terms(
        primal_dual(**BOX), outer_weight=0.3, constraint_weight=0.2, period=2
      ),
      _down,
      _boxes,
    ),
  ),
  alias(
    value_function,
    "bome",
    jaxbo.bome(0.1, inner_loss, barrier_rate=0.4, phi="value", **BOX, **LOWER),
    optax.chain(barrier(phi="value", project_inner=clip_inner), _down, _boxes),
  ),
  alias(
    value_function,
    "bome_defaults",
    jaxbo.bome(0.1, inner_loss, inner_optimizer=optax.sgd(0.3)),
    optax.chain(
      jaxbo.add_dynamic_barrier(
        inner_loss, barrier_rate=0.5, num_steps=10, inner_optimizer=optax.sgd(0.3)
      ),
      _down,
    ),
  ),
  alias(
    value_function,
    "v_pbgd",
    jaxbo.v_pbgd(jaxbo.Bilevel(0.1, 0.05), inner_loss, multiplier=RISING, **BOX, **LOWER),
    optax.chain(penalty(normalize=True, project_inner=clip_inner), levels(0.1, 0.05), _boxes),
  ),
  alias(
    value_function,
    "v_pbgd_defaults",
    jaxbo.v_pbgd(0.1, inner_loss, multiplier=RISING, inner_optimizer=LOWER["inner_optimizer"]),
    optax.chain(penalty(normalize=True, num_steps=1), _down),
  ),
  alias(
    value_function,
    "f2sa",
    jaxbo.f2sa(0.1, 0.2, inner_loss, multiplier=RISING, **BOX, **LOWER),
    optax.chain(penalty(project_inner=clip_inner), levels(0.1, 0.2), _boxes),
  ),
]


def _fit(x, y, batch):
  del x
  features, targets = batch
  return jnp.mean((features @ _whole(y) - targets) ** 2)


def _ridge(x, y, batch):
  return _fit(x, y, batch) + jnp.sum(jnp.exp(x) * y**2)


def _whole(leaf):
  """Explicit axes are told where divided parameters meet divided rows."""
  sharding = jax.typeof(leaf).sharding
  explicit = AxisType.Explicit in sharding.mesh.axis_types
  return jax.sharding.reshard(leaf, sharding.update(spec=PartitionSpec())) if explicit else leaf


def fully_sharded():
  """Both levels and the data are divided, so that states must be."""
  inner = jaxbo.inner_solver(_ridge, optax.adam(0.1), 2)

  def run(x, y, *data):
    outer = jaxbo.aid(0.1, inner, _cg(2, warm_start=True), inner_params=y)
    init, step = jaxbo.bilevel_loop(_fit, inner, outer)
    return jax.lax.scan(lambda state, _: step(state, data, data), init(x, y), length=2)

  features = jnp.cos(jnp.arange(128.0)).reshape(16, 8)
  arguments = jnp.zeros(8), jnp.ones(8), features, jnp.sin(features[:, 0])
  return run, arguments, (PartitionSpec("d"),) * 4


PROGRAMS = [Program("aid_fsdp", fully_sharded)]
