"""What stands for gradients until the head of a chain has made them."""

from typing import ClassVar, NoReturn

import jax


class NotGradients:
  """The base of what only the head of a chain understands; all else that treats it as a tree fails.

  Silence would be wrong: a clip or a sum in front of the head acts on something that is not the
  gradient. Subclasses are pytree nodes, so that the first look at them as a tree raises
  ``TypeError`` with their ``_cure``.
  """

  _cure: ClassVar[str]

  def __init_subclass__(cls, **kwargs: object):
    super().__init_subclass__(**kwargs)
    jax.tree_util.register_pytree_node_class(cls)

  def _refuse(self, *_: object) -> NoReturn:
    raise TypeError(
      f"{type(self).__name__} are not gradients yet: put {self._cure} first in the chain, and "
      "clipping, scaling, optimizers and wrappers (optax.MultiSteps, apply_if_finite, masked, "
      "partition, nnx.Optimizer) after it; and call update in the function that makes them, under "
      "the same jit"
    )

  # The first is asked by everything that sees a tree, the others where all parameters are one leaf.
  tree_flatten = tree_unflatten = __jax_array__ = _refuse
  __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
  __neg__ = __pow__ = __array__ = _refuse
