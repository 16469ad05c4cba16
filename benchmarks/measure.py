"""What a compiled program costs, and how to time programs against each other."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
  """The bytes of scratch memory that XLA plans for a compiled program, beside inputs and outputs.

  -1 where the backend does not say.
  """
  analysis = compiled.memory_analysis()
  return -1 if analysis is None else analysis.temp_size_in_bytes


def count_flops(
  fn: Callable[..., Any], *args: Any, while_steps: int = 1, dead_code: bool = True
) -> int:
  """Counts floating-point operations in the jaxpr of ``fn(*args)``, loops included.

  XLA's own analysis counts the body of a loop once, so the count is made here: two operations for
  a multiply-add of a matrix product or a convolution (zeros of its padding and dilation included),
  one for each element that any other operation computes, and none for moving data. A scan's body
  counts once a step; a ``while`` has no number of steps that could be read off, so it is given. Of
  the branches of a conditional the costliest counts.

  Args:
    fn: a traceable function.
    *args: its arguments.
    while_steps: the number of steps of every ``while`` loop in ``fn``.
    dead_code: whether that counts which no output depends on, and which XLA leaves out.
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  if not dead_code:
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(jaxpr, while_steps)


_MOVES_DATA = frozenset(
  """reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice concatenate pad rev
  gather dynamic_update_slice copy copy_p convert_element_type stop_gradient iota split select_n
  random_wrap random_unwrap""".split()  # noqa: SIM905
)


def _count(jaxpr, while_steps: int) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    inside = [_count(sub, while_steps) for sub in sub_jaxprs(eqn.params)]
    inner = max(inside) if name == "cond" else sum(inside)
    if name == "scan":
      total += eqn.params["length"] * inner
    elif name == "while":
      total += while_steps * inner
    elif name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      depth = math.prod(lhs[axis] for axis in contracted)
      total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    elif name == "conv_general_dilated":
      kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
      depth = math.prod(kernel) // kernel[spec[0]]  # All but the output features.
      total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    elif name.startswith(("reduce_", "cum", "arg")):
      total += math.prod(eqn.invars[0].aval.shape)
    elif inner:
      total += inner
    elif name not in _MOVES_DATA:
      total += sum(math.prod(var.aval.shape) for var in eqn.outvars)
  return total


def count_marks(fn: Callable[..., Any], *args: Any, mark: str, while_steps: int = 1) -> int:
  """How often ``fn(*args)`` meets ``jax.ad_checkpoint.checkpoint_name(..., mark)``, loops included.

  A loss that marks one array is counted once for each value or gradient, and not at all for
  products with its Hessian. Counted in the jaxpr, as in :func:`count_flops`.
  """

  def count(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
      times = {"scan": eqn.params.get("length"), "while": while_steps}.get(eqn.primitive.name, 1)
      total += times * sum(count(sub) for sub in sub_jaxprs(eqn.params))
      total += eqn.primitive.name == "name" and eqn.params["name"] == mark
    return total

  return count(jax.make_jaxpr(fn)(*args).jaxpr)


def sub_jaxprs(params: Mapping[str, Any]) -> list[Jaxpr]:
  """The jaxprs among the parameters of an equation: bodies of loops, branches, calls.

  Of ``lax.custom_linear_solve`` only what runs: its other jaxprs are for derivatives.
  """
  if hasattr(params.get("jaxprs"), "transpose_solve"):
    params = {"solve": params["jaxprs"].solve}
  is_jaxpr = lambda value: isinstance(value, (Jaxpr, ClosedJaxpr))
  leaves = jax.tree.leaves(list(params.values()), is_leaf=is_jaxpr)
  return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if is_jaxpr(leaf)]


class Timing(NamedTuple):
  """Seconds a call.

  Attributes:
    seconds: the median over rounds.
    ratio: the median over rounds of the ratio to the first program, in the same round.
    spread: half the distance of the quartiles of that ratio.
  """

  seconds: float
  ratio: float
  spread: float


def time_together(
  programs: Mapping[Any, Callable[[], Any]], num_rounds: int = 15, calls: int = 10
) -> dict[Any, Timing]:
  """Times programs in turns, so that what slows the machine slows all of them.

  Args:
    programs: functions without arguments that return arrays; the first is the baseline of the
      ratios. Each is called once before.
    num_rounds: how often each program has its turn.
    calls: calls in a turn.

  Returns:
    A :class:`Timing` for each name.
  """
  for program in programs.values():
    jax.block_until_ready(program())
  rounds = []
  for _ in range(num_rounds):
    seconds = {}
    for name, program in programs.items():
      start = time.perf_counter()
      for _ in range(calls):
        jax.block_until_ready(program())
      seconds[name] = (time.perf_counter() - start) / calls
    rounds.append(seconds)
  baseline = next(iter(programs))
  timings = {}
  for name in programs:
    ratios = [seconds[name] / seconds[baseline] for seconds in rounds]
    low, high = np.quantile(ratios, [0.25, 0.75])
    timings[name] = Timing(
      seconds=statistics.median(seconds[name] for seconds in rounds),
      ratio=statistics.median(ratios),
      spread=float(high - low) / 2,
    )
  return timings
