"""The program of the best slopes: its optimum against a conic solver's, its Newton step against autograd."""

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor

from convex_head.problems import interior_point
from convex_head.problems.dual import DualPoint, oracle
from convex_head.problems.interior_point import FreeRows, SlopeProgram

COEFFICIENTS, REG, CAP = (0.09, 0.5, 0.47), 0.02, 1 / 30


def moment(x: Tensor, weight: float) -> Tensor:
    """Share of a point with this weight in a moment, from the definition."""
    a, b, c = COEFFICIENTS
    found = torch.zeros(len(x) + 1, len(x) + 1, dtype=torch.float64)
    found[:-1, :-1], found[-1, -1] = a * torch.outer(x, x), c
    found[:-1, -1] = found[-1, :-1] = 0.5 * b * x
    return weight * found


def case(free: int = 24, fixed: int = 6, d: int = 5) -> tuple[FreeRows, DualPoint]:
    """Two margins of every example among three functions; the last rows are fixed."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(free + fixed, d, generator=generator, dtype=torch.float64)
    plus = torch.arange(free + fixed) // 2 % 3
    functions = torch.stack([plus, (plus + 1 + torch.arange(free + fixed) % 2) % 3], dim=1)
    slope = torch.full((free + fixed,), 0.3 * CAP, dtype=torch.float64)
    rest = torch.zeros(3, d + 1, d + 1, dtype=torch.float64)
    for x, (p, q), s in zip(points[free:], functions[free:].tolist(), slope[free:].tolist(), strict=True):
        rest[p] += moment(x, s)
        rest[q] -= moment(x, s)
    rows = FreeRows(points[:free], functions[:free], torch.ones(free).double(), slope[:free], torch.arange(free) // 2)
    return rows, DualPoint(slope[free:].sum().view(1), rest)


def program(rows: FreeRows, rest: DualPoint, basis: Tensor | None = None) -> SlopeProgram:
    d = rows.points.shape[1]
    basis = torch.eye(d, dtype=torch.float64).expand(3, 2, d, d) if basis is None else basis
    return SlopeProgram(rows, rest, basis, cap=CAP, coefficients=COEFFICIENTS, reg=REG)


def matrices(rows: FreeRows, rest: DualPoint) -> list[list[np.ndarray]]:
    """Of every function the share of each free slope, and last that of the others."""
    found = []
    for f in range(3):
        shares = []
        for x, (p, q) in zip(rows.points, rows.functions.tolist(), strict=True):
            shares.append(moment(x, float(p == f) - float(q == f)).numpy())
        found.append([*shares, rest.moments[f].numpy()])
    return found


@pytest.mark.parametrize("reg", [0.02, 0.005])
def test_the_optimum_is_that_of_a_conic_solver(monkeypatch: pytest.MonkeyPatch, reg: float) -> None:
    monkeypatch.setattr(f"{__name__}.REG", reg)
    monkeypatch.setattr(interior_point, "_CLOSE", 1e-6)
    rows, rest = case()
    free, mass = len(rows.slope), float(rest.mass)
    x, t = cvxpy.Variable(free + 1, nonneg=True), cvxpy.Variable((3, 2))
    constraints = [x[free] <= 1, *(x[2 * i] + x[2 * i + 1] <= CAP for i in range(free // 2))]
    corner = np.diag([0.0] * 5 + [1.0])
    for f, shares in enumerate(matrices(rows, rest)):
        moments = sum(x[r] * share for r, share in enumerate(shares))
        for half, sign in enumerate((-1, 1)):
            diagonal = t[f, half] * (np.eye(6) - 2 * corner) + reg * corner
            constraints.append(diagonal + sign * moments >> 0)
    optimum = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(x[:free]) + mass * x[free]), constraints).solve(solver="CLARABEL")
    start = torch.cat([rows.slope, torch.ones(1).double()])
    found = program(rows, rest)
    best = found.maximise(start, aim=2 * optimum, limit=3 * optimum, persist=True)
    bound = oracle(found.point(best), reg).dual
    assert optimum < (1 - 1e-3) * (free / 2 * CAP + mass)  # the matrices bind
    assert (1 - 1e-3) * optimum < bound <= (1 + 1e-6) * optimum
    assert bound == pytest.approx(float(found.point(best).mass), rel=1e-9)  # without being scaled down
    # What is good enough ends the search.
    early = found.point(found.maximise(start, aim=0.9 * optimum, limit=optimum)).mass
    assert 0.9 * optimum <= float(early) < 0.99 * optimum


def test_the_step_is_newton_s() -> None:
    """Gradient and Hessian of the objective, written down anew, by autograd."""
    rows, rest = case()
    found = program(rows, rest)
    now = found._start(torch.cat([rows.slope, torch.ones(1).double()]))
    assert now is not None
    shares = [torch.from_numpy(np.stack(part)) for part in matrices(rows, rest)]
    nu, n = 0.01, len(now.x)
    corner = torch.diag(torch.tensor([0.0] * 5 + [1.0], dtype=torch.float64))

    def objective(z: Tensor) -> Tensor:
        x, t = z[:n], z[n:].view(3, 2)
        value = (x[:-1].sum() + float(rest.mass) * x[-1]) / nu + x.log().sum() + (1 - x[-1]).log()
        value = value + (CAP - x[:-1].view(-1, 2).sum(1)).log().sum()
        for f, share in enumerate(shares):
            a = torch.einsum("r,rij->ij", x, share)
            for half, sign in enumerate((-1.0, 1.0)):
                diagonal = t[f, half] * (torch.eye(6).double() - 2 * corner) + REG * corner
                value = value + torch.linalg.slogdet(diagonal + sign * a).logabsdet
        return value

    z = torch.cat([now.x, now.t.reshape(-1)])
    assert found._total(now.x) / nu + now.barrier == pytest.approx(float(objective(z)), rel=1e-12)
    gradient = torch.func.grad(objective)(z)
    hessian = torch.func.hessian(objective)(z)
    step = found._newton(now, nu)
    assert step is not None
    torch.testing.assert_close(step[0], torch.linalg.solve(-hessian, gradient), rtol=1e-7, atol=1e-9)
    assert step[1] == pytest.approx(float(gradient @ step[0]) ** 0.5, rel=1e-9)


def test_fewer_neurons_leave_slopes_more_room() -> None:
    rows, rest = case()
    start = torch.cat([rows.slope, torch.ones(1).double()])
    vectors = torch.randn(3, 2, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = []
    for basis in (None, torch.linalg.qr(vectors).Q):
        found = program(rows, rest, basis)
        best = found.maximise(start, aim=10.0, limit=11.0, persist=True)
        assert float(best.min()) > 0 and float(best[-1]) <= 1
        assert float(best[:-1].view(-1, 2).sum(1).max()) <= CAP
        sums.append(float(found.point(best).mass))
    assert sums[1] > 1.01 * sums[0]


def test_an_aim_out_of_reach_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, rest = case()
    start = torch.cat([rows.slope, torch.ones(1).double()])
    found = program(rows, rest)
    optimum = float(found.point(found.maximise(start, aim=10.0, limit=11.0, persist=True)).mass)
    steps = []
    newton = found._newton
    monkeypatch.setattr(found, "_newton", lambda *args: (steps.append(args), newton(*args))[1])
    found.maximise(start, aim=1.5 * optimum, limit=2 * optimum)
    assert 0 < len(steps) < interior_point._STEPS / 2
