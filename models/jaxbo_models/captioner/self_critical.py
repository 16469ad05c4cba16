"""Self-critical training: the model draws captions, and the host rewards them in batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxbo_models.captioner.decoding import greedy, make_step, sample
from jaxbo_models.captioner.losses import caption_losses
from jaxbo_models.mesh import explicit_sharding

BASELINES = ("greedy", "leave_one_out")
# reward(candidates, references) -> [number of candidates]; a candidate is a list of ids.
Reward = Callable[[list[list[int]], list[Any]], Any]


def self_critical_batch(
  model: nn.Module,
  reward: Reward,
  *,
  bos_id: int,
  eos_id: int,
  max_length: int = 20,
  num_samples: int = 5,
  baseline: str = "greedy",
  forbidden: jax.Array | None = None,
) -> Callable[..., dict[str, jax.Array]]:
  r"""Makes a function that draws captions and computes their advantages over a baseline reward.

  The advantage of sample s of an image is

  .. math:: A_s = r(s) - r(\mathrm{greedy}) \quad \text{or} \quad
    A_s = r(s) - \frac{1}{S - 1} \sum_{s' \neq s} r(s')

  The drawing compiles once. The reward is a function on the host; one call sees all candidates of
  the batch, including the greedy ones.

  >>> from jaxbo_models import captioner
  >>> model = captioner.GuidedCaptioner(19, embed_dim=8, hidden_dim=16, attention_dim=8)
  >>> features, tokens = jnp.ones((2, 4, 6)), jnp.ones((2, 5), int)
  >>> params = jax.jit(model.init)(jax.random.key(0), features, tokens)["params"]
  >>> reward = lambda candidates, references: [c.count(r) for c, r in zip(candidates, references)]
  >>> draw = self_critical_batch(model, reward, bos_id=1, eos_id=2, max_length=7)
  >>> batch = draw(params, {"features": features}, [5, 6], jax.random.key(1))
  >>> batch["tokens"].shape, batch["advantages"].shape
  ((10, 8), (10,))
  >>> jax.eval_shape(self_critical_losses(model), params, batch).shape
  (10,)

  Source: Rennie et al., *Self-critical sequence training* (https://arxiv.org/abs/1612.00563); the
  second baseline: Luo (https://arxiv.org/abs/2003.09971). As in their code, candidates include
  ``eos_id``, so the reward sees whether a caption ends.

  Args:
    model: a :class:`GuidedCaptioner`.
    reward: ``reward(candidates, references) -> [number of candidates]``. Candidates are lists of
      ids without ``bos_id``, up to and including ``eos_id``. ``references`` holds, for each
      candidate, the entry given for its image. An example is CIDEr-D with the document frequencies
      of the training set.
    bos_id: the token that begins a caption.
    eos_id: the token that ends a caption.
    max_length: maximum number of tokens in a caption, including the end token; at least 1.
    num_samples: S, the number of samples for each image, at least 1; at least 2 for
      ``"leave_one_out"``.
    baseline: ``"greedy"`` or ``"leave_one_out"``: the first or the second advantage above.
    forbidden: ``[vocab_size]``, bool: True for tokens that are never drawn.

  Returns:
    A function ``(params, batch, references, key) -> batch``. The given batch holds ``"features"``
    and possibly ``"cell_mask"``; ``references`` is a sequence with one entry for each image. The
    new batch is for :func:`self_critical_losses`. It holds ``"features"``, ``"cell_mask"`` if
    given, ``"tokens"``, ``"mask"`` and ``"advantages"`` of ``S`` captions for each image, with the
    captions of an image in consecutive rows.

  Raises:
    ValueError: an argument is out of its range. The returned function raises if ``references`` does
      not have one entry for each image, or if the reward returns another shape or a number that is
      not finite.
  """
  if baseline not in BASELINES:
    raise ValueError(f"baseline must be one of {BASELINES}, got {baseline!r}")
  if num_samples < 1 + (baseline == "leave_one_out"):
    raise ValueError(
      f"num_samples must be at least {1 + (baseline == 'leave_one_out')} for {baseline!r}, got "
      f"{num_samples}"
    )

  @jax.jit
  def draw(params, features, cell_mask, key):
    step_fn, state = make_step(model, params, features, cell_mask)
    options: dict[str, Any] = {
      "batch_size": len(features),
      "max_length": max_length,
      "bos_id": bos_id,
      "eos_id": eos_id,
      "forbidden": forbidden,
    }
    tokens, _ = sample(step_fn, state, key, num_samples=num_samples, **options)
    if baseline == "greedy":
      best, _ = greedy(step_fn, state, **options)
      tokens = jnp.concatenate([tokens, best[:, None]], axis=1)
    return tokens

  def make_batch(
    params: Any, batch: Mapping[str, Any], references: Sequence[Any], key: jax.Array
  ) -> dict[str, jax.Array]:
    features, cell_mask = batch["features"], batch.get("cell_mask")
    if len(references) != len(features):
      raise ValueError(
        f"references must be one for each of {len(features)} images, got {len(references)}"
      )
    tokens = np.asarray(draw(params, features, cell_mask, key))
    rewards = _rewards(reward, tokens, references, eos_id)
    drawn, rewards = tokens[:, :num_samples].reshape(-1, max_length), rewards.astype(np.float32)

    def repeat(x):
      if x is None:
        return None
      return jnp.repeat(x, num_samples, axis=0, out_sharding=explicit_sharding(x))

    first = np.full((len(drawn), 1), bos_id, np.int32)
    made = {
      "features": repeat(features),
      "cell_mask": repeat(cell_mask),
      "tokens": jnp.asarray(np.concatenate([first, drawn], axis=1)),
      "mask": jnp.asarray(np.arange(max_length + 1)[None] <= _lengths(drawn, eos_id)[:, None]),
      "advantages": jnp.asarray(_advantages(rewards, baseline).reshape(-1)),
    }
    return {name: value for name, value in made.items() if value is not None}

  return make_batch


def self_critical_losses(model: nn.Module) -> Callable[[Any, Mapping[str, Any]], jax.Array]:
  r"""Makes a function that returns, for each drawn caption, a loss with the policy gradient.

  .. math:: \ell_s = -A_s \log p(s)

  Use only the gradient of the loss; its value means nothing. In expectation over draws, the
  gradient of the mean loss is the gradient of minus the expected reward. With forbidden tokens this
  is only approximate, because :math:`p` is not renormalized without them.

  Args:
    model: a :class:`GuidedCaptioner`.

  Returns:
    A function ``(params, batch) -> losses``, ``[batch]``, for the batches that
    :func:`self_critical_batch` makes.
  """
  loss_fn = caption_losses(model, "sum")
  return lambda params, batch: batch["advantages"] * loss_fn(params, batch)


def _lengths(tokens: np.ndarray, eos_id: int) -> np.ndarray:
  """Counts the tokens up to and including ``eos_id``, or all tokens if there is none."""
  ends = tokens == eos_id
  return np.where(ends.any(axis=-1), ends.argmax(axis=-1) + 1, tokens.shape[-1])


def _rewards(reward: Reward, tokens: np.ndarray, references: Sequence[Any], eos_id: int) -> Any:
  """Returns the rewards ``[images, captions]``."""
  images, captions, _ = tokens.shape
  flat = tokens.reshape(images * captions, -1)
  lengths = _lengths(flat, eos_id)
  candidates = [row[:length].tolist() for row, length in zip(flat, lengths, strict=True)]
  repeated = [references[i] for i in range(images) for _ in range(captions)]
  rewards = np.asarray(reward(candidates, repeated), float)
  if rewards.shape != (len(candidates),) or not np.isfinite(rewards).all():
    raise ValueError(
      f"reward must return {len(candidates)} finite numbers, got the shape {rewards.shape}"
      + ("" if np.isfinite(rewards).all() else ", and not all are finite")
    )
  return rewards.reshape(images, captions)


def _advantages(rewards: np.ndarray, baseline: str) -> np.ndarray:
  if baseline == "greedy":
    return rewards[:, :-1] - rewards[:, -1:]
  others = rewards.sum(axis=1, keepdims=True) - rewards
  return rewards - others / (rewards.shape[1] - 1)
