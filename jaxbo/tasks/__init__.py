"""Tasks to learn from: samplers that run on the device, under jit.

**Few-shot episodes**: :func:`sample_episode`, :class:`Episode`.

**Streams** for :func:`jaxbo.online`: :func:`minibatch_stream`, :func:`phase_stream`.

**Streams of tasks** for :func:`jaxbo.online_meta_learner`: :func:`osaka_stream`, few-shot tasks
that change without notice; :func:`moving_gaussian_stream` and :func:`jumping_gaussian_stream`,
whose answers are known exactly.

**Imbalanced data**: :func:`long_tailed_counts`, :func:`step_imbalanced_counts`,
:func:`imbalanced_subset`.

**Augmentation**: :func:`random_crop`, :func:`random_flip`.

**Images with captions** whose entropy is known exactly: :class:`ShapesCaptions`.
"""

from jaxbo.tasks.augmentation import random_crop, random_flip
from jaxbo.tasks.corruption import imbalanced_subset, long_tailed_counts, step_imbalanced_counts
from jaxbo.tasks.episodes import Episode, sample_episode
from jaxbo.tasks.gaussian_streams import (
  GaussianBatch,
  GaussianState,
  GaussianTruth,
  gaussian_posterior_mean,
  jumping_gaussian_stream,
  moving_gaussian_stream,
)
from jaxbo.tasks.shapes_captions import CaptionedShapes, ShapesCaptions
from jaxbo.tasks.shapes_language import CaptionEntropies
from jaxbo.tasks.streams import minibatch_stream, phase_stream
from jaxbo.tasks.task_streams import (
  OsakaState,
  StreamBatch,
  StreamTruth,
  TaskStream,
  osaka_stream,
)

__all__ = [
  "CaptionEntropies",
  "CaptionedShapes",
  "Episode",
  "GaussianBatch",
  "GaussianState",
  "GaussianTruth",
  "OsakaState",
  "ShapesCaptions",
  "StreamBatch",
  "StreamTruth",
  "TaskStream",
  "gaussian_posterior_mean",
  "imbalanced_subset",
  "jumping_gaussian_stream",
  "long_tailed_counts",
  "minibatch_stream",
  "moving_gaussian_stream",
  "osaka_stream",
  "phase_stream",
  "random_crop",
  "random_flip",
  "sample_episode",
  "step_imbalanced_counts",
]
