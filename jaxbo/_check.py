"""Checks of user arguments; every message names the argument, the value and the allowed range."""

import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval

from jaxbo import _tree
from jaxbo._types import PyTree

T = TypeVar("T")
Number = TypeVar("Number", bound=jax.typing.ArrayLike)


def positive_int(name: str, value: SupportsIndex) -> int:
  """Returns ``value`` as an int; raises unless it is a Python integer of at least 1."""
  return _int(name, value, 1, "positive")


def non_negative_int(name: str, value: SupportsIndex) -> int:
  """Returns ``value`` as an int; raises unless it is a Python integer of at least 0."""
  return _int(name, value, 0, "non-negative")


def _int(name: str, value: SupportsIndex, smallest: int, kind: str) -> int:
  try:
    if isinstance(value, bool):
      raise TypeError
    number = operator.index(value)
  except TypeError:
    raise TypeError(f"{name} must be a {kind} Python int, got {value!r}") from None
  if number < smallest:
    raise ValueError(f"{name} must be at least {smallest}, got {number}")
  return number


def positive(name: str, value: Number) -> Number:
  """Returns ``value``; raises unless it is traced or a finite number above 0."""
  if not 0 < _number(name, value, 1.0) < float("inf"):
    raise ValueError(f"{name} must be positive and finite, got {value}")
  return value


def non_negative(name: str, value: Number) -> Number:
  """Returns ``value``; raises unless it is traced or a finite number of at least 0."""
  if not 0 <= _number(name, value, 0.0) < float("inf"):
    raise ValueError(f"{name} must be non-negative and finite, got {value}")
  return value


def finite(name: str, value: Number) -> Number:
  """Returns ``value``; raises unless it is traced or a finite number."""
  if not math.isfinite(_number(name, value, 0.0)):
    raise ValueError(f"{name} must be finite, got {value}")
  return value


def not_nan(name: str, value: Number) -> Number:
  """Returns ``value``; raises unless it is traced or a number other than NaN."""
  if math.isnan(_number(name, value, 0.0)):
    raise ValueError(f"{name} must be a number or an infinity, got {value}")
  return value


def within(
  name: str, value: Number, low: int | float, high: int | float, *, ends: str = "[]"
) -> Number:
  """Returns ``value``; raises unless it is traced or a number in the interval.

  ``ends`` says which ends belong to the interval: ``"(]"`` excludes ``low`` and includes ``high``.
  """
  number = _number(name, value, (low + high) / 2)
  above = number > low or (ends[0] == "[" and number == low)
  below = number < high or (ends[1] == "]" and number == high)
  if not (above and below):
    raise ValueError(f"{name} must be in {ends[0]}{low}, {high}{ends[1]}, got {value}")
  return value


def _number(name: str, value: Any, if_traced: float) -> float:
  if isinstance(value, jax.core.Tracer):
    return if_traced
  try:
    if isinstance(value, str):
      raise TypeError
    return float(value)
  except TypeError:
    raise TypeError(f"{name} must be a number, got {value!r}") from None


def transformation(name: str, value: object) -> None:
  """Raises ``TypeError`` unless ``value`` is a gradient transformation."""
  if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
    raise TypeError(f"{name} must be an optax transformation, say optax.sgd(0.1), got {value!r}")


def is_known(value: object) -> bool:
  """Whether the numbers in ``value`` are known, which they are not under a trace."""
  return not isinstance(value, jax.core.Tracer)


def one_of(name: str, value: T, allowed: Iterable[str | bool]) -> T:
  """Returns ``value``; raises ``ValueError`` if it is not among ``allowed``."""
  if value not in (allowed := tuple(allowed)):
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
  return value


def manual_axis(name: str, value: str) -> None:
  """Raises ``ValueError`` unless ``value`` is an axis of the ``shard_map`` or ``pmap`` outside."""
  if value not in (axes := jax.sharding.get_abstract_mesh().manual_axes):
    around = f"those around have {', '.join(map(repr, axes))}" if axes else "there is none around"
    raise ValueError(
      f"{name} must be an axis of the jax.shard_map or jax.pmap in which update is called ({around}"
      f"), or of a mesh that is given by mesh=; got {value!r}"
    )


def takes_arguments(name: str, function: Callable[..., object], *arguments: str) -> None:
  """Raises ``TypeError`` unless ``function`` takes ``arguments`` as positional arguments."""
  expected = f"{name} must be a function {name}({', '.join(arguments)})"
  if not callable(function):
    raise TypeError(f"{expected}, got {function!r}")
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):  # Some builtins have no signature: the trace will raise.
    return
  try:
    signature.bind(*arguments)
  except TypeError:
    raise TypeError(f"{expected}, got one with the signature {signature}") from None


def same_on_devices(
  name: str, value: jax.typing.ArrayLike, params: PyTree, cure: str, *, named: Iterable[str] = ()
) -> None:
  """Raises ``ValueError`` if ``value`` varies over an axis over which a leaf of params does not.

  ``shard_map`` with its replication check then adds up derivatives by this leaf over the devices of
  the axis, each of which has a value of its own. Without the check, nothing is known to vary.

  Args:
    name: what the value is, for the message.
    value: a loss, or losses.
    params: what they are differentiated by.
    cure: what to do, for the message, where ``{axis!r}`` stands for the axis.
    named: axes over which the value may vary.
  """
  for axis in sorted(_tree.varying_axes(value).difference(named)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      if axis not in _tree.varying_axes(leaf):
        raise ValueError(
          f"{name} must not vary over the axis {axis!r} of shard_map, since "
          f"params{jax.tree_util.keystr(path)} does not: {cure.format(axis=axis)}"
        )


def not_varying(name: str, tree: PyTree, axis: str) -> None:
  """Raises ``ValueError`` if a leaf of ``tree`` is known to vary over ``axis``."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if axis in _tree.varying_axes(leaf):
      raise ValueError(
        f"{name} must not vary over axis_name={axis!r}, whose devices share the samples, but "
        f"{name}{jax.tree_util.keystr(path)} does: divide data over another axis"
      )


def scalar_loss(
  name: str, value: jax.typing.ArrayLike | tuple[PyTree, ...], params: PyTree = ()
) -> None:
  """Raises unless ``value``, a loss of ``params``, is one float, and the same on all devices."""
  if isinstance(value, tuple):
    raise TypeError(f"{name} must return a scalar, got a tuple; for (loss, aux) set has_aux=True")
  shape = jnp.shape(value)
  if shape != ():
    raise ValueError(f"{name} must return a scalar, got shape {shape}; reduce it, say by its mean")
  if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
    raise TypeError(f"{name} must return a real float, got dtype {jnp.result_type(value)}")
  same_on_devices(name, value, params, "return the mean over it, jax.lax.pmean(loss, {axis!r})")


def depends(function: Callable[[PyTree], PyTree], argument: PyTree) -> bool:
  """Whether a leaf of ``argument`` reaches ``function(argument)``, by its trace."""
  jaxpr = jax.make_jaxpr(function)(argument).jaxpr
  # It looks into jitted functions and loops too.
  return any(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])


def depends_by_leaf(function: Callable[[PyTree], PyTree], argument: PyTree) -> list[bool]:
  """For each leaf of ``function(argument)``, whether a leaf of ``argument`` reaches it."""
  jaxpr = jax.make_jaxpr(function)(argument).jaxpr
  return _reached(jaxpr, [True] * len(jaxpr.invars))


def _reached(jaxpr: Jaxpr, given: list[bool]) -> list[bool]:
  known = {id(var) for var, one in zip(jaxpr.invars, given, strict=True) if one}
  for eqn in jaxpr.eqns:
    taken = [id(var) in known for var in eqn.invars]
    called = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
    called = [value for value in called if hasattr(value, "eqns")]
    if len(called) == 1 and len(called[0].invars) == len(taken) and eqn.primitive.name != "scan":
      outputs = _reached(called[0], taken)
    else:
      outputs = [any(taken)] * len(eqn.outvars)
    known |= {id(var) for var, one in zip(eqn.outvars, outputs, strict=True) if one}
  return [id(var) in known for var in jaxpr.outvars]


def uses(name: str, loss: Callable[[PyTree], jax.Array], argument: PyTree) -> None:
  """Raises ``ValueError`` if no leaf of ``argument`` reaches ``loss(argument)``."""
  if not depends(loss, argument):
    raise ValueError(f"loss must use {name}, which has no influence on it")


def floating(name: str, tree: PyTree) -> None:
  """Raises ``TypeError`` if a leaf of ``tree`` is not a floating-point array."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if callable(leaf) or isinstance(leaf, str):
      raise TypeError(
        f"{name} must be a pytree of arrays, got {leaf!r} at {name}{jax.tree_util.keystr(path)}; "
        "split a module first, by nnx.split(module) or equinox.partition(module, "
        "equinox.is_inexact_array)"
      )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f"{name} must be real floats, got dtype {dtype} at {name}{jax.tree_util.keystr(path)}"
      )


def same_structure(name: str, tree: PyTree, like_name: str, like: PyTree) -> None:
  """Raises ``ValueError`` unless both trees have the same structure and leaf shapes."""
  leaves, structure = jax.tree.flatten(tree)
  like_leaves, like_structure = jax.tree.flatten(like)
  # Leaf by leaf: a user-defined node class may not define equality.
  if structure != like_structure or [*map(jnp.shape, leaves)] != [*map(jnp.shape, like_leaves)]:
    raise ValueError(
      f"{name} must have the structure and shapes of {like_name}, got "
      f"{jax.tree.map(jnp.shape, tree)} against {jax.tree.map(jnp.shape, like)}"
    )
