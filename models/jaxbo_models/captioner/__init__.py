"""Image captioning: a guided decoder with attention, its losses and its decoders."""

from jaxbo_models.captioner.attention import attend
from jaxbo_models.captioner.beam import beam_search
from jaxbo_models.captioner.check import check_captions, check_params
from jaxbo_models.captioner.decoding import greedy, make_step, sample
from jaxbo_models.captioner.encoder import GridEncoder, PatchEncoder
from jaxbo_models.captioner.generate import Captions, caption_images
from jaxbo_models.captioner.losses import caption_losses, discriminative_losses, token_losses
from jaxbo_models.captioner.model import GuidedCaptioner
from jaxbo_models.captioner.recurrence import CaptionerOutput, DecoderState, Encoded
from jaxbo_models.captioner.self_critical import self_critical_batch, self_critical_losses

__all__ = [
  "CaptionerOutput",
  "Captions",
  "DecoderState",
  "Encoded",
  "GridEncoder",
  "GuidedCaptioner",
  "PatchEncoder",
  "attend",
  "beam_search",
  "caption_images",
  "caption_losses",
  "check_captions",
  "check_params",
  "discriminative_losses",
  "greedy",
  "make_step",
  "sample",
  "self_critical_batch",
  "self_critical_losses",
  "token_losses",
]
