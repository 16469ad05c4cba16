r"""Streams whose distribution changes: class imbalance, label noise, and shifting class priors.

A stream is drawn once for each seed, with NumPy, as a :class:`Schedule`: which rows of a table of
features each round sees, with which labels. What :func:`jaxbo.online_loop` plays is a gather from
the table, a pure function of the number of the round, so that a run is one scan and several seeds
are one ``vmap``. The streams of imbalanced classes are those of the published code of OAGD
(https://github.com/BojianHou/OAGD, ``dataset/mnist.py``); the others are ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

import jaxbo
from scripts.common.data import Examples

NUM_PHASES = 4
GRADUAL_RATIOS = (0.4, 0.6, 0.8, 1.0)
IMBALANCE = 0.01  # of the last class to the first, in "static" and "zigzag"
STATIC_NOISE, STAGED_NOISE, NOISE_SWING = 0.3, (0.0, 0.4, 0.2, 0.6), 0.3
PRIOR_RATIO = 20.0  # of the likeliest class to the least likely


class Batch(NamedTuple):
  """A minibatch of a level: ``images [batch, features]``, and int32 labels and weights ``[batch]``.

  The weights are what each example counts in the loss.
  """

  images: Any
  labels: Any
  weights: Any


class Pools(NamedTuple):
  """Which rows of the features a seed may use, without an overlap."""

  train: Sequence[np.ndarray]  # for each class, the rows of the inner losses
  val: Sequence[np.ndarray]  # for each class, the rows of the outer losses
  test: np.ndarray  # fresh data, for reports only


class Level(NamedTuple):
  """The minibatches of a level in all rounds; leaves ``[rounds, batch]``."""

  rows: Any
  labels: Any
  weights: Any


class Schedule(NamedTuple):
  """A stream that was drawn: the batches of the inner and of the outer losses."""

  train: Level
  val: Level


class StreamKind(NamedTuple):
  """A kind of stream: ``draw(rng, pools, labels, rounds, batch_size)``, and names of phases."""

  draw: Callable[[np.random.Generator, Pools, np.ndarray, int, int], Schedule]
  names: Sequence[str]  # one or NUM_PHASES


def stream_of(
  features: Any, schedule: Schedule
) -> Callable[[jax.Array, jax.Array], jaxbo.online.OnlineBatch]:
  """The stream for :func:`jaxbo.online_loop`; it needs no key, since all was drawn before."""
  return jax.tree_util.Partial(_read, features, schedule)


def _read(features, schedule, key, t):
  del key
  of_level = lambda level: Batch(features[level.rows[t]], level.labels[t], level.weights[t])
  return jaxbo.online.OnlineBatch(of_level(schedule.train), of_level(schedule.val))


# -- Rows.


def split_by_class(
  examples: Examples,
  train_size: int,
  val_size: int,
  seed: int | None = None,
  test: np.ndarray | None = None,
) -> Pools:
  """The first ``train_size`` rows of each class, its last ``val_size``, and the test rows.

  A ``seed`` shuffles before; ``None`` keeps the order, as the published code does. ``test`` are the
  rows of an official test set; ``None`` takes what is left over.

  Raises:
    ValueError: if a class has too few examples.
  """
  order = np.arange(len(examples.labels))
  if test is not None:
    order = np.setdiff1d(order, test)
  if seed is not None:
    order = np.random.default_rng(seed).permutation(order)
  members = [order[examples.labels[order] == label] for label in np.unique(examples.labels)]
  fewest = min(map(len, members))
  if train_size + val_size + (test is None) > fewest:
    raise ValueError(
      f"train_size and val_size must leave the smallest class of {fewest} examples "
      f"{'some' if test is None else 'none'} over, got {train_size} and {val_size}"
    )
  train, rest, val = zip(
    *(np.split(rows, [train_size, len(rows) - val_size]) for rows in members), strict=True
  )
  return Pools(train, val, np.concatenate(rest) if test is None else test)


def class_counts(largest: int, ratio: float, num_classes: int) -> list[int]:
  r"""How many examples each class has: :math:`\lceil n \mu^i \rceil`."""
  return [math.ceil(largest * ratio**i) for i in range(num_classes)]


def class_weights(counts: ArrayLike) -> np.ndarray:
  """Weights that make every class count the same: inverse counts, of Euclidean norm 1."""
  weights = np.sum(counts) / np.asarray(counts)
  return weights / np.linalg.norm(weights)


def passes(rng: np.random.Generator, rows: np.ndarray, rounds: int, batch_size: int) -> np.ndarray:
  """Shuffled passes over ``rows``, cut into ``[rounds, batch_size]``."""
  num_passes = -(-rounds * batch_size // len(rows))
  shuffled = np.concatenate([rng.permutation(rows) for _ in range(num_passes)])
  return shuffled[: rounds * batch_size].reshape(rounds, batch_size)


def _level(rows: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Level:
  """A level with true labels, and a weight for each class or 1."""
  labels_of_rows = labels[rows].astype(np.int32)
  per_row = np.ones(rows.shape) if weights is None else weights[labels_of_rows]
  return Level(rows.astype(np.int32), labels_of_rows, per_row.astype(np.float32))


def quarters(rounds: int) -> np.ndarray:
  """The phase of each round, ``[rounds]``."""
  return np.arange(rounds) * NUM_PHASES // rounds


# -- Imbalanced classes.


def _imbalanced(pools: Sequence[np.ndarray], ratio: float | None = None) -> np.ndarray:
  """Rows of each class, ``ratio`` times as many as of the one before; see ``IMBALANCE``."""
  ratio_or_default = ratio or IMBALANCE ** (1 / (len(pools) - 1))
  counts = class_counts(len(pools[0]), ratio_or_default, len(pools))
  return np.concatenate([rows[:count] for rows, count in zip(pools, counts, strict=True)])


def _draw_gradual(rng, pools, labels, rounds, batch_size):
  lengths = np.bincount(quarters(rounds))
  train = [
    passes(rng, _imbalanced(pools.train, ratio), length, batch_size)
    for ratio, length in zip(GRADUAL_RATIOS, lengths, strict=True)
  ]
  val = passes(rng, np.concatenate(pools.val), rounds, batch_size)
  return Schedule(_level(np.concatenate(train), labels), _level(val, labels))


def _draw_zigzag(rng, pools, labels, rounds, batch_size):
  parts = np.concatenate(pools.train), _imbalanced(pools.train)
  both = np.stack([passes(rng, part, -(-rounds // 2), batch_size) for part in parts], axis=1)
  val = passes(rng, np.concatenate(pools.val), rounds, batch_size)
  return Schedule(_level(both.reshape(-1, batch_size)[:rounds], labels), _level(val, labels))


def _draw_imbalanced(rng, pools, labels, rounds, batch_size):
  train, val = _imbalanced(pools.train), _imbalanced(pools.val)
  return Schedule(
    _level(passes(rng, train, rounds, batch_size), labels),
    _level(passes(rng, val, rounds, batch_size), labels, class_weights(np.bincount(labels[val]))),
  )


# -- Wrong labels, in the inner losses alone.


def _with_noise(rates: Callable[[int], np.ndarray]) -> Callable[..., Schedule]:
  """A row has one wrong label for good; the more noise, the more rows show theirs."""

  def draw(rng, pools, labels, rounds, batch_size):
    rows = np.concatenate(pools.train)
    num_classes, order = len(pools.train), np.ones(len(labels))
    wrong = (labels + rng.integers(1, num_classes, len(labels))) % num_classes
    order[rows] = (rng.permutation(len(rows)) + 0.5) / len(rows)
    train, val = (
      _level(passes(rng, part, rounds, batch_size), labels)
      for part in (rows, np.concatenate(pools.val))
    )
    shown = order[train.rows] < rates(rounds)[:, None]
    noisy = np.where(shown, wrong[train.rows], train.labels).astype(np.int32)
    return Schedule(train._replace(labels=noisy), val)

  return draw


# -- Priors of the classes, in both levels.


def shifted_prior(shift: float, num_classes: int) -> np.ndarray:
  """A prior around the circle of classes, the likeliest being number ``shift``, ``[classes]``."""
  angles = 2 * np.pi * (np.arange(num_classes) - shift) / num_classes
  prior = PRIOR_RATIO ** (np.cos(angles) / 2)
  return prior / prior.sum()


def _with_prior(shifts: Callable[[int], np.ndarray]) -> Callable[..., Schedule]:
  """``shifts(rounds)`` are shares of the number of classes."""

  def draw(rng, pools, labels, rounds, batch_size):
    num_classes = len(pools.train)
    drawn = [], []
    for shift in shifts(rounds) * num_classes:
      prior = shifted_prior(shift, num_classes)
      for rows, part in zip(drawn, (pools.train, pools.val), strict=True):
        classes = rng.choice(num_classes, batch_size, p=prior)
        rows.append([rng.choice(part[label]) for label in classes])
    return Schedule(*(_level(np.asarray(rows), labels) for rows in drawn))

  return draw


IMBALANCED: Mapping[str, StreamKind] = {
  "gradual": StreamKind(_draw_gradual, [f"μ = {ratio:g}" for ratio in GRADUAL_RATIOS]),
  "zigzag": StreamKind(_draw_zigzag, ["balanced, imbalanced in turns"]),
  "static": StreamKind(_draw_imbalanced, [f"least class {IMBALANCE:.0%} of largest"]),
}
STATIC = _with_noise(lambda rounds: np.full(rounds, STATIC_NOISE))
STAGED = _with_noise(lambda rounds: np.asarray(STAGED_NOISE)[quarters(rounds)])
SWINGING = _with_noise(
  lambda rounds: STATIC_NOISE + NOISE_SWING * np.sin(2 * np.pi * np.arange(rounds) / rounds)
)
NOISY: Mapping[str, StreamKind] = {
  "static": StreamKind(STATIC, [f"{STATIC_NOISE:.0%} wrong labels"]),
  "staged": StreamKind(STAGED, [f"{rate:.0%} wrong" for rate in STAGED_NOISE]),
  "dynamic": StreamKind(SWINGING, [f"0 to {STATIC_NOISE + NOISE_SWING:.0%} wrong labels"]),
}
QUARTER_TURNS = _with_prior(lambda rounds: quarters(rounds) / NUM_PHASES)
TURNING = _with_prior(lambda rounds: np.arange(rounds) / rounds)
SHIFTING: Mapping[str, StreamKind] = {
  "static": StreamKind(_with_prior(np.zeros), ["one prior"]),
  "staged": StreamKind(QUARTER_TURNS, [f"prior {phase + 1}" for phase in range(NUM_PHASES)]),
  "dynamic": StreamKind(TURNING, ["the prior turns"]),
}
