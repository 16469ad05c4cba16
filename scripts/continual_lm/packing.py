"""Prompts with responses as tokens: noise in them, several in a row, held-out ones, questions."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scripts.continual_lm import data as lm_data
from scripts.continual_lm.data import Choices, HeldOut, LanguageData, Sequences, Tokenizer
from scripts.continual_lm.documents import SPLITS, Corpus
from scripts.continual_lm.instructions import Example, prompt_of

OTHERS = 3  # Wrong responses to choose from, beside the right one.
_OPEN = 64  # Rows that may still get an example.


class Encoded(NamedTuple):
  """An example: an end of text, the prompt, the response, an end of text.

  A model has seen ends of text in front of documents.
  """

  prompt: np.ndarray  # int32, with the first token.
  response: np.ndarray  # int32, with the last token.
  domain: int

  def size(self) -> int:
    """All of its tokens."""
    return len(self.prompt) + len(self.response)


class Noisy(NamedTuple):
  """Examples, and which were made noise of."""

  examples: list[Encoded]
  corrupted: np.ndarray  # [n], bool.


def clean(examples: list[Encoded]) -> Noisy:
  """Examples without noise."""
  return Noisy(examples, np.zeros(len(examples), bool))


def places_in(length: int) -> int:
  """How many examples a row holds at most."""
  return max(1, length // 32)


def make(
  corpus: Corpus[Example],
  tokenizer: Tokenizer,
  template: str,
  length: int,
  num_validation: int,
  num_test: int,
) -> tuple[LanguageData, Callable[[float, str, int], Sequences], int]:
  """The data, ``noisy(share, kind, seed)``, and how many examples were too long for a row.

  ``noisy`` gives what is trained on, with noise in a share of the examples. The others are left out
  of all parts.

  Raises:
    ValueError: if no example of a domain fits into a row in one of the parts, or too few for
      questions.
  """
  encoded = [encode(getattr(corpus, split), tokenizer, template) for split in SPLITS]
  parts = [[one for one in part if one.size() <= length] for part in encoded]
  left_out = sum(map(len, encoded)) - sum(map(len, parts))
  number = len(corpus.domains)
  of_domains = np.stack([np.bincount(_domains(part), minlength=number) for part in parts])
  if not of_domains.all():
    split, domain = np.argwhere(of_domains == 0)[0]
    raise ValueError(
      f"length must be enough for an example of every domain, got {length}: all of "
      f"{corpus.domains[domain]} in {SPLITS[split]} are longer"
    )
  train, *held = parts
  shares = of_domains[0] / of_domains[0].sum()
  kept = [
    [part[i] for i in lm_data.from_all_over(_domains(part), most, number)]
    for part, most in zip(held, (num_validation, num_test), strict=True)
  ]
  pack_held = lambda part: HeldOut(
    pack(clean(part), length), lm_data.weights_of(_domains(part), shares)
  )
  order = np.random.default_rng(0).permutation(len(train))
  shuffled = [train[i] for i in order]

  def noisy(share: float, kind: str, seed: int) -> Sequences:
    return pack(corrupt(shuffled, share, kind, tokenizer.vocab_size, seed), length)

  validation, test = map(pack_held, kept)
  questions = make_choices(kept[1], length, corpus.domains)
  data = LanguageData(corpus.domains, noisy(0.0, "shuffled", 0), validation, test, questions)
  return data, noisy, left_out


def _domains(examples: Sequence[Encoded]) -> np.ndarray:
  return np.array([one.domain for one in examples], np.int32)


def encode(
  examples: Sequence[Sequence[Example]], tokenizer: Tokenizer, template: str
) -> list[Encoded]:
  """The tokens of the examples of each domain."""
  end = tokenizer.end_of_text
  array = lambda tokens: np.array(tokens, np.int32)
  return [
    Encoded(
      array([end, *tokenizer.encode(prompt_of(one, template))]),
      array([*tokenizer.encode(one.response), end]),
      domain,
    )
    for domain, of_domain in enumerate(examples)
    for one in of_domain
  ]


def corrupt(
  examples: Sequence[Encoded], share: float, kind: str, vocab_size: int, seed: int
) -> Noisy:
  """Makes noise of the responses of ``round(share * n)`` examples, drawn at random.

  ``"shuffled"`` puts the tokens of a response into a random order, ``"random"`` draws them
  uniformly from the vocabulary; the end of the text stays. ``"swapped"`` gives every one of these
  examples the response of another one of its domain; the only one of a domain stays as it is.
  """
  rng, found = np.random.default_rng(seed), list(examples)
  corrupted = lm_data.drawn(rng, len(found), share)
  rows = np.flatnonzero(corrupted)
  if kind == "swapped":
    domains = _domains(found)
    for domain in np.unique(domains):
      mine = rng.permutation(rows[domains[rows] == domain])
      corrupted[mine] = len(mine) > 1
      for i, j in zip(mine.tolist(), np.roll(mine, 1).tolist(), strict=True):
        found[i] = examples[i]._replace(response=examples[j].response)
    return Noisy(found, corrupted)
  for i in rows.tolist():
    *tokens, end = examples[i].response
    if kind == "shuffled":
      tokens = rng.permutation(tokens)
    else:
      tokens = rng.integers(vocab_size, size=len(tokens))
    found[i] = examples[i]._replace(response=np.array([*tokens, end], np.int32))
  return Noisy(found, corrupted)


def pack(noisy: Noisy, length: int) -> Sequences:
  """Puts each example into the first row with room for it, of the last rows that were begun.

  Tokens behind the examples of a row are 0, in no example. An example that is longer than a row,
  by a swapped response, is left out.
  """
  places, rows, begun = places_in(length), list[list[int]](), list[tuple[list[int], list[int]]]()
  for i, example in enumerate(noisy.examples):
    if example.size() > length:
      continue
    for row, room in begun:
      if room[0] >= example.size() and len(row) < places:
        break
    else:
      row, room = [], [length]
      rows.append(row)
      begun = [*begun[1 - _OPEN :], (row, room)]
    row.append(i)
    room[0] -= example.size()
  n, where = len(rows), np.full(len(noisy.examples), -1)
  tokens, loss_mask = np.zeros((n, length), np.int32), np.zeros((n, length), bool)
  segment_ids = np.full((n, length), -1, np.int32)
  domain, corrupted = np.full((n, places), -1, np.int32), np.zeros((n, places), bool)
  for r, row in enumerate(rows):
    begin = 0
    for place, i in enumerate(row):
      example = noisy.examples[i]
      response, end = begin + len(example.prompt), begin + example.size()
      tokens[r, begin:response], tokens[r, response:end] = example.prompt, example.response
      segment_ids[r, begin:end], loss_mask[r, response:end] = place, True
      domain[r, place], corrupted[r, place] = example.domain, noisy.corrupted[i]
      where[i], begin = r * places + place, end
  return Sequences(tokens, domain, corrupted, loss_mask, segment_ids, where[where >= 0])


def make_choices(test: Sequence[Encoded], length: int, domains: Sequence[str]) -> Choices:
  """A question for each example to which three other responses of its domain fit.

  The draw is the same for all runs. The four responses differ from each other.

  Raises:
    ValueError: if a domain has no question.
  """
  rng, asked, of_others = np.random.default_rng(0), list[int](), list[list[int]]()
  for i, example in enumerate(test):
    responses = {example.response.tobytes(): i}
    for j in rng.permutation(len(test)).tolist():
      fits = len(example.prompt) + len(test[j].response) <= length
      if test[j].domain == example.domain and fits and len(responses) <= OTHERS:
        responses.setdefault(test[j].response.tobytes(), j)
    if len(responses) > OTHERS:
      asked.append(i)
      of_others.append([*responses.values()][1:])
  for number, domain in enumerate(domains):
    if number not in {test[i].domain for i in asked}:
      raise ValueError(
        f"instructions must leave {OTHERS + 1} different responses of every domain in the test "
        f"part that fit into {length} tokens behind one prompt; {domain} has too few"
      )
  others = [
    test[i]._replace(response=test[j].response)
    for i, wrong in zip(asked, of_others, strict=True)
    for j in wrong
  ]
  alone = [one._replace(prompt=one.prompt[:1]) for one in test]
  return Choices(
    np.array(asked), np.array(of_others), pack(clean(others), length), pack(clean(alone), length)
  )
