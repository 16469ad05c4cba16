"""What runs every public transformation through the laws of the library (tests/test_catalogue.py).

A new transformation is one line in the table of its family, ``tests/<family>/catalogue.py``: a
name, and the transformation or a function that makes it. The function that the line calls says how
the transformation is used:

* ``response`` -- behind an inner solver, on the pair ``(df/dx, df/dy)``;
* ``value_function`` -- on gradients in ``Bilevel`` parameters;
* ``online`` -- in the loop ``jaxbo.online_loop``;
* ``minimizer`` -- on the gradient of a loss that it is given as ``value_fn``;
* ``robust`` -- on per-example gradients.

A whole method, an alias, is a line of ``ALIASES`` there: the method and the chain that its
docstring says, with options that are not the defaults. Both must be one program; the chain's parts
are entries of their own.

What is not a transformation, an attack, a stream or a learner, is a line of ``PROGRAMS`` there: a
program that must have the results of one device on any mesh. Models are put through the same by
``assert_same_on_meshes``.
"""

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbo

# Everything that the library offers, by its dotted name.
PUBLIC = {
  f"{module.__name__}.{name}": getattr(module, name)
  for module in (jaxbo, *(m for m in vars(jaxbo).values() if inspect.ismodule(m)))
  for name in getattr(module, "__all__", ())
  if not inspect.ismodule(getattr(module, name))
}

INNER = {"v": jnp.zeros((2, 3)), "c": jnp.zeros(())}


class Harness(NamedTuple):
  """A transformation in use.

  Attributes:
    init: ``init(params) -> carry``; the parameters come first in the carry.
    step: ``step(carry, t, **extra) -> carry``; ``t`` is an int that selects the data, and
      ``extra`` goes to ``tx.update``.
  """

  init: Callable[..., Any]
  step: Callable[..., Any]


class Entry(NamedTuple):
  """A line of a table.

  Attributes:
    name: what the tests call it.
    make: ``make(seed, inner) -> Harness``, for a seed, traced or not, and the inner parameters.
    slow: whether it shows other options of what is an entry already, so that fast tests skip it.
    random: whether the seed does anything.
  """

  name: str
  make: Callable[[Any, Any], Harness]
  slow: bool = False
  random: bool = False


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


def _train_batch(solver, value):
  """The scalar ``value`` as a batch of the solver, different for each step and each task."""
  if solver.per_step_batches:
    value = jnp.stack([value, -value, value])
  return value if solver.task is None else jnp.stack([value, value / 2], axis=-1)


def _build(make: Any, **offered: Any) -> optax.GradientTransformationExtraArgs:
  """A transformation as it is, or from a function that takes some of what is ``offered``."""
  if not isinstance(make, optax.GradientTransformation):
    make = make(**{name: offered[name] for name in inspect.signature(make).parameters})
  return optax.with_extra_args_support(make)


def _is_random(make: Any) -> bool:
  """Whether :func:`_build` gives ``make`` the seed."""
  made = isinstance(make, optax.GradientTransformation)
  return not made and "key" in inspect.signature(make).parameters


def _apply(params, updates, scale):
  """``params + scale * updates``, without the cast of optax: another dtype of updates shows."""
  return jax.tree.map(lambda p, u: p + jnp.asarray(scale, u.dtype) * u, params, updates)


def response(name, make, solver=plain_solver, *, scale=-0.1, slow=False):
  """A response; ``make`` may take ``solver``, ``key`` and ``inner_params``."""

  def harness(seed, inner):
    inner_solver = solver()
    tx = _build(make, solver=inner_solver, key=seed, inner_params=inner)
    dtype = jax.tree.leaves(inner)[0].dtype

    def init(x):
      train = _train_batch(inner_solver, jnp.zeros((), dtype))
      return x, inner_solver.init(inner, x, train), tx.init(x)

    def step(carry, t, **extra):
      x, solution, state = carry
      train, val = _train_batch(inner_solver, jnp.cos(t).astype(dtype)), jnp.sin(t).astype(dtype)
      solution = inner_solver.solve(x, solution, train)
      grads = jaxbo.outer_grad(outer_loss)(x, solution.params, val)
      updates, state = tx.update(grads, state, x, solution=solution, batch=train, **extra)
      return _apply(x, updates, scale), solution, state

    return Harness(init, step)

  return Entry(name, harness, slow, _is_random(make))


def value_function(name, make, *, scale=-0.1, slow=False):
  """A value-function method: gradients of the outer loss in ``Bilevel`` go in."""

  def harness(seed, inner):
    tx = _build(make, key=seed)
    dtype = jax.tree.leaves(inner)[0].dtype

    def init(x):
      y = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), inner)
      return x, y, tx.init(jaxbo.Bilevel(x, y))

    def step(carry, t, **extra):
      x, y, state = carry
      params = jaxbo.Bilevel(x, y)
      train, val = jnp.cos(t).astype(dtype), jnp.sin(t).astype(dtype)
      grads = jax.grad(lambda p: outer_loss(p.outer, p.inner, val))(params)
      updates, state = tx.update(grads, state, params, batch=train, **extra)
      return *_apply(params, updates, scale), state

    return Harness(init, step)

  return Entry(name, harness, slow, _is_random(make))


def online(name, make, solver=None, *, slow=False, **options):
  """A method that needs the loop, its memory or both batches; ``make`` may take ``solver``."""

  def harness(seed, inner):
    inner_solver = None if solver is None else solver()
    tx = _build(make, solver=inner_solver, key=seed)
    loop = jaxbo.online_loop(outer_loss, inner_solver, tx, **options)
    dtype = jax.tree.leaves(inner)[0].dtype
    batches = lambda t: (jnp.cos(t).astype(dtype), jnp.sin(t).astype(dtype))

    def init(x):
      state = loop.init(x, inner, lambda key, t: batches(t))
      return state.x, state._replace(loop=state.loop._replace(x=()))

    def step(carry, t, **extra):
      x, state = carry
      state = state._replace(loop=state.loop._replace(x=x))
      state, _ = loop.step(state, batches(t), **extra)
      return state.x, state._replace(loop=state.loop._replace(x=()))

    return Harness(init, step)

  return Entry(name, harness, slow, _is_random(make))


def minimizer(name, make, *, slow=False):
  """An optimizer that wants the loss as a function; ``make`` may take ``key``."""

  def harness(seed, inner):
    del inner
    tx = _build(make, key=seed)

    def init(x):
      return x, tx.init(x)

    def step(carry, t, **extra):
      x, state = carry
      value_fn = lambda x: (_summary(x) - jnp.cos(t).astype(x["scalar"].dtype)) ** 2
      updates, state = tx.update(jax.grad(value_fn)(x), state, x, value_fn=value_fn, **extra)
      return _apply(x, updates, 1.0), state

    return Harness(init, step)

  return Entry(name, harness, slow, _is_random(make))


def _example_losses(x, batch):
  """One loss for each of eight examples; every leaf of ``x`` moves them."""
  return (batch * (1 + _summary(x)) - jnp.sin(3 * batch)) ** 2


def robust(name, make, *, scale=-0.1, stored=False, repair=False, slow=False):
  """Robust training: per-example gradients go in, lazy or ``stored``.

  With ``repair`` there is a second backward pass to compile, so it is for one entry only.
  """

  def harness(seed, inner):
    del inner
    tx = _build(make, key=seed)

    def init(x):
      rows = jnp.arange(8, dtype=x["wide"].dtype)
      # Divided as ``wide`` is. Explicit axes do not map over an axis that divides parameters.
      return x, tx.init(x), rows if stored else rows + 0 * x["wide"][:, 0]

    def step(carry, t, **extra):
      x, state, rows = carry
      batch = jnp.cos(t.astype(rows.dtype) + rows)
      options = {"groups": jnp.array([0, 1, 1, 0] * 2), "mask": jnp.arange(8) < 6, **extra}
      if stored:
        one_loss = lambda x, example: _example_losses(x, example[None])[0]
        losses, grads = jax.vmap(jax.value_and_grad(one_loss), in_axes=(None, 0))(x, batch)
        options["losses"] = losses
      else:
        grads = jaxbo.per_example_grad(_example_losses, repair=repair)(x, batch)
      updates, state = tx.update(grads, state, x, **options)
      return _apply(x, updates, scale), state, rows

    return Harness(init, step)

  return Entry(name, harness, slow, _is_random(make))


class Program(NamedTuple):
  """A line of ``PROGRAMS``.

  Attributes:
    name: what the tests call it.
    make: ``make() -> (function, arguments, specs)`` for :func:`assert_same_on_meshes`.
  """

  name: str
  make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]]


def assert_same_on_meshes(function, arguments, specs, sizes=(8,), rtol=1e-4, atol=1e-5, plain=None):
  """Explicit and automatic axes, inside ``set_mesh`` and without, give the result of one device.

  What a mesh refuses it refuses when a program is traced, so it is traced in all four ways, and
  compiled on explicit axes without ``set_mesh`` and on automatic ones inside.

  Args:
    function: what to run.
    arguments: its arguments.
    specs: a tree of ``PartitionSpec``, a prefix of ``arguments``, over the axes "d" and "m".
    sizes: how many devices the axes have, eight together.
    rtol: as in ``np.testing.assert_allclose``.
    atol: likewise.
    plain: a program of JAX alone that does with the arguments what ``function`` cannot avoid. Where
      JAX refuses it, ``function`` must be refused with the same error.
  """
  alone = jax.device_get(jax.jit(function)(*arguments))
  for axis_type in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh(sizes, ("d", "m")[: len(sizes)], axis_types=(axis_type,) * len(sizes))
    put = lambda spec, part, mesh=mesh: jax.device_put(part, NamedSharding(mesh, spec))
    is_spec = lambda node: isinstance(node, PartitionSpec)
    divided = jax.tree.map(put, specs, arguments, is_leaf=is_spec)
    for inside in (True, False):
      with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        if refusal := plain and _refusal(plain, divided):
          assert axis_type == AxisType.Explicit, refusal
          assert not inside, refusal
          with pytest.raises(type(refusal), match=re.escape(str(refusal).split(". ")[0])):
            jax.jit(function).trace(*divided)
          continue
        traced = jax.jit(function).trace(*divided)
        if inside == (axis_type == AxisType.Explicit):
          continue
        ours = jax.device_get(traced.lower().compile()(*divided))
      for a, b in zip(*map(jax.tree.leaves, (ours, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def _refusal(program, arguments):
  """The error of JAX as it traces a program, or None."""
  try:
    jax.jit(program).trace(*arguments)
  except Exception as error:  # a class of JAX's that is not public
    return error
  return None


def alias(kind, name, method, chain, **options):
  """``(name, entry of the method, entry of its chain)``, both used as ``kind`` says."""
  return name, *(kind(name, make, **options) for make in (method, chain))
