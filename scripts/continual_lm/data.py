"""Packed sequences of tokens: which there are, which are corrupted, and which a batch holds."""

import functools
from typing import NamedTuple

import numpy as np
from jaxbo_models.tokenizers import BPETokenizer, ByteTokenizer

from scripts.continual_lm.documents import SPLITS, Corpus, Documents

CORRUPTIONS = ("shuffled", "random")
Tokenizer = ByteTokenizer | BPETokenizer


class Sequences(NamedTuple):
  """Sequences of equal length, no two with a token of the same place in a text."""

  tokens: np.ndarray  # [n, length], int32.
  domain: np.ndarray  # The domain of each, [n], int32.
  corrupted: np.ndarray  # Which were made noise of, [n], bool.


class HeldOut(NamedTuple):
  """Sequences for evaluation, and their ``weights`` ``[n]``, which sum to 1.

  Weighted means are means over the mixture of domains that is trained on.
  """

  sequences: Sequences
  weights: np.ndarray


class LanguageData(NamedTuple):
  """Names of domains, and sequences: to train on, for curves, and for reports."""

  domains: tuple[str, ...]
  train: Sequences
  validation: HeldOut
  test: HeldOut


def make(
  corpus: Corpus, tokenizer: Tokenizer, length: int, num_validation: int, num_test: int
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


def hold_out(sequences: Sequences, most: int, shares: np.ndarray) -> HeldOut:
  """At most so many sequences of each domain, from all over it; ``shares`` of the mixture."""
  rows = []
  for number in range(len(shares)):
    of_domain = np.flatnonzero(sequences.domain == number)
    places = np.linspace(0, len(of_domain) - 1, min(most, len(of_domain))).round().astype(int)
    rows.extend(of_domain[places])
  chosen = Sequences(*(field[rows] for field in sequences))
  return HeldOut(chosen, (shares / np.bincount(chosen.domain))[chosen.domain])


def corrupt(sequences: Sequences, share: float, kind: str, vocab_size: int, seed: int) -> Sequences:
  """Makes noise of ``round(share * n)`` sequences, drawn at random.

  ``"shuffled"`` puts the tokens of a sequence into a random order, ``"random"`` draws them
  uniformly from the vocabulary.
  """
  rng, tokens = np.random.default_rng(seed), sequences.tokens.copy()
  corrupted = np.zeros(len(tokens), bool)
  corrupted[rng.permutation(len(tokens))[: round(share * len(tokens))]] = True
  if kind == "shuffled":
    tokens[corrupted] = rng.permuted(tokens[corrupted], axis=1)
  else:
    tokens[corrupted] = rng.integers(vocab_size, size=tokens[corrupted].shape, dtype=np.int32)
  return Sequences(tokens, sequences.domain, corrupted)


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
