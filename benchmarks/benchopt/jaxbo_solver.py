"""jaxbo as a solver of the bilevel benchmark of benchopt: copy this file to its folder ``solvers``.

  cp jaxbo_solver.py benchmark_bilevel/solvers/
  benchopt run benchmark_bilevel -s "jaxbo[method=[saba,srba],step_size=0.1]" -d quadratic

The options of ``-s`` are the ``parameters`` below. Of the benchmark it uses what ``set_objective``
is given: the losses ``f(inner_var, outer_var, start=, batch_size=)`` and ``f_fb(inner_var,
outer_var)`` over all samples. Samples beyond the last whole minibatch are left out, but in restarts
of SRBA and in AID, which see all.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from benchopt import BaseSolver  # pyright: ignore

import jaxbo

DOUBLE_LOOPS = ("amigo", "stocbio")
JOINT = ("saba", "srba", "sogd", "f2sa")


class Solver(BaseSolver):  # pyright: ignore
  """A method of jaxbo, by name."""

  name = "jaxbo"
  sampling_strategy = "callback"
  requirements = ("pip::jaxbo",)
  references = ("Dagreou et al., A Framework for Bilevel Optimization, NeurIPS 2022",)
  parameters: ClassVar[dict[str, list[Any]]] = {
    "method": ["saba"],  # saba, srba, sogd, f2sa, soba, amigo, stocbio, or aid, on all samples
    "step_size": [0.1],  # of the inner variable and of the linear system
    "outer_ratio": [1.0],  # step_size over the step of the outer variable
    "batch_size": [64],  # or "full"
    "num_steps": [10],  # inner steps, and products, of amigo, stocbio and aid
    "period": [2.0],  # srba: epochs between restarts
    "multiplier": [10.0],  # f2sa
    "eval_freq": [128],  # steps between two looks
    "random_state": [1],
  }

  def set_objective(
    self,
    f_inner: Any,
    f_outer: Any,
    n_inner_samples: int,
    n_outer_samples: int,
    inner_var0: Any,
    outer_var0: Any,
    f_inner_fb: Any,
    f_outer_fb: Any,
  ) -> None:
    """Builds the method, and compiles it in a first short run."""

    def as_loss(minibatch: Any, whole: Any, size: int) -> Any:
      """A batch is where it starts, ``[1]``, or ``None`` for all samples."""

      def loss(x, y, batch):
        if batch is None:
          return whole(y, x)
        return minibatch(y, x, start=batch[0] * size, batch_size=size)

      return loss

    samples = n_inner_samples, n_outer_samples
    sizes = samples if self.batch_size == "full" else (self.batch_size,) * 2
    self.counts = tuple(n // size for n, size in zip(samples, sizes, strict=True))
    self.losses = (
      as_loss(f_inner, f_inner_fb, sizes[0]),
      as_loss(f_outer, f_outer_fb, sizes[1]),
    )
    self.start = jnp.asarray(outer_var0), jnp.asarray(inner_var0)
    starts = [jnp.arange(count) for count in self.counts]
    self.stream = jaxbo.tasks.finite_sum_stream(starts[0], starts[1], 1)
    self.init, step = self.joint() if self.method in JOINT else self.one_after_the_other()
    body = lambda state, _: (step(state), None)
    self.steps = jax.jit(lambda state: jax.lax.scan(body, state, length=self.eval_freq)[0])
    self.run_once(2)

  def joint(self) -> Any:
    """Methods that move both levels at once."""
    inner_loss, outer_loss = self.losses
    rho = self.step_size
    gamma = rho / self.outer_ratio
    if self.method == "saba":
      sizes = dict(zip(("num_batches", "num_outer_batches"), self.counts, strict=True))
      outer = jaxbo.saba(gamma, rho, inner_loss, linear_learning_rate=rho, **sizes)
    elif self.method == "srba":
      outer = jaxbo.srba(gamma, rho, inner_loss, outer_loss, linear_learning_rate=rho)
    elif self.method == "sogd":
      options = {"linear_learning_rate": rho, "correction": 0.1}
      outer = jaxbo.sogd(gamma, rho, inner_loss, outer_loss, **options)
    else:
      options = {"multiplier": self.multiplier, "inner_optimizer": optax.sgd(rho)}
      outer = jaxbo.f2sa(gamma, rho / self.multiplier, inner_loss, **options)
    loop = jaxbo.online_loop(outer_loss, None, outer)
    period = max(1, round(self.period * self.counts[0]))

    def init():
      return loop.init(*self.start, self.stream, key=self.random_state)

    def step(state):
      stream_state, batch = self.stream.step(state.stream_state)
      state = state._replace(stream_state=stream_state)
      play = lambda: loop.step(state, batch)[0]
      if self.method != "srba":
        return play()
      again = lambda: loop.step(state, (None, None), restart=True)[0]
      return jax.lax.cond(state.round_count % period == 0, again, play)

    return init, step

  def one_after_the_other(self) -> Any:
    """Methods of an inner solver and a response."""
    inner_loss, outer_loss = self.losses
    rho, num_steps = self.step_size, self.num_steps
    gamma = rho / self.outer_ratio
    double, y0 = self.method in DOUBLE_LOOPS, self.start[1]
    inner = jaxbo.inner_solver(
      inner_loss,
      optax.sgd(rho),
      1 if self.method == "soba" else num_steps,
      per_step_batches=double,
    )
    if self.method == "soba":
      outer = jaxbo.soba(gamma, inner, rho, inner_params=y0)
    elif self.method == "amigo":
      outer = jaxbo.amigo(gamma, inner, num_steps, rho, inner_params=y0)
    elif self.method == "stocbio":
      outer = jaxbo.stocbio(gamma, inner, num_steps, rho)
    elif self.method == "aid":
      solver = jaxbo.conjugate_gradient(num_steps, warm_start=True)
      outer = jaxbo.aid(gamma, inner, solver, inner_params=y0)
    else:
      raise ValueError(f"method must be a solver of this file, got {self.method!r}")
    begin, play = jaxbo.bilevel_loop(outer_loss, inner, outer)

    def init():
      return begin(*self.start), self.stream.init(self.random_state)

    def step(state):
      state, stream_state = state
      stream_state, last = self.stream.step(stream_state)
      if self.method == "aid":
        return play(state, None, None)[0], stream_state
      if not double:
        return play(state, last.train, last.val)[0], stream_state
      draw = lambda carry, _: self.stream.step(carry)
      stream_state, batches = jax.lax.scan(draw, stream_state, length=num_steps)
      after = play(state, batches.train, last.val, linear_batch=last.train)[0]
      return after, stream_state

    return init, step

  def run(self, callback: Any) -> None:
    """Runs ``eval_freq`` steps between two looks."""
    state = self.init()
    self.state = state
    while callback():
      state = jax.block_until_ready(self.steps(state))
      self.state = state

  def get_result(self) -> dict[str, jax.Array]:
    """Both variables."""
    state: Any = self.state
    if self.method in JOINT:
      return {"inner_var": state.y, "outer_var": state.x}
    return {"inner_var": state[0].solution.params, "outer_var": state[0].x}
