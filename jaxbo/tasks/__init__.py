"""Tasks to learn from: samplers that run on the device, under jit.

**Few-shot episodes**: :func:`sample_episode`, :class:`Episode`.

**Streams** of rounds for :func:`jaxbo.online_loop` and :func:`jaxbo.meta.online_meta_learner`:
:class:`Stream`, the protocol; :func:`function_stream` and :func:`iterator_stream`, which make one;
:func:`minibatch_stream`, :func:`finite_sum_stream`, :func:`phase_stream`.

**Streams of tasks**: :func:`osaka_stream`, few-shot tasks that change without notice;
:func:`moving_gaussian_stream` and :func:`jumping_gaussian_stream`, whose best answers are known
exactly.
"""

from jaxbo.tasks.episodes import Episode, sample_episode
from jaxbo.tasks.finite_sum import (
  BatchIndex,
  FiniteSumBatch,
  FiniteSumState,
  finite_sum_stream,
)
from jaxbo.tasks.gaussian_streams import (
  GaussianBatch,
  GaussianState,
  GaussianTruth,
  gaussian_posterior_mean,
  jumping_gaussian_stream,
  moving_gaussian_stream,
)
from jaxbo.tasks.iterators import iterator_stream
from jaxbo.tasks.streams import (
  PhaseState,
  RoundState,
  Stream,
  function_stream,
  minibatch_stream,
  phase_stream,
)
from jaxbo.tasks.task_streams import (
  OsakaState,
  StreamBatch,
  StreamTruth,
  osaka_stream,
)

__all__ = [
  "BatchIndex",
  "Episode",
  "FiniteSumBatch",
  "FiniteSumState",
  "GaussianBatch",
  "GaussianState",
  "GaussianTruth",
  "OsakaState",
  "PhaseState",
  "RoundState",
  "Stream",
  "StreamBatch",
  "StreamTruth",
  "finite_sum_stream",
  "function_stream",
  "gaussian_posterior_mean",
  "iterator_stream",
  "jumping_gaussian_stream",
  "minibatch_stream",
  "moving_gaussian_stream",
  "osaka_stream",
  "phase_stream",
  "sample_episode",
]
