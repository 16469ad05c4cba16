"""Tasks to learn from: samplers that run on the device, under jit.

**Few-shot episodes**: :func:`sample_episode`, :class:`Episode`.

**Streams** for :func:`jaxbo.online`: :func:`minibatch_stream`, :func:`phase_stream`.
"""

from jaxbo.tasks.episodes import Episode, sample_episode
from jaxbo.tasks.streams import minibatch_stream, phase_stream

__all__ = ["Episode", "minibatch_stream", "phase_stream", "sample_episode"]
