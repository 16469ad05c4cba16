"""Packed examples: rows, noise, questions, losses of each; and what is told of them."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from scripts.continual_lm import losses, packing, report, train
from scripts.continual_lm.data import Choices, HeldOut, LanguageData, Sequences
from scripts.continual_lm.documents import Corpus
from scripts.continual_lm.instructions import Example
from scripts.continual_lm.packing import Encoded, Noisy

RNG = np.random.default_rng(0)
LENGTH = 64  # Two places.


class Letters:
  """Lower-case letters are 0 to 25, a line break is 26."""

  vocab_size = 28
  end_of_text = 27

  def encode(self, text):
    return ["abcdefghijklmnopqrstuvwxyz\n".index(letter) for letter in text]


def examples(sizes, domains=1):
  """With tokens that are all different."""
  found, begin = [], 100
  for i, (prompt, response) in enumerate(sizes):
    tokens = np.arange(begin, begin := begin + prompt + response, dtype=np.int32)
    found.append(Encoded(tokens[:prompt], tokens[prompt:], i % domains))
  return found


def noisy(found):
  return Noisy(found, np.arange(len(found)) % 3 == 0)


def test_an_example_stands_between_ends_of_text():
  [example] = packing.encode([[], [Example((("user", "ab"),), "cd")]], Letters(), "plain")
  assert example.prompt.tolist() == [27, 0, 1, 26]
  assert example.response.tolist() == [2, 3, 27]
  assert example.domain == 1


def test_every_example_is_in_one_row_with_its_own_segment_and_targets():
  sizes = RNG.integers(1, 30, size=(200, 2))
  sizes[7] = 40, 30  # Longer than a row.
  found = examples(sizes, domains=3)
  packed = packing.pack(noisy(found), LENGTH)
  fitting = [i for i in range(200) if found[i].size() <= LENGTH]
  assert len(packed.examples) == len(set(packed.examples.tolist())) == len(fitting) < 200
  for i, place in zip(fitting, packed.examples, strict=True):
    row, segment = divmod(int(place), packing.places_in(LENGTH))
    mine = packed.segment_ids[row] == segment
    assert packed.tokens[row][mine].tolist() == [*found[i].prompt, *found[i].response]
    assert packed.tokens[row][mine & packed.loss_mask[row]].tolist() == found[i].response.tolist()
    assert packed.domain[row, segment] == found[i].domain
    assert packed.corrupted[row, segment] == (i % 3 == 0)
  assert packed.domains().tolist() == [found[i].domain for i in fitting]
  padding = packed.segment_ids == -1
  assert padding.any()
  assert not packed.loss_mask[padding].any()
  assert (packed.domain >= 0).sum() == len(fitting)
  assert packed.tokens.dtype == packed.segment_ids.dtype == packed.domain.dtype == np.int32


def test_a_row_that_was_begun_is_filled_before_another_one_begins():
  packed = packing.pack(noisy(examples([(30, 20), (30, 20), (8, 6), (5, 5), (40, 24)])), LENGTH)
  assert packed.examples.tolist() == [0, 2, 1, 3, 4]
  packed = packing.pack(noisy(examples(5 * [(1, 1)])), LENGTH)  # A row has two places.
  assert packed.examples.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["shuffled", "random", "swapped"])
def test_noise_is_in_so_many_responses_and_nowhere_else(kind):
  found = examples(50 * [(4, 12)], domains=2)
  result = packing.corrupt(found, 0.3, kind, 1000, seed=1)
  same = packing.corrupt(found, 0.3, kind, 1000, seed=1)
  assert result.corrupted.sum() == 15
  for i, (old, new) in enumerate(zip(found, result.examples, strict=True)):
    np.testing.assert_array_equal(new.prompt, old.prompt)
    np.testing.assert_array_equal(new.response, same.examples[i].response)
    assert (new.response.tolist() != old.response.tolist()) == result.corrupted[i]
    assert new.response.dtype == np.int32
    if kind != "swapped":
      assert new.response[-1] == old.response[-1]  # The end of the text.
  rows = np.flatnonzero(result.corrupted)
  if kind == "shuffled":
    for i in rows:
      assert sorted(result.examples[i].response) == found[i].response.tolist()
  elif kind == "random":
    drawn = np.concatenate([result.examples[i].response[:-1] for i in rows])
    assert drawn.max() < 1000
    # 165 draws: the mean of uniform ones is 499.5 with a standard error of 289 / sqrt(165).
    assert abs(drawn.mean() - 499.5) < 4 * 289 / np.sqrt(165)
  else:
    for domain in (0, 1):
      mine = [i for i in rows if found[i].domain == domain]
      before = {found[i].response.tobytes() for i in mine}
      assert {result.examples[i].response.tobytes() for i in mine} == before
      assert len(before) == len(mine) > 1


def test_a_response_is_not_swapped_with_itself_or_with_another_domain():
  found = examples(4 * [(2, 3)], domains=2)
  found[3] = found[3]._replace(domain=5)
  result = packing.corrupt(found, 0.99, "swapped", 1000, seed=0)
  assert result.corrupted.tolist() == [True, False, True, False]
  np.testing.assert_array_equal(result.examples[0].response, found[2].response)
  np.testing.assert_array_equal(result.examples[2].response, found[0].response)


def test_a_question_has_three_other_responses_of_the_same_domain_that_fit():
  found = examples(6 * [(10, 10)] + 6 * [(20, 40)] + [(54, 10)], domains=2)
  found[2] = found[2]._replace(response=found[0].response)  # The same is not another one.
  choices = packing.make_choices(found, LENGTH, ("a", "b"))
  again = packing.make_choices(found, LENGTH, ("a", "b"))
  np.testing.assert_array_equal(choices.others.tokens, again.others.tokens)
  # The last one's domain has three short responses, but two are the same.
  assert choices.asked.tolist() == list(range(12))
  others, places = choices.others, packing.places_in(LENGTH)
  assert len(choices.alone.examples) == len(found)
  assert choices.alone.loss_mask.sum() == sum(len(one.response) for one in found)
  assert (choices.alone.segment_ids >= 0).sum() == choices.alone.loss_mask.sum() + len(found)
  for question, i in enumerate(choices.asked):
    responses = {found[i].response.tobytes()}
    for place in others.examples[3 * question : 3 * question + 3]:
      row, segment = divmod(int(place), places)
      mine = others.segment_ids[row] == segment
      of_response = mine & others.loss_mask[row]
      np.testing.assert_array_equal(others.tokens[row][mine & ~of_response], found[i].prompt)
      response = others.tokens[row][of_response].tobytes()
      whose = found[choices.of_others[question][len(responses) - 1]]
      assert (response, found[i].domain) == (whose.response.tobytes(), whose.domain)
      responses.add(response)
    assert len(responses) == 4
  with pytest.raises(ValueError, match=r"4 different responses of every domain .*; a has too few"):
    packing.make_choices(found[:7], LENGTH, ("a", "b"))


def corpus(number=40):
  word = lambda i: chr(97 + i // 26) + chr(97 + i % 26)
  of = lambda start, n: [Example((("user", word(i)),), word(i)) for i in range(start, start + n)]
  long = Example((("user", "x" * 70),), "y")
  return Corpus(("few", "many"), [of(0, 3), [*of(3, 9), long]], [of(0, 2)] * 2, [of(0, 9)] * 2)


def test_parts_of_a_corpus_are_packed_and_held_out_examples_count_by_the_mixture():
  data, noisy_data, left_out = packing.make(corpus(), Letters(), "plain", LENGTH, 2, 5)
  assert left_out == 1
  assert np.bincount(data.train.domains()).tolist() == [3, 9]
  for part, each in ((data.validation, 2), (data.test, 5)):
    assert np.bincount(part.sequences.domains()).tolist() == [each, each]
    np.testing.assert_allclose(part.weights, [0.25 / each] * each + [0.75 / each] * each)
  noise = noisy_data(0.5, "random", 3)
  assert noise.corrupted.sum() == 6
  np.testing.assert_array_equal(noise.segment_ids, data.train.segment_ids)
  assert not data.train.corrupted.any()
  with pytest.raises(ValueError, match="example of every domain, got 4: all of few in train are"):
    packing.make(corpus(), Letters(), "plain", 4, 2, 5)


# -- Losses. The model: logits are a row of a table for each token.


MODEL = SimpleNamespace(apply=lambda given, tokens, **_: given["params"][tokens])


def test_the_loss_of_an_example_is_the_mean_over_its_response():
  """In float64 NumPy, at two temperatures; a place without an example does not count."""
  found = examples([(3, 4), (2, 5), (10, 50)])
  found = [e._replace(prompt=e.prompt % 9, response=e.response % 9) for e in found]
  packed = packing.pack(noisy(found), LENGTH)
  table = jnp.asarray(RNG.normal(size=(9, 9)), jnp.float32)
  batch = {name: jnp.asarray(field) for name, field in packed.batch().items()}
  loss_fn = losses.packed_losses(MODEL, packing.places_in(LENGTH))
  at = losses.losses_at(MODEL, (1.0, 2.0), packing.places_in(LENGTH))
  mask, got = loss_fn.example_mask(batch), loss_fn(table, batch)
  assert mask.tolist() == [True, True, True, False]
  assert got.shape == (4,)
  assert got[3] == 0
  for column, temperature in enumerate((1.0, 2.0)):
    logits = np.asarray(table, np.float64) / temperature
    log_likelihoods = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = []
    for one in found:
      before = [one.prompt[-1], *one.response[:-1]]
      expected.append(-log_likelihoods[before, one.response].mean())
    np.testing.assert_allclose(packed.of_examples(at(table, batch))[:, column], expected, rtol=1e-5)
    if temperature == 1:
      np.testing.assert_allclose(packed.of_examples(got), expected, rtol=1e-5)


# -- What is told.


def data_of(choices=None):
  sequences = Sequences(
    np.zeros((3, 1), np.int32), np.array([0, 0, 1], np.int32), np.zeros(3, bool)
  )
  part = HeldOut(sequences, np.array([0.125, 0.125, 0.75]))
  return LanguageData(("a", "b"), sequences, part, part, choices)


def test_the_temperature_is_the_best_on_validation_and_the_loss_that_of_the_test_part():
  validation, test = np.full((3, len(report.TEMPERATURES)), 2.0), np.ones((3, 25))
  validation[2, 4], validation[:2, 11] = 1.9, 1.5  # 0.075 and 0.125 better, by the mixture.
  test[:, 11], test[:, 4] = (1.0, 3.0, 5.0), 0.5
  told = report.calibrated(validation, test, data_of())
  assert told == {"calibrated": 0.5 + 3.75, "calibration": 2.0 ** (3 / 8)}


def test_a_right_response_must_be_likelier_than_all_others():
  """Of three questions one is lost and one is a tie; they count by the mixture."""
  right = np.array([1.0, 2.0, 3.0])
  others = np.array([1.5, 1.1, 9.0, 3.0, 1.9, 9.0, 3.0, 4.0, 5.0])
  nothing = packing.pack(packing.clean([]), LENGTH)
  of_others = np.array([[1, 2, 1], [0, 2, 0], [0, 1, 1]])
  data = data_of(Choices(np.arange(3), of_others, nothing, nothing))
  accuracy = lambda *losses: [*report.accuracies(*losses, data).values()]
  assert accuracy(right, others, np.zeros(3)) == [0.125, 0.125]
  assert accuracy(right, others + 2, np.zeros(3)) == [1, 1]
  # The gains: 3 against 0.5, 0.9, -7; 0 against 1, 0.1, -5; -1 against 1, -2, -3.
  assert accuracy(right, others, np.array([4.0, 2.0, 2.0])) == [0.125, 0.125]
  # Now the first one has 3 against 0.5, 8.9, -7, and the third one 7 against 1, -2, -3.
  assert accuracy(right, others, np.array([4.0, 2.0, 10.0])) == [0.125, 0.875 - 0.125]
  data = data_of(Choices(np.array([0, 2]), of_others[[0, 2]], nothing, nothing))
  assert accuracy(right, others[[0, 1, 2, 6, 7, 8]], np.zeros(3)) == 2 * [0.125 / 0.875]


def test_weights_of_empty_places_are_not_told():
  sequences = Sequences(
    np.zeros((2, 1), np.int32),
    np.array([[0, 1], [0, -1]], np.int32),
    np.array([[False, True], [False, False]]),
  )
  shown = train.Shown(
    np.array([[1.0, 2.0, 3.0, 0.0]]), np.array([[0.5, 2.0, 0.5, 0.0]]), np.ones(1)
  )
  told = report.of_window(shown, np.array([[0, 1]]), sequences, ["a", "b"])
  assert told["train_loss"] == 2
  assert (told["weight_clean"], told["weight_noise"]) == (0.5, 2)
  assert (told["weight/a"], told["weight/b"]) == (0.5, 2)
