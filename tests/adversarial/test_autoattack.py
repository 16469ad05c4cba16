"""AutoAttack has the published order and budgets; dropping what is broken changes no answer."""

import functools
import importlib

import jax
import numpy as np
import pytest

import jaxbo
from jaxbo.adversarial import Box, autoattack, evaluate_robustness
from tests.adversarial import problem
from tests.adversarial.problem import EPSILON, model

pytestmark = pytest.mark.slow

PARAMS = problem.params()
PARTS = [problem.batch(seed) for seed in range(1, 5)]
IMAGES, LABELS = (np.concatenate(column) for column in zip(*PARTS, strict=True))
EVALUATE = importlib.import_module("jaxbo.adversarial.evaluate")
KEY = 3


@functools.cache
def attacks(norm="linf"):
  box = Box(EPSILON if norm == "linf" else 0.3, norm=norm)
  return {
    # A weak one, so that there is something left for the others.
    "fgsm": jaxbo.adversarial.fgsm(model, box),
    **autoattack(model, box, num_steps=8, num_targets=2, num_queries=30),
  }


@functools.cache
def dropped(norm="linf", batch_size=8):
  return evaluate_robustness(
    model, PARAMS, (IMAGES, LABELS), KEY, attacks(norm), batch_size=batch_size, drop_broken=True
  )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_dropping_gives_the_answer_of_all_attacks_on_all_images(norm):
  """Image by image, with the same keys."""
  ours = dropped(norm)
  clean = np.argmax(model(PARAMS, IMAGES), axis=1) == LABELS
  left, broken_by_each = clean, []
  for number, (name, attack) in enumerate(attacks(norm).items()):

    def alone(image, label, index, attack=attack, number=number):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), number), index)
      return attack(PARAMS, (image[None], label[None]), key)[0]

    found = jax.jit(jax.vmap(alone))(IMAGES, LABELS, np.arange(len(LABELS)))
    still = left & (np.argmax(model(PARAMS, found), axis=1) == LABELS)
    np.testing.assert_array_equal(ours.correct[name], still, err_msg=name)
    broken_by_each.append(int(np.sum(left & ~still)))
    left = still
  np.testing.assert_array_equal(ours.clean, clean)
  np.testing.assert_array_equal(ours.worst_case, left)
  assert 0 < left.sum() < clean.sum() < len(clean)
  assert sum(broken_by_each) == clean.sum() - left.sum()
  assert sum(count > 0 for count in broken_by_each) > 1
  names = ["clean", "fgsm", "apgd_ce", "apgd_t", "fab_t", "square", "worst_case"]
  assert list(ours.accuracies()) == names


def test_dropping_gives_the_same_at_any_batch_size():
  for batch_size in (5, 32):
    ours = dropped(batch_size=batch_size)
    for name, row in ours.correct.items():
      np.testing.assert_array_equal(row, dropped().correct[name])


def test_attacks_that_draw_nothing_have_the_same_worst_case_without_dropping():
  box = Box(EPSILON)
  plain = {
    "pgd": jaxbo.adversarial.pgd(model, box, step_size=0.01, num_steps=2, random_start=False),
    "fgsm": jaxbo.adversarial.fgsm(model, box, random_start=False),
    "fab": jaxbo.adversarial.fab(model, box, num_steps=8, num_targets=2),
  }
  run = functools.partial(evaluate_robustness, model, PARAMS, (IMAGES, LABELS), 0, batch_size=8)
  all_of_them, only_left = run(plain), run(plain, drop_broken=True)
  np.testing.assert_array_equal(all_of_them.worst_case, only_left.worst_case)
  alone = np.logical_and.accumulate(list(all_of_them.correct.values()))
  np.testing.assert_array_equal(list(only_left.correct.values()), alone)
  assert np.any(alone[0] != all_of_them.correct["fgsm"])


def test_what_is_left_is_attacked_in_batches_of_one_size(monkeypatch):
  """Each attack is compiled once, and is not run where nothing is left."""
  sizes, each = [], EVALUATE._attack_each

  def counted(run, params, images, labels, keys):
    sizes.append((run, len(images)))
    return each(run, params, images, labels, keys)

  monkeypatch.setattr(EVALUATE, "_attack_each", counted)
  before = each._cache_size()
  made = {name: a._replace(run=functools.partial(a.run)) for name, a in attacks().items()}
  run = functools.partial(evaluate_robustness, model, PARAMS, batch_size=5, drop_broken=True)
  ours = run((IMAGES, LABELS), KEY, made)
  assert {size for _, size in sizes} == {5}
  left = ours.clean
  for name, attack in made.items():
    number = sum(run is attack.run for run, _ in sizes)
    assert number == -(-left.sum() // 5), name
    left = ours.correct[name]
  assert each._cache_size() - before == len(made)
  # Other images: other counts, and no other program.
  run((IMAGES[::-1][:23], LABELS[::-1][:23]), KEY, made)
  assert each._cache_size() - before == len(made)
  sizes.clear()
  wrong = (np.argmax(model(PARAMS, IMAGES), axis=1) + 1) % problem.CLASSES
  nothing = run((IMAGES, wrong), KEY, made)
  assert not sizes
  assert not nothing.worst_case.any()
  assert nothing.accuracies()["square"] == 0


def test_images_outside_of_an_attacks_box_are_refused_before_it_runs():
  with pytest.raises(ValueError, match=r"images must be from low=0\.0 to high=1\.0"):
    evaluate_robustness(model, PARAMS, (IMAGES + 0.1, LABELS), 0, attacks(), drop_broken=True)


def test_order_and_budgets_are_those_of_autoattack(as_users_run, monkeypatch):
  asked = []
  module = importlib.import_module("jaxbo.adversarial.autoattack")
  for name in ("apgd", "fab", "square"):
    make = lambda model, box, *, name=name, **options: (name, box, options)
    monkeypatch.setattr(module, name, make)
  asked = autoattack(model, Box(8 / 255))
  hundred = {"num_steps": 100}
  assert list(asked) == ["apgd_ce", "apgd_t", "fab_t", "square"]
  assert list(asked.values()) == [
    ("apgd", Box(8 / 255), hundred),
    ("apgd", Box(8 / 255), hundred | {"num_targets": 9, "objective": "targeted_dlr"}),
    ("fab", Box(8 / 255), hundred | {"num_targets": 9}),
    ("square", Box(8 / 255), {"num_queries": 5000}),
  ]
  few = autoattack(model, Box(0.5, norm="l2"), num_queries=0, num_classes=3)
  assert list(few) == ["apgd_ce", "apgd_t", "fab_t"]
  assert few["apgd_t"][2]["objective"] == "margin"
