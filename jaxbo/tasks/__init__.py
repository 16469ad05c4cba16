"""Tasks to learn from: samplers that run on the device, under jit.

**Few-shot episodes**: :func:`sample_episode`, :class:`Episode`.
"""

from jaxbo.tasks.episodes import Episode, sample_episode

__all__ = ["Episode", "sample_episode"]
