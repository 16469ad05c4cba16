"""Tokenizers: text to ids and back."""

import pathlib
from collections.abc import Sequence
from typing import Any


class ByteTokenizer:
  """The bytes of UTF-8, and one more id for the end of a text.

  >>> tokenizer = ByteTokenizer()
  >>> tokenizer.encode("né")
  [110, 195, 169]
  >>> tokenizer.decode([110, 195, 169, tokenizer.end_of_text])
  'né'

  Attributes:
    vocab_size: 257.
    end_of_text: 256.
  """

  vocab_size: int = 257
  end_of_text: int = 256

  def encode(self, text: str) -> list[int]:
    """The ids of ``text``, without an end."""
    return list(text.encode())

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ``ids``; ends are left out, and bytes that are no UTF-8 become U+FFFD."""
    return bytes(i for i in ids if i != self.end_of_text).decode(errors="replace")


class BPETokenizer:
  """Byte-pair encoding as in GPT-2, from local files, by the package tokenizers.

  It comes with ``jaxbo-models[huggingface]``.

  >>> tokenizer = BPETokenizer("gpt2_bpe")  # doctest: +SKIP
  >>> tokenizer.encode("Hello world")  # doctest: +SKIP
  [15496, 995]

  Text is text: the name of a special token in it is encoded letter by letter, so that no document
  can end another. This is our choice; transformers reads it as the token.

  Args:
    path: a folder with ``tokenizer.json`` (Pythia, GPT-2), with ``vocab.json`` and ``merges.txt``
      (GPT-2, OPT), or with ``encoder.json`` and ``vocab.bpe`` (GPT-2, as OpenAI published it).
    end_of_text: the special token that ends a text: ``"</s>"`` for OPT.

  Attributes:
    vocab_size: how many ids there are. A model may have more: Pythia's are padded.
    end_of_text: the id of that token.

  Raises:
    FileNotFoundError: the folder has none of these files.
    ValueError: there is no token ``end_of_text``, or ``tokenizer.json`` is broken.
  """

  vocab_size: int
  end_of_text: int

  def __init__(self, path: str | pathlib.Path, end_of_text: str = "<|endoftext|>"):
    self._tokenizer = _read(pathlib.Path(path))
    end = self._tokenizer.token_to_id(end_of_text)
    if end is None:
      raise ValueError(f"end_of_text must be a token of {path}, got {end_of_text!r}")
    self._tokenizer.add_special_tokens([end_of_text])
    self._tokenizer.encode_special_tokens = True
    self.vocab_size = self._tokenizer.get_vocab_size()
    self.end_of_text = end

  def encode(self, text: str) -> list[int]:
    """The ids of ``text``, without a beginning or an end."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ``ids``; ends are left out, and bytes that are no UTF-8 become U+FFFD."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _read(path: pathlib.Path) -> Any:
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  if (path / "tokenizer.json").exists():
    try:
      tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # The package raises no other.
      raise ValueError(f"{path / 'tokenizer.json'} is no tokenizer: {error}") from error
    tokenizer.no_truncation()  # These are saved along, and would cut off or add ids.
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
