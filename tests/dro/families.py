"""The robust weightings as functions of traced parameters, and a generic solver as their oracle.

Each weighting is compiled once, for batches of 50: smaller ones are padded with masked rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

import jaxbo

SIZE = 50
MAKE = {
  "kl": jaxbo.dro.kl,
  "kl_ball": jaxbo.dro.kl_ball,
  "cvar": jaxbo.dro.cvar,
  "kl_cvar": jaxbo.dro.kl_cvar,
  "chi_square": jaxbo.dro.chi_square,
  "chi_square_ball": jaxbo.dro.chi_square_ball,
  "cressie_read_ball": jaxbo.dro.cressie_read_ball,
  "total_variation_ball": jaxbo.dro.total_variation_ball,
  "tilted": jaxbo.dro.tilted,
}


@functools.cache
def compiled(name, transform=lambda weigh: weigh):
  def weigh(losses, mask, prior, *parameters):
    weighting = MAKE[name](*parameters)
    weights, _, info = weighting.weigh(losses, weighting.init(), mask=mask, prior=prior)
    return weights, info

  return jax.jit(transform(weigh))


def pad(values, fill):
  values = np.asarray(values, float)
  return jnp.asarray(np.concatenate([values, np.full(SIZE - values.size, fill)]))


def weigh(name, losses, *parameters, prior=None):
  """Weights in float64 as NumPy, and the info; padding is masked and holds NaN."""
  n = len(losses)
  prior = np.ones(n) if prior is None else prior
  with jax.enable_x64(True):
    arguments = pad(losses, np.nan), jnp.arange(SIZE) < n, pad(prior, 1e3)
    parameters = [jnp.asarray(p, jnp.float64) for p in parameters]
    weights, info = jax.tree.map(np.asarray, compiled(name)(*arguments, *parameters))
  assert not np.any(weights[n:])
  assert info.num_valid == n
  assert info.num_excluded == 0
  return weights[:n], info


def kl_divergence(w, p):
  return np.sum(np.where(w > 0, w * np.log(np.maximum(w, 1e-300) / p), 0))


def chi_square_divergence(w, p):
  return 0.5 * np.sum(p * (w / p - 1) ** 2)


def cressie_read_divergence(w, p, power):
  t = w / p
  return np.sum(p * (t**power - power * t + power - 1)) / (power * (power - 1))


def optimum(name, losses, *parameters, prior=None):
  """The largest value of the objective on the simplex, by scipy's generic solvers."""
  losses = np.asarray(losses, float)
  n = losses.size
  p = np.full(n, 1 / n) if prior is None else np.asarray(prior, float) / np.sum(prior)
  if name == "tilted":
    sign, name, parameters = np.sign(parameters[0]), "kl", (1 / abs(parameters[0]),)
    return sign * optimum("kl", sign * losses, *parameters, prior=prior)
  if name == "total_variation_ball":  # w = p + up - down, in a linear program.
    (radius,), ones, eye = parameters, np.ones(n), np.eye(n)
    result = scipy.optimize.linprog(
      -np.concatenate([losses, -losses]),
      A_ub=np.block([[ones, 0 * ones], [-eye, eye]]),
      b_ub=[radius, *p],
      A_eq=np.concatenate([ones, -ones])[None],
      b_eq=[0],
    )
    return p @ losses - result.fun
  if name == "cressie_read_ball":  # The dual, convex in one variable.
    (radius, k), conjugate = parameters, parameters[1] / (parameters[1] - 1)
    factor, top = (1 + k * (k - 1) * radius) ** (1 / k), losses.max()

    def dual(log_depth):
      eta = top - np.exp(log_depth)
      hinges = np.maximum(losses - eta, 0) / np.exp(log_depth)  # At most 1: powers are finite.
      return eta + factor * np.exp(log_depth) * (p @ hinges**conjugate) ** (1 / conjugate)

    bounds = {"bounds": (-40, 12), "options": {"xatol": 1e-10}}
    starts = np.linspace(-40, 12, 400)
    best = starts[np.argmin([dual(start) for start in starts])]
    bounds["bounds"] = (best - 0.3, best + 0.3)
    return min(top, scipy.optimize.minimize_scalar(dual, **bounds).fun)
  *level, scale = parameters
  cap = np.minimum(p / (level[0] if level else scale if name == "cvar" else 1e-9), 1.0)
  if name == "cvar":
    result = scipy.optimize.linprog(
      -losses, A_eq=np.ones((1, n)), b_eq=[1], bounds=list(zip(np.zeros(n), cap, strict=True))
    )
    return -result.fun
  if name == "kl_ball":  # SLSQP does not converge at n = 50: the dual, convex in one variable.
    softmax_value = lambda t: t * scipy.special.logsumexp(losses / t, b=p)
    dual = lambda log_t: np.exp(log_t) * scale + softmax_value(np.exp(log_t))
    options = {"xatol": 1e-10}
    return scipy.optimize.minimize_scalar(dual, bounds=(-25, 12), options=options).fun
  divergence = chi_square_divergence if name.startswith("chi") else kl_divergence
  slope = (
    (lambda w: w / p - 1)
    if name.startswith("chi")
    else (lambda w: np.log(np.maximum(w, 1e-300) / p) + 1)
  )
  constraints = [{"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n)}]
  if name.endswith("ball"):
    fun, jac = lambda w: -w @ losses, lambda w: -losses
    constraints.append(
      {"type": "ineq", "fun": lambda w: scale - divergence(w, p), "jac": lambda w: -slope(w)}
    )
  else:
    fun = lambda w: -(w @ losses - scale * divergence(w, p))
    jac = lambda w: -(losses - scale * slope(w))
  low = 1e-14 if "kl" in name else 0.0  # The entropy has no slope at zero.
  result = scipy.optimize.minimize(
    fun,
    0.5 * p + 0.5 * scipy.special.softmax(losses),  # At p the chi-square ball has no slope.
    jac=jac,
    bounds=list(zip(np.full(n, low), cap, strict=True)),
    constraints=constraints,
    method="SLSQP",
    options={"ftol": 1e-15, "maxiter": 500},
  )
  return -result.fun
