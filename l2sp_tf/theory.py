"""Appendix A: the minimiser of a quadratic objective under a penalty, Eqs. (8) and (9).

Symbols: `hessian` H, of the unregularized objective J at its minimum; `w_star` w*, that minimum; `w0` the
anchor; `alpha` the strength. With w0 = 0 the formulas describe L2. All computations are in float64.
"""

import numpy as np

from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError


def minimiser(hessian, w_star, w0, alpha, fisher=None):
    """Eq. (8): the minimiser of a quadratic objective under L2-SP, from H (w - w*) + alpha (w - w0) = 0.

    The objective is 1/2 (w - w*)^T H (w - w*) + alpha / 2 ||w - w0||^2. With `fisher` the penalty is that of Eq. (4), and
    the condition H (w - w*) + alpha F (w - w0) = 0, F = diag(F_jj). The paper omits this case.

    Args:
        hessian: H, symmetric and positive semi-definite, [n, n].
        w_star, w0: w* and w0, [n].
        alpha: strength, finite and at least 0.
        fisher: F_jj, finite and not negative, [n]; 1 by default.

    Returns:
        The minimiser, [n].

    Raises:
        InputError: an argument is invalid, or H + alpha F is singular: the minimiser is then not unique.
    """
    hessian, (w_star, w0), tolerance = _quadratic(hessian, w_star=w_star, w0=w0)
    metric = fields.number("alpha", alpha) * _fisher(fisher, len(w0))
    if np.linalg.eigvalsh(hessian + np.diag(metric))[0] <= max(tolerance, _resolution(np.diag(metric))):
        raise InputError(f"H + alpha F is singular at alpha = {alpha!r}, and has no unique minimiser: give a larger alpha.")
    return w_star + np.linalg.solve(hessian + np.diag(metric), metric * (w0 - w_star))


def shrinkage(eigenvalues, alpha):
    """Eq. (9): the factors lambda_i / (lambda_i + alpha) on w*; those on w0 are 1 minus them.

    Args:
        eigenvalues: lambda_i of the Hessian, not negative, [n].
        alpha: strength, finite and at least 0.

    Returns:
        The factors, between 0 and 1, [n].

    Raises:
        InputError: an argument is invalid, or an eigenvalue is 0 at alpha = 0.
    """
    eigenvalues = _finite(eigenvalues, "eigenvalues", 1)
    if np.any(eigenvalues < 0):
        raise InputError(f"eigenvalues has {eigenvalues.min():g}, but those of a minimum are not negative: give its Hessian's.")
    if fields.number("alpha", alpha) == 0 and not np.all(eigenvalues):
        raise InputError("alpha is 0 while an eigenvalue of the Hessian is 0, so no point is the only minimum: give alpha > 0.")
    return eigenvalues / (eigenvalues + alpha)


def path(hessian, w_star, w0, alphas):
    """Eq. (9): the minimiser for each alpha, a convex combination of w* and w0 along each eigenvector.

    Q^T w = (Lambda + alpha I)^-1 Lambda Q^T w* + alpha (Lambda + alpha I)^-1 Q^T w0, with
    H = Q Lambda Q^T. Eigenvalues within rounding of 0 count as 0.

    Args:
        hessian: H, symmetric and positive semi-definite, [n, n].
        w_star, w0: w* and w0, [n].
        alphas: strengths, each finite and at least 0, [k].

    Returns:
        The minimisers, [k, n].

    Raises:
        InputError: an argument is invalid, or an alpha is 0 although H is singular.
    """
    hessian, (w_star, w0), tolerance = _quadratic(hessian, w_star=w_star, w0=w0)
    eigenvalues, q = np.linalg.eigh(hessian)
    eigenvalues[eigenvalues <= tolerance] = 0
    factors = np.array([shrinkage(eigenvalues, alpha) for alpha in _finite(alphas, "alphas", 1)])
    return (factors * (w_star @ q) + (1 - factors) * (w0 @ q)) @ q.T


def _quadratic(hessian, **points):
    """Checks H and the points; returns them in float64, with the size below which an eigenvalue of H is rounding."""
    given, hessian = np.asarray(hessian), _finite(hessian, "hessian", 2)
    n, resolution = len(hessian), _resolution(given)
    if hessian.shape != (n, n) or np.abs(hessian - hessian.T).max() > resolution:
        raise InputError(f"hessian, of the shape {hessian.shape}, is not symmetric: give a matrix of second derivatives.")
    hessian = (hessian + hessian.T) / 2
    if (least := np.linalg.eigvalsh(hessian).min()) < -resolution:
        raise InputError(f"hessian has the eigenvalue {least:g}, so w_star is not a minimum: give the Hessian at a minimum.")
    points = {name: _finite(value, name, 1) for name, value in points.items()}
    for name, value in points.items():
        if len(value) != n:
            raise InputError(f"{name} has {len(value)} entries, but hessian is {n} by {n}: give one for each row.")
    return hessian, points.values(), resolution


def _resolution(matrix):
    """n eps ||H||_inf: a bound on the rounding of an eigenvalue in the dtype of `matrix`."""
    kind = np.result_type(matrix, np.float32)
    return len(matrix) * np.finfo(kind).eps * np.abs(matrix).sum(axis=-1).max()


def _finite(value, name, rank):
    array = np.asarray(value, "float64")
    if array.ndim != rank or array.size == 0 or not np.all(np.isfinite(array)):
        raise InputError(f"{name}, of the shape {array.shape}, is not an array of finite numbers with {rank} axes: give one.")
    return array


def _fisher(fisher, n):
    fisher = np.ones(n) if fisher is None else _finite(fisher, "fisher", 1)
    if len(fisher) != n or np.any(fisher < 0):
        raise InputError(f"fisher has {len(fisher)} entries, the least {fisher.min():g}: give {n} that are at least 0.")
    return fisher
