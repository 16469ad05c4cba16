"""Adversarial training: attacks, gradients through them, losses, weights, and evaluation."""

from jaxbo.adversarial.apgd import apgd
from jaxbo.adversarial.attack import Attack, AttackInfo
from jaxbo.adversarial.autoattack import autoattack, standard_attacks
from jaxbo.adversarial.box import Box, normalized
from jaxbo.adversarial.class_metrics import class_accuracy, tail_accuracy
from jaxbo.adversarial.done import done_grad
from jaxbo.adversarial.evaluate import RobustnessReport, evaluate_robustness
from jaxbo.adversarial.fab import fab
from jaxbo.adversarial.fast_bat import fast_bat_grad
from jaxbo.adversarial.implicit import DoneInfo
from jaxbo.adversarial.losses import (
  cross_entropy_loss,
  margin_loss,
  mart_loss,
  probabilistic_margin,
  trades_loss,
)
from jaxbo.adversarial.pgd import fgsm, pgd
from jaxbo.adversarial.square import square
from jaxbo.adversarial.weightings import WatState, gairat, mail, wat

__all__ = [
  "Attack",
  "AttackInfo",
  "Box",
  "DoneInfo",
  "RobustnessReport",
  "WatState",
  "apgd",
  "autoattack",
  "class_accuracy",
  "cross_entropy_loss",
  "done_grad",
  "evaluate_robustness",
  "fab",
  "fast_bat_grad",
  "fgsm",
  "gairat",
  "mail",
  "margin_loss",
  "mart_loss",
  "normalized",
  "pgd",
  "probabilistic_margin",
  "square",
  "standard_attacks",
  "tail_accuracy",
  "trades_loss",
  "wat",
]
