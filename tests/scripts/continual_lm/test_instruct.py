"""Instruction tuning, whole: columns, weights of examples, resuming, chosen rates."""

import contextlib
import io
import json

import numpy as np
import pandas as pd
import pytest

from scripts.common import folder, study
from scripts.common.folder import RunFolder
from scripts.common.study import Results, Run
from scripts.continual_lm import model, runs, tuning
from scripts.continual_lm.__main__ import ContinualLM
from scripts.continual_lm.config import Config
from scripts.continual_lm.documents import DATASETS
from scripts.continual_lm.methods import START, START_KEY
from scripts.continual_lm.runs import Training
from scripts.continual_lm.tuning import Tuning
from tests.scripts.common.processes import some_devices, tables_of
from tests.scripts.common.stopped import programs_kept, stopped_after
from tests.scripts.continual_lm import small_lm
from tests.scripts.continual_lm.small_lm import SMALL

pytestmark = pytest.mark.slow  # All together, not each.

METHODS = ("uniform", "ir_dro")
RUNS = [(0.0, START), *((corruption, method) for corruption in (0.0, 0.25) for method in METHODS)]
SIZES = {"length": 64, "test_sequences": 5}


class Kept(ContinualLM):
  """The data are read, and evaluations compiled, once."""

  given = None

  def prepare(self, config):
    Kept.given = Kept.given or super().prepare(config)
    return Kept.given

  def draw(self, run):
    pass


class KeptTuning(Tuning):
  def prepare(self, config):
    return Kept.given


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Two domains of short questions, on one device."""
  path = tmp_path_factory.mktemp("instruct")
  word = lambda i: "abcdefghijklmnopqrst"[i % 20] * (1 + i // 20)
  # Long ones are alone in their rows.
  prompt = lambda i, d: f"{d} {i}" + i % 2 * 45 * "."
  record = lambda i, d: {"prompt": prompt(i, d), "response": word(i), "domain": d}
  lines = [json.dumps(record(i, d)) for i in range(60) for d in ("one", "two")]
  (path / "mine.jsonl").write_text("\n".join(lines))
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setitem(DATASETS, "python", small_lm.corpus)
    monkeypatch.setattr(runs.devices, "all_devices", lambda: some_devices(1))
    monkeypatch.setattr(Kept, "given", None)
    yield Config(
      **SMALL | SIZES,
      task="instruct",
      instructions=(str(path / "mine.jsonl"),),
      corruption_kind="swapped",
      corruptions=(0.0, 0.25),
      methods=METHODS,
      output_dir=path / "whole",
    )


@pytest.fixture(scope="module")
def programs():
  """What the runs of this file share."""
  return {}


@pytest.fixture(scope="module")
def whole(config, programs):
  """What a run has printed."""
  with programs_kept(programs), contextlib.redirect_stdout(io.StringIO()) as output:
    assert study.run(Kept(), config) == 0
  return output.getvalue()


def test_a_run_tells_responses_of_both_domains_calibration_and_choices(config, whole):
  lines, rows, notes = folder.read(config.output_dir)
  assert [(row["corruption"], row["method"]) for row in rows] == RUNS
  for row in rows:
    assert 0 < row["calibrated"] < row["loss"] + 1
    assert 0.5 <= row["calibration"] <= 4
    assert min(row["accuracy"], row["accuracy_by_gain"]) >= 0
    assert row["loss"] == pytest.approx((row["loss/one"] + row["loss/two"]) / 2)
  assert rows[1]["learning_rate"] == 3e-4
  assert not rows[1]["tuned"]
  assert np.isnan(rows[1]["temperature"])
  assert rows[2]["temperature"] == 1
  assert len({row["loss"] for row in rows}) == 5  # Every run has gone somewhere else.
  noise = [line["weight_noise"] for line in lines if line["corruption"] == 0.25]
  np.testing.assert_allclose(noise[:2], 1, rtol=1e-5)  # Uniform weights, of examples.
  assert notes["left_out"] == 0
  for words in ("mine, clean data: 4 steps of 8 sequences", "calibrated loss", "accuracy", "rates"):
    assert words in whole
  assert "with others' responses" in whole


def test_weights_are_those_of_examples(config, whole, programs, tmp_path):
  """Those of IR-DRO are a softmax over the examples; an empty place has none."""
  with contextlib.closing(RunFolder(config.but(output_dir=tmp_path), "", "")) as files:
    run = Run(Kept(), config, Kept.given, files)
  with programs_kept(programs):
    task = Training(run, None, corruption=0.25, method="ir_dro", seed=0)
    rows, _ = task.batch(0)
    _, (shown, _) = task.step(task.state, 0)
  there = task.sequences.domain[rows].reshape(-1) >= 0
  assert shown.losses.shape == there.shape == (8 * 2,)
  assert 8 < there.sum() < 16
  losses, weights = np.asarray(shown.losses, np.float64), np.asarray(shown.weights)
  expected = there * np.exp(losses - losses.max())
  np.testing.assert_allclose(weights, there.sum() * expected / expected.sum(), rtol=1e-4)
  clean, noisy = Kept.given.data.train, task.sequences
  assert round(noisy.corrupted.sum() / len(noisy.examples), 2) == 0.25
  assert not clean.corrupted.any()


def test_a_run_goes_on_bit_for_bit_where_it_was_stopped(config, whole, programs, tmp_path):
  again = config.but(output_dir=tmp_path / "stopped")
  with programs_kept(programs), contextlib.redirect_stdout(io.StringIO()):
    with stopped_after(8):  # Of the noisy runs the first one is at its last step.
      study.run(Kept(), again)
    assert study.run(Kept(), again.but(resume=True)) == 0
  for mine, theirs in zip(tables_of(again.output_dir), tables_of(config.output_dir), strict=True):
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


def test_another_run_goes_on_from_the_model_that_one_has_trained_first(
  config, whole, programs, tmp_path, monkeypatch
):
  again = config.but(pretrained=config.output_dir / "pretrained", output_dir=tmp_path)
  assert again.name() == config.name()
  language = model.make(again)
  monkeypatch.setattr(Kept, "given", Kept.given._replace(language=language))
  with programs_kept(programs), contextlib.redirect_stdout(io.StringIO()):
    assert study.run(Kept(), again.but(methods=("uniform",), corruptions=(0.0,))) == 0
  (_, known, _), (lines, found, _) = folder.read(config.output_dir), folder.read(tmp_path)
  assert [row["loss"] for row in found] == [row["loss"] for row in known[:2]]
  assert [line["method"] for line in lines] == ["uniform", "uniform"]  # No first phase.
  tokens = tmp_path / "other"
  tokens.mkdir()
  letters = {chr(300 + i): i for i in range(256)} | {"<|endoftext|>": 256}
  (tokens / "vocab.json").write_text(json.dumps(letters))
  (tokens / "merges.txt").write_text("#version: 0.2\n")
  assert model.make(config.but(tokenizer=tokens)).tokenizer.vocab_size == 257
  others = {"width": 16}, {"num_layers": 2}, {"architecture": "gpt2"}, {"tokenizer": tokens}
  for wrong in others:
    with pytest.raises(ValueError, match="must be those of the model in pretrained"):
      model.make(again.but(**wrong))


def test_the_first_phase_begins_with_short_pieces_of_the_same_rows(
  config, whole, programs, tmp_path, monkeypatch
):
  monkeypatch.setattr(runs, "SHORT", 4)
  with contextlib.closing(RunFolder(config.but(output_dir=tmp_path), "", "")) as files:
    run = Run(Kept(), config, Kept.given, files)
  with programs_kept(programs):
    task = Training(run, **START_KEY)
  (rows, begins), (_, goes_on) = task.batch(0), task.batch(1)  # Of two steps.
  np.testing.assert_array_equal(begins["tokens"], Kept.given.text.train.tokens[rows])
  np.testing.assert_array_equal(begins["segment_ids"], np.tile(np.arange(64) // 4, (8, 1)))
  assert not goes_on["segment_ids"].any()


def test_rates_are_chosen_on_validation_and_then_used(
  config, whole, programs, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(tuning, "FACTORS", (1.0,))
  monkeypatch.setattr(tuning, "TEMPERATURES", (1.0,))
  monkeypatch.setattr(tuning, "SEEDS", (0,))  # As the report: losses are known.
  tune = config.but(tune=True, output_dir=tmp_path, corruptions=(0.25,))
  with programs_kept(programs):
    assert study.run(KeptTuning(), tune) == 0
  assert "the learning rate 0.0003 is an end of the grid" in capsys.readouterr().out
  _, tried, _ = folder.read(tmp_path)
  with programs_kept(programs):
    assert study.run(KeptTuning(), tune.but(resume=True)) == 0
  assert str(folder.read(tmp_path)[1]) == str(tried)  # Every row is found again.
  assert "loss" not in tried[1]  # Nothing of the test part.
  lines, _, _ = folder.read(config.output_dir)
  known = {(one["corruption"], one["method"]): one["validation_loss"] for one in lines}
  for row in tried[1:]:
    assert row["validation_loss"] == known[row["corruption"], row["method"]]
  found = json.loads((tmp_path / "rates.json").read_text())
  rates = {"uniform": None, "ir_dro": 1.0}
  assert found == {
    "instruct/mine/llama-1x8-bytes": {
      name: {"0.25": {"learning_rate": 3e-4, "temperature": temperature}}
      for name, temperature in rates.items()
    }
  }
  chosen = config.but(rates_file=tmp_path / "rates.json")
  assert chosen.chosen("ir_dro", 0.25) == (3e-4, 1.0, True)
  assert chosen.chosen("ir_dro", 0.0) == (3e-4, 1.0, False)
  assert chosen.but(learning_rate=0.1).chosen("ir_dro", 0.25) == (0.1, 1.0, False)
  assert ContinualLM().depends_on(chosen) != ContinualLM().depends_on(config)


def test_the_rates_are_those_of_the_least_mean_loss():
  """Over two seeds; a loss that is not finite is never chosen."""
  rate = lambda lr, temperature, loss, seed: {
    "corruption": 0.2, "method": "ir_dro", "seed": seed, "learning_rate": lr,
    "temperature": temperature, "validation_loss": loss,
  }  # fmt: skip
  rows = [rate(1e-3, 0.3, loss, seed) for seed, loss in enumerate((1.0, np.nan))]
  rows += [rate(3e-4, 3.0, loss, seed) for seed, loss in enumerate((1.0, 3.0))]
  rows += [rate(3e-4, 1.0, loss, seed) for seed, loss in enumerate((2.0, 1.9))]
  [choice] = Tuning().choices(pd.DataFrame(rows))
  assert choice.entry == ("ir_dro", "0.2")
  assert choice.rates == {"learning_rate": 3e-4, "temperature": 1.0}
  results = Results(Config(), [], rows, {})
  assert not [one for one in Tuning().remarks(results) if "end of the grid" in one]
  [table] = Tuning().tables(results)
  assert table.rows == [["IR-DRO, 20% noise", "0.0003", "1", "1.9500"]]
  assert len(tuning.candidates(Config(), "ir_dro")) == 12
  assert len(tuning.candidates(Config(), "uniform")) == 4


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"corruption_kind": "swapped"}, "corruption_kind should be swapped with task=instruct only"),
    ({"dataset": "text.pdf"}, r"dataset should be among python, .*, or a .txt or .jsonl; got text"),
    ({"instructions": ("gsm8k", "x.txt")}, "instructions should be among .* a .jsonl; got x.txt"),
    ({"init": "hf", "model_dir": "x", "pretrained": "y"}, "with init=scratch only; got y"),
    ({"init": "hf", "model_dir": "x", "tokenizer": "y"}, "with init=scratch only: .* got y"),
    ({"tune": True, "learning_rate": 1.0}, "learning_rate should not be given with it"),
  ],
)
def test_what_does_not_fit_is_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    Config(**wrong)


def test_the_end_of_a_text_is_that_of_the_tokenizer_or_of_the_family(tmp_path):
  write = lambda name, settings: (tmp_path / name).write_text(json.dumps(settings))
  for family, end in (("gpt2", "<|endoftext|>"), ("opt", "</s>"), ("llama", "</s>")):
    write("config.json", {"model_type": family})
    assert model.end_of_text(tmp_path) == end
  write("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
  write("tokenizer_config.json", {"bos_token": "<s>"})
  assert model.end_of_text(tmp_path) == "<|im_end|>"
  write("tokenizer_config.json", {"eos_token": "<|end_of_text|>"})
  assert model.end_of_text(tmp_path) == "<|end_of_text|>"


def test_a_new_model_may_have_the_tokens_of_a_byte_pair_encoding(tmp_path):
  letters = ["<|endoftext|>", *"abcdefg"]
  (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(letters)}))
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  language = model.make(Config(tokenizer=tmp_path, dtype="bfloat16"))
  assert language.tokenizer.encode("bad") == [2, 1, 4]
  assert language.model.config.vocab_size == 8
  assert language.model.config.dtype == "bfloat16"


def test_an_encoding_is_learned_from_the_text_of_the_first_phase_and_kept_with_the_model(tmp_path):
  texts = tmp_path / "texts.txt"
  passages = [f"the theme of {i} is another theme, or the last" for i in range(12)]
  texts.write_text("\n\n".join(passages))
  config = Config(dataset=str(texts), tokenizer=270, num_layers=1, width=16)
  language = model.make(config)
  tokenizer = language.tokenizer
  assert config.name().endswith("-bpe270")
  assert tokenizer.vocab_size == language.model.config.vocab_size == 270
  assert len(tokenizer.encode(" theme of")) < 5 < len(tokenizer.encode("of themes unknown"))
  assert model.fingerprint(tokenizer) == model.fingerprint(model.tokenizer_of(config))
  tokenizer.save(tmp_path)
  with pytest.raises(ValueError, match=r"tokenizer must be at most 2\d\d, .* gives; got 9999"):
    model.tokenizer_of(config.but(tokenizer=9999))
  texts.unlink()  # A later run takes the tokens of the model, whatever its texts are.
  kept = model.tokenizer_of(config.but(pretrained=tmp_path))
  assert model.fingerprint(kept) == model.fingerprint(tokenizer)
  with pytest.raises(ValueError, match=r"tokenizer must be that of the model in .*; got 271"):
    model.tokenizer_of(config.but(pretrained=tmp_path, tokenizer=271))
  with pytest.raises(ValueError, match=r"tokenizer must be that of the model in .*; got 270"):
    model.tokenizer_of(config.but(pretrained=tmp_path / "of_bytes"))
  with pytest.raises(ValueError, match="greater than 256"):
    Config(tokenizer=256)


def test_sizes_are_those_of_the_task():
  of = lambda **given: (lambda c: (c.sequence_length(), c.rows_of_batch(), c.steps_of("cvar")))(
    Config(**given)
  )
  assert of() == (64, 32, 60)
  assert of(task="instruct") == (256, 8, 30)
  assert of(task="instruct", smoke=True) == (128, 4, 4)
  assert of(smoke=True) == (32, 8, 4)
  assert of(smoke=True, length=16) == (16, 8, 4)
