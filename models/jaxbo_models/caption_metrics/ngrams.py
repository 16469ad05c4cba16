"""Functions that the scores share: n-grams and checks of arguments."""

from collections import Counter
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]
References = Sequence[Sequence[Tokens]]


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[Hashable, ...]]:
  """Counts how often each n-gram occurs in ``tokens``."""
  return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def check(candidates: Sequence[Tokens], references: References) -> None:
  """Raises unless each image has a caption and at least one reference.

  Raises:
    TypeError: a caption is a string.
    ValueError: there are no images, ``candidates`` and ``references`` differ in length, or an image
      has no reference.
  """
  if not len(candidates):
    raise ValueError("candidates must hold at least one caption, got none")
  if len(candidates) != len(references):
    raise ValueError(
      "candidates and references must be of the same images, got "
      f"{len(candidates)} and {len(references)}"
    )
  for i, candidate in enumerate(candidates):
    if isinstance(candidate, str):
      raise TypeError(f"candidates must be sequences of tokens, got the string {candidate!r}")
    check_references(i, references[i])


def check_references(image: int, references: Sequence[Tokens]) -> None:
  """Raises unless an image has references and each reference is a sequence of tokens."""
  if isinstance(references, str) or any(isinstance(reference, str) for reference in references):
    raise TypeError(
      f"references[{image}] must be a list of sequences of tokens, got {references!r}"
    )
  if not len(references):
    raise ValueError(f"references[{image}] must hold at least one caption, got none")
