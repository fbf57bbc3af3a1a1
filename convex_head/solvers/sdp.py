"""The convex program as one semidefinite program in CVXPY: exact, for small data, the reference for the rest.

Variables: Z_c, Z'_c in S (decomposition.py) for every function c, a margin w_ik and a multiplier l_ik >= 0
for every example i and every form h_ik = sum_c B_ikc f_c whose worst case is in the loss (B_ikc is -1, 0, 1).
With D = sum_c B_ikc (Z_c - Z'_c) and s(t) = a t^2 + b t + c the S-lemma says, exactly and for radius r > 0,

    w_ik <= min_{|e|<=r} h_ik(x_i + e)   iff for some l_ik >= 0

    [ l_ik I + a D1            a D1 x_i + b d2 / 2            ]
    [ (a D1 x_i + b d2 / 2)'   h_ik(x_i) - w_ik - l_ik r^2    ]   is positive semidefinite.

That matrix is T_i'W(D)T_i + l_ik diag(I, -r^2) - w_ik E with T_i = [I x_i; 0 1], the W of solvers/conic.py
and E the last unit matrix; so b d2 / 2 enters with a plus (a minus there, and w is not the worst case).
Without a ball (r = 0) the S-lemma has no Slater point and the constraint is the linear w_ik <= h_ik(x_i).
Objective (arXiv 2405.14033 for the first two; pairs of classes are ours):

    binary          (1/n) sum_i (1 - w_i)_+                   form y f, y = +1 for label 1, -1 for label 0
    one_vs_rest     (1/nC) sum_ic (1 - w_ic)_+                forms y_ic f_c
    multi_margin    (1/nC) sum_i sum_{k != y} (1 - w_ik)_+    forms f_y - f_k
    crammer_singer  (1/n) sum_i max_{k != y} (1 - w_ik)_+     forms f_y - f_k

plus reg * sum_c (z4_c + z4'_c).
"""

from __future__ import annotations

from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.conic import (
    certify,
    form_signs,
    moment_variables,
    network_of,
    pick_conic_solver,
    quadratic_coefficients,
    report_start,
    robust_objective,
    solve_conic,
    values_at,
)


@dataclass(frozen=True)
class Variables:
    """Handles of the program's parts, F functions, n examples, K forms an example.

    Attributes:
        positive, negative: F variables (d+1, d+1) each, Z_c and Z'_c.
        margins: (n, K) w_ik.
        bound: the n K inequalities on the margins, in one batch; matrix inequalities, linear at radius 0.
    """

    positive: list[cp.Variable]
    negative: list[cp.Variable]
    margins: cp.Variable
    bound: cp.Constraint


def build(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    radius: float,
    reg: float,
    loss: str = "crammer_singer",
    coefficients: tuple[float, float, float] = (0.09, 0.5, 0.47),
) -> tuple[cp.Problem, Variables]:
    """The semidefinite program of the module docstring.

    Args:
        features: (n, d) float64.
        labels: (n,) integers in 0..num_classes-1.
        num_classes: C; two classes have one function and the hinge, whatever ``loss`` says.
        radius: r >= 0, in the units of the features.
        reg: weight of sum_c (z4_c + z4'_c), > 0.
        loss: name of a margin loss.
        coefficients: (a, b, c) of the activation.

    Returns:
        The CVXPY problem, unsolved, and its variables.

    Raises:
        UnknownLossError: ``loss`` is not a name.
    """
    signs = form_signs(labels, num_classes, loss)
    n, num_forms, num_functions = signs.shape
    positive, negative, constraints = moment_variables(num_functions, features.shape[1])
    quadratics = quadratic_coefficients(positive, negative, coefficients)
    margins = cp.Variable((n, num_forms))
    flat = cp.vec(margins, order="C")
    if radius == 0.0:
        centres = np.repeat(features, num_forms, axis=0)
        bound = flat <= values_at(centres, signs.reshape(-1, num_functions)) @ quadratics
    else:
        size, count = features.shape[1] + 1, n * num_forms
        multipliers = cp.Variable(count, nonneg=True)
        ball, corner = np.eye(size), np.zeros((size, size))
        ball[-1, -1], corner[-1, -1] = -(radius**2), 1.0
        stacked = _centred(features, signs) @ quadratics + _repeat(ball, count) @ multipliers
        bound = cp.PSD(cp.reshape(stacked - _repeat(corner, count) @ flat, (count, size, size), order="C"))
    objective = robust_objective(margins, positive, negative, loss, reg)
    variables = Variables(positive, negative, margins, bound)
    return cp.Problem(cp.Minimize(objective), [*constraints, bound]), variables


def _centred(features: np.ndarray, signs: np.ndarray) -> sp.csr_array:
    """(n K (d+1)^2, F (d+1)^2) matrix that maps the stacked W(D_c) to the stacked T_i' W(D) T_i."""
    size = features.shape[1] + 1
    shift = sp.eye_array(size, format="lil")
    blocks = []
    for x, form in zip(features, signs, strict=True):
        shift[:-1, -1] = x[:, None]
        transposed = shift.T.tocsr()
        blocks.append(sp.kron(form, sp.kron(transposed, transposed), format="csr"))
    return sp.vstack(blocks, format="csr")


def _repeat(matrix: np.ndarray, count: int) -> sp.csr_array:
    """(count q^2, count) matrix that maps scalars t to the stacked t_i * matrix."""
    return sp.kron(sp.eye_array(count), sp.csr_array(matrix.reshape(-1, 1)), format="csr")


def multipliers(variables: Variables, radius: float) -> np.ndarray:
    """(n, K, d+1, d+1) multipliers of the margins' bounds in the form that :func:`certify` takes."""
    shape = variables.margins.shape
    size = variables.positive[0].shape[0]
    if radius > 0.0:
        return np.asarray(variables.bound.dual_value).reshape(*shape, size, size)
    moments = np.zeros((*shape, size, size))
    moments[..., -1, -1] = np.asarray(variables.bound.dual_value).reshape(shape)
    return moments


class SDP(Solver):
    """See the module docstring.

    Args:
        conic_solver: CVXPY's name of a conic solver, or None for an installed one that suits the size.
        rank_tol: eigenvalues of Z below this share of the largest are the conic solver's noise.
    """

    name = "sdp"

    def __init__(self, conic_solver: str | None = None, rank_tol: float = 1e-6):
        self.conic_solver = conic_solver
        self.rank_tol = rank_tol

    def _solve(self, problem: PolynomialProblem, run: Run) -> None:
        labels = problem.labels.cpu().numpy()
        signs = form_signs(labels, problem.num_classes, problem.loss)
        triangle = (problem.d + 1) * (problem.d + 2) // 2
        name = pick_conic_solver(self.conic_solver, problem.n * problem.num_margins * triangle**2)
        report_start(problem, run)
        program, variables = build(
            problem.features.cpu().numpy(),
            labels,
            num_classes=problem.num_classes,
            radius=problem.radius,
            reg=problem.reg,
            loss=problem.loss,
            coefficients=problem.coefficients,
        )
        if not solve_conic(program, name, run):
            return
        network = network_of(variables.positive, variables.negative, problem, self.rank_tol)
        dual = certify(problem, signs, multipliers(variables, problem.radius))
        run.extra |= {
            "conic_solver": name,
            "conic_status": program.status,
            "conic_value": float(program.value),
        }
        run.report(primal=problem.objective(network), dual=dual, network=network, neurons=network.size)
