"""Scores of captions: published programs' numbers, other packages, and what must hold."""

import json
import math
import pathlib
import random
import shutil
import stat

import numpy as np
import pytest
from jaxbo_models import caption_metrics
from jaxbo_models.vocabulary import Vocabulary

from tests.cases import cases

pytestmark = pytest.mark.slow  # All together, not each.

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "captions.json").read_text())
CANDIDATES = [text.split() for text in GOLDEN["candidates"]]
REFERENCES = [[text.split() for text in of_image] for of_image in GOLDEN["references"]]


def test_scores_are_those_of_pycocoevalcap():
  np.testing.assert_allclose(
    caption_metrics.bleu(CANDIDATES, REFERENCES), GOLDEN["bleu"], rtol=1e-12
  )
  for name in ("rouge_l", "cider_d"):
    score = getattr(caption_metrics, name)(CANDIDATES, REFERENCES)
    np.testing.assert_allclose(score, GOLDEN[name], rtol=1e-12, atol=1e-14, err_msg=name)


def test_bleu_is_that_of_sacrebleu():
  sacrebleu = pytest.importorskip("sacrebleu")
  columns = [[refs[min(i, len(refs) - 1)] for refs in GOLDEN["references"]] for i in range(5)]
  for n, ours in enumerate(caption_metrics.bleu(CANDIDATES, REFERENCES), start=1):
    theirs = sacrebleu.BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True)
    assert theirs.corpus_score(GOLDEN["candidates"], columns).score == pytest.approx(100 * ours)


def test_bleu_is_that_of_nltk():
  nltk = pytest.importorskip("nltk.translate.bleu_score")
  long = [i for i, tokens in enumerate(CANDIDATES) if len(tokens) >= 4]  # Others count as such.
  candidates, references = [CANDIDATES[i] for i in long], [REFERENCES[i] for i in long]
  for n, ours in enumerate(caption_metrics.bleu(candidates, references), start=1):
    theirs = nltk.corpus_bleu(references, candidates, weights=[1 / n] * n)
    assert theirs == pytest.approx(ours)


def test_bleu_clips_counts_and_punishes_short_captions():
  assert caption_metrics.bleu([["the"] * 4], [[["the", "cat"]]], max_order=1) == pytest.approx(0.25)
  short = caption_metrics.bleu([["the"]], [[["the", "cat", "sat"]]], max_order=1)
  assert short == pytest.approx(math.exp(1 - 3))
  # Of references that are equally close in length the shorter one counts.
  tie = caption_metrics.bleu([["a", "b"]], [[["a", "b", "c"], ["b"]]], max_order=1)
  assert tie == pytest.approx(1)


def test_a_copy_of_the_only_reference_has_the_best_scores():
  captions = [f"a w{i} w{i + 1} cross".split() for i in range(5)]  # No 4-gram twice.
  references = [[caption] for caption in captions]
  np.testing.assert_allclose(caption_metrics.bleu(captions, references), 1)
  np.testing.assert_allclose(caption_metrics.rouge_l(captions, references), 1)
  np.testing.assert_allclose(caption_metrics.cider_d(captions, references), 10)
  assert caption_metrics.exact_match(captions, references).all()
  summary = caption_metrics.summary(captions, references)
  assert summary == pytest.approx(
    {f"bleu_{n}": 1 for n in (1, 2, 3, 4)} | {"rouge_l": 1, "cider_d": 10, "exact_match": 1}
  )


def test_one_of_several_references_one_image_and_shared_ngrams_score_less():
  first, second = (
    ["a", "red", "cross", "left", "of", "a", "cube"],
    ["the", "blue", "circle", "above", "one", "line"],
  )
  scores = caption_metrics.cider_d([first, second], [[first, second], [second]])
  assert scores[0] < 10  # A copy of one of two,
  assert scores[1] < scores[0]  # and n-grams of all images count nothing.
  assert caption_metrics.cider_d([first], [[first]]) == [0]  # ln 1 = 0.


def test_scores_do_not_depend_on_the_order_of_images_but_cider_on_which_there_are():
  order = random.Random(1).sample(range(40), 40)
  shuffled = [CANDIDATES[i] for i in order], [REFERENCES[i] for i in order]
  for name in ("rouge_l", "cider_d"):
    score = getattr(caption_metrics, name)
    np.testing.assert_allclose(score(*shuffled), score(CANDIDATES, REFERENCES)[order])
  np.testing.assert_allclose(
    caption_metrics.bleu(*shuffled), caption_metrics.bleu(CANDIDATES, REFERENCES)
  )
  part = caption_metrics.cider_d(CANDIDATES[:20], REFERENCES[:20])
  assert abs(part - caption_metrics.cider_d(CANDIDATES, REFERENCES)[:20]).max() > 0.01


def test_rouge_takes_the_maxima_of_precision_and_recall_on_their_own():
  # The first reference has the better precision, 2 / 2, and the second the better recall, 1 / 1.
  score = caption_metrics.rouge_l([["a", "b"]], [[["a", "b", "c", "d", "e"], ["a"]]])
  assert score == pytest.approx(1)
  assert caption_metrics.rouge_l([["a"], []], [[["b"]], [["a"]]]).tolist() == [0, 0]
  longer = [caption_metrics.rouge_l([list("abcd"[:k])], [[list("abcdef")]])[0] for k in range(5)]
  assert longer == sorted(longer)


def test_rouge_takes_no_words_for_one_empty_word_as_the_published_program_does():
  pairs = (([], [[]], 1), ([], [["a"], []], 1), (["a"], [[]], 0), ([], [["a"]], 0))
  for candidate, references, expected in pairs:
    assert caption_metrics.rouge_l([candidate], [references]) == [expected]


def test_signs_handles_addresses_and_emoji_are_those_of_the_ptb_tokenizer():
  for text, tokens in (
    ("It costs \u20ac5, \u00a33.50 or 20\u00a2", "it costs $ 5 # 3.50 or 20 cents"),
    ("@some_one likes #dogs, see www.dogs.org/a-b.", "@some_one likes #dogs see www.dogs.org/a-b"),
    ("(from https://a.b/c?d=1)", "-lrb- from https://a.b/c?d=1 -rrb-"),
    ("A dog \U0001f436\U0001f3fd!", "a dog"),
    ("# 1 @ 5", "# 1 @ 5"),
  ):
    assert caption_metrics.tokenize(text) == tokens.split()


def test_a_reward_scores_any_captions_of_any_images_with_given_frequencies():
  frequencies = caption_metrics.DocumentFrequencies.of(REFERENCES)
  reward = caption_metrics.CiderD(REFERENCES[:10], frequencies)
  whole = caption_metrics.cider_d(CANDIDATES, REFERENCES)
  np.testing.assert_allclose(reward(CANDIDATES[:10]), whole[:10])
  images = np.array([3, 3, 7])
  np.testing.assert_allclose(reward([CANDIDATES[i] for i in images], images), whole[images])
  with pytest.raises(ValueError, match="images must say of which image each of 1 captions"):
    reward(CANDIDATES[:1], images)


def test_ids_are_as_good_as_words():
  ids = Vocabulary.build([t for of_image in REFERENCES for t in of_image] + CANDIDATES)
  number = lambda words: ids.encode(words)[1:-1].tolist()
  references = [[number(t) for t in of_image] for of_image in REFERENCES]
  candidates = [number(t) for t in CANDIDATES]
  assert caption_metrics.summary(candidates, references) == pytest.approx(
    caption_metrics.summary(CANDIDATES, REFERENCES)
  )


@pytest.mark.parametrize("text, tokens", GOLDEN["tokens"])
def test_tokens_are_those_of_the_ptb_tokenizer(text, tokens):
  assert caption_metrics.tokenize(text) == tokens.split()


@cases("name", ["bleu", "rouge_l", "cider_d", "exact_match", "meteor", "spice"])
def test_bad_input_says_what_is_wrong(name):
  score = getattr(caption_metrics, name)
  with pytest.raises(ValueError, match="candidates must hold at least one caption"):
    score([], [])
  with pytest.raises(ValueError, match="must be of the same images, got 1 and 2"):
    score([["a"]], [[["a"]], [["b"]]])
  with pytest.raises(ValueError, match=r"references\[0\] must hold at least one caption"):
    score([["a"]], [[]])


def test_strings_are_no_tokens(as_users_run):
  with pytest.raises(TypeError, match="candidates must be sequences of tokens, got the string"):
    caption_metrics.bleu(["a dog"], [[["a", "dog"]]])
  with pytest.raises(TypeError, match=r"references\[0\] must be a list of sequences of tokens"):
    caption_metrics.rouge_l([["a", "dog"]], [["a dog"]])


def test_java_scores_say_why_they_are_skipped(tmp_path, monkeypatch):
  for score, name in ((caption_metrics.meteor, "METEOR"), (caption_metrics.spice, "SPICE")):
    with monkeypatch.context() as patch:
      patch.setenv("PATH", str(tmp_path / name))
      (tmp_path / name).mkdir()
      skipped = score(CANDIDATES, REFERENCES)
      assert math.isnan(skipped.value)
      assert skipped.reason == f"{name} was skipped: there is no java"
      java = tmp_path / name / "java"
      java.write_text("#!/bin/sh\nexit 3\n")
      java.chmod(java.stat().st_mode | stat.S_IXUSR)
      jar = tmp_path / "nowhere.jar"
      assert str(jar) in score(CANDIDATES, REFERENCES, jar=jar).reason
      jar = tmp_path / "some.jar"
      for file in ("some.jar", "data/paraphrase-en.gz", "lib/stanford-corenlp-3.6.0.jar",
                   "lib/stanford-corenlp-3.6.0-models.jar"):  # fmt: skip
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
      failed = score(CANDIDATES, REFERENCES, jar=jar)
      assert "exit status 3" in failed.reason
      assert len(failed.per_caption) == 0


def test_what_java_programs_should_not_say_is_the_reason(tmp_path, monkeypatch):
  for file in ("it.jar", "data/paraphrase-en.gz", "lib/stanford-corenlp-3.6.0.jar",
               "lib/stanford-corenlp-3.6.0-models.jar"):  # fmt: skip
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
  monkeypatch.setenv("PATH", str(tmp_path))
  java, jar = tmp_path / "java", tmp_path / "it.jar"
  java.touch()
  java.chmod(java.stat().st_mode | stat.S_IXUSR)
  for score, output, reason in (
    (caption_metrics.meteor, "Error: no model", "could not convert string to float"),
    (caption_metrics.meteor, "", "not enough values to unpack"),
    (caption_metrics.meteor, "0.5", "it.jar gave 1 numbers"),
    (caption_metrics.meteor, "\udcff", "can't decode byte"),
    (caption_metrics.spice, "[]", "did not give a score for each image: KeyError"),
    (caption_metrics.spice, "{}", "did not give a score for each image: KeyError"),
    (caption_metrics.spice, "[3]", "did not give a score for each image: TypeError"),
    (caption_metrics.spice, '[{"image_id": 0, "scores": {}}]', "each image: KeyError"),
    (caption_metrics.spice, '[{"image_id": 0, "scores": {"All": {"f": null}}}]', "TypeError"),
    (caption_metrics.spice, "Error: no model", "Expecting value"),
  ):
    java.write_text(
      "#!/usr/bin/python3\nimport os, sys\n"
      f"output = {output!r}.encode(errors='surrogateescape')\n"
      "out = sys.argv[sys.argv.index('-out') + 1] if '-out' in sys.argv else 1\n"
      "open(out, 'wb').write(output)\n"
    )
    skipped = score([["a", "b"]], [[["a", "b"]]], jar=jar)
    assert reason in skipped.reason
    assert math.isnan(skipped.value)
    assert len(skipped.per_caption) == 0


def test_java_programs_are_asked_and_answered(tmp_path, monkeypatch):
  """With programs that stand in for the real ones: 5 words, 0.25 each, 0.5 in all."""
  java = tmp_path / "java"
  java.write_text(
    "#!/usr/bin/python3\n"
    "import json, sys\n"
    "if '-stdio' in sys.argv:\n"
    "  for line in sys.stdin.read().splitlines():\n"
    "    kind, *parts = line.split(' ||| ')\n"
    "    if kind == 'SCORE':\n"
    "      print(len(parts), parts[-1].replace(' ', '_'))\n"
    "    else:\n"
    "      print('\\n'.join(['0.25'] * len(parts) + ['0.5']))\n"
    "else:\n"
    "  images = json.load(open(sys.argv[4]))\n"
    "  f = [{'image_id': i['image_id'], 'scores': {'All': {'f': len(i['refs']) / 10}}}\n"
    "       for i in images]\n"
    "  json.dump(f[::-1], open(sys.argv[sys.argv.index('-out') + 1], 'w'))\n"
  )
  java.chmod(java.stat().st_mode | stat.S_IXUSR)
  for folder in ("data", "lib"):
    (tmp_path / folder).mkdir()
  for file in ("it.jar", "data/paraphrase-en.gz", "lib/stanford-corenlp-3.6.0.jar",
               "lib/stanford-corenlp-3.6.0-models.jar"):  # fmt: skip
    (tmp_path / file).touch()
  monkeypatch.setenv("PATH", str(tmp_path))
  broken = [["a\n", "dog\r\n"], *CANDIDATES[1:]]  # Lines are captions to the program.
  meteor = caption_metrics.meteor(broken, REFERENCES, jar=tmp_path / "it.jar")
  assert (meteor.value, meteor.reason) == (0.5, "")
  assert meteor.per_caption.tolist() == [0.25] * 40
  spice = caption_metrics.spice(CANDIDATES, REFERENCES, jar=tmp_path / "it.jar")
  assert spice.per_caption.tolist() == [len(of_image) / 10 for of_image in REFERENCES]
  assert spice.value == pytest.approx(np.mean(spice.per_caption))


def test_meteor_is_that_of_pycocoevalcap():
  pytest.importorskip("pycocoevalcap")
  if shutil.which("java") is None:
    pytest.skip("there is no java")
  score = caption_metrics.meteor(CANDIDATES, REFERENCES)
  assert score.reason == ""
  np.testing.assert_allclose([score.value, *score.per_caption], GOLDEN["meteor"], rtol=1e-9)


def test_a_vocabulary_has_frequent_words_and_ends(tmp_path):
  captions = [["a", "dog"], ["a", "cat"], ["a", "dog"], ["the", "cat", "cat"]]
  vocabulary = Vocabulary.build(captions, min_count=2)
  assert vocabulary.words == ("<pad>", "<bos>", "<eos>", "<unk>", "a", "cat", "dog")
  assert len(vocabulary) == 7
  ids = vocabulary.encode(["the", "dog"], length=6)
  assert ids.tolist() == [1, 3, 6, 2, 0, 0]
  assert ids.dtype == np.int32
  assert vocabulary.encode(["a"] * 9, length=5).tolist() == [1, 4, 4, 4, 2]
  assert vocabulary.encode(["a", "dog"]).tolist() == [1, 4, 6, 2]
  assert vocabulary.decode([1, 4, 6, 2, 5]) == ["a", "dog"]
  path = tmp_path / "vocabulary.json"
  vocabulary.save(path)
  assert Vocabulary.load(path).words == vocabulary.words


@cases(
  "call, message",
  [
    (lambda v: v.encode([]), "caption must have at least one word, got none"),
    (lambda v: v.encode(["dog"]), "caption must consist of known words, got 'dog'"),
    (lambda v: v.encode(["a"], length=2), "length must be at least 3"),
    (lambda v: v.decode([1, 4]), r"ids must be in \[0, 3\], got 4"),
    (lambda v: Vocabulary(["a"]), "words must begin with"),
    (
      lambda v: Vocabulary(["<pad>", "<bos>", "<eos>", "a", "<unk>"]),
      "words must have '<unk>' at position 3 or not at all, got it at 4",
    ),
    (lambda v: Vocabulary([*v.words, "a"]), "words must be different, got 'a' twice"),
    (lambda v: Vocabulary.build([], min_count=0), "min_count must be at least 1, got 0"),
  ],
)
def test_bad_input_of_a_vocabulary_says_what_is_allowed(call, message):
  with pytest.raises(ValueError, match=message):
    call(Vocabulary(["<pad>", "<bos>", "<eos>", "a"]))


def test_a_string_is_not_a_list_of_words(as_users_run):
  with pytest.raises(TypeError, match="caption must be a sequence of words, got the string 'a re"):
    Vocabulary.build(["a red dog"])
  with pytest.raises(TypeError, match="caption must be a sequence of words, got the string 'a'"):
    Vocabulary.build([["a"]]).encode("a")


def test_padding_beginning_and_end_are_unknown_words_inside_captions():
  vocabulary = Vocabulary.build([["a", "red", "<eos>"]])
  for word in ("<pad>", "<bos>", "<eos>", "<unk>"):
    ids = vocabulary.encode(["a", word, "red"])
    assert ids.tolist() == [1, 4, 3, 5, 2]
    assert vocabulary.decode(ids) == ["a", "<unk>", "red"]
  with pytest.raises(ValueError, match="caption must consist of known words, got '<eos>'"):
    Vocabulary(["<pad>", "<bos>", "<eos>", "a"]).encode(["a", "<eos>"])


def test_words_as_frequent_are_in_alphabetical_order_and_no_negative_id_is_decoded():
  vocabulary = Vocabulary.build([["b", "c", "a", "c"]])
  assert vocabulary.words[4:] == ("c", "a", "b")
  with pytest.raises(ValueError, match="got -1"):
    vocabulary.decode([1, 4, -1])
