"""GPTQ: weights rounded one input after another, each making up for the errors before it.

  minimise tr(E H E^T),   E = W - W',   H = X^T X  (float[K, K], of the inputs X [samples, K])

Factor H = V V^T with V upper triangular. Column c of E V then holds errors of inputs up to c only:
E_c V_cc + sum_{r<c} E_r V_rc, and rounding input c's weights to the grid from

  w_c + sum_{r<c} E_r V_rc / V_cc

makes it as small as it can be. These are the roundings of Frantar et al. (arXiv:2210.17323), who
update all later weights through a Cholesky factor of H's inverse; that the two are one is shown by
Chen et al. (arXiv:2507.18553). Here nothing is inverted and no weight but the current is touched:
the sum over earlier runs of inputs is one matrix product a run.

Orders (`order`) in which inputs are taken:

  given     as they lie
  grouped   groups of larger mean H_cc first, and in a group inputs of larger H_cc first
  static    inputs of larger H_cc first; groups' parameters come from the original weights
  permuted  as static, but groups are of neighbours in that order: the result is of
            W[:, permutation], whose inputs must be permuted too

In all but "static" a group's parameters are found when its first input is reached, from its weights
as they then are: the optimum given the errors so far, w_g + (sum_{r<g} E_r V_rg) V_gg^-1.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant import rtn
from q4jax.quant.grid import (
  Fit,
  Floats,
  Grid,
  GroupArray,
  Parameters,
  checked,
  decode,
  encode,
  quantize,
)

Order = Literal["given", "grouped", "static", "permuted"]
ORDERS: tuple[Order, ...] = ("given", "grouped", "static", "permuted")
_RUN = 128  # Inputs a run, where groups do not say.
_WORST_DAMPING = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class GPTQ:
  """What came of it.

  Attributes:
    array: the quantised matrix.
    permutation: int[K], the order of its inputs (w[:, permutation]) under "permuted", else None.
    objective: float64[N], each row's E H E^T.
    start: the same of rounding without making up for errors, with the same `fit`; never less.
    fallback: rows that are as the start has them, for GPTQ did not improve them.
    damping: that was used; more than asked for where H was not positive definite.
  """

  array: GroupArray
  permutation: NDArray[np.intp] | None
  objective: NDArray[np.float64]
  start: NDArray[np.float64]
  fallback: int
  damping: float


def quantize_gptq(
  w: Floats,
  hessian: NDArray[np.floating],
  grid: Grid,
  *,
  fit: Fit = rtn.fit,
  order: Order = "given",
  damping: float = 0.01,
) -> GPTQ:
  """float[N, K] on a grid.

  Args:
    w: float[N, K].
    hessian: X^T X or a multiple, float32 or float64 [K, K], factored in that type. An input that
      was never active (H_cc = 0) is rounded to nearest.
    grid: its groups divide K.
    fit: finds groups' parameters; it is given V_cc^2 as importance, which is what the error of
      input c costs when later ones make up for it.
    order: of the inputs; see the module.
    damping: times the mean of H_cc, added to each H_cc.

  Raises:
    ConfigError: as rtn.fit; a Hessian that is none: not [K, K], not finite, not positive.
  """
  checked(w)
  grid.groups(w.shape)
  k = w.shape[1]
  _check(hessian, k, order)
  diagonal = np.diagonal(hessian).astype(np.float64)
  taken = _taken(diagonal, grid, order)
  x = np.ascontiguousarray(w[:, taken], np.float32)
  upper, damping = _factor(hessian[np.ix_(taken, taken)], damping)
  weight = np.square(np.diagonal(upper))

  # What is rounded without feedback, in the inputs' own order but under "permuted".
  home = np.arange(k) if order == "permuted" else np.argsort(taken)
  original = np.ascontiguousarray(x[:, home])
  start = fit(original, grid, diagonal[taken][home].astype(np.float32))
  whole = not isinstance(grid.group_size, int)
  given = start if whole or order == "static" else None
  codes, p = _round(x, upper, weight, grid, fit, given, taken if order == "static" else None)
  if given is None and order == "grouped":
    assert isinstance(grid.group_size, int)
    groups = np.argsort(taken[:: grid.group_size] // grid.group_size)
    p = p.map(lambda part: np.ascontiguousarray(part[:, groups]))
  array = GroupArray(np.ascontiguousarray(codes[:, home]), p, grid)

  plain = quantize(original, grid, start)
  h = hessian[np.ix_(taken[home], taken[home])]
  ours, theirs = (objective(original, a.dequantize(), h) for a in (array, plain))
  worse = ours > theirs
  array = _with_rows(array, plain, worse)
  return GPTQ(
    array,
    taken if order == "permuted" else None,
    np.minimum(ours, theirs),
    theirs,
    int(worse.sum()),
    damping,
  )


def objective(w: Floats, y: Floats, hessian: NDArray[np.floating]) -> NDArray[np.float64]:
  """Each row's (w - y) H (w - y)^T, float64[N]: its squared output error over the samples of H."""
  miss = w - y
  product = miss @ hessian.astype(np.float32)
  return np.asarray(np.einsum("nk,nk->n", product, miss, dtype=np.float64))


def _check(hessian: NDArray[np.floating], k: int, order: Order) -> None:
  if order not in ORDERS:
    raise ConfigError(f"order={order!r} is none of {', '.join(ORDERS)}.")
  if hessian.shape != (k, k):
    raise ConfigError(f"the Hessian is {list(hessian.shape)}; K={k} inputs need [{k}, {k}].")
  if not np.isfinite(hessian).all() or (np.diagonal(hessian) < 0).any():
    raise ConfigError("the Hessian has values that are not finite, or diagonal ones below 0.")


def _taken(diagonal: NDArray[np.float64], grid: Grid, order: Order) -> NDArray[np.intp]:
  """The inputs in the order in which they are rounded. Ties stay as they lie."""
  if order == "given":
    return np.arange(len(diagonal))
  if order != "grouped" or not isinstance(grid.group_size, int):
    return np.argsort(-diagonal, kind="stable")
  groups = diagonal.reshape(-1, grid.group_size)
  inside = np.argsort(-groups, axis=1, kind="stable")
  first = np.argsort(-groups.mean(axis=1), kind="stable")
  return (inside + np.arange(len(groups))[:, None] * grid.group_size)[first].reshape(-1)


def _factor(h: NDArray[np.floating], damping: float) -> tuple[Floats, float]:
  """The upper triangular V of damped H = V V^T, float32[K, K], and the damping that it took."""
  diagonal = np.diagonal(h).copy()
  mean = float(diagonal.mean()) or 1.0
  while True:
    # Reversed in both axes, V is the lower triangular factor that Cholesky gives.
    damped = np.ascontiguousarray(h[::-1, ::-1])
    np.fill_diagonal(damped, diagonal[::-1] + damping * mean)
    try:
      lower = np.linalg.cholesky(damped)
      return lower[::-1, ::-1].astype(np.float32), damping
    except np.linalg.LinAlgError:
      damping = max(10 * damping, 1e-4)
      if damping > _WORST_DAMPING:
        raise ConfigError(
          "the Hessian is not positive definite, not even with its mean diagonal added; is it "
          "X^T X?"
        ) from None


def _round(
  x: Floats,
  upper: Floats,
  weight: Floats,
  grid: Grid,
  fit: Fit,
  given: Parameters | None,
  member: NDArray[np.intp] | None,
) -> tuple[NDArray[np.uint8], Parameters]:
  """Codes of x [N, K] with feedback of errors, and the parameters, both in x's order.

  Args:
    given: parameters, or None to find them as groups are reached.
    member: of each input the input whose group it is in, where groups are not of neighbours.
  """
  n, k = x.shape
  size = grid.group_size if isinstance(grid.group_size, int) else k
  run = _RUN if given is not None else size
  # Inputs become rows: what is worked on is contiguous. v[c, r] = V_rc / V_cc for r < c.
  v = np.ascontiguousarray((upper / np.diagonal(upper)).T)
  rows = np.ascontiguousarray(x.T)
  miss = np.empty_like(rows)
  codes = np.empty((k, n), np.uint8)
  found: list[Parameters] = []
  for begin in range(0, k, run):
    end = min(begin + run, k)
    fed = v[begin:end, :begin] @ miss[:begin]
    if given is None:
      now = rows[begin:end] + np.linalg.solve(v[begin:end, begin:end], fed)
      group = dataclasses.replace(grid, group_size=size)
      found.append(fit(np.ascontiguousarray(now.T), group, weight[begin:end]))
    for c in range(begin, end):
      if given is None:
        p = found[-1].map(lambda part: part[:, 0])
      else:
        at = (c if member is None else int(member[c])) // size
        p = given.map(_column(at))
      target = rows[c] + (fed[c - begin] + v[c, begin:c] @ miss[begin:c])
      code = encode(target, grid, p)
      codes[c] = code
      np.subtract(rows[c], decode(code, grid, p), out=miss[c])
  p = given if given is not None else _joined(found)
  return codes.T, p


def _column(at: int) -> Callable[[NDArray], NDArray]:
  return lambda part: part[:, at]


def _joined(found: list[Parameters]) -> Parameters:
  def join(parts: list[NDArray | None]) -> NDArray | None:
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays, axis=1) if arrays else None

  scale = np.concatenate([p.scale for p in found], axis=1)
  return Parameters(scale, join([p.minimum for p in found]), join([p.zero_point for p in found]))


def _with_rows(a: GroupArray, b: GroupArray, of_b: NDArray[np.bool_]) -> GroupArray:
  """Rows of b where `of_b`, else of a."""
  codes = np.where(of_b[:, None], b.codes, a.codes)
  if len(a.scale) == 1:  # One set of parameters, the same in both.
    return dataclasses.replace(a, codes=codes)

  def pick(x: NDArray | None, y: NDArray | None) -> NDArray | None:
    return None if x is None or y is None else np.where(of_b[:, None], y, x)

  scale = np.where(of_b[:, None], b.scale, a.scale)
  p = Parameters(scale, pick(a.minimum, b.minimum), pick(a.zero_point, b.zero_point))
  return GroupArray(codes, p, a.grid)
