"""Online bilevel optimization: rounds, metrics, and the states of its methods."""

from jaxbo.online.loop import Online, OnlineInfo, OnlineState
from jaxbo.online.oagd import BatchAverageInfo, BatchAverageState
from jaxbo.online.regret import Accumulated, local_regret, path_length
from jaxbo.online.rounds import OnlineBatch, OnlineMetric, OnlineRound
from jaxbo.online.sogd import CorrectedResponseInfo, CorrectedResponseState, SogdVariables
from jaxbo.online.window import Window, WindowAverageInfo, WindowAverageState

__all__ = [
  "Accumulated",
  "BatchAverageInfo",
  "BatchAverageState",
  "CorrectedResponseInfo",
  "CorrectedResponseState",
  "Online",
  "OnlineBatch",
  "OnlineInfo",
  "OnlineMetric",
  "OnlineRound",
  "OnlineState",
  "SogdVariables",
  "Window",
  "WindowAverageInfo",
  "WindowAverageState",
  "local_regret",
  "path_length",
]
