r"""Streams whose distribution changes: class imbalance, label noise, and shifting class priors.

A stream is drawn once for each seed, with NumPy, as a :class:`Schedule`: which rows of a table of
features each round sees, with which labels. What :func:`jaxbo.online` plays is a gather from the
table, a pure function of the number of the round, so that a run is one scan and several seeds are
one ``vmap``. The streams of imbalanced classes are those of the published code of OAGD
(https://github.com/BojianHou/OAGD, ``dataset/mnist.py``); the others are ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxbo
from scripts.common.data import Examples

NUM_PHASES = 4
GRADUAL_RATIOS = (0.4, 0.6, 0.8, 1.0)
IMBALANCE = 0.01  # of the last class to the first, in "static" and "zigzag"
STATIC_NOISE, STAGED_NOISE, NOISE_SWING = 0.3, (0.0, 0.4, 0.2, 0.6), 0.3
PRIOR_RATIO = 20.0  # of the likeliest class to the least likely


class Batch(NamedTuple):
  """A minibatch of a level.

  Attributes:
    images: ``[batch, features]``.
    labels: ``[batch]``, int32.
    weights: ``[batch]``, what each example counts in the loss.
  """

  images: Any
  labels: Any
  weights: Any


class Pools(NamedTuple):
  """Which rows of the features a seed may use: disjoint, by class.

  Attributes:
    train: for each class, the rows of the inner losses.
    val: for each class, the rows of the outer losses.
    test: fresh data, for reports only.
  """

  train: Sequence[np.ndarray]
  val: Sequence[np.ndarray]
  test: np.ndarray


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
  """A kind of stream.

  Attributes:
    draw: ``draw(rng, pools, labels, rounds, batch_size) -> Schedule``.
    names: of the phases, one or ``NUM_PHASES``.
  """

  draw: Callable[[np.random.Generator, Pools, np.ndarray, int, int], Schedule]
  names: Sequence[str]

  def phases(self, rounds: int) -> list[tuple[int, str]]:
    """The pairs of first round and name of each phase."""
    begins = [int(np.argmax(quarters(rounds) == phase)) for phase in range(len(self.names))]
    return list(zip(begins, self.names, strict=True))


def stream_of(
  features: Any, schedule: Schedule
) -> Callable[[jax.Array, jax.Array], jaxbo.OnlineBatch]:
  """The stream for :func:`jaxbo.online`; it needs no key, since all was drawn before."""
  return jax.tree_util.Partial(_read, features, schedule)


def _read(features, schedule, key, t):
  del key
  of_level = lambda level: Batch(features[level.rows[t]], level.labels[t], level.weights[t])
  return jaxbo.OnlineBatch(of_level(schedule.train), of_level(schedule.val))


# -- Rows.


def split_by_class(
  examples: Examples,
  train_size: int,
  val_size: int,
  seed: int | None = None,
  test: np.ndarray | None = None,
) -> Pools:
  """The first ``train_size`` rows of each class, its last ``val_size``, and the test rows.

  Args:
    examples: all examples; rows of ``test`` are in none of the other parts.
    train_size: rows of each class for the inner losses.
    val_size: rows of each class for the outer losses.
    seed: shuffles before; ``None`` keeps the order, as the published code does.
    test: the rows of an official test set; ``None`` takes what is left over.

  Raises:
    ValueError: if a class has too few examples.
  """
  order = np.arange(len(examples.labels))
  if test is not None:
    order = np.setdiff1d(order, test)
  if seed is not None:
    order = np.random.default_rng(seed).permutation(order)
  classes = np.unique(examples.labels)
  members = [order[examples.labels[order] == label] for label in classes]
  fewest = min(map(len, members))
  if train_size + val_size + (test is None) > fewest:
    raise ValueError(
      f"train_size and val_size must leave the smallest class of {fewest} examples "
      f"{'some' if test is None else 'none'} over, got {train_size} and {val_size}"
    )
  rest = [rows[train_size:-val_size] for rows in members]
  return Pools(
    train=[rows[:train_size] for rows in members],
    val=[rows[-val_size:] for rows in members],
    test=np.concatenate(rest) if test is None else test,
  )


def class_counts(largest: int, ratio: float, num_classes: int) -> list[int]:
  r"""How many examples each class has: :math:`\lceil n \mu^i \rceil`."""
  return [math.ceil(largest * ratio**i) for i in range(num_classes)]


def class_weights(counts: Sequence[int]) -> np.ndarray:
  """Weights that make every class count the same: inverse counts, of Euclidean norm 1."""
  weights = sum(counts) / np.asarray(counts)
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


def _imbalanced(pools: Sequence[np.ndarray], ratio: float) -> np.ndarray:
  counts = class_counts(len(pools[0]), ratio, len(pools))
  return np.concatenate([rows[:count] for rows, count in zip(pools, counts, strict=True)])


def _static_ratio(num_classes: int) -> float:
  return IMBALANCE ** (1 / (num_classes - 1))


def _draw_gradual(rng, pools, labels, rounds, batch_size):
  lengths = np.bincount(quarters(rounds))
  parts = [
    passes(rng, _imbalanced(pools.train, ratio), length, batch_size)
    for ratio, length in zip(GRADUAL_RATIOS, lengths, strict=True)
  ]
  val = passes(rng, np.concatenate(pools.val), rounds, batch_size)
  return Schedule(_level(np.concatenate(parts), labels), _level(val, labels))


def _draw_zigzag(rng, pools, labels, rounds, batch_size):
  half = -(-rounds // 2)
  balanced = passes(rng, np.concatenate(pools.train), half, batch_size)
  skewed = _imbalanced(pools.train, _static_ratio(len(pools.train)))
  both = np.stack([balanced, passes(rng, skewed, half, batch_size)], axis=1)
  val = passes(rng, np.concatenate(pools.val), rounds, batch_size)
  return Schedule(_level(both.reshape(-1, batch_size)[:rounds], labels), _level(val, labels))


def _draw_imbalanced(rng, pools, labels, rounds, batch_size):
  ratio = _static_ratio(len(pools.train))
  train, val = (_imbalanced(part, ratio) for part in (pools.train, pools.val))
  weights = class_weights(class_counts(len(pools.val[0]), ratio, len(pools.val)))
  return Schedule(
    _level(passes(rng, train, rounds, batch_size), labels),
    _level(passes(rng, val, rounds, batch_size), labels, weights),
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


def _swinging_noise(rounds: int) -> np.ndarray:
  return STATIC_NOISE + NOISE_SWING * np.sin(2 * np.pi * np.arange(rounds) / rounds)


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
    drawn = {"train": [], "val": []}
    for shift in shifts(rounds) * num_classes:
      prior = shifted_prior(shift, num_classes)
      for name, part in (("train", pools.train), ("val", pools.val)):
        classes = rng.choice(num_classes, batch_size, p=prior)
        drawn[name].append([rng.choice(part[label]) for label in classes])
    return Schedule(*(_level(np.asarray(drawn[name]), labels) for name in ("train", "val")))

  return draw


IMBALANCED: Mapping[str, StreamKind] = {
  "gradual": StreamKind(_draw_gradual, [f"μ = {ratio:g}" for ratio in GRADUAL_RATIOS]),
  "zigzag": StreamKind(_draw_zigzag, ["balanced, imbalanced in turns"]),
  "static": StreamKind(_draw_imbalanced, [f"least class {IMBALANCE:.0%} of largest"]),
}
STATIC = _with_noise(lambda rounds: np.full(rounds, STATIC_NOISE))
STAGED = _with_noise(lambda rounds: np.asarray(STAGED_NOISE)[quarters(rounds)])
NOISY: Mapping[str, StreamKind] = {
  "static": StreamKind(STATIC, [f"{STATIC_NOISE:.0%} wrong labels"]),
  "staged": StreamKind(STAGED, [f"{rate:.0%} wrong" for rate in STAGED_NOISE]),
  "dynamic": StreamKind(
    _with_noise(_swinging_noise), [f"0 to {STATIC_NOISE + NOISE_SWING:.0%} wrong labels"]
  ),
}
QUARTER_TURNS = _with_prior(lambda rounds: quarters(rounds) / NUM_PHASES)
TURNING = _with_prior(lambda rounds: np.arange(rounds) / rounds)
SHIFTING: Mapping[str, StreamKind] = {
  "static": StreamKind(_with_prior(np.zeros), ["one prior"]),
  "staged": StreamKind(QUARTER_TURNS, [f"prior {phase + 1}" for phase in range(NUM_PHASES)]),
  "dynamic": StreamKind(TURNING, ["the prior turns"]),
}


def draw(
  kind: StreamKind, pools: Pools, examples: Examples, rounds: int, batch_size: int, seed: int
) -> Schedule:
  """Draws a stream; the same for the same seed."""
  rng = np.random.default_rng([seed, 1])
  return kind.draw(rng, pools, examples.labels, rounds, batch_size)
