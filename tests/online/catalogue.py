"""Transformations of online methods in the catalogue (tests/catalogue.py)."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import jaxbo
from tests.bilevel.catalogue import BOX, clip
from tests.catalogue import (
  Program,
  alias,
  inner_loss,
  minimizer,
  online,
  outer_loss,
  plain_solver,
  response,
)

_cg, _implicit = jaxbo.conjugate_gradient, jaxbo.add_implicit_response
FALLING = optax.linear_schedule(0.2, 0.1, 4)
CORRECTION = optax.linear_schedule(1.0, 0.5, 4)
SCALES = {"in_distribution_scale": 0.5, "out_of_distribution_scale": 0.9, "no_switch_scale": 0.1}


def corrected(**options):
  """SOGD's head."""
  rates = {"linear_learning_rate": FALLING, "correction": CORRECTION}
  return jaxbo.add_corrected_response(inner_loss, outer_loss, **rates, **options)


def detected(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """A chain with what an online meta-learner gives it; the three cases follow each other."""
  tx = optax.chain(*parts)

  def update(updates, state, params=None, **extra):
    count, state = state
    scores = jaxbo.meta.Scores(jnp.float32(0.0), jnp.float32(0.0))
    extra["detection"] = jaxbo.meta.Detection(count != 1, count % 3 == 2, scores)
    extra["value"] = jnp.float32(2.0)
    updates, state = tx.update(updates, state, params, **extra)
    return updates, (count + 1, state)

  return optax.GradientTransformationExtraArgs(lambda x: (jnp.int32(0), tx.init(x)), update)


AVERAGED = {"linear_learning_rate": FALLING, "num_batches": 3, "num_outer_batches": 2}


def indexed(tx):
  """``tx`` with the indices of batches, which come in turns."""

  def update(updates, state, params=None, **extra):
    count, state = state
    extra |= {"index": count % 3, "outer_index": count % 2}
    updates, state = tx.update(updates, state, params, **extra)
    return updates, (count + 1, state)

  return optax.GradientTransformationExtraArgs(lambda p: (jnp.int32(0), tx.init(p)), update)


ENTRIES = [
  response(
    "window_average",
    lambda solver: optax.chain(
      jaxbo.add_unrolled_response(solver, 1),
      jaxbo.window_average(3, decay=0.9),
      jaxbo.window_average(2, normalization="present", storage_dtype=jnp.bfloat16),
      jaxbo.bilevel.project_params(clip),
    ),
  ),
  online(
    "average_over_batches",
    lambda solver: jaxbo.average_over_batches(_implicit(solver, _cg(2)), outer_loss, 0.9),
    plain_solver,
    window=3,
    replay=True,
    hyper_at="before",
  ),
  online(
    "corrected_response",
    optax.chain(corrected(radius=1.0), optax.adam(0.1), jaxbo.project(*BOX.values())),
  ),
  online(
    "averaged_response",
    indexed(optax.chain(jaxbo.add_averaged_response(inner_loss, **AVERAGED), optax.scale(-0.1))),
  ),
  response(
    "gate_by_detection",
    lambda solver: detected(
      jaxbo.add_unrolled_response(solver),
      jaxbo.modulate_by_loss(0.5),
      jaxbo.gate_by_detection(optax.sgd(-1.0, momentum=0.9), 0.5, 1.0),
    ),
  ),
  minimizer(
    "bayesian_gradient_descent",
    lambda key: jaxbo.meta.bayesian_gradient_descent(1.0, 0.1, num_samples=2, key=key),
  ),
]

_down = optax.scale_by_learning_rate(0.1)
_inside = jaxbo.bilevel.project_params(clip)
_window = {"decay": 0.9, "normalization": "present"}

ALIASES = [
  alias(
    response,
    "ogd",
    jaxbo.ogd(0.1, project=clip),
    optax.chain(jaxbo.drop_response(), _down, _inside),
  ),
  alias(
    response,
    "sobow",
    lambda solver, inner_params: jaxbo.sobow(0.1, solver, window=3, inner_params=inner_params),
    lambda solver, inner_params: optax.chain(
      _implicit(solver, _cg(5, warm_start=True), inner_params=inner_params),
      jaxbo.window_average(3),
      _down,
    ),
  ),
  alias(
    response,
    "sobow_full",
    lambda solver: jaxbo.sobow(
      0.1,
      solver,
      window=3,
      linear_solver=_cg(2),
      storage_dtype=jnp.bfloat16,
      project=clip,
      **_window,
    ),
    lambda solver: optax.chain(
      _implicit(solver, _cg(2)),
      jaxbo.window_average(3, storage_dtype=jnp.bfloat16, **_window),
      _down,
      _inside,
    ),
  ),
  alias(
    online,
    "oagd",
    lambda solver: jaxbo.oagd(0.1, solver, outer_loss),
    lambda solver: optax.chain(
      jaxbo.average_over_batches(_implicit(solver, _cg(5)), outer_loss), _down
    ),
    solver=plain_solver,
    window=2,
  ),
  alias(
    online,
    "oagd_full",
    lambda solver: jaxbo.oagd(
      0.1,
      solver,
      outer_loss,
      decay=0.9,
      normalization="full",
      linear_solver=_cg(2, warm_start=True),
      inner_params={"v": jnp.zeros((2, 3)), "c": jnp.zeros(())},
      project=clip,
    ),
    lambda solver: optax.chain(
      jaxbo.average_over_batches(
        _implicit(
          solver,
          _cg(2, warm_start=True),
          inner_params={"v": jnp.zeros((2, 3)), "c": jnp.zeros(())},
        ),
        outer_loss,
        0.9,
        normalization="full",
      ),
      _down,
      _inside,
    ),
    solver=plain_solver,
    window=2,
  ),
  alias(
    online,
    "sogd",
    jaxbo.sogd(
      0.1,
      FALLING,
      inner_loss,
      outer_loss,
      linear_learning_rate=FALLING,
      correction=CORRECTION,
      radius=2.0,
      **BOX,
    ),
    optax.chain(
      corrected(radius=2.0),
      optax.partition(
        {"outer": _down, "inner": optax.scale_by_learning_rate(FALLING)},
        jaxbo.Bilevel("outer", "inner"),
      ),
      jaxbo.project(*BOX.values()),
    ),
  ),
  alias(
    online,
    "srba",
    jaxbo.srba(0.1, FALLING, inner_loss, outer_loss, linear_learning_rate=0.2, radius=2.0, **BOX),
    jaxbo.sogd(
      0.1,
      FALLING,
      inner_loss,
      outer_loss,
      linear_learning_rate=0.2,
      correction=0.0,
      radius=2.0,
      **BOX,
    ),
  ),
  alias(
    online,
    "saba",
    indexed(jaxbo.saba(0.1, FALLING, inner_loss, **AVERAGED, **BOX)),
    indexed(
      optax.chain(
        jaxbo.add_averaged_response(inner_loss, **AVERAGED),
        optax.partition(
          {"outer": _down, "inner": optax.scale_by_learning_rate(FALLING)},
          jaxbo.Bilevel("outer", "inner"),
        ),
        jaxbo.project(*BOX.values()),
      )
    ),
  ),
  alias(
    response,
    "leeds",
    lambda solver: detected(jaxbo.leeds(0.1, solver, **SCALES)),
    lambda solver: detected(
      optax.chain(
        jaxbo.add_unrolled_response(solver),
        jaxbo.gate_by_detection(optax.sgd(0.1), **SCALES),
      )
    ),
  ),
  alias(
    response,
    "leeds_defaults",
    lambda solver: detected(jaxbo.leeds(0.1, solver, response=jaxbo.drop_response())),
    detected(
      optax.chain(jaxbo.drop_response(), jaxbo.gate_by_detection(optax.sgd(0.1), 0.1, 1.0, 0.0))
    ),
  ),
]


def _miss(x, y, batch):
  features, targets = batch
  miss = features @ (x + y) - targets
  return jnp.mean(miss**2), miss


def _squares(x, y, batch):
  return _miss(x, y, batch)[0] + 0.1 * jnp.sum(jnp.exp(x) * y**2)


def _learner(**options):
  """An online meta-learner, which is not told when tasks change."""
  return jaxbo.meta.online_meta_learner(
    _miss,
    _steps,
    jaxbo.leeds(0.1, _steps, in_distribution_scale=0.5),
    jaxbo.meta.threshold_detector(switch=2.0, shift=1.0),
    shift_score=jnp.linalg.norm,
    **options,
  )


def _oagd():
  return jaxbo.online_loop(_squares, _steps, jaxbo.oagd(0.1, _steps, _squares), window=2)


def _pap():
  options = {"drop_threshold": 0.1, "buffer_size": 2, "shift_score": jnp.linalg.norm}
  return jaxbo.meta.c_maml_pap(_miss, _steps, optax.sgd(0.1), **options)


def played(make, *y0, stream=jaxbo.tasks.minibatch_stream):
  """Three rounds of minibatches of data that are divided among devices."""
  make_stream = stream

  def run(x, *data):
    stream = make_stream(data, data, 8)
    loop = make()
    return loop.run(loop.init(x, *y0, stream), stream, 3)

  rng = np.random.default_rng(0)
  arguments = jnp.ones(4), *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 4), 16))
  return lambda: (run, arguments, (PartitionSpec(), PartitionSpec("d"), PartitionSpec("d")))


def _saba():
  """Fixed batches of data that are divided, and the table of a pair of parameters."""
  table = {"linear_learning_rate": 0.1, "num_batches": 2, "num_outer_batches": 2}
  plain = lambda x, y, batch: _miss(x, y, batch)[0]
  return jaxbo.online_loop(plain, None, jaxbo.saba(0.1, 0.1, _squares, **table))


def _osaka():
  """Domains whose classes are divided, and domains whose images are."""

  def draw(*domains):
    options = {"num_ways": 4, "num_shots": 2, "stay_probability": 0.5, "shuffle": False}
    stream = jaxbo.tasks.osaka_stream(domains, domain_probabilities=[0.5, 0.5], **options)
    return stream.step(stream.init(0))[1]

  domains = tuple(jnp.arange(n * 8.0).reshape(n, 8, 1) for n in (16, 24))
  return draw, domains, (PartitionSpec("d"), PartitionSpec(None, "d"))


_steps = jaxbo.inner_solver(_squares, optax.sgd(0.1), 2)

PROGRAMS = [
  Program("oagd_run", played(_oagd, jnp.zeros(4))),
  Program("leeds_next", played(lambda: _learner(query="next", switch_score="drop"))),
  Program("c_maml_pap", played(_pap)),
  Program("saba_run", played(_saba, jnp.zeros(4), stream=jaxbo.tasks.finite_sum_stream)),
  Program("osaka", _osaka),
]
