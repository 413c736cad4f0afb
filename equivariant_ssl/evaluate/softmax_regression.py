"""Multinomial logistic regression in float32 on all devices, for more features than scikit-learn
can fit in a day."""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial
from scipy.special import logsumexp

from equivariant_ssl.evaluate import row_sums
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.evaluate.row_sums import CHUNK, FeatureRows, make_rows, product, sum_over_rows
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Array

MEMORY = 3         # steps that L-BFGS remembers; each takes two arrays of the size of the weights
ITERATIONS = 200   # of L-BFGS for one penalty, at most
TRIALS = 10        # passes of one line search, at most
# L-BFGS stops where half the squared gradient, in the coordinates in which the curvature is about
# 1, is this share of the objective: about what the objective can still fall by.
TOLERANCE = 1e-6
SAMPLE = 512       # rows on which the result is compared with float64
SMALLEST = 1e-2    # mean cross-entropies below it are compared as if they were this large
RIDGE = 1e-6       # of the trace, on the curvature
PATIENCE = 2       # smaller penalties are not tried after so many that are less accurate


class Coordinates(NamedTuple):
  """The coordinates phi [D + 1, K] in which the curvature of the objective is about 1.

  The weights are inverse^T phi without its last row, which times `stretch` is the bias. inverse:
  [D D], the inverse of the curvature's triangular root. stretch: a number.
  """
  inverse: Array
  stretch: Array


class SoftmaxFit(NamedTuple):
  """A fit: weights [D K] for rows as they are read, bias [K]; the objective; the passes over the
  rows that it took; whether it converged."""
  weights: Array
  bias: Array
  objective: float
  passes: int
  converged: bool


class Programs(NamedTuple):
  """The compiled programs of one mesh.

  gradient: ((weights, bias), rows) -> `row_sums.loss_and_gradient` of all rows. mean: (zeros [D],
  rows) -> the mean row. scatter: (zeros [D D], rows) -> the mean of x x^T. judge: ((weights, bias),
  rows) -> (top-1 accuracy, doubt). coordinates, weights: the functions of that name below. start,
  step: of L-BFGS in the coordinates phi.
  """
  gradient: Callable
  mean: Callable
  scatter: Callable
  judge: Callable
  coordinates: Callable
  weights: Callable
  start: Callable
  step: Callable


def weights_of(c: Coordinates, phi: Array) -> tuple[Array, Array]:
  """Return the weights [D K] and the bias [K] at the coordinates phi."""
  return product(c.inverse.T, phi[:-1]), c.stretch * phi[-1]


def _coordinates(scatter: Array, doubt: Array, penalty: Array, weights: Array, bias: Array
                 ) -> tuple[Coordinates, Array]:
  """Return the Coordinates at a fit of this `doubt`, and the phi at which they give that fit.

  The curvature is taken as doubt / K x the rows' scatter + penalty: that of every class is alike. A
  share of the trace is added, since the root is taken in float32.
  """
  D, share = weights.shape[0], doubt / weights.shape[1]
  ridge = penalty + RIDGE * share * jnp.trace(scatter)
  identity = jnp.eye(D, dtype=scatter.dtype)
  root = jnp.linalg.cholesky(share * scatter + ridge * identity)
  inverse = jax.scipy.linalg.solve_triangular(root, identity, lower=True)
  stretch = 1. / jnp.sqrt(share)
  phi = jnp.concatenate([product(root.T, weights), bias[None] / stretch])
  return Coordinates(inverse, stretch), phi


def _objective(mesh: Mesh) -> Callable:
  """Return the function (phi, Coordinates, rows, penalty) -> the objective.

  Its gradient is summed beside the loss, in one pass: differentiating the loop over chunks would
  keep what each of them computed.
  """
  add_gradient = sum_over_rows(mesh, row_sums.loss_and_gradient, row_sums.no_gradient)

  def evaluated(phi: Array, c: Coordinates, rows: FeatureRows, penalty: Array) -> tuple:
    (weights, bias), total = weights_of(c, phi), rows.weight.sum()
    loss, of_weights, of_bias = add_gradient((weights, bias), rows)
    of_weights = of_weights / total + penalty * weights
    of_phi = [product(c.inverse, of_weights), c.stretch * of_bias[None] / total]
    return loss / total + .5 * penalty * jnp.sum(weights ** 2), jnp.concatenate(of_phi)
  objective = jax.custom_vjp(lambda *arguments: evaluated(*arguments)[0])
  objective.defvjp(evaluated, lambda gradient, of_value: (of_value * gradient, None, None, None))
  return objective


def _solver(mesh: Mesh) -> tuple[Callable, Callable]:
  """Return (start, step) of L-BFGS.

  start: phi -> the state. step: (phi, state, Coordinates, rows, penalty) -> (phi, state, the
  objective, the squared gradient, passes over the rows).
  """
  objective = _objective(mesh)
  # The objective is convex and the curvature about 1, so that a whole step is nearly always taken.
  search = optax.scale_by_backtracking_linesearch(
      TRIALS, decrease_factor=.5, increase_factor=math.inf, store_grad=True)
  solver = optax.lbfgs(memory_size=MEMORY, linesearch=search)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(phi: Array, state: Any, c: Coordinates, rows: FeatureRows, penalty: Array) -> tuple:
    def at(phi: Array) -> Array:
      return objective(phi, c, rows, penalty)
    value, gradient = optax.value_and_grad_from_state(at)(phi, state=state)
    updates, state = solver.update(gradient, state, phi, value=value, grad=gradient, value_fn=at)
    end: Any = state[-1]
    return (optax.apply_updates(phi, updates), state, end.value, jnp.sum(end.grad ** 2),
            end.info.num_linesearch_steps)
  return jax.jit(solver.init), step


@functools.lru_cache
def programs(mesh: Mesh) -> Programs:
  """Return the Programs of a mesh."""
  def average(read: Callable) -> Callable:
    add = sum_over_rows(mesh, read, lambda zeros: zeros)
    return jax.jit(lambda zeros, rows: add(zeros, rows) / rows.weight.sum())

  add_judged = sum_over_rows(mesh, row_sums.judge, lambda shared: (jnp.zeros(()),) * 3)

  def judge(shared: tuple, rows: FeatureRows) -> tuple[Array, Array]:
    right, total, doubt = add_judged(shared, rows)
    return right / total, doubt / total
  add_gradient = sum_over_rows(mesh, row_sums.loss_and_gradient, row_sums.no_gradient)
  return Programs(jax.jit(add_gradient), average(row_sums.total), average(row_sums.scatter),
                  jax.jit(judge), jax.jit(_coordinates), jax.jit(weights_of), *_solver(mesh))


def _standardized(rows: FeatureRows, mesh: Mesh) -> tuple[FeatureRows, Array]:
  """Return rows that are read with mean 0 and variance 1, and their mean of x x^T [D D].

  Dimensions that never change are read as 0, as `linear.standardizer` has them.
  """
  p, D = programs(mesh), rows.x.shape[1]
  rows = rows._replace(mean=p.mean(np.zeros(D, np.float32), rows))
  scatter = p.scatter(np.zeros((D, D), np.float32), rows)
  std = jnp.sqrt(jnp.diagonal(scatter))
  alive = std > 1e-5 * jnp.maximum(std.max(), 1e-30)
  scale = jnp.where(alive, 1. / jnp.where(alive, std, 1.), 0.)
  return rows._replace(scale=scale), scatter * scale[:, None] * scale[None, :]


def minimize(mesh: Mesh, rows: FeatureRows, scatter: Array, start: SoftmaxFit, penalty: float,
             doubt: Any) -> SoftmaxFit:
  """Return the fit of weights W at one penalty: of the mean cross-entropy + penalty |W|^2 / 2.

  start: the fit to start at. doubt: what `judge` says of it.
  """
  p, penalty_array = programs(mesh), np.float32(penalty)
  c, phi = p.coordinates(scatter, doubt, penalty_array, start.weights, start.bias)
  state, passes, value, converged = p.start(phi), 1, math.inf, False
  for _ in range(ITERATIONS):
    phi, state, new, square, trials = p.step(phi, state, c, rows, penalty_array)
    before, value = value, float(new)
    passes += int(trials)
    converged = .5 * float(square) <= TOLERANCE * value
    if converged or not value < before:  # float32 can tell no lower value
      break
  weights, bias = p.weights(c, phi)
  return SoftmaxFit(weights, bias, value, passes, converged)


def _float64_difference(mesh: Mesh, rows: FeatureRows, x: np.ndarray, y: np.ndarray,
                        fit: SoftmaxFit) -> float:
  """Return the largest relative difference between float32 on the devices and float64 here: of the
  mean cross-entropy of some rows [S D], and of its gradient."""
  sample = make_rows(x, y, mesh)._replace(mean=rows.mean, scale=rows.scale)
  on_devices: Any = programs(mesh).gradient((fit.weights, fit.bias), sample)
  mean, scale, weights, bias = (np.asarray(a, np.float64) for a in
                                (rows.mean, rows.scale, fit.weights, fit.bias))
  least = SMALLEST * len(y)  # a cross-entropy near 0 has no relative accuracy, and needs none
  z = (x - mean) * scale
  logits = z @ weights + bias
  log_sum: Any = logsumexp(logits, axis=1, keepdims=True)
  log_p = logits - log_sum
  index = np.arange(len(y))
  error = np.exp(log_p)
  error[index, y] -= 1.
  here: Any = -log_p[index, y].sum(), z.T @ error, error.sum(0)
  return max(float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), least))
             for a, b in zip(on_devices, here, strict=True))


class Candidate(NamedTuple):
  """The fit at one penalty: its accuracy on the held-out rows and its doubt on the others."""
  top1: float
  penalty: float
  fit: SoftmaxFit
  doubt: Any


class Chosen(NamedTuple):
  """The fit to all rows at the chosen penalty.

  mean, scale: float32 [D], by which a row is standardized. held_out_top1: of the chosen penalty;
  None where nothing was held out. passes: over the rows, at all penalties. difference: between
  float32 and float64, see `_float64_difference`.
  """
  fit: SoftmaxFit
  mean: np.ndarray
  scale: np.ndarray
  penalty: float
  held_out_top1: float | None
  passes: int
  difference: float


def _candidates(mesh: Mesh, rows: FeatureRows, scatter: Array, out: np.ndarray, first: Candidate,
                penalties: tuple[float, ...]) -> tuple[Candidate, int]:
  """Return the best of the fits at `penalties`, falling, to the rows that are not `out`, each
  started at the one before, and the passes that they took.

  Where PATIENCE in a row are less accurate than the best, no more are tried.
  """
  judge, best, last, passes, worse = programs(mesh).judge, first, first, 0, 0
  fitted, held = (rows._replace(weight=sharding.place_rows(mask.astype(np.float32), mesh))
                  for mask in (~out, out))
  for penalty in penalties:
    fit = minimize(mesh, fitted, scatter, last.fit, penalty, last.doubt)
    weights = fit.weights, fit.bias
    (top1, _), (_, doubt) = judge(weights, held), judge(weights, fitted)
    last, passes = Candidate(float(top1), penalty, fit, doubt), passes + fit.passes + 2
    worse = worse + 1 if last.top1 < best.top1 else 0
    best = last if last.top1 > best.top1 else best
    if worse == PATIENCE:
      break
  return best, passes


def choose(x: np.ndarray, y: np.ndarray, out: np.ndarray, K: int, penalties: tuple[float, ...],
           mesh: Mesh) -> Chosen:
  """Return the fit to features [N D] float32 and labels [N] in [0, K) at one of `penalties`.

  It is the one whose fit to the other rows is the most accurate on the rows `out`, a mask [N] (of
  equal ones the largest). Penalties are tried from the largest down, until PATIENCE in a row are
  less accurate than the best. All is computed on the devices, with the same bits in each process.
  """
  rows, scatter = _standardized(make_rows(x, y, mesh), mesh)
  weights, bias = sharding.place(
      (np.zeros((x.shape[1], K), np.float32), np.zeros(K, np.float32)),
      sharding.replicated_sharding(mesh))
  penalties = tuple(sorted(penalties, reverse=True))
  nothing = SoftmaxFit(weights, bias, math.inf, 0, False)
  first = Candidate(-1., penalties[0], nothing, np.float32(1 - 1 / K))
  best, passes = first, 0
  if out.any():
    best, passes = _candidates(mesh, rows, scatter, out, first, penalties)
  fit = minimize(mesh, rows, scatter, best.fit, best.penalty, best.doubt)
  sample = np.linspace(0, len(x) - 1, min(SAMPLE, len(x))).astype(np.int64)
  return Chosen(fit, np.asarray(rows.mean), np.asarray(rows.scale), best.penalty,
                best.top1 if out.any() else None, 2 + passes + fit.passes,
                _float64_difference(mesh, rows, x[sample], y[sample], fit))


def _scores(weights: Array, bias: Array, mean: Array, scale: Array, x: Array) -> Array:
  return product((x - mean[None, :]) * scale[None, :], weights) + bias[None, :]


def scores(chosen: Chosen, x: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Return the scores [M K] of features [M D] float32."""
  f = Partial(_scores, chosen.fit.weights, chosen.fit.bias, chosen.mean, chosen.scale)
  return in_batches(f, x, CHUNK, mesh)
