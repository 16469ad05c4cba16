"""Packed sequences of tokens: which there are, which are corrupted, and which a batch holds."""

import functools
from typing import NamedTuple

import numpy as np
from jaxbo_models.tokenizers import BPETokenizer, ByteTokenizer

from scripts.continual_lm.documents import SPLITS, Corpus, Documents

CORRUPTIONS = ("shuffled", "random", "swapped")  # The last one is of responses.
Tokenizer = ByteTokenizer | BPETokenizer


class Sequences(NamedTuple):
  """Sequences of equal length: the rows of batches.

  They are cut from texts, no two with a token of the same place, and then each is an example; or
  they are packed with examples that do not see each other (``packing.py``), and then domains and
  corruption are those of the places for examples in a row, ``[n, places]``.
  """

  tokens: np.ndarray  # [n, length], int32.
  domain: np.ndarray  # The domain of each example, int32; -1 for a place that is empty.
  corrupted: np.ndarray  # Which examples were made noise of, bool.
  loss_mask: np.ndarray | None = None  # Which tokens are targets, [n, length], bool; None for all.
  segment_ids: np.ndarray | None = None  # The place of each token's example; -1 for padding.
  examples: np.ndarray | None = None  # Where the examples are among all places, in their order.

  def batch(self) -> dict[str, np.ndarray]:
    """What a loss takes, by name."""
    fields = {"loss_mask": self.loss_mask, "segment_ids": self.segment_ids}
    return {"tokens": self.tokens} | {n: f for n, f in fields.items() if f is not None}

  def of_examples(self, values: np.ndarray) -> np.ndarray:
    """What belongs to the examples, in their order, of what belongs to all places."""
    return values if self.examples is None else values[self.examples]

  def domains(self) -> np.ndarray:
    """The domain of each example, ``[examples]``."""
    return self.of_examples(self.domain.reshape(-1))


class HeldOut(NamedTuple):
  """Sequences for evaluation, and the ``weights`` ``[examples]`` of examples, which sum to 1.

  Weighted means are means over the mixture of domains that is trained on.
  """

  sequences: Sequences
  weights: np.ndarray


class Choices(NamedTuple):
  """Questions about held-out examples: is the right response likelier than three others?"""

  asked: np.ndarray  # Which examples, [questions], int.
  of_others: np.ndarray  # Whose responses the others are, [questions, 3], int.
  others: Sequences  # The same prompts with other responses, three for each question.
  alone: Sequences  # The response of every held-out example without its prompt.


class LanguageData(NamedTuple):
  """Names of domains, and sequences: to train on, for curves, and for reports."""

  domains: tuple[str, ...]
  train: Sequences
  validation: HeldOut
  test: HeldOut
  choices: Choices | None = None


def make(
  corpus: Corpus[str], tokenizer: Tokenizer, length: int, num_validation: int, num_test: int
) -> LanguageData:
  """Packs a corpus; holds out at most so many sequences of each domain.

  Raises ``ValueError`` if a domain has no whole sequence in one of the parts.
  """
  packed = [pack(getattr(corpus, split), tokenizer, length) for split in SPLITS]
  counts = np.stack([np.bincount(p.domain, minlength=len(corpus.domains)) for p in packed])
  if not counts.all():
    split, domain = np.argwhere(counts == 0)[0]
    raise ValueError(
      f"length must leave a sequence of every domain, got {length}: too long for the documents "
      f"of {corpus.domains[domain]} in {SPLITS[split]}"
    )
  shares = counts[0] / counts[0].sum()
  train, validation, test = packed
  return LanguageData(
    corpus.domains,
    train,
    hold_out(validation, num_validation, shares),
    hold_out(test, num_test, shares),
  )


def pack(documents: Documents, tokenizer: Tokenizer, length: int) -> Sequences:
  """Cuts the documents of each domain, one behind another, into sequences.

  What is left of a domain, less than a sequence, is not used.
  """
  tokens, domain = [], []
  for number, texts in enumerate(documents):
    stream = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.end_of_text)]
    whole = len(stream) // length
    tokens.append(np.array(stream[: whole * length], np.int32).reshape(whole, length))
    domain += [number] * whole
  return Sequences(np.concatenate(tokens), np.array(domain, np.int32), np.zeros(len(domain), bool))


def in_pieces(sequences: Sequences, size: int) -> Sequences:
  """The same rows, of pieces of so many tokens that do not see each other."""
  pieces = np.arange(sequences.tokens.shape[1], dtype=np.int32) // size
  return sequences._replace(segment_ids=np.broadcast_to(pieces, sequences.tokens.shape))


def hold_out(sequences: Sequences, most: int, shares: np.ndarray) -> HeldOut:
  """At most so many sequences of each domain, from all over it; ``shares`` of the mixture."""
  rows = from_all_over(sequences.domain, most, len(shares))
  tokens, domain, corrupted = (field[rows] for field in sequences[:3])
  return HeldOut(Sequences(tokens, domain, corrupted), weights_of(domain, shares))


def from_all_over(domain: np.ndarray, most: int, num_domains: int) -> list[int]:
  """At most so many places of each domain, evenly spaced."""
  rows: list[int] = []
  for number in range(num_domains):
    of_domain = np.flatnonzero(domain == number)
    places = np.linspace(0, len(of_domain) - 1, min(most, len(of_domain))).round().astype(int)
    rows.extend(of_domain[places])
  return rows


def weights_of(domain: np.ndarray, shares: np.ndarray) -> np.ndarray:
  """The weights that give each domain its share."""
  return (shares / np.bincount(domain))[domain]


def corrupt(sequences: Sequences, share: float, kind: str, vocab_size: int, seed: int) -> Sequences:
  """Makes noise of ``round(share * n)`` sequences, drawn at random.

  ``"shuffled"`` puts the tokens of a sequence into a random order, ``"random"`` draws them
  uniformly from the vocabulary.
  """
  rng, tokens = np.random.default_rng(seed), sequences.tokens.copy()
  corrupted = drawn(rng, len(tokens), share)
  if kind == "shuffled":
    tokens[corrupted] = rng.permuted(tokens[corrupted], axis=1)
  else:
    tokens[corrupted] = rng.integers(vocab_size, size=tokens[corrupted].shape, dtype=np.int32)
  return Sequences(tokens, sequences.domain, corrupted)


def drawn(rng: np.random.Generator, n: int, share: float) -> np.ndarray:
  """A share of ``n``, at random: bool ``[n]``."""
  chosen = np.zeros(n, bool)
  chosen[rng.permutation(n)[: round(share * n)]] = True
  return chosen


def rows_of_batch(num_sequences: int, batch_size: int, stream: tuple[int, ...], step: int):
  """The rows of the batch of a step, ``[batch_size]``: a function of its arguments alone.

  So a run that goes on at a step sees what it would have seen. Every epoch is a new permutation,
  whose last rows are left out if they do not fill a batch. Numbers name the ``stream`` of batches.
  """
  epoch, place = divmod(step, num_sequences // batch_size)
  begin = place * batch_size
  return _permutation(num_sequences, (*stream, epoch))[begin : begin + batch_size]


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(seed).permutation(n)
