"""What the scores share: n-grams, and checks of their arguments."""

from collections import Counter
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]
References = Sequence[Sequence[Tokens]]


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[Hashable, ...]]:
  """How often each n-gram occurs in ``tokens``."""
  return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def check(candidates: Sequence[Tokens], references: References) -> None:
  """Raises unless there is a caption for each image, and a reference for each caption.

  Raises:
    TypeError: if a caption is a string.
    ValueError: if there is no caption, a different number of images, or one without reference.
  """
  if not len(candidates):
    raise ValueError("candidates must hold a caption at least, got none")
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
  """Raises unless an image has references, and they are sequences of tokens."""
  if isinstance(references, str) or any(isinstance(reference, str) for reference in references):
    raise TypeError(
      f"references[{image}] must be a list of sequences of tokens, got {references!r}"
    )
  if not len(references):
    raise ValueError(f"references[{image}] must hold a caption at least, got none")
