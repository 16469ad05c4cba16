"""Instructions: a user's files, the sets that there are, templates, and no leaks between parts."""

import json
import os

import pytest

from scripts.continual_lm import documents, instructions, user_files
from scripts.continual_lm.instructions import Example


def user(prompt, response):
  return Example((("user", prompt),), response)


def lines(tmp_path, *records):
  path = tmp_path / "mine.jsonl"
  path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
  return path


# -- Files of a user.


def test_passages_between_blank_lines_are_documents(tmp_path):
  path = tmp_path / "tales.txt"
  path.write_text("One,\ntwo.\n  \nThree.\n\n\n\n  Four.\n")
  assert list(user_files.texts(path)) == [
    ("tales", "One,\ntwo."),
    ("tales", "Three."),
    ("tales", "  Four."),
  ]


def test_records_have_text_and_may_have_a_domain(tmp_path):
  path = lines(tmp_path, {"text": "a"}, "", {"text": "b", "domain": "law", "id": 3})
  assert list(user_files.texts(path)) == [("mine", "a"), ("law", "b")]


def test_a_users_texts_are_divided_domain_by_domain(tmp_path):
  path = lines(tmp_path, *({"text": f"{d} {i}", "domain": d} for i in range(20) for d in "ab"))
  corpus = documents.read(str(path))
  assert corpus.domains == ("a", "b")
  assert corpus.validation == [["a 5", "a 15"], ["b 5", "b 15"]]
  assert corpus.test == [["a 0", "a 10"], ["b 0", "b 10"]]
  assert [len(texts) for texts in corpus.train] == [16, 16]
  path = lines(tmp_path, *({"text": str(i % 5)} for i in range(9)))
  with pytest.raises(ValueError, match=r"at least 6 different documents .*; got 5 of mine"):
    documents.read(str(path))


def test_a_response_follows_a_prompt_or_messages(tmp_path):
  said = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "Sure?")]
  messages = [{"role": role, "content": text} for role, text in (*said, ("assistant", "Yes."))]
  path = lines(tmp_path, {"prompt": "p", "response": "r"}, {"messages": messages, "domain": "x"})
  assert list(user_files.turns(path)) == [
    ("mine", (("user", "p"),), "r"),
    ("x", tuple(said), "Yes."),
  ]


@pytest.mark.parametrize(
  "bad, message",
  [
    ("{'a': 1}", "mine.jsonl, line 2 is not JSON: Expecting property name"),
    ([1], r"line 2 must be an object, got \[1\]"),
    ({"prompt": "p"}, r"line 2: response must be a text .*, got only the fields \['prompt'\]"),
    ({"prompt": 3, "response": "r"}, "line 2: prompt must be a text that is not empty, got 3"),
    ({"prompt": " ", "response": "r"}, 'line 2: prompt must be a text .* empty, got " "'),
    ({"messages": "p"}, 'line 2: messages must be a list of at least 2, got "p"'),
    ({"messages": [{"role": "user"}, 2]}, "line 2, message 1: content must be a text"),
    (
      {"messages": 2 * [{"role": "user", "content": "x"}]},
      "line 2: the role of the last message must be assistant, got 'user'",
    ),
    ({"prompt": "p", "response": "r", "domain": ""}, "line 2: domain must be a text"),
  ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
  path = lines(tmp_path, {"prompt": "p", "response": "r"}, bad)
  with pytest.raises(ValueError, match=message):
    list(user_files.turns(path))


# -- Sets.


def test_a_prompt_that_is_there_twice_counts_once_and_the_test_part_keeps_it():
  examples = [user(f"p{i}", "r") for i in range(11)]
  train, validation, test = instructions._parts([*examples, user("p3", "s")], [user("p0", "t")] * 2)
  assert test == [user("p0", "t")]
  assert validation == [examples[6]]  # The sixth of those that are left.
  assert train == [one for i, one in enumerate(examples) if i not in (0, 6)]
  train, validation, test = instructions._parts(examples, None)
  assert (validation, test) == ([examples[5]], [examples[0], examples[10]])
  assert len(train) == 8


def test_of_several_sets_each_is_a_domain(tmp_path):
  path = lines(tmp_path, *({"prompt": f"{i}", "response": "r"} for i in range(10)))
  other = tmp_path / "other.jsonl"
  other.write_text(path.read_text().replace('"r"}', '"s", "domain": "d"}'))
  corpus = instructions.read([str(path), str(other)])
  assert corpus.domains == ("mine", "other")
  assert corpus.test == [[user("0", "r")], [user("0", "s")]]
  assert [len(examples) for examples in corpus.train] == [8, 8]
  assert instructions.read([str(other)]).domains == ("d",)
  (tmp_path / "folder").mkdir()
  again = other.rename(tmp_path / "folder" / "mine.jsonl")
  with pytest.raises(ValueError, match="instructions must have different names, got mine mine"):
    instructions.read([str(path), str(again)])


SOURCE = '''
class A:
  def run(self, x: int=1):
    """Runs e.g. version 3.5 of
    it. And more.

    Details."""
  async def stop(self):
    """Stops"""
  def hidden(self):
    return 1
'''


def test_an_example_is_a_signature_and_its_first_sentence(tmp_path):
  (tmp_path / "a.py").write_text(SOURCE)
  assert instructions.functions(tmp_path / "a.py") == [
    user("def run(self, x: int=1)", "Runs e.g. version 3.5 of it."),
    user("def stop(self)", "Stops"),
  ]


def test_documented_functions_are_divided_by_files_as_the_text_is(tmp_path, monkeypatch):
  """No text that is trained on has what is held out; no signature or sentence is there twice."""
  texts = {"docstrings": {}, "code": {}}
  for kind, folder in (("docstrings", ""), ("code", "asyncio/"), ("code", "json/")):
    (tmp_path / folder).mkdir(exist_ok=True)
    for i in range(20):
      name = f"{folder}m{i:02}.py"
      sentence = f"Does {name}" if i != 1 else f"Does {folder}m00.py"  # Of a file for testing.
      (tmp_path / name).write_text(f'def f_{folder[:-1]}{i}():\n  "{sentence}"\n')
      texts[kind][name] = name
  monkeypatch.setattr(documents, "library_texts", lambda: texts)
  monkeypatch.setattr(instructions.sysconfig, "get_path", lambda _: tmp_path)
  corpus = instructions.docstrings()
  assert corpus.domains == ("modules", "network", "tools")
  names = lambda part: [[one.response[5:] for one in of_domain] for of_domain in part]
  trained, held, tested = names(corpus.train), names(corpus.validation), names(corpus.test)
  assert tested == [
    [f"{folder}m{i}.py" for i in ("00", "10")] for folder in ("", "asyncio/", "json/")
  ]
  assert held == [
    [f"{folder}m{i}.py" for i in ("05", "15")] for folder in ("", "asyncio/", "json/")
  ]
  assert [len(of_domain) for of_domain in trained] == [15, 15, 15]
  corpus = documents._every_tenth(texts)
  assert {name for of in corpus.train for name in of} >= {name for of in trained for name in of}
  assert {name for of in corpus.test for name in of} == {name for of in tested for name in of}


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs data sets in TFDS_DATA_DIR")
def test_problems_and_tasks_are_read():
  corpus = instructions.read(["gsm8k", "self_instruct_seed"])
  assert corpus.domains == ("gsm8k", "self_instruct_seed")
  sizes = [[len(examples) for examples in part] for part in corpus[1:]]
  assert sizes[2] == [1319, 252]
  assert sizes[1] == [747, 17]
  assert 6700 < sizes[0][0] <= 6726
  prompts = [one.turns for part in corpus[1:] for of_domain in part for one in of_domain]
  assert len(prompts) == len(set(prompts))
  for one in corpus.test[0]:
    assert "<<" not in one.response
    assert "\n#### " in one.response
  assert all(one.response for one in corpus.train[1])


def test_a_missing_set_says_what_is_expected(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no self_instruct_seed in[^$]*user-oriented"):
    instructions.read(["self_instruct_seed"], tmp_path)


def test_a_template_writes_what_stands_before_the_response():
  example = Example((("system", "Be brief."), ("user", "2 + 2?")), "4")
  assert instructions.prompt_of(example, "plain") == "Be brief.\n2 + 2?\n"
  chat = "<|system|>\nBe brief.\n<|user|>\n2 + 2?\n<|assistant|>\n"
  assert instructions.prompt_of(example, "chat") == chat
