"""The stream of OSAKA: its statistics, its data, what it hides, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbo.tasks
from tests.cases import cases

pytestmark = pytest.mark.slow

# An image is its domain, class and number, so that a batch can be checked against the truth.
SIZES = {0: (25, 8), 1: (10, 30), 2: (12, 5)}


def numbered(domain):
  classes, per_class = SIZES[domain]
  grid = np.stack(np.meshgrid(np.arange(classes), np.arange(per_class), indexing="ij"), axis=-1)
  return np.concatenate([np.full((classes, per_class, 1), domain), grid], axis=-1).astype(np.int16)


DOMAINS = [numbered(domain) for domain in SIZES]
MIX = [0.5, 0.25, 0.25]


def osaka(**options):
  arguments = {
    "num_ways": 10,
    "num_shots": 3,
    "stay_probability": 0.9,
    "domain_probabilities": MIX,
    **options,
  }
  return jaxbo.tasks.osaka_stream(DOMAINS, **arguments)


def play(stream, state, num_rounds, flags_only=False):
  """The state after so many rounds, and their batches in NumPy; or only the flags."""
  state, batches = _play(stream, state, num_rounds, flags_only)
  return state, jax.device_get(batches)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _play(stream, state, num_rounds, flags_only):
  def body(state, _):
    state, batch = stream.step(state)
    return state, batch.extra if flags_only else batch

  return jax.lax.scan(body, state, length=num_rounds)


@pytest.mark.parametrize(("stay", "redraw"), [(0.9, None), (0.98, None), (0.5, 0.3)])
def test_the_statistics_of_section_3_2(stay, redraw):
  """Numbers of switches and shifts, run lengths, within four standard deviations."""
  rounds, p_e = 20_000, 1.0 if redraw is None else redraw
  stream = osaka(stay_probability=stay, domain_switch_probability=redraw)
  _, truth = play(stream, stream.init(1), rounds, True)
  switches = np.asarray(truth.task_switch)
  assert switches[0]
  sd = np.sqrt((rounds - 1) * stay * (1 - stay))
  assert abs(switches.sum() - (1 + (rounds - 1) * (1 - stay))) < 4 * sd
  lengths = np.diff(np.flatnonzero(switches))  # Geometric: mean 1 / q, variance stay / q^2.
  q = 1 - stay
  assert abs(lengths.mean() - 1 / q) < 4 * np.sqrt(stay / q**2 / len(lengths))
  assert abs(np.mean(lengths == 1) - q) < 4 * np.sqrt(q * stay / len(lengths))
  # Changes of the domain follow each other with some dependence: of three domains, twice the sd.
  changes = q * p_e * (1 - np.sum(np.square(MIX)))
  shifts = np.asarray(truth.domain_switch)
  assert abs(shifts.mean() - changes) < 8 * np.sqrt(changes * (1 - changes) / rounds)
  assert not shifts[0]
  assert not np.any(shifts & ~switches)
  np.testing.assert_array_equal(shifts[1:], np.diff(truth.domain) != 0)
  # An interval of one domain takes 1 / (q p_e) rounds, so so many independent draws there are.
  draws = rounds * q * p_e
  for domain, probability in enumerate(MIX):
    sd = np.sqrt(2 * probability * (1 - probability) / draws)
    assert abs(np.mean(truth.domain == domain) - probability) < 4 * sd


def test_the_first_domain_is_drawn_even_where_it_never_changes():
  stream = osaka(domain_switch_probability=0.0)
  first = jax.jit(jax.vmap(lambda key: stream.step(stream.init(key))[1].domain))
  with jax.debug_key_reuse(False):  # It takes the batched switch of the stream for reuse.
    found = np.asarray(first(jax.random.split(jax.random.key(0), 1000)))
  for domain, probability in enumerate(MIX):
    sd = np.sqrt(probability * (1 - probability) / 1000)
    assert abs(np.mean(found == domain) - probability) < 4 * sd


def test_images_are_those_of_the_task_and_labels_follow_the_classes():
  stream = osaka(num_queries=2)
  _, batch = play(stream, stream.init(2), 2000)
  for images, labels, count in (
    (batch.images, batch.labels, 30),
    (batch.query_images, batch.query_labels, 20),
  ):
    assert images.shape == (2000, count, 3)
    assert images.dtype == jnp.int16
    assert labels.dtype == jnp.int32
    domain = np.broadcast_to(batch.domain[:, None], labels.shape)
    np.testing.assert_array_equal(images[..., 0], domain)
    classes = np.take_along_axis(np.asarray(batch.classes), np.asarray(labels), axis=1)
    np.testing.assert_array_equal(images[..., 1], classes)
    for row in np.asarray(labels[:20]):
      np.testing.assert_array_equal(np.bincount(row), np.full(10, count // 10))
  assert np.any(np.diff(batch.labels[0]) < 0)  # Shuffled.
  for classes in np.asarray(batch.classes):
    assert len(set(classes)) == 10
  kept = ~np.asarray(batch.task_switch)[1:]
  np.testing.assert_array_equal(batch.classes[1:][kept], batch.classes[:-1][kept])
  np.testing.assert_array_equal(batch.domain[1:][kept], batch.domain[:-1][kept])


def test_no_image_is_in_both_sets_and_all_are_drawn_alike():
  stream = osaka(num_queries=2, domain_probabilities=[0.0, 1.0, 0.0])
  _, batch = play(stream, stream.init(3), 2000)
  number = lambda images: np.asarray(images[..., 1].astype(int) * 30 + images[..., 2])
  support, query = number(batch.images), number(batch.query_images)
  for s, q in zip(support, query, strict=True):
    assert not set(s) & set(q)
  for drawn in (support, query):
    # Two of a class in one round are dependent, by at most a factor of the shots.
    expected, shots = drawn.size / 300, drawn.shape[1] / 10
    counts = np.bincount(drawn.ravel(), minlength=300)
    assert np.max(np.abs(counts - expected)) < 4.5 * np.sqrt(expected * shots)


def test_without_queries_images_are_uniform_with_replacement():
  stream = osaka(stay_probability=1.0, shuffle=False)
  _, batch = play(stream, stream.init(4), 2000)
  np.testing.assert_array_equal(batch.labels[7], np.repeat(np.arange(10), 3))
  per_class = SIZES[int(batch.domain[0])][1]
  assert np.sum(batch.task_switch) == 1
  numbers = np.asarray(batch.images[..., 2])
  counts = np.bincount(numbers.ravel(), minlength=per_class)
  expected = numbers.size / per_class
  assert np.max(np.abs(counts - expected)) < 4 * np.sqrt(expected)
  triples = numbers.reshape(-1, 3)
  again = np.mean(triples[:, 0] == triples[:, 1])
  sd = np.sqrt(1 / per_class * (1 - 1 / per_class) / len(triples))
  assert abs(again - 1 / per_class) < 4 * sd
  assert batch.query_images is None
  one = jax.tree.map(lambda leaf: leaf[0], batch)
  assert one.val[0] is one.images


def test_tasks_of_a_domain_with_as_many_classes_as_ways_differ_in_the_labels_alone():
  only_ten = {"stay_probability": 0.0, "domain_probabilities": [0, 1, 0]}
  for order in ("drawn", "sorted"):
    stream = osaka(label_order=order, **only_ten)
    _, truth = play(stream, stream.init(5), 100, True)
    assert np.all(truth.task_switch)
    np.testing.assert_array_equal(np.sort(truth.classes), np.tile(np.arange(10), (100, 1)))
    in_order = np.array_equal(truth.classes, np.tile(np.arange(10), (100, 1)))
    assert in_order == (order == "sorted")


def test_a_run_resumes_bit_for_bit_and_is_a_function_of_the_key():
  stream = osaka(num_queries=2)
  middle, first = play(stream, stream.init(6), 1000)
  restored = jax.tree.map(jnp.asarray, jax.device_get(middle))
  _, second = play(stream, restored, 1000)
  _, whole = play(stream, stream.init(6), 2000)
  joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
  jax.tree.map(np.testing.assert_array_equal, joined, whole)
  assert first.task_switch[0]
  assert np.any(play(stream, stream.init(7), 1000)[1].images != first.images)
  raw = stream.init(jax.random.key_data(jax.random.key(6)))
  np.testing.assert_array_equal(play(stream, raw, 1000)[1].images, first.images)


def test_the_data_are_arguments_of_a_jitted_function():
  stream = osaka()
  assert {leaf.shape for leaf in jax.tree.leaves(stream)} >= {(*s, 3) for s in SIZES.values()}
  jaxpr = jax.make_jaxpr(lambda stream: stream.step(stream.init(0)))(stream)
  assert all(np.size(const) < 100 for const in jaxpr.consts)


BAD = {
  "ways": ({"num_ways": 11}, "num_ways must be at most 10, the classes of domains.1., got 11"),
  "shots": ({"num_shots": 0}, "num_shots must be at least 1, got 0"),
  "queries": ({"num_queries": -1}, "num_queries must be at least 1, got -1"),
  "stay": ({"stay_probability": 1.1}, r"stay_probability must be in \[0, 1\], got 1.1"),
  "p_e": ({"domain_switch_probability": -1.0}, r"domain_switch_probability must be in \[0, 1\]"),
  "sum": (
    {"domain_probabilities": [0.5, 0.5, 0.5]},
    "domain_probabilities must be non-negative and sum to 1, got",
  ),
  "negative": ({"domain_probabilities": [1.5, -0.5, 0.0]}, "must be non-negative and sum to 1"),
  "nan": ({"domain_probabilities": [float("nan"), 0.5, 0.5]}, "must be non-negative and sum to 1"),
  "number": ({"domain_probabilities": [0.5, 0.5]}, "must be 3 numbers, one for each domain"),
  "order": ({"label_order": "random"}, "label_order must be one of 'drawn', 'sorted'"),
}


@cases("name", BAD)
def test_bad_arguments(name):
  options, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    osaka(**options)


@cases(
  ("domains", "message"),
  [
    ([], "domains must have at least one array"),
    ([np.zeros(5)], r"domains\[0\] must have shape \[classes, per_class, ...\] with at least 1"),
    ([np.zeros((5, 0, 2))], r"domains\[0\] must have shape .* got shape \(5, 0, 2\)"),
    ([np.zeros((5, 2, 2)), np.zeros((5, 2, 3))], "domains must have images of one shape and dtype"),
    ([np.zeros((5, 2, 2)), np.zeros((5, 2, 2), np.uint8)], "images of one shape and dtype, got"),
  ],
)
def test_bad_domains(domains, message):
  mix = np.full(len(domains), 1 / max(len(domains), 1))
  with pytest.raises(ValueError, match=message):
    jaxbo.tasks.osaka_stream(
      domains, num_ways=2, num_shots=1, stay_probability=0.5, domain_probabilities=mix
    )


def test_domains_are_a_list(as_users_run):
  """Of one array the classes would be taken for domains."""
  for domains, kind in ((np.zeros((3, 4, 5, 2)), "ndarray"), ({"a": np.zeros((4, 5))}, "dict")):
    with pytest.raises(TypeError, match=f"domains must be a list of arrays .*, got {kind}"):
      jaxbo.tasks.osaka_stream(
        domains,  # pyright: ignore
        num_ways=2,
        num_shots=1,
        stay_probability=0.5,
        domain_probabilities=MIX,
      )


def test_queries_need_two_images_of_a_class():
  with pytest.raises(ValueError, match="with at least 2 images of each class"):
    jaxbo.tasks.osaka_stream(
      [np.zeros((5, 1, 2))],
      num_ways=2,
      num_shots=1,
      num_queries=1,
      stay_probability=0.5,
      domain_probabilities=[1.0],
    )


def test_a_key_of_another_generator_is_refused():
  with pytest.raises(ValueError, match="key must have the default generator threefry2x32, got rbg"):
    osaka().init(jax.random.key(0, impl="rbg"))
