"""Parts of the captioning script without training: rates, masks, scores, pictures."""

import math
import types

import flax.linen as nn
import jax
import numpy as np
import optax
import pandas as pd
import pytest
from jaxbo_models import captioner
from jaxbo_models.captioner import Captions
from jaxbo_models.vocabulary import Vocabulary
from PIL import Image

from scripts.captioning import __main__ as script
from scripts.captioning import data as caption_data
from scripts.captioning import language
from scripts.captioning import model as caption_model
from scripts.captioning import noise as caption_noise
from scripts.captioning import plots as caption_plots
from scripts.captioning import shapes as caption_shapes
from scripts.captioning.config import Settings
from scripts.captioning.files import Files
from scripts.captioning.scenes import ShapesCaptions
from scripts.captioning.train import Captioner
from scripts.common import devices
from tests.scripts.common.processes import some_devices

pytestmark = pytest.mark.slow  # All together, not each.

ONE = some_devices(1)


def test_captions_are_in_reading_order_in_the_first_steps():
  data = ShapesCaptions(order="either")
  batch = caption_shapes.held_out(data, "test", 40)
  first, later = (np.asarray(caption_shapes.captions_of_step(batch, t, 5)) for t in (4, 5))
  said = " ".join(word for tokens in first for word in language.VOCABULARY.decode(tokens))
  assert "above" in said
  assert not {"right", "below"} & set(said.split())
  assert all(
    (valid == tokens).all(axis=1).any() for valid, tokens in zip(batch.valid, first, strict=True)
  )
  np.testing.assert_array_equal(later, batch.tokens)


def test_losses_of_files_are_those_of_a_token_of_the_set_that_was_asked_for():
  captions = [[["a", "dog"], ["the", "dog"]], [["a", "very", "big", "cat"]]]
  images = np.arange(2, dtype=np.uint8)[:, None, None, None]
  part = caption_data.CaptionedImages(images, captions, ["a", "b"])
  data = caption_data.CaptionData(part, part._replace(images=images + 5), part)
  files = Files(data, Settings(max_words=3, batch_size=1), 1, ONE)
  asked = types.SimpleNamespace(
    devices=ONE,
    losses=lambda params, images, tokens: images[:, 0, 0, 0] * (tokens[:, 1:] > 0).sum(axis=1),
  )
  # Three tokens of the first image twice; four of the second, of which the last word is cut.
  assert files.token_nll(asked, None, data.train) == 4 / 10
  assert files.validation(asked, None) == 5 + 4 / 10


def test_scores_of_files_say_what_the_image_is_for_and_whether_captions_differ():
  """The loss of a caption is its image's number, and images of others have the other number."""
  captions = [[["a", "dog"], ["the", "dog"]], [["a", "very", "big", "cat"]]]
  images = np.arange(2, dtype=np.uint8)[:, None, None, None]
  part = caption_data.CaptionedImages(images, captions, ["a", "b"])
  files = Files(
    caption_data.CaptionData(part, part, part), Settings(max_words=4, batch_size=1), 1, ONE
  )
  a, the, dog = (files.vocabulary.encode([word], length=3)[1] for word in ("a", "the", "dog"))
  eos = files.vocabulary.eos
  said = np.array([[a, dog, eos], [the, dog, eos]])

  def asked(said):
    search = lambda params, images: Captions(np.resize(said, (len(images), 1, 3)), None, None)
    losses = lambda params, images, tokens: images[:, 0, 0, 0] * (tokens[:, 1:] > 0).sum(axis=1)
    return types.SimpleNamespace(devices=ONE, beam=search, losses=losses)

  scores = files.test(asked(said), None)
  assert scores["token_nll"] == 5 / 11
  assert scores["image_gain"] == pytest.approx(6 / 11 - 5 / 11)
  assert scores["distinct"] == scores["words"] == 2
  assert files.test(asked(said[:1]), None)["distinct"] == 1


def test_images_are_no_constant_of_the_compiled_step():
  """A photograph data set would be written into the program: beyond 2 GiB that fails."""
  images, captions = np.zeros((50, 8, 8, 3), np.uint8), [[["a", "dog"]]] * 50
  part = caption_data.CaptionedImages(images, captions, ["a"] * 50)
  sizes = Settings(image_size=(8, 8), embed_dim=4, hidden_dim=4, attention_dim=4, batch_size=8)
  files = Files(caption_data.CaptionData(part, part, part), sizes, 1, ONE)
  made = Captioner("none_word", files, sizes, ONE)
  key = jax.random.key(0)
  arguments = jax.eval_shape(made.init, key), 0, jax.random.key_data(key), *files.batches(0)[1][0]
  traced = made.program._jitted.trace(*arguments)
  assert all(np.size(constant) < 100 for constant in traced.jaxpr.consts)


def test_gradients_are_clipped_and_the_rate_rises_and_falls():
  tx = caption_model.make_optimizer(Settings(steps=30, learning_rate=0.1))

  def step(state, gradient):
    updates, state = tx.update(gradient, state)
    return state, updates

  gradients = np.geomspace(1, 1e6, 31, dtype=np.float32)  # All 1 when clipped, so Adam's step is 1.
  _, updates = jax.lax.scan(step, tx.init(np.float32(0)), gradients)
  expected = [0, 0.05] + [0.05 * (1 + math.cos(math.pi * t / 28)) for t in range(29)]
  np.testing.assert_allclose(updates, -np.array(expected), rtol=1e-4, atol=1e-7)


def test_weights_of_captions_are_divided_by_their_sum():
  weights = np.array([0.2, 0.2, 0.8])
  found = caption_noise.weighted_mean(np.log(weights / (1 - weights)), np.array([1.0, 2.0, 6.0]))
  assert float(found) == pytest.approx(5.4 / 1.2)


def test_only_what_is_trained_with_dropout_gets_a_key(monkeypatch):
  losses = lambda model: lambda params, batch: params * (2.0 if "key" in batch else 1.0)
  monkeypatch.setattr(captioner, "caption_losses", losses)
  tx = optax.sgd(1.0)
  for dropout, loss in ((0.0, 1.0), (0.3, 2.0)):
    step = caption_model.make_step(types.SimpleNamespace(dropout=dropout), tx)
    state, found = step(caption_model.State(1.0, tx.init(1.0)), {}, jax.random.key(0))
    assert found == (loss, loss)  # The gradient is the loss: it is linear.
    assert state.params == 1 - loss


def test_a_batch_has_pixels_in_0_1_and_no_padding_in_its_mask():
  images = np.full((1, 2, 2, 3), 255, np.uint8)
  batch = caption_model.as_batch(images, np.array([[1, 5, 2, 0]]))
  assert (batch["features"] == 1).all()
  np.testing.assert_array_equal(batch["mask"], [[True, True, True, False]])
  assert (caption_model.as_batch(np.ones((1, 2, 2, 3)), batch["tokens"])["features"] == 1).all()


def test_without_attention_all_cells_are_averaged():
  cells = np.arange(12.0).reshape(1, 4, 3)
  encoder = caption_model.MeanEncoder(nn.Sequential([lambda images: images]))
  np.testing.assert_array_equal(encoder.apply({}, cells), [[[4.5, 5.5, 6.5]]])


def test_scores_of_a_captioner_that_knows_everything(monkeypatch):
  """Answers that are right by construction have the best scores, and wrong ones have not."""
  source = caption_shapes.Shapes("either", Settings(), num_test=40)
  batch = caption_shapes.held_out(source.data, "test", 40)
  place = np.arange(9)

  def attention(params, images, tokens):
    """On the cell of the object whose colour or shape comes next; at first it may be either."""
    del params, images
    assert len(tokens) == 40  # All of them, in their order.
    cells = np.eye(16)[batch.cells]
    return np.where(place[:, None] == 1, cells.mean(axis=1)[:, None], cells[:, (place >= 4) * 1])

  # A search fills up what it returns with the end.
  right = np.where(batch.valid == language.PAD, language.EOS, batch.valid)[:, :, 1:]
  log = np.log(np.tile([0.6, 0.4], (40, 1)))
  asked = types.SimpleNamespace(
    devices=ONE,
    losses=lambda params, images, tokens: np.full(len(images), math.log(2)),
    attention=attention,
    greedy=lambda params, images: right[:, 0],
    beam=lambda params, images: Captions(right[:, ::-1], log, np.zeros((40, 9, 16))),
  )
  monkeypatch.setattr(devices.in_batches, "__kwdefaults__", {"size": 40})
  scores = types.SimpleNamespace(**source.test(asked, None))
  assert scores.exact_match == scores.both_orders == 1
  assert scores.nll == pytest.approx(scores.entropy)
  assert [scores.mass_0, scores.mass_1, scores.mass_2, scores.mass_3] == [0.5, 1, 1, 1]
  assert scores.mentioned == 1
  assert scores.beam_sum == pytest.approx(1)
  assert scores.beam_gap == pytest.approx(math.log(1.5))
  wrong = types.SimpleNamespace(
    devices=ONE,
    losses=lambda params, images, tokens: np.linspace(0.5, 0.6, len(images)),
    attention=attention,
    greedy=lambda params, images: np.where(right[:, 0] == 15, 16, right[:, 0]),
    beam=lambda params, images: Captions(right[:, [0, 0]], log, np.zeros((40, 9, 16))),
  )
  scores = types.SimpleNamespace(**source.test(wrong, None))
  assert 0 < scores.exact_match < 1
  assert scores.standard_error == pytest.approx(np.linspace(0.5, 0.6, 40).std(ddof=1) / 40**0.5)
  assert scores.both_orders == 0


def test_an_image_in_batches_is_the_image_alone():
  images, seen = np.arange(7, dtype=np.float32), []
  double = lambda params, x: seen.append(x.shape) or params * x
  for number, size in ((1, 3), (4, 4), (8, 8)):
    result = devices.in_batches(some_devices(number), double, 2, images, size=3)
    np.testing.assert_array_equal(result, 2 * images)
    assert {*seen} == {(size,)}
    seen.clear()


def test_pictures_of_wide_images_are_broken_into_lines(tmp_path, monkeypatch):
  seen, draw = [], caption_plots._draw_word
  spy = lambda axes, image, *rest: seen.append(image.max()) or draw(axes, image, *rest)
  monkeypatch.setattr(caption_plots, "_draw_word", spy)
  dark = np.ones((50, 200, 3), np.uint8)
  example = caption_plots.Captioned(dark, ["word"] * 14, np.full((14, 100), 0.01), "")
  caption_plots.draw_attention([example] * 2, 10, tmp_path / "picture.png")
  with Image.open(tmp_path / "picture.png") as picture:
    assert picture.width < 3 * picture.height
  assert seen == [1 / 255] * 28


def test_curves_are_drawn_of_a_run_whose_loss_was_not_finite(tmp_path):
  run = {"order": "", "model": "sequential", "seed": 0}
  points = ((1, 2.0), (2, float("nan")))
  lines = pd.DataFrame([run | {"step": t, "validation_nll": loss} for t, loss in points])
  caption_plots.draw_curves(lines, 0, tmp_path / "curves.png")
  assert (tmp_path / "curves.png").exists()


def test_scores_are_drawn_and_compared_in_pairs_with_the_guided_captioner(tmp_path):
  rows = pd.DataFrame(
    [
      {"order": "", "model": model, "seed": seed, "image_gain": gain, "distinct": 1 + seed}
      | {"cider_d": 0.9, "bleu_4": 0.1, "token_nll": 1.5}
      for seed in (0, 1)
      for model, gain in (("sequential", 0.1), ("none_hidden", 0.3))
    ]
  )
  caption_plots.draw_scores(rows, tmp_path / "scores.png")
  assert (tmp_path / "scores.png").exists()
  rows = rows.assign(**dict.fromkeys(set(script.FILES_COLUMNS) - {*rows}, math.nan))
  made = script.Results(script.Config(dataset="nlvr_captions"), [], rows.to_dict("records"), {})
  _, pairs = script.Captioning().tables(made)
  column = pairs.columns.index("image's gain")
  assert [(row[0], row[column]) for row in pairs.rows] == [
    ("no guide, query: hidden", "0.200 ± 0.000")
  ]


def test_the_best_caption_is_drawn_with_its_end_and_its_attention():
  tokens = np.array([[[3, 4, 2, 2], [4, 2, 2, 2]]])
  attention = np.arange(4.0)[None, :, None]
  vocabulary = Vocabulary([*Vocabulary.SPECIAL[:3], "a", "dog"])
  asked = caption_model.Asked("sequential", Settings(), vocabulary, 2, ONE)
  asked.beam = lambda params, images: Captions(tokens, np.log([[0.5, 0.25]]), attention)
  [example] = asked.captioned(None, np.zeros((1, 2, 2, 3)))
  assert example.words == ["a", "dog", "(end)"]
  assert example.attention[:, 0].tolist() == [0, 1, 2]
  assert example.title == "probability 0.5"
