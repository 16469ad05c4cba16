r"""Families of random directions for :func:`jaxbo.add_es_response`.

Every family except ``"official"`` has :math:`\mathbb E[u u^\top] = I` over all :math:`p` parameters
together, so the mean of :math:`u u^\top v` is :math:`v`. The relative error of
:math:`\frac1Q \sum_j u_j u_j^\top v` is then

=============== ======================= =========================================================
family          relative error, squared cost of a direction
=============== ======================= =========================================================
``gaussian``    :math:`(p + 1) / Q`     :math:`p` normal numbers
``sphere``      :math:`(p - 1) / Q`     :math:`p` normal numbers; the norm is :math:`\sqrt p`
``rademacher``  :math:`(p - 1) / Q`     :math:`p` random bits
``orthogonal``  :math:`p / Q - 1`       :math:`2 \sqrt p` cosines; zero error at :math:`Q = p`
=============== ======================= =========================================================
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbo import _tree
from jaxbo._types import PyTree

Draw = Callable[[jax.Array], PyTree]
"""``draw(sample) -> u``, a pytree: the same sample always gives the same direction."""

Family = Callable[[jax.Array, PyTree, int], Draw]
"""``family(key, like, num_samples) -> draw``: directions are shaped like the pytree ``like``."""


def gaussian(key: jax.Array, like: PyTree, num_samples: int) -> Draw:
  """Independent standard normal entries."""
  del num_samples
  return lambda sample: optax.tree.random_like(jax.random.fold_in(key, sample), like)


def sphere(key: jax.Array, like: PyTree, num_samples: int) -> Draw:
  """Uniform on the sphere of radius sqrt(p), over all leaves together."""
  draw, radius = gaussian(key, like, num_samples), math.sqrt(_size(like))

  def draw_scaled(sample):
    u = draw(sample)
    return _scale(radius / _tree.norm(u), u)

  return draw_scaled


def rademacher(key: jax.Array, like: PyTree, num_samples: int) -> Draw:
  """Independent random signs, one random bit each."""
  del num_samples
  return lambda sample: _signs(jax.random.fold_in(key, sample), like)


def orthogonal(key: jax.Array, like: PyTree, num_samples: int) -> Draw:
  r"""Orthogonal directions of norm sqrt(p): rows of a cosine transform with random signs.

  .. math::
    u_{jn} = \varepsilon_n\, c_{k_j} \cos\frac{\pi (2 n + 1) k_j}{2 p}, \qquad
    c_0 = 1,\ c_k = \sqrt 2

  The rows :math:`k` of the transform are orthogonal for every :math:`p`. The signs
  :math:`\varepsilon`, drawn once an update, make the mean of :math:`u u^\top` diagonal. The rows
  :math:`k_j = k_0 + a j \bmod p`, with a random :math:`k_0` and an :math:`a` coprime to :math:`p`,
  are all different and uniform, so this mean is the identity. Orthogonality and this mean give the
  error law of a Haar matrix. Unlike a row of a Haar matrix, a direction costs neither memory nor
  random numbers: by the addition theorem it is two outer products of :math:`\sqrt p` numbers.
  """
  p = _size(like)
  if num_samples > p:
    raise ValueError(
      f"num_samples must be at most the number of perturbed parameters, {p}, for orthogonal "
      f"directions, got {num_samples}"
    )
  if p >= 2**28:
    raise ValueError(f"orthogonal directions are for fewer than 2**28 parameters, got {p}")
  signs = _signs(jax.random.fold_in(key, num_samples), like)
  stride = next(a for a in range(max(round(0.618 * p), 1), 2 * p + 2) if math.gcd(a, p) == 1)
  offsets = np.array([stride * j % p for j in range(num_samples)], np.uint32)
  row_key = jax.random.fold_in(key, num_samples + 1)  # Samples fold in smaller numbers.
  first_row = jax.random.randint(row_key, (), 0, p, jnp.int32).astype(jnp.uint32)

  def draw(sample):
    row = (first_row + jnp.asarray(offsets)[sample]) % np.uint32(p)
    leaves, structure = jax.tree.flatten(signs)
    rows, begin = [], 0
    for leaf in leaves:
      rows.append(leaf * _cosines(row, begin, leaf.size, p, leaf.dtype).reshape(leaf.shape))
      begin += leaf.size
    return structure.unflatten(rows)

  return draw


def official(key: jax.Array, like: PyTree, num_samples: int) -> Draw:
  r"""The draw of the authors' code: each leaf over its own norm, which shrinks the response.

  The mean of :math:`u u^\top` is :math:`I / p_i` on leaf :math:`i`, which has :math:`p_i` entries.
  For replication only.
  """
  draw = gaussian(key, like, num_samples)
  return lambda sample: jax.tree.map(lambda u: _scale(1 / _tree.norm(u), u), draw(sample))


FAMILIES: dict[str, Family] = {
  family.__name__: family for family in (gaussian, sphere, rademacher, orthogonal, official)
}


def _size(tree: PyTree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _scale(scale: jax.Array, tree: PyTree) -> PyTree:
  return jax.tree.map(lambda u: u * scale.astype(u.dtype), tree)


def _signs(key: jax.Array, like: PyTree) -> PyTree:
  """Random signs shaped like ``like``, one random bit for each entry."""

  def signs(key, shape, dtype):
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> np.arange(32, dtype=np.uint32)[None]) & np.uint32(1)
    return 1 - 2 * bits.reshape(-1)[:size].reshape(shape).astype(dtype)

  return optax.tree.random_like(key, like, signs)


def _cosines(
  row: jax.Array, begin: int, size: int, p: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Entries ``begin`` to ``begin + size`` of row ``row`` of the transform, ``[size]``.

  The angle of entry ``begin + width * i + j`` is the sum of one for ``i`` and one for ``j``.
  """
  width = math.isqrt(max(size - 1, 0)) + 1
  modulus = 4 * p
  outer = 2 * (begin + width * np.arange(-(-size // width), dtype=np.uint64)) % modulus
  inner = (2 * np.arange(width, dtype=np.uint64) + 1) % modulus

  def angles(factors):
    turns = _product_modulo(factors.astype(np.uint32), row, modulus)
    return turns.astype(dtype) * (2 * math.pi / modulus)

  a, b = angles(outer), angles(inner)
  scale = jnp.where(row == 0, 1, math.sqrt(2)).astype(dtype)
  left = scale * jnp.stack([jnp.cos(a), -jnp.sin(a)], axis=1)
  right = jnp.stack([jnp.cos(b), jnp.sin(b)])
  # A matrix product: XLA would fuse elementwise products with the cosines and compute p cosines.
  return jnp.matmul(left, right, precision="highest").reshape(-1)[:size]


def _product_modulo(factors: np.ndarray, row: jax.Array, modulus: int) -> jax.Array:
  """``factors * row % modulus`` in uint32, by digits of ``row`` to avoid overflow."""
  bits = 32 - modulus.bit_length()
  result = jnp.zeros(factors.shape, jnp.uint32)
  for shift in reversed(range(0, modulus.bit_length(), bits)):
    digit = (row >> np.uint32(shift)) & np.uint32(2**bits - 1)
    shifted = (result << np.uint32(bits)) % np.uint32(modulus)
    result = (shifted + jnp.asarray(factors) * digit % np.uint32(modulus)) % np.uint32(modulus)
  return result
