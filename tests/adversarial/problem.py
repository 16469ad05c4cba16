"""A classifier of tiny images that all tests attack, and its batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxbo

BATCH, SIDE, HIDDEN, CLASSES = 8, 4, 12, 5
EPSILON = 0.1


@jax.jit  # Tests call it by itself too, and an operation alone is a program.
def model(params, images):
  """One hidden layer, smooth; ``[batch, 4, 4, 1]`` to five logits."""
  x = images.reshape(images.shape[0], SIDE * SIDE)
  hidden = jnp.tanh(x @ params["w"] + params["b"][None])
  return hidden @ params["v"]


def params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[0])
  made = {"w": 3 * draw(SIDE * SIDE, HIDDEN), "b": draw(HIDDEN), "v": 3 * draw(HIDDEN, CLASSES)}
  return {name: jnp.asarray(values, dtype) for name, values in made.items()}


def batch(seed=1, dtype=jnp.float32):
  """Images with pixels at both ends of the range; two labels in three are the model's."""
  rng = np.random.default_rng(seed)
  images = np.clip(rng.uniform(-0.2, 1.2, (BATCH, SIDE, SIDE, 1)), 0, 1)
  labels = np.argmax(np.array(model(params(), images.astype(np.float32))), axis=1)
  labels[::3] = (labels[::3] + 1) % CLASSES
  return jnp.asarray(images, dtype), jnp.asarray(labels, jnp.int32)


def cross_entropy(logits, labels):
  """In float64 NumPy."""
  z = np.asarray(logits, np.float64)
  z = z - z.max(axis=1, keepdims=True)
  return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), np.asarray(labels)]


@jax.jit
def loss(params, images, labels):
  return -jnp.take_along_axis(jax.nn.log_softmax(model(params, images)), labels[:, None], 1)[:, 0]


@jax.jit
def margin_attack_loss(params, images, labels):
  """Minus a smooth margin: another objective than the loss."""
  logits = model(params, images)
  is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
  others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=1)
  return jnp.sum(jnp.where(is_label, logits, 0), axis=1) - others


@functools.partial(jax.jit, static_argnums=2)
def _look(image, label, model):
  logits_of = lambda x: model(params(), x[None])
  value = lambda x: jaxbo.adversarial.cross_entropy_loss(logits_of(x), label[None])[0]
  loss, slope = jax.value_and_grad(value)(image)
  return loss, slope, jnp.argmax(logits_of(image)[0])


def look(image, label, model=model):
  """The cross entropy of one image, its slope, and whether it is misclassified."""
  loss, slope, predicted = _look(jnp.asarray(image), label, model)
  return float(loss), np.asarray(slope), int(predicted) != int(label)
