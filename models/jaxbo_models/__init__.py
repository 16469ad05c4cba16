"""Flax models that jaxbo's scripts and tests use."""

from jaxbo_models import caption_metrics, captioner, linear_head, lora, tokenizers, transformer
from jaxbo_models.conv4 import Conv4
from jaxbo_models.lenet5 import LeNet5
from jaxbo_models.mlp import MLP
from jaxbo_models.preact_resnet18 import PreActResNet18
from jaxbo_models.resnet12 import ResNet12, drop_block
from jaxbo_models.small_cnn import SmallCNN
from jaxbo_models.vocabulary import Vocabulary

__all__ = [
  "MLP",
  "Conv4",
  "LeNet5",
  "PreActResNet18",
  "ResNet12",
  "SmallCNN",
  "Vocabulary",
  "caption_metrics",
  "captioner",
  "drop_block",
  "linear_head",
  "lora",
  "tokenizers",
  "transformer",
]
