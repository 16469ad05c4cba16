"""Tokenizers: text comes back, and ids are the published ones."""

import json
import os
from pathlib import Path

import pytest
from jaxbo_models import tokenizers

TEXTS = ["", "Hello world", "  two  spaces\n\ttabs ", "naïve £5, 日本語 🙂", "a<|endoftext|>b</s>"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_come_back_as_text(text):
  tokenizer = tokenizers.ByteTokenizer()
  ids = tokenizer.encode(text)
  assert len(ids) == len(text.encode())
  assert all(i < 256 for i in ids)
  assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
  assert tokenizer.end_of_text == tokenizer.vocab_size - 1 == 256


def test_bytes_that_are_no_text_are_shown_as_such():
  assert tokenizers.ByteTokenizer().decode([104, 195]) == "h�"


def check_what_is_refused(tokenizer):
  """A lone surrogate is not a character, and an id beyond the last one not a token."""
  with pytest.raises(ValueError, match=r"text must not have lone .* '\\ud800' at position 2"):
    tokenizer.encode("ab\ud800")
  last = tokenizer.vocab_size - 1
  tokenizer.decode([0, last])
  for i in (last + 1, 10**6, -1):
    with pytest.raises(ValueError, match=rf"ids must be those .*, got {i} at position 1"):
      tokenizer.decode([0, i])


def test_bytes_refuse_what_they_do_not_know():
  check_what_is_refused(tokenizers.ByteTokenizer())


@pytest.fixture(params=["tokenizer.json", "vocab.json"])
def folder(request, tmp_path):
  """A small tokenizer, as one file or as two."""
  from tokenizers import ByteLevelBPETokenizer

  trained = ByteLevelBPETokenizer()
  trained.train_from_iterator(
    ["low lower lowest hello world"] * 3,
    vocab_size=270,
    special_tokens=["<|endoftext|>"],
    show_progress=False,
  )
  if request.param == "tokenizer.json":
    trained.enable_truncation(5)  # Saved along; no text may be cut off, and none be filled up.
    trained.enable_padding(length=5)
    trained.save(str(tmp_path / "tokenizer.json"))
  else:
    trained.save_model(str(tmp_path))
  return tmp_path


def test_pairs_come_back_as_text(folder):
  tokenizer = tokenizers.BPETokenizer(folder)
  assert (tokenizer.end_of_text, tokenizer.vocab_size) == (0, 270)
  assert len(tokenizer.encode("lower")) < 5
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert max(ids, default=0) < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text


def test_pairs_refuse_what_they_do_not_know(folder):
  check_what_is_refused(tokenizers.BPETokenizer(folder))


def test_the_end_of_a_text_is_read_from_the_folder(folder):
  with pytest.raises(ValueError, match=r"end_of_text must be given where .* names no eos_token"):
    tokenizers.BPETokenizer(folder, end_of_text=None)
  for named in ("<|endoftext|>", {"content": "<|endoftext|>", "special": True}):
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    assert tokenizers.BPETokenizer(folder, end_of_text=None).end_of_text == 0


def test_missing_files_and_tokens_are_refused(folder, tmp_path):
  with pytest.raises(ValueError, match=r"end_of_text must be a token of .*, got '</s>'"):
    tokenizers.BPETokenizer(folder, end_of_text="</s>")
  (tmp_path / "empty").mkdir()
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer: Model missing"):
    tokenizers.BPETokenizer(tmp_path / "broken")
  with pytest.raises(FileNotFoundError, match=r"empty must have tokenizer\.json, vocab\.json and"):
    tokenizers.BPETokenizer(tmp_path / "empty")


GPT2 = Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).parent / "gpt2_bpe"


@pytest.mark.skipif(not GPT2.exists(), reason="there is no gpt2_bpe beside TFDS_DATA_DIR")
def test_gpt2_has_its_published_ids():
  tokenizer = tokenizers.BPETokenizer(GPT2)
  assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
  assert tokenizer.encode("Hello world") == [15496, 995]
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
