"""Text for language models: no leaks between parts, packed sequences, noise, order of batches."""

import functools
import os

import numpy as np
import pytest

from scripts.continual_lm import data as lm_data
from scripts.continual_lm import documents as lm_documents
from scripts.continual_lm.documents import Corpus


class Letters:
  """Lower-case letters are 0 to 25."""

  vocab_size = 27
  end_of_text = 26

  def encode(self, text):
    return [ord(letter) - ord("a") for letter in text]


def sequences(n, length=8):
  tokens = np.arange(n * length, dtype=np.int32).reshape(n, length)
  return lm_data.Sequences(tokens, np.arange(n, dtype=np.int32) % 2, np.zeros(n, bool))


@functools.cache
def python():
  return lm_documents.python_corpus()


def test_the_text_that_ships_with_python_has_four_domains_in_three_disjoint_parts():
  corpus = python()
  assert corpus.domains == ("manual", "docstrings", "code", "characters")
  for documents in zip(*corpus[1:], strict=True):
    of_part = [set(texts) for texts in documents]
    assert all(of_part)
    assert sum(map(len, of_part)) == len(set.union(*of_part))
    sizes = [sum(map(len, texts)) for texts in of_part]
    assert min(sizes) > 0.03 * sum(sizes)


def test_no_order_of_files_and_no_text_that_is_there_twice_changes_the_parts():
  texts = {f"{i:02}": f"text {i}" for i in range(20)} | {"03": "text 2", "99": ""}
  parts = lm_documents._every_tenth({"domain": texts})
  assert lm_documents._every_tenth({"domain": dict(reversed(texts.items()))}) == parts
  found = [documents for [documents] in parts[1:]]
  left = [i for i in range(20) if i != 3]
  assert found[1:] == [[f"text {left[5]}", f"text {left[15]}"], ["text 0", f"text {left[10]}"]]
  assert sorted(text for part in found for text in part) == sorted(f"text {i}" for i in left)


@pytest.mark.slow
def test_each_domain_holds_what_its_name_says():
  manual, docstrings, code, characters = python().train
  assert any(text.startswith("Names, and") or "statement" in text for text in manual)
  assert any("Return a" in text for text in docstrings)
  assert not any("def __init__(self" in text for text in docstrings)
  assert any("def __init__(self" in text for text in code)
  names = "\n".join(characters)
  assert "GREEK SMALL LETTER" in names
  assert "CJK UNIFIED IDEOGRAPH-" not in names
  assert "HANGUL SYLLABLE" not in names


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs data sets in TFDS_DATA_DIR")
def test_text_domains_and_plays_are_read():
  corpus = lm_documents.text_domains()
  assert set(corpus.domains) == {"wiki", "novel", "politics", "economics", "captions"}
  parts = [[text for texts in part for text in texts] for part in corpus[1:]]
  assert all(corpus.train)
  assert min(map(len, parts)) > 100
  assert sum(len(set(part)) for part in parts) == len(set().union(*parts))
  novels = corpus.test[corpus.domains.index("novel")]
  assert "Whale" in novels[-1] or "Holmes" in novels[-1]
  plays = lm_documents.tiny_shakespeare()
  assert [[len(texts) for texts in part] for part in plays[1:]] == [[1], [1], [1]]


def test_a_missing_data_set_says_what_is_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no text_domains in[^$]*source and position"):
    lm_documents.text_domains(tmp_path)


def test_documents_are_packed_one_behind_another_domain_by_domain():
  packed = lm_data.pack([["abc", "de"], ["zz", "yyyy"]], Letters(), 3)
  assert packed.tokens.tolist() == [[0, 1, 2], [26, 3, 4], [25, 25, 26], [24, 24, 24]]
  assert packed.domain.tolist() == [0, 0, 1, 1]
  assert packed.tokens.dtype == packed.domain.dtype == np.int32
  assert not packed.corrupted.any()


def corpus():
  part = [["abcdefgh" * 3], ["stuvwxyz"]]
  return Corpus(("many", "few"), part, part, part)


def test_held_out_sequences_count_as_domains_do_in_training():
  """Three quarters of the sequences are of one domain, but half of those that are held out."""
  data = lm_data.make(corpus(), Letters(), 4, 2, 1)
  assert np.bincount(data.train.domain).tolist() == [6, 2]
  for held_out, each in ((data.validation, 2), (data.test, 1)):
    assert np.bincount(held_out.sequences.domain).tolist() == [each, each]
    np.testing.assert_allclose(held_out.weights.sum(), 1)
    np.testing.assert_allclose(held_out.weights @ (held_out.sequences.domain == 0), 0.75)
  first_and_last = data.train.tokens[[0, 5]]
  np.testing.assert_array_equal(data.validation.sequences.tokens[:2], first_and_last)


def test_each_part_is_packed_from_its_own_documents():
  parts = [[[letter * 7]] for letter in "abc"]
  data = lm_data.make(Corpus(("one",), *parts), Letters(), 4, 2, 2)
  packed = (data.train, data.validation.sequences, data.test.sequences)
  assert [set(part.tokens.ravel().tolist()) for part in packed] == [{0, 26}, {1, 26}, {2, 26}]


def test_a_length_beyond_a_domain_is_refused():
  with pytest.raises(ValueError, match=r"length must leave a sequence of .*, got 20: .*few"):
    lm_data.make(corpus(), Letters(), 20, 2, 1)


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_noise_is_in_so_many_sequences_and_nowhere_else(kind):
  clean = sequences(50, 16)
  noisy = lm_data.corrupt(clean, 0.3, kind, 1000, seed=1)
  assert noisy.corrupted.sum() == 15
  np.testing.assert_array_equal(noisy.tokens[~noisy.corrupted], clean.tokens[~noisy.corrupted])
  assert (noisy.tokens[noisy.corrupted] != clean.tokens[noisy.corrupted]).any(axis=1).all()
  np.testing.assert_array_equal(clean.tokens, sequences(50, 16).tokens)  # as it was
  same = lm_data.corrupt(clean, 0.3, kind, 1000, seed=1)
  np.testing.assert_array_equal(noisy.tokens, same.tokens)
  other = lm_data.corrupt(clean, 0.3, kind, 1000, seed=2)
  assert (other.corrupted != noisy.corrupted).any()
  if kind == "shuffled":
    np.testing.assert_array_equal(np.sort(noisy.tokens, axis=1), clean.tokens)
    orders = noisy.tokens[noisy.corrupted] % 16
    assert len(np.unique(orders, axis=0)) == 15  # Each its own: one order of all can be learned.
  else:
    drawn = noisy.tokens[noisy.corrupted]
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    # 240 draws: the mean of uniform ones is 499.5 with a standard error of 289 / sqrt(240).
    assert abs(drawn.mean() - 499.5) < 4 * 289 / np.sqrt(240)


def test_batches_of_an_epoch_are_parts_of_a_permutation():
  rows = [lm_data.rows_of_batch(10, 3, (0, 1), step) for step in range(6)]
  first, second = np.concatenate(rows[:3]), np.concatenate(rows[3:])
  assert len(set(first)) == len(set(second)) == 9
  assert set(first) | set(second) <= set(range(10))
  assert first.tolist() != second.tolist()


def test_a_batch_is_a_function_of_stream_and_step():
  late = lm_data.rows_of_batch(100, 7, (5, 1), 40).tolist()
  lm_data._permutation.cache_clear()
  assert lm_data.rows_of_batch(100, 7, (5, 1), 40).tolist() == late
  for other in ((6, 1), (5, 0)):
    assert lm_data.rows_of_batch(100, 7, other, 40).tolist() != late
