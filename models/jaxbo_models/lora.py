r"""Low-rank adapters of kernels (LoRA), as a tree of parameters of their own.

.. math:: W' = W + \frac{\alpha}{r} A B

Hu et al., *LoRA: low-rank adaptation of large language models* (https://arxiv.org/abs/2106.09685).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
from flax import traverse_util

from jaxbo_models.batch_loss import BatchLoss


class Adapter(NamedTuple):
  """The adapter of one kernel ``[*stacked, *inputs, *outputs]``.

  Attributes:
    down: the paper's A, ``[*stacked, *inputs, rank]``.
    up: the paper's B, ``[*stacked, rank, *outputs]``.
  """

  down: jax.Array
  up: jax.Array


class Axes(NamedTuple):
  """How many axes of a kernel number layers, and how many are inputs; the rest are outputs.

  Attributes:
    num_stacked: the number of leading axes that number layers.
    num_inputs: the number of input axes, after these.
  """

  num_stacked: int
  num_inputs: int


def is_kernel(path: str) -> bool:
  """Whether a path such as ``"blocks/qkv/kernel"`` ends in ``kernel``."""
  return path.split("/")[-1] == "kernel"


def kernel_axes(path: str, kernel: jax.Array) -> Axes:
  """The axes of the kernels of :class:`Transformer`, and of Flax's ``Dense`` and ``Conv``.

  In the transformer's ``blocks``, the first axis is the layer. Except in attention, only the last
  axis is an output.
  """
  modules = ["", *path.split("/")[:-1]]
  num_stacked = int("blocks" in modules)
  if modules[-1] in ("qkv", "query", "key_value"):
    return Axes(num_stacked, 1)
  return Axes(num_stacked, kernel.ndim - num_stacked - 1)


def init(
  key: jax.Array | int,
  params: Mapping[str, Any],
  rank: int,
  *,
  where: Callable[[str], bool] = is_kernel,
  axes: Callable[[str, Any], Axes] = kernel_axes,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, Any]:
  """Makes adapters that do not change the model yet: ``up`` is 0, and ``down`` is random.

  >>> from jaxbo_models import MLP
  >>> params = MLP((8, 3)).init(jax.random.key(0), jnp.ones((1, 5)))["params"]
  >>> adapters = init(0, params, rank=2)
  >>> jax.tree.map(jnp.shape, adapters["Dense_0"])
  {'kernel': Adapter(down=(5, 2), up=(2, 8))}
  >>> first = init(0, params, rank=2, where=lambda path: path == "Dense_0/kernel")
  >>> list(first)
  ['Dense_0']

  Args:
    key: an int or a key.
    params: nested dictionaries of parameters, of any Flax model; arrays or their shapes.
    rank: the rank of the updates, at least 1.
    where: ``where(path)`` chooses which parameters to adapt, by paths such as
      ``"blocks/qkv/kernel"``. All kernels by default.
    axes: ``axes(path, kernel)`` says which axes of a kernel are inputs, for modules that
      :func:`kernel_axes` does not know.
    dtype: dtype of the adapters, independent of that of ``params``.

  Returns:
    Nested dictionaries with an :class:`Adapter` in place of each chosen parameter.
    ``down`` is normal with the standard deviation ``1 / sqrt(number of inputs)``.

  Raises:
    ValueError: ``rank`` is below 1, ``where`` chooses nothing, or a chosen parameter does not have
      axes of inputs and of outputs.
  """
  if rank < 1:
    raise ValueError(f"rank must be at least 1, got {rank}")
  key = jax.random.key(key) if isinstance(key, int) else key
  adapters: dict[tuple[str, ...], Adapter] = {}
  flat = _flatten(params)
  for number, (names, kernel) in enumerate(flat.items()):
    path = "/".join(names)
    if not where(path):
      continue
    num_stacked, num_inputs = axes(path, kernel)
    first_output = num_stacked + num_inputs
    if not (num_stacked >= 0 and num_inputs >= 1 and first_output < kernel.ndim):
      raise ValueError(
        f"where must choose parameters with axes of inputs and of outputs, got {path} of the shape "
        f"{kernel.shape}"
      )
    stacked, inputs = kernel.shape[:num_stacked], kernel.shape[num_stacked:first_output]
    down = jax.random.normal(jax.random.fold_in(key, number), (*stacked, *inputs, rank), dtype)
    adapters[names] = Adapter(
      down=down * math.prod(inputs) ** -0.5,
      up=jnp.zeros((*stacked, rank, *kernel.shape[first_output:]), dtype),
    )
  if not adapters:
    raise ValueError(f"where must choose a parameter of {['/'.join(names) for names in flat]}")
  return _unflatten(adapters)


def merge(
  params: Mapping[str, Any], adapters: Mapping[str, Any], *, alpha: float | None = None
) -> dict[str, Any]:
  """Returns the parameters with the updates of the adapters.

  An adapted kernel gets the wider dtype of kernel and adapter, such as float32 for bfloat16 weights
  with float32 adapters: rounding to bfloat16 would lose small updates. The other parameters stay as
  they are. In a training step, merging costs one more copy of the adapted kernels, and so does its
  gradient.

  >>> params = {"kernel": jnp.ones((3, 2))}
  >>> adapters = {"kernel": Adapter(down=jnp.ones((3, 1)), up=jnp.array([[0.0, 0.5]]))}
  >>> merge(params, adapters)["kernel"][0]
  Array([1. , 1.5], dtype=float32)

  Args:
    params: the parameters that :func:`init` was given.
    adapters: the adapters.
    alpha: updates are multiplied by ``alpha / rank``; None for ``rank``.

  Raises:
    ValueError: an adapter does not belong to a parameter.
  """
  flat = _flatten(params)
  for names, adapter in _flatten(adapters).items():
    kernel, (down, up) = flat.get(names), adapter
    rank = down.shape[-1]
    num_stacked = down.ndim + up.ndim - 2 - kernel.ndim if kernel is not None else 0
    if kernel is None or kernel.shape != down.shape[:-1] + up.shape[num_stacked + 1 :]:
      found = "none" if kernel is None else kernel.shape
      raise ValueError(
        f"adapters must be those of params, got one of the shapes {down.shape} and {up.shape} for "
        f"{'/'.join(names)} of the shape {found}"
      )
    layers = tuple(range(num_stacked))
    contracted = (down.ndim - 1,), (num_stacked,)
    update = jax.lax.dot_general(down, up, (contracted, (layers, layers)))
    flat[names] = kernel + (1 if alpha is None else alpha / rank) * update
  return _unflatten(flat)


def adapted(
  loss_fn: Callable[[Any, Mapping[str, Any]], jax.Array],
  params: Mapping[str, Any],
  *,
  alpha: float | None = None,
) -> Callable[[Any, Mapping[str, Any]], jax.Array]:
  """Makes the losses a function of the adapters, ``(adapters, batch) -> losses``.

  Examples that do not count in ``loss_fn`` do not count here either. Call this function inside the
  jitted step, with ``params`` among the step's arguments; a closure would make them constants of
  the program.

  >>> from jaxbo_models import transformer
  >>> config = transformer.gpt2(vocab_size=9, max_length=8, num_layers=1, width=8, num_heads=2)
  >>> model, tokens = transformer.Transformer(config), jnp.ones((2, 4), int)
  >>> params = model.init(jax.random.key(0), tokens)["params"]
  >>> adapters = init(0, params, rank=1)
  >>> losses = adapted(transformer.sequence_losses(model), params)(adapters, {"tokens": tokens})
  >>> losses.shape
  (2,)

  Args:
    loss_fn: losses of the parameters and a batch, such as :func:`sequence_losses` makes.
    params: the parameters, which are not trained.
    alpha: see :func:`merge`.
  """
  example_mask = getattr(loss_fn, "example_mask", None)

  def losses(adapters: Any, batch: Mapping[str, Any]) -> jax.Array:
    return loss_fn(merge(params, adapters, alpha=alpha), batch)

  return losses if example_mask is None else BatchLoss(losses, example_mask)


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
  flat: Any = traverse_util.flatten_dict(tree)
  return flat


def _unflatten(flat: Any) -> dict[str, Any]:
  tree: Any = traverse_util.unflatten_dict(flat)
  return tree
