"""What the solvers that use CVXPY share: variables, objective, choice of conic solver, certificate.

Every margin is the worst case of a form h_ik = sum_c B_ikc f_c with B_ikc in {-1, 0, 1}, and
f_c(x) = [x; 1]' W(D_c) [x; 1] with D_c = Z_c - Z'_c and

    W(D) = [ a D1, b d2/2 ; b d2'/2, c d4 ]                     Z_c, Z'_c PSD, tr Z1 = z4, tr Z1' = z4'.

The multiplier of a margin holds moments of weighted steps from its example into the ball: a linear bound
gives [e; 1][e; 1]' times its multiplier, a matrix inequality its multiplier matrix. :func:`certify` turns
them into the rigorous lower bound of problems/polynomial.py, with any number of worst points for a margin.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch

from convex_head.decomposition import network_from_moments
from convex_head.errors import SolverError, UnknownSolverError
from convex_head.problems.base import Network
from convex_head.problems.dual import DualPoint
from convex_head.problems.losses import get_loss
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.base import Run

_CLARABEL_LIMIT = 2_000_000
_CANDIDATES = ("MOSEK", "CLARABEL", "SCS")


def form_signs(labels: np.ndarray, num_classes: int, loss: str) -> np.ndarray:
    """B (n, K, F): the coefficient of f_c in the k-th form of example i.

    K = F = 1 for two classes, K = F = C for one_vs_rest; K = C - 1 and F = C for pairs, where k runs through
    the classes other than the example's own in increasing order.

    Raises:
        UnknownLossError: ``loss`` is not a name.
    """
    pairwise = get_loss(loss).pairwise
    if num_classes == 2:
        return (2.0 * labels - 1.0).reshape(-1, 1, 1)
    identity = np.eye(num_classes)
    if not pairwise:
        return (2.0 * identity[labels] - 1.0)[:, :, None] * identity
    others = np.array([np.delete(np.arange(num_classes), y) for y in range(num_classes)])
    return identity[labels][:, None, :] - identity[others[labels]]


def moment_variables(num_functions: int, width: int) -> tuple[list[cp.Variable], list[cp.Variable], list[Any]]:
    """Z_c, Z'_c of size width + 1 and the constraints tr Z1 = z4 of each (they are PSD by declaration)."""
    size = width + 1
    positive = [cp.Variable((size, size), PSD=True) for _ in range(num_functions)]
    negative = [cp.Variable((size, size), PSD=True) for _ in range(num_functions)]
    return positive, negative, [cp.trace(Z) == 2 * Z[-1, -1] for Z in (*positive, *negative)]


def quadratic_mask(width: int, coefficients: tuple[float, float, float]) -> np.ndarray:
    """(d+1, d+1) entries by which W(D) multiplies those of D."""
    a, b, c = coefficients
    mask = np.full((width + 1, width + 1), a)
    mask[-1, :] = mask[:, -1] = b / 2
    mask[-1, -1] = c
    return mask


def quadratic_coefficients(
    positive: Sequence[cp.Variable], negative: Sequence[cp.Variable], coefficients: tuple[float, float, float]
) -> cp.Expression:
    """(F (d+1)^2,) stacked W(D_c), so that f_c(x) = [x; 1]' W(D_c) [x; 1]."""
    mask = quadratic_mask(positive[0].shape[0] - 1, coefficients)
    pairs = zip(positive, negative, strict=True)
    return cp.hstack([cp.vec(cp.multiply(mask, Z - other), order="C") for Z, other in pairs])


def robust_objective(
    margins: cp.Expression,
    positive: Sequence[cp.Variable],
    negative: Sequence[cp.Variable],
    loss: str,
    reg: float,
) -> cp.Expression:
    """mean loss of the (n, K) worst-case margins + reg * sum_c (z4_c + z4'_c)."""
    n, num_forms = margins.shape
    form = get_loss(loss)
    hinge = cp.pos(1 - margins)
    total = cp.sum(cp.max(hinge, axis=1)) if form.joint and num_forms > 1 else cp.sum(hinge)
    share = form.share(max(2, len(positive)))
    norm = sum(Z[-1, -1] for Z in (*positive, *negative))
    return share / n * total + reg * norm


def values_at(points: np.ndarray, signs: np.ndarray) -> sp.csr_array:
    """Matrix (P, F (d+1)^2) from the stacked W(D_c) to sum_c signs_pc f_c(points_p).

    Args:
        points: (P, d).
        signs: (P, F).
    """
    lifted = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    outer = np.einsum("pa,pb->pab", lifted, lifted).reshape(len(points), -1)
    return sp.csr_array(np.einsum("pc,pq->pcq", signs, outer).reshape(len(points), -1))


def network_of(
    positive: Sequence[cp.Variable],
    negative: Sequence[cp.Variable],
    problem: PolynomialProblem,
    rank_tol: float,
) -> Network:
    """The network of a solved program, on the device of the problem."""
    network = network_from_moments(
        [torch.from_numpy(Z.value) for Z in positive], [torch.from_numpy(Z.value) for Z in negative], rank_tol
    )
    device = problem.features.device
    return Network(network.directions.to(device), network.weights.to(device), network.function.to(device))


def pick_conic_solver(name: str | None, cost: int) -> str:
    """The conic solver to use: ``name`` if installed, else MOSEK, CLARABEL or SCS.

    Args:
        name: a CVXPY solver name, or None to choose.
        cost: entries of the dense blocks in an interior-point factorisation. Beyond 2e6 (about a minute)
            CLARABEL is left aside for the first-order SCS.

    Raises:
        UnknownSolverError: ``name`` is not installed, or no conic solver is.
    """
    installed = cp.installed_solvers()
    if name is not None:
        if name not in installed:
            raise UnknownSolverError(
                f"conic_solver must be installed; found {name!r}, installed are {', '.join(installed)}. "
                "Install it or pass conic_solver=None."
            )
        return name
    usable = [s for s in _CANDIDATES if s in installed and (s != "CLARABEL" or cost <= _CLARABEL_LIMIT)]
    if not usable:
        raise UnknownSolverError(f"one of {', '.join(_CANDIDATES)} is needed; installed are {', '.join(installed)}.")
    return usable[0]


# Options from the relative gap asked for and the seconds left. Interior points pay little for accuracy, and the
# lower bound needs it; the first-order SCS pays a lot. CLARABEL's own static regularisation of 1e-8 fails in the
# first step of well-posed masters (n = 455, d = 30); iterative refinement makes up for the larger one.
_OPTIONS: dict[str, Callable[[float, float], dict[str, Any]]] = {
    "MOSEK": lambda tol, seconds: {"mosek_params": {"MSK_DPAR_OPTIMIZER_MAX_TIME": seconds}},
    "CLARABEL": lambda tol, seconds: {
        "time_limit": seconds,
        **dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), min(1e-7, 1e-4 * tol)),
        "static_regularization_constant": 1e-7,
    },
    "SCS": lambda tol, seconds: {
        "time_limit_secs": seconds,
        **dict.fromkeys(("eps_abs", "eps_rel"), min(1e-4, 1e-2 * tol)),
    },
}


def report_start(problem: PolynomialProblem, run: Run) -> None:
    """Report the warm start, or the zero network, so that a time limit always finds a point to return."""
    network = run.start if run.start is not None else Network.empty(problem.d, device=problem.features.device)
    run.report(primal=problem.objective(network), dual=0.0, network=network, neurons=network.size)


def solve_conic(program: cp.Problem, conic_solver: str, run: Run) -> bool:
    """Solve in place in the time left.

    Returns:
        Whether there is a point; False only when the time is over.

    Raises:
        SolverError: the conic solver fails for another reason; ``best`` carries the run's best network.
    """
    seconds = 1e9 if run.max_seconds is None else max(1e-3, run.max_seconds - run.seconds)
    options = _OPTIONS.get(conic_solver, lambda tol, seconds: {})(run.tol, seconds)
    try:
        # "May be inaccurate" is for those who trust the solver's value; here the certificate is measured.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            program.solve(solver=conic_solver, canon_backend="SCIPY", **options)
        found = all(variable.value is not None for variable in program.variables())
        reason = f"it ended with status {program.status!r}"
    except cp.SolverError as error:
        found, reason = False, f"it failed: {error}"
    if not found and not run.out_of_time():
        raise SolverError(f"{conic_solver} must return a point; {reason}. Try another conic_solver.", best=run.network)
    return found


def certify(problem: PolynomialProblem, signs: np.ndarray, moments: np.ndarray) -> float:
    """Rigorous lower bound of the optimum from multipliers of the margins.

    Args:
        problem: whose optimum is bounded.
        signs: (n, K, F) of :func:`form_signs`.
        moments: (n, K, d+1, d+1), each [sum s e e', sum s e; sum s e', sum s] over steps e of weight s from
            the example into its ball, to solver precision: eigenvalues are clipped, steps pulled back into
            the ball, and masses scaled into the loss's set of slopes, so it is a bound whatever comes in.
    """
    eigenvalues, vectors = np.linalg.eigh((moments + moments.swapaxes(-1, -2)) / 2)
    steps = (vectors * np.maximum(eigenvalues, 0.0)[..., None, :]) @ vectors.swapaxes(-1, -2)
    spread = np.trace(steps[..., :-1, :-1], axis1=-2, axis2=-1)
    shrink = np.sqrt(np.minimum(1.0, problem.radius**2 * steps[..., -1, -1] / np.maximum(spread, 1e-300)))
    steps[..., :-1, :] *= shrink[..., None, None]
    steps[..., :, :-1] *= shrink[..., None, None]
    loss, cap = get_loss(problem.loss), get_loss(problem.loss).share(problem.num_classes) / problem.n
    mass = steps[..., -1, -1].sum(axis=1, keepdims=True) if loss.joint else steps[..., -1, -1]
    steps *= (cap / np.maximum(mass, cap))[..., None, None]
    shift = np.tile(np.eye(problem.d + 1), (problem.n, 1, 1))
    shift[:, :-1, -1] = problem.features.cpu().numpy()
    weighted = np.einsum("ikc,ikpq->icpq", signs, steps)
    total = np.einsum("iap,icpq,ibq->cab", shift, weighted, shift, optimize=True)
    by_column = steps[..., -1, -1].sum(axis=0)
    mass = by_column if len(by_column) == problem.num_functions else by_column.sum(keepdims=True)
    to_tensor = partial(torch.as_tensor, device=problem.features.device)
    point = DualPoint(to_tensor(mass), to_tensor(quadratic_mask(problem.d, problem.coefficients) * total))
    return problem.oracle(point).dual
