"""Tokenizers from text to ids and back."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any


class ByteTokenizer:
  """Maps a text to the ids of its UTF-8 bytes; one more id marks the end of a text.

  >>> tokenizer = ByteTokenizer()
  >>> tokenizer.encode("né")
  [110, 195, 169]
  >>> tokenizer.decode([110, 195, 169, tokenizer.end_of_text])
  'né'

  Attributes:
    vocab_size: the number of ids, 257.
    end_of_text: the id of the end of a text, 256.
  """

  vocab_size: int = 257
  end_of_text: int = 256

  def encode(self, text: str) -> list[int]:
    """Returns the ids of ``text``, without ``end_of_text``.

    Raises:
      ValueError: ``text`` has a lone surrogate, which is not a character.
    """
    return list(_encoded(text))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ``ids`` without ``end_of_text``; invalid UTF-8 becomes U+FFFD.

    Raises:
      ValueError: an id is not in [0, 256].
    """
    _check_ids(ids, lambda i: i < self.vocab_size)
    return bytes(i for i in ids if i != self.end_of_text).decode(errors="replace")


class BPETokenizer:
  """GPT-2's byte-pair encoding, or the encoding in a ``tokenizer.json``, read from local files.

  Install ``jaxbo-models[huggingface]`` for the package tokenizers, which does the work.

  >>> tokenizer = BPETokenizer("gpt2_bpe")  # doctest: +SKIP
  >>> tokenizer.encode("Hello world")  # doctest: +SKIP
  [15496, 995]

  The name of a special token in a text is encoded as ordinary text, so that no document can contain
  an end of text. This is our choice; transformers encodes the name as the special token.

  Args:
    path: a folder with ``tokenizer.json`` (Pythia, GPT-2, Llama, Qwen), with ``vocab.json`` and
      ``merges.txt`` (GPT-2, OPT), or with ``encoder.json`` and ``vocab.bpe`` (GPT-2, as OpenAI
      published it). :meth:`save` writes ``tokenizer.json``.
    end_of_text: the special token that ends a text, such as ``"</s>"`` for OPT. None for the token
      that ``tokenizer_config.json`` in the folder calls ``eos_token``.

  Attributes:
    vocab_size: the number of ids. A model may have more: Pythia pads its vocabulary.
    end_of_text: the id of the token that ends a text.

  Raises:
    FileNotFoundError: the folder has none of these sets of files.
    ValueError: ``end_of_text`` is not a token, or is None and no file names one; or
      ``tokenizer.json`` is broken.
  """

  vocab_size: int
  end_of_text: int

  def __init__(self, path: str | pathlib.Path, end_of_text: str | None = "<|endoftext|>"):
    self._tokenizer = _read(pathlib.Path(path))
    end_of_text = _named_end(pathlib.Path(path)) if end_of_text is None else end_of_text
    end = self._tokenizer.token_to_id(end_of_text)
    if end is None:
      raise ValueError(f"end_of_text must be a token of {path}, got {end_of_text!r}")
    self._tokenizer.add_special_tokens([end_of_text])
    self._tokenizer.encode_special_tokens = True
    self.vocab_size = self._tokenizer.get_vocab_size()
    self.end_of_text = end

  def save(self, path: str | pathlib.Path) -> None:
    """Writes ``tokenizer.json`` into a folder, for this class and for transformers."""
    self._tokenizer.save(str(pathlib.Path(path) / "tokenizer.json"))

  def encode(self, text: str) -> list[int]:
    """Returns the ids of ``text``, without tokens for its beginning or end.

    Raises:
      ValueError: ``text`` has a lone surrogate, which is not a character.
    """
    _encoded(text)
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ``ids`` without special tokens; invalid UTF-8 becomes U+FFFD.

    Raises:
      ValueError: an id is not one of this tokenizer.
    """
    _check_ids(ids, lambda i: self._tokenizer.id_to_token(i) is not None)
    return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _encoded(text: str) -> bytes:
  """Returns the bytes of a text in UTF-8."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"text must not have lone surrogates, got {text[error.start]!r} at position {error.start}"
    ) from None


def _check_ids(ids: Sequence[int], is_known: Callable[[int], bool]) -> None:
  """Raises ``ValueError`` if an id is negative or unknown."""
  for place, i in enumerate(map(int, ids)):
    if i < 0 or not is_known(i):
      raise ValueError(f"ids must be those of the tokenizer, got {i} at position {place}")


def _named_end(path: pathlib.Path) -> str:
  """The end of a text by ``tokenizer_config.json``, where it is a string or has a content."""
  file = path / "tokenizer_config.json"
  named = json.loads(file.read_text()).get("eos_token") if file.exists() else None
  token = named.get("content") if isinstance(named, dict) else named
  if token is None:
    raise ValueError(f"end_of_text must be given where {file} names no eos_token")
  return token


def _read(path: pathlib.Path) -> Any:
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  if (path / "tokenizer.json").exists():
    try:
      tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # The package raises plain Exception.
      raise ValueError(f"{path / 'tokenizer.json'} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()  # The file saves both settings; they would cut off or add ids.
    tokenizer.no_padding()
    return tokenizer
  for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
    if (path / vocabulary).exists() and (path / merges).exists():
      model = models.BPE.from_file(str(path / vocabulary), str(path / merges))
      tokenizer = Tokenizer(model)
      tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
      tokenizer.decoder = decoders.ByteLevel()
      return tokenizer
  raise FileNotFoundError(
    f"{path} must have tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe"
  )
