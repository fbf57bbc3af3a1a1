"""Compiled passes against the torch ones, trust-region reference cases, losses, brute force and differences."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from test_trust_region import CASES as QUADRATICS

from convex_head.adversary.margins import PackedNetwork
from convex_head.adversary.trust_region import minimise_blurred, minimise_over_ball
from convex_head.kernels import ball, compiled, factors
from convex_head.kernels import loss as kernel_loss
from convex_head.kernels.tiles import LANES
from convex_head.problems import fused, polynomial
from convex_head.problems.base import Network
from convex_head.problems.losses import LOSSES
from convex_head.problems.polynomial import Evaluation, PolynomialProblem
from convex_head.solvers import base
from convex_head.solvers.column_generation import ColumnGeneration

PROBLEMS = [(2, "crammer_singer"), (3, "crammer_singer"), (4, "multi_margin"), (4, "one_vs_rest")]
cases = pytest.mark.parametrize(("classes", "loss"), PROBLEMS, ids=[f"{c}-{l}" for c, l in PROBLEMS])
both = pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["double", "single"]
)


def make(n: int, d: int, classes: int, loss: str, **kwargs: Any) -> PolynomialProblem:
    """Overlapping clusters, labels in no order."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(n, generator=generator) % classes
    x = 1.5 * torch.randn(classes, d, generator=generator, dtype=torch.float64)[labels]
    x += torch.randn(n, d, generator=generator, dtype=torch.float64)
    settings = {"radius": 0.4, "reg": 0.02} | kwargs
    return PolynomialProblem(x, labels, num_classes=classes, loss=loss, **settings)


def network(d: int, functions: int, neurons: int, seed: int = 0) -> Network:
    """Random neurons; functions have different numbers of them, most likely."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(neurons, d, generator=generator, dtype=torch.float64)
    weights = 2 * torch.randn(neurons, generator=generator, dtype=torch.float64)
    function = torch.randint(functions, (neurons,), generator=generator)
    return Network(u / u.norm(dim=1, keepdim=True), weights, function)


def evaluations(problem: PolynomialProblem, packed: PackedNetwork, *settings: Any) -> tuple[Evaluation, Evaluation]:
    """By compiled code, and by torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polynomial, "_COMPILED_ROWS", 0)
        ours = problem.evaluate(packed, *settings)
        patch.setattr(fused, "serves", lambda scan, loss: False)
        return ours, problem.evaluate(packed, *settings)


def check(pair: tuple[Evaluation, Evaluation], tol: float) -> None:
    ours, theirs = pair
    assert (ours.smoothed, ours.hard) == pytest.approx((theirs.smoothed, theirs.hard), rel=tol)
    scale = float(theirs.gradient.abs().max())
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=0, atol=100 * tol * scale)


@pytest.fixture
def always() -> Iterator[None]:
    """Compiled code for any number of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polynomial, "_COMPILED_ROWS", 0)
        yield


@both
@pytest.mark.parametrize("radius", [0.0, 0.4, 2.0])
@pytest.mark.parametrize(("n", "d", "neurons"), [(60, 4, 12), (90, 5, 40), (17, 30, 20)])
@cases
def test_it_is_the_torch_pass(
    classes: int, loss: str, n: int, d: int, neurons: int, radius: float, dtype: torch.dtype, tol: float
) -> None:
    problem = make(n, d, classes, loss, radius=radius, dtype=dtype)
    packed = problem.pack(network(d, problem.num_functions, neurons))
    for mu in (0.3, 0.003):
        for blur in (0.0, 0.01, problem.blur(mu)):
            # A slope that jumps with the margin, where smoothing is narrow, shows the margin's rounding.
            check(evaluations(problem, packed, mu, blur), tol * (1 if mu > 0.1 else 30))


@cases
def test_odd_networks(classes: int, loss: str) -> None:
    """Dependent neurons, neurons of norm 0, functions without a neuron, the zero and the empty network, few rows."""
    problem = make(50, 6, classes, loss)
    functions = problem.num_functions
    net = network(6, functions, 9)
    twins = Network(*(torch.cat([part, part]) for part in (net.directions, net.weights, net.function)))
    opposite = replace(twins, weights=torch.cat([net.weights, -net.weights]))
    lonely = replace(net, function=torch.full_like(net.function, functions - 1))
    for other in (twins, opposite, lonely, problem.zero_network(), Network.empty(6)):
        # Neurons that cancel leave nothing to tell points of the ball apart, unless it is blurred.
        for blur in (0.05,) if other is opposite else (0.0, 0.05):
            check(evaluations(problem, problem.pack(other), 0.2, blur), 1e-10)
    packed = problem.pack(net)
    vanished = PackedNetwork.of(packed.vectors * (torch.arange(packed.vectors.shape[1]) > 0)[:, None], packed.signs)
    check(evaluations(problem, vanished, 0.2, 0.05), 1e-10)
    single = make(1, 6, classes, loss)
    check(evaluations(single, packed, 0.2), 1e-10)


@cases
def test_hard_cases_of_whole_networks(classes: int, loss: str) -> None:
    """Rows at the origin and one concave neuron along the axes each: gradients vanish, eigenvalues repeat."""
    problem = PolynomialProblem(
        torch.zeros(classes + 2, 4),
        torch.arange(classes + 2) % classes,
        num_classes=classes,
        radius=1.0,
        reg=0.1,
        loss=loss,
        coefficients=(0.5, 0.0, 0.2),
    )
    functions = torch.arange(problem.num_functions).repeat_interleave(4)
    weights = torch.tensor([1.0, -1.0, -1.0, 0.5], dtype=torch.float64).repeat(problem.num_functions)
    net = Network(
        torch.eye(4, dtype=torch.float64).repeat(problem.num_functions, 1), weights * (1 + functions), functions
    )
    for blur in (0.0, 0.1):
        ours, theirs = evaluations(problem, problem.pack(net), 0.3, blur)
        assert (ours.smoothed, ours.hard) == pytest.approx((theirs.smoothed, theirs.hard), rel=1e-12)
        # The minimiser is not unique without blur, and neither is the derivative.
        if blur > 0:
            check((ours, theirs), 1e-12)


@numba.njit
def minimise(eigenvalues: Any, negative: int, gradient: Any, setting: Any, value: Any, e: Any, spread: Any) -> None:
    magnitude, gaps = np.empty((len(e) + 1, gradient.shape[1]), e.dtype), np.empty(len(e) + 1, e.dtype)
    width, rank = gradient.shape[1], len(eigenvalues)
    ball.minimise(eigenvalues, negative, rank, gradient, width, setting, value, magnitude, gaps, e, spread)


@pytest.mark.parametrize("blur", [0.0, 1e-2])
@pytest.mark.parametrize("negative", [0, 1])
@pytest.mark.parametrize("case", QUADRATICS.values(), ids=QUADRATICS.keys())
def test_minimiser_in_every_case(case: tuple, negative: int, blur: float) -> None:
    eigenvalues, gradient, radius = (torch.tensor(part, dtype=torch.float64) for part in case)
    if radius == 0:
        blur = 0.0
    gradients = torch.stack([gradient, torch.ones_like(gradient), gradient * 3])
    problem = make(5, len(gradient) + 2, 3, "crammer_singer", radius=float(radius))
    packed = problem.pack(network(len(gradient) + 2, 3, 3))
    settings: dict[str, Any] = {"radius": float(radius), "mu": 0.1, "blur": blur, "examples": 5}
    setting = fused.FusedPass(problem._scan, packed, LOSSES["crammer_singer"], **settings)._setting
    value, e = np.zeros(3), np.zeros((len(gradient), 3))
    spread = np.zeros_like(e)
    signed = (-eigenvalues if negative else eigenvalues).numpy()
    minimise(signed, negative, gradients.T.numpy().copy(), setting, value, e, spread)
    if blur > 0:
        best = minimise_blurred(eigenvalues, gradients, float(radius), blur, len(gradient) + 2)
        torch.testing.assert_close(torch.from_numpy(spread).T, best.spread, rtol=1e-9, atol=1e-12)
    else:
        best = minimise_over_ball(eigenvalues, gradients, float(radius))
    scale = float(gradients.norm(dim=1).max() * radius + eigenvalues.abs().max() * radius**2) + 1e-300
    torch.testing.assert_close(torch.from_numpy(value), best.value, rtol=0, atol=1e-12 * scale)
    step = torch.from_numpy(e).T
    assert (step.norm(dim=1) <= float(radius) * (1 + 1e-15)).all()
    attained = (gradients * step).sum(1) + 0.5 * (eigenvalues * step.square()).sum(1)
    if blur == 0:
        torch.testing.assert_close(attained, best.value, rtol=0, atol=1e-11 * scale)


@numba.njit
def losses(margins: Any, setting: Any, slopes: Any, sums: Any) -> None:
    order = np.empty(margins.shape[1], margins.dtype)
    for i in range(len(margins)):
        kernel_loss.loss(margins[i], setting, order, slopes[i], sums[i])


@pytest.mark.parametrize("mu", [1e-3, 0.3, 5.0])
@pytest.mark.parametrize("columns", [1, 2, 9, 46, 47])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_slopes(name: str, columns: int, mu: float) -> None:
    loss = LOSSES[name]
    classes = columns + 1 if loss.pairwise else max(3, columns)
    margins = 1 + torch.randn(300, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margins[:50] = margins[:50, :1]  # ties
    margins[50:100] = (margins[50:100] - 1).abs() * mu + 1 - mu
    problem = make(5, 3, classes, name)
    packed = problem.pack(network(3, problem.num_functions, 3))
    settings: dict[str, Any] = {"radius": 0.4, "mu": mu, "blur": 0.0, "examples": 5}
    setting = fused.FusedPass(problem._scan, packed, loss, **settings)._setting
    slopes, sums = np.empty(margins.shape), np.zeros((300, 2))
    losses(margins.numpy(), setting, slopes, sums)
    value, expected = loss.smoothed(margins, classes, mu)
    torch.testing.assert_close(torch.from_numpy(slopes), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.from_numpy(sums[:, 0]), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.from_numpy(sums[:, 1]), loss.value(margins, classes), rtol=1e-12, atol=1e-12)


def test_factors_of_dependent_and_independent_forms() -> None:
    """P P' = V V' and Z' V V' Z = I with P'H-quotients the eigenvalues, in both branches."""

    @numba.njit
    def factor(gram: Any, beta: Any, a: float, rank: int) -> Any:
        return factors._factor_form(gram, beta, a, rank)

    rng = np.random.default_rng(0)
    for k, d in ((4, 9), (9, 4), (6, 6)):
        v, beta = rng.normal(size=(k, d)), np.sign(rng.normal(size=k))
        eigenvalues, lift, combination = factor(v @ v.T, beta, 0.3, min(k, d))
        basis = v.T @ combination
        np.testing.assert_allclose(basis.T @ basis, np.eye(min(k, d)), atol=1e-9)
        np.testing.assert_allclose(lift, v @ basis, atol=1e-9)
        hessian = 2 * 0.3 * v.T @ (beta[:, None] * v)
        np.testing.assert_allclose(basis.T @ hessian @ basis, np.diag(eigenvalues), atol=1e-9)


@pytest.mark.usefixtures("always")
@cases
def test_hard_loss_is_brute_force(classes: int, loss: str) -> None:
    """In two dimensions, against the least margins over a fine net of points of every ball."""
    problem = make(12, 2, classes, loss)
    net = network(2, problem.num_functions, 7)
    angle = torch.linspace(0, 2 * torch.pi, 400, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    ball = torch.cat([0.4 * share * circle for share in torch.linspace(0, 1, 40, dtype=torch.float64)])
    rows = []
    for x, label in zip(problem.features, problem.labels.tolist(), strict=True):
        t = (x + ball) @ net.directions.T
        hidden = ((0.09 * t + 0.5) * t + 0.47) * net.weights
        f = hidden @ torch.nn.functional.one_hot(net.function, problem.num_functions).double()
        if classes == 2:
            margins = f if label == 1 else -f
        elif loss == "one_vs_rest":
            margins = torch.where(torch.arange(classes) == label, f, -f)
        else:
            margins = f[:, [label]] - f[:, [k for k in range(classes) if k != label]]
        rows.append(margins.amin(0))
    sampled = LOSSES[loss].value(torch.stack(rows), classes).mean() + problem.reg * net.weights.abs().sum()
    found = problem.evaluate(problem.pack(net), 1e-4).hard
    assert float(sampled) - 1e-9 <= found <= float(sampled) + 2e-3


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("blur", [0.0, 0.2])
@cases
def test_gradient_by_differences(classes: int, loss: str, blur: float) -> None:
    problem = make(20, 3, classes, loss, coefficients=(0.3, -0.4, 0.2))
    packed = problem.pack(network(3, problem.num_functions, 8))
    gradient = problem.evaluate(packed, 0.3, blur).gradient
    step = torch.randn(packed.vectors.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step *= packed.signs.abs()[..., None]
    up, down = (
        problem.evaluate(PackedNetwork.of(packed.vectors + h * step, packed.signs), 0.3, blur).smoothed
        for h in (1e-5, -1e-5)
    )
    assert (up - down) / 2e-5 == pytest.approx(float((gradient * step).sum()), rel=1e-5, abs=1e-7)
    assert not gradient[packed.signs == 0].any()


@pytest.mark.usefixtures("always")
@cases
def test_chunks_threads_and_streams_do_not_matter(classes: int, loss: str, tmp_path: Path) -> None:
    n = 2 * fused._ROWS_OF_A_THREAD + 3
    whole = make(n, 4, classes, loss)
    np.save(tmp_path / "x.npy", whole.features.numpy())
    options: dict[str, Any] = {"num_classes": classes, "radius": 0.4, "reg": 0.02, "loss": loss}
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    streamed = PolynomialProblem(mapped, whole.labels, stream=True, chunk_rows=n - 1, **options)
    packed = whole.pack(network(4, whole.num_functions, 11))
    expected = whole.evaluate(packed, 0.1, 0.05)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for problem in (whole, streamed, make(n, 4, classes, loss, chunk_rows=7)):
                got, again = (problem.evaluate(packed, 0.1, 0.05) for _ in range(2))
                check((got, expected), 1e-11)
                assert (got.smoothed, got.hard) == (again.smoothed, again.hard)
                assert torch.equal(got.gradient, again.gradient)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("scale", "least", "most"), [(0.1, 0.9, 1.0), (0.7, 0.05, 0.85), (20.0, 0.01, 0.6)])
@cases
def test_full_and_thin_tiles(classes: int, loss: str, scale: float, least: float, most: float) -> None:
    """Several tiles with more than one label, in which nearly all margins have a slope, or some, or few."""
    problem = make(2 * LANES + 5, 6, classes, loss)
    x, labels, functions = problem.features, problem.labels, problem.num_functions
    sides = [x[labels == c].mean(0) - x[labels != c].mean(0) for c in (range(classes) if functions > 1 else [1])]
    along = torch.stack(sides)
    noise = network(6, functions, 3 * functions)
    trained = Network(
        torch.cat([along / along.norm(dim=1, keepdim=True), noise.directions]),
        scale * torch.cat([torch.ones(functions, dtype=torch.float64), 0.02 * noise.weights]),
        torch.cat([torch.arange(functions), noise.function]),
    )
    share = float((problem.worst_case(trained)[0] < 1).double().mean())
    assert least <= share <= most
    for mu in (0.3, 0.003):
        for blur in (0.0, 0.05):
            check(evaluations(problem, problem.pack(trained), mu, blur), 1e-10)


@pytest.mark.usefixtures("always")
@cases
def test_a_solve_ends_at_the_same_optimum(classes: int, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ColumnGeneration().solve(make(60, 4, classes, loss), tol=1e-3)
    again = ColumnGeneration().solve(make(60, 4, classes, loss), tol=1e-3)
    assert first.converged and torch.equal(first.network.weights, again.network.weights)
    monkeypatch.setattr(fused, "serves", lambda scan, loss: False)
    other = ColumnGeneration().solve(make(60, 4, classes, loss), tol=1e-3)
    assert first.dual <= other.primal and other.dual <= first.primal


def test_numba_is_imported_for_large_problems_alone_and_not_needed() -> None:
    code = (
        "import sys, torch, convex_head\n"
        "from convex_head.problems.polynomial import PolynomialProblem, _COMPILED_ROWS as rows\n"
        "assert 'numba' not in sys.modules\n"
        "def run(n):\n"
        "    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))\n"
        "    problem = PolynomialProblem(x, torch.arange(n) % 2, num_classes=2, radius=0.1, reg=0.1)\n"
        "    return problem.evaluate(problem.pack(problem.random_network(1, 0)), 0.1).smoothed\n"
        "run(rows - 1)\n"
        "assert 'numba' not in sys.modules\n"
        "with_numba = run(rows)\n"
        "assert 'numba' in sys.modules\n"
        "from convex_head.problems import fused\n"
        "fused._kernels.cache_clear()\n"
        "fused.importlib.util.find_spec = lambda name: None\n"
        "assert abs(run(rows) / with_numba - 1) < 1e-12\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_numbers_that_have_no_factors_are_the_fault_that_solvers_know(value: float) -> None:
    problem = make(20, 3, 3, "crammer_singer")
    packed = problem.pack(network(3, 3, 6))
    with pytest.raises(torch.linalg.LinAlgError):
        problem.evaluate(PackedNetwork.of(packed.vectors * value, packed.signs), 0.1)


def test_other_losses_are_left_to_torch() -> None:
    problem = make(20, 3, 3, "crammer_singer")
    loss = LOSSES["crammer_singer"]
    assert fused.serves(problem._scan, loss)
    assert not fused.serves(problem._scan, replace(loss, name="another"))


def test_code_is_compiled_where_numba_may_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numba.njit

    def njit(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return whole(**options)

    monkeypatch.setattr(compiled.numba, "njit", njit)
    assert compiled.entry(lambda x: x + 1)(1) == 2


def test_compiling_is_not_in_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver's clock starts after the problem is prepared, which runs the compiled pass once."""
    order: list[str] = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 3, generator=generator, dtype=torch.float64)
    problem = PolynomialProblem(x, (x[:, 0] > 0).long(), num_classes=2, radius=0.1, reg=0.1)
    run, clock = fused.FusedPass.run, base.Run
    monkeypatch.setattr(fused.FusedPass, "run", lambda self: (order.append("pass"), run(self))[1])
    monkeypatch.setattr(base, "Run", lambda *args: (order.append("clock"), clock(*args))[1])
    ColumnGeneration().solve(problem, tol=0.5, max_seconds=60.0)
    assert order[:2] == ["pass", "clock"]
