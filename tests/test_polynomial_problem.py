"""The convex problem: worst cases by sampling, gradients by autograd and differences, bounds against the SDP."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_head.adversary.margins import Forms, PackedNetwork
from convex_head.problems import moments
from convex_head.problems.base import Network
from convex_head.problems.losses import get_loss
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.column_generation import ColumnGeneration
from convex_head.solvers.sdp import build

COEFFICIENTS = (0.09, 0.5, 0.47)
LOSSES = ("crammer_singer", "multi_margin", "one_vs_rest")
CASES = [(2, "crammer_singer"), (3, "crammer_singer"), (4, "multi_margin"), (3, "one_vs_rest")]
cases = pytest.mark.parametrize(("classes", "loss"), CASES)


def data(n: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters, labels in no order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=generator) % classes
    centres = 1.5 * torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64), labels


def make(n: int, d: int, classes: int, loss: str, **kwargs: object) -> PolynomialProblem:
    settings = {"radius": 0.4, "reg": 0.02} | kwargs
    return PolynomialProblem(*data(n, d, classes), num_classes=classes, loss=loss, **settings)  # type: ignore[arg-type]


def network(d: int, functions: int, neurons: int, seed: int = 0, scale: float = 1.0) -> Network:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(neurons, d, generator=generator, dtype=torch.float64)
    weights = scale * torch.randn(neurons, generator=generator, dtype=torch.float64)
    function = torch.randint(functions, (neurons,), generator=generator)
    return Network(u / u.norm(dim=1, keepdim=True), weights, function)


def outputs(net: Network, x: torch.Tensor, functions: int, coefficients: tuple = COEFFICIENTS) -> torch.Tensor:
    """f_c(x), written out; x (..., d) -> (..., F)."""
    a, b, c = coefficients
    t = x @ net.directions.T
    hidden = (a * t**2 + b * t + c) * net.weights
    return hidden @ torch.nn.functional.one_hot(net.function, functions).to(hidden)


def margins_at(f: torch.Tensor, label: int, classes: int, loss: str) -> torch.Tensor:
    """Margins (..., K) of outputs f (..., F)."""
    if classes == 2:
        return f if label == 1 else -f
    if loss == "one_vs_rest":
        return torch.where(torch.arange(classes) == label, f, -f)
    others = [k for k in range(classes) if k != label]
    return f[..., label, None] - f[..., others]


@cases
@pytest.mark.parametrize(("d", "coefficients"), [(2, COEFFICIENTS), (5, (0.3, -0.4, 0.2))])
def test_worst_cases_are_attained_and_never_beaten(classes: int, loss: str, d: int, coefficients: tuple) -> None:
    problem = make(25, d, classes, loss, coefficients=coefficients)
    net = network(d, problem.num_functions, 9, scale=2.0)
    x, labels = data(25, d, classes)
    margins, points = problem.worst_case(net)
    assert margins.shape == (25, problem.num_margins) and points.shape == (25, problem.num_margins, d)
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(3000, d, generator=generator, dtype=torch.float64)
    steps *= 0.4 / steps.norm(dim=1, keepdim=True)
    steps[1500:] *= torch.rand(1500, 1, generator=generator, dtype=torch.float64) ** (1 / d)
    for i in range(25):
        sampled = margins_at(outputs(net, x[i] + steps, problem.num_functions, coefficients), labels[i], classes, loss)
        assert bool((margins[i] <= sampled.amin(0) + 1e-10).all())
        if d == 2:
            torch.testing.assert_close(margins[i], sampled.amin(0), atol=5e-3, rtol=0)
        attained = margins_at(outputs(net, points[i], problem.num_functions, coefficients), labels[i], classes, loss)
        torch.testing.assert_close(attained.diagonal(), margins[i])
    assert float((points - x[:, None]).norm(dim=-1).max()) <= 0.4 * (1 + 1e-12)


@cases
def test_objective_is_the_mean_loss_of_the_worst_cases(classes: int, loss: str) -> None:
    problem = make(40, 4, classes, loss)
    net = network(4, problem.num_functions, 7)
    margins, _ = problem.worst_case(net)
    expected = get_loss(loss).value(margins, classes).mean() + 0.02 * net.weights.abs().sum()
    assert problem.objective(net) == pytest.approx(float(expected), rel=1e-12)
    assert problem.objective(problem.zero_network()) == pytest.approx(
        {"multi_margin": (classes - 1) / classes}.get(loss, 1.0)
    )


@cases
@pytest.mark.parametrize("mu", [0.5, 1e-3])
def test_evaluation_is_autograd_through_the_worst_points(classes: int, loss: str, mu: float) -> None:
    """Danskin written with autograd, over *all* margins: examples that the scan skips change nothing."""
    problem = make(60, 4, classes, loss, radius=0.2)
    labels = problem.labels
    packed = problem.pack(network(4, problem.num_functions, 12, scale=3.0))
    got = problem.evaluate(packed, mu)
    vectors = packed.vectors.clone().requires_grad_()
    margins, points = problem.worst_case(packed.unpack())
    assert 0.1 < float((margins > 1).double().mean()) < 0.9
    a, b, c = COEFFICIENTS
    rows = []
    norm = vectors.norm(dim=-1)
    for i in range(60):
        tau = torch.einsum("kd,fmd->kfm", points[i], vectors)
        f = (packed.signs * (a * tau**2 + b * norm * tau + c * norm**2)).sum(-1)
        rows.append(margins_at(f, int(labels[i]), classes, loss).diagonal())
    smooth, _ = get_loss(loss).smoothed(torch.stack(rows), classes, mu)
    total = smooth.mean() + problem.reg * vectors.square().sum()
    (expected,) = torch.autograd.grad(total, vectors)
    expected = torch.nan_to_num(expected)  # the norm of the padding's zero vectors
    assert got.smoothed == pytest.approx(float(total.detach()), rel=1e-10)
    assert got.hard == pytest.approx(problem.objective(packed.unpack()), rel=1e-10)
    alive = (packed.signs != 0).unsqueeze(-1)
    torch.testing.assert_close(got.gradient * alive, expected * alive, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("blur", [0.0, 0.2])
@cases
def test_gradient_by_differences(classes: int, loss: str, blur: float) -> None:
    problem = make(20, 3, classes, loss, coefficients=(0.3, -0.4, 0.2))
    packed = problem.pack(network(3, problem.num_functions, 8))
    gradient = problem.evaluate(packed, 0.3, blur).gradient
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        step = (
            torch.randn(packed.vectors.shape, generator=generator, dtype=torch.float64) * packed.signs.abs()[..., None]
        )
        up, down = (
            problem.evaluate(PackedNetwork.of(packed.vectors + h * step, packed.signs), 0.3, blur).smoothed
            for h in (1e-5, -1e-5)
        )
        assert (up - down) / 2e-5 == pytest.approx(float((gradient * step).sum()), rel=1e-5, abs=1e-7)


@cases
def test_chunks_do_not_matter(classes: int, loss: str) -> None:
    whole, small, single = (make(17, 4, classes, loss, chunk_rows=rows) for rows in (8192, 7, 1))
    net = network(4, whole.num_functions, 9, scale=2.0)
    expected = whole.evaluate(whole.pack(net), 0.1)
    bound = whole.oracle(whole.dual_point(whole.pack(net), 0.1).point).dual
    for problem in (small, single):
        got = problem.evaluate(problem.pack(net), 0.1)
        assert (got.smoothed, got.hard) == pytest.approx((expected.smoothed, expected.hard), rel=1e-12)
        torch.testing.assert_close(got.gradient, expected.gradient, rtol=1e-9, atol=1e-12)
        assert problem.objective(net) == pytest.approx(whole.objective(net), rel=1e-12)
        for ours, theirs in zip(problem.worst_case(net), whole.worst_case(net), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert problem.oracle(problem.dual_point(problem.pack(net), 0.1).point).dual == pytest.approx(bound, rel=1e-9)


@cases
def test_order_of_examples_does_not_matter(classes: int, loss: str) -> None:
    x, labels = data(30, 3, classes)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    settings = {"num_classes": classes, "radius": 0.4, "reg": 0.02, "loss": loss}
    first, second = PolynomialProblem(x, labels, **settings), PolynomialProblem(x[order], labels[order], **settings)
    net = network(3, first.num_functions, 6)
    for ours, theirs in zip(first.worst_case(net), second.worst_case(net), strict=True):
        torch.testing.assert_close(ours[order], theirs)
    assert torch.equal(first.features, x) and torch.equal(first.labels, labels)
    assert first.objective(net) == pytest.approx(second.objective(net), rel=1e-12)
    weights = torch.rand(30, first.num_margins, dtype=torch.float64) / 30
    points = first.worst_case(net)[1]
    bound = first.dual_value(weights, points)
    assert second.dual_value(weights[order], points[order]) == pytest.approx(bound, rel=1e-12)


@pytest.fixture(scope="module", params=CASES, ids=[f"{c}-{l}" for c, l in CASES])
def solved(request: pytest.FixtureRequest) -> tuple[PolynomialProblem, float]:
    classes, loss = request.param
    problem = make(12, 2, classes, loss)
    x, labels = data(12, 2, classes)
    program, _ = build(x.numpy(), labels.numpy(), num_classes=classes, radius=0.4, reg=0.02, loss=loss)
    return problem, program.solve(solver="CLARABEL", canon_backend="SCIPY")


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 30), size=st.floats(1e-3, 100), spread=st.floats(0, 3))
def test_any_point_brackets_the_optimum(solved: tuple, seed: int, scale: float, size: float, spread: float) -> None:
    """Random networks from above; random weights and points, in their sets or not, from below."""
    problem, optimum = solved
    net = network(2, problem.num_functions, 6, seed, scale)
    assert problem.objective(net) >= optimum - 1e-6
    report = problem.dual_point(problem.pack(net), 0.2 * scale)
    assert problem.oracle(report.point).dual <= optimum + 1e-6
    scaled = Network(net.directions, report.scale * net.weights, net.function)
    assert report.primal == pytest.approx(problem.objective(scaled), rel=1e-9)
    assert report.primal <= problem.objective(net) * (1 + 1e-12)
    generator = torch.Generator().manual_seed(seed)
    weights = size * torch.rand(12, problem.num_margins, generator=generator, dtype=torch.float64) / 12
    noise = spread * torch.randn(12, problem.num_margins, 2, generator=generator, dtype=torch.float64)
    assert 0 <= problem.dual_value(weights, problem.features[:, None] + noise) <= optimum + 1e-6


@cases
def test_dual_value_of_the_slopes_is_that_of_the_dual_point(classes: int, loss: str) -> None:
    problem = make(30, 3, classes, loss)
    net = network(3, problem.num_functions, 8)
    margins, points = problem.worst_case(net)
    _, slopes = get_loss(loss).smoothed(margins, classes, 0.2)
    answer = problem.oracle(problem.dual_point(problem.pack(net), 0.2).point)
    assert problem.dual_value(slopes / 30, points) == pytest.approx(answer.dual, rel=1e-9)


@cases
def test_oracle_bounds_every_neuron_and_names_the_best(classes: int, loss: str) -> None:
    problem = make(30, 3, classes, loss)
    net = network(3, problem.num_functions, 8)
    point = problem.dual_point(problem.pack(net), 0.2).point
    answer = problem.oracle(point)
    u = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lifted = torch.nn.functional.pad(u / u.norm(dim=1, keepdim=True), (0, 1), value=1.0)
    values = torch.einsum("si,fij,sj->fs", lifted, point.moments, lifted)
    sampled = torch.stack([values.amax(1), -values.amin(1)], dim=1)
    assert bool((answer.bounds >= sampled).all())
    torch.testing.assert_close(answer.bounds, sampled, atol=1e-2 * float(answer.bounds.abs().max()), rtol=0)
    best = torch.nn.functional.pad(answer.directions, (0, 1), value=1.0)
    attained = torch.einsum("fski,fij,fskj->fsk", best, point.moments, best) * torch.tensor([1.0, -1.0]).unsqueeze(1)
    torch.testing.assert_close(attained[..., 0], answer.bounds)
    torch.testing.assert_close(attained, answer.values)
    torch.testing.assert_close(answer.directions.norm(dim=-1), torch.ones_like(answer.values))


@cases
def test_radius_zero_is_the_clean_loss(classes: int, loss: str) -> None:
    problem = make(30, 3, classes, loss, radius=0.0)
    net = network(3, problem.num_functions, 8)
    x, labels = data(30, 3, classes)
    f = outputs(net, x, problem.num_functions)
    clean = torch.stack([margins_at(f[i], int(labels[i]), classes, loss) for i in range(30)])
    margins, points = problem.worst_case(net)
    torch.testing.assert_close(margins, clean)
    torch.testing.assert_close(points, x[:, None].expand_as(points))
    if loss == "multi_margin":
        expected = torch.nn.functional.multi_margin_loss(f, labels)
        assert problem.objective(net) == pytest.approx(float(expected) + 0.02 * float(net.norm), rel=1e-12)


def test_single_precision_agrees_with_double() -> None:
    for classes, loss in CASES:
        double, single = (make(60, 5, classes, loss, dtype=dtype) for dtype in (torch.float64, torch.float32))
        net = network(5, double.num_functions, 10, scale=2.0)
        assert single.objective(net) == pytest.approx(double.objective(net), rel=1e-5)
        ours, theirs = (p.evaluate(p.pack(net), 0.3) for p in (single, double))
        assert ours.smoothed == pytest.approx(theirs.smoothed, rel=1e-5)
        torch.testing.assert_close(ours.gradient.double(), theirs.gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(single.worst_case(net)[0], double.worst_case(net)[0], rtol=1e-4, atol=1e-4)


def test_wide_networks_and_missing_classes() -> None:
    """More neurons than features, classes without an example, functions without a neuron."""
    x, labels = data(20, 2, 2)
    problem = PolynomialProblem(x, 3 * labels, num_classes=5, radius=0.3, reg=0.02)
    net = network(2, 2, 40)
    margins, points = problem.worst_case(net)
    f = outputs(net, points, 5)
    for i in range(20):
        attained = margins_at(f[i], int(3 * labels[i]), 5, "crammer_singer").diagonal()
        torch.testing.assert_close(attained, margins[i])
    packed = problem.pack(net)
    back = packed.unpack()
    torch.testing.assert_close(outputs(back, x, 5), outputs(net, x, 5))
    assert float(back.norm) == pytest.approx(float(net.norm))
    assert problem.pack(Network.empty(2)).vectors.shape[:2] == (5, 1)
    assert problem.objective(Network.empty(2)) == 1.0


def test_random_networks_repeat_by_seed() -> None:
    problem = make(10, 3, 3, "crammer_singer")
    first, again, other = (problem.random_network(2, seed) for seed in (7, 7, 8))
    assert torch.equal(first.directions, again.directions) and not torch.equal(first.directions, other.directions)
    assert first.size == 12 and sorted(first.function.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert np.allclose(first.directions.norm(dim=1), 1)


@pytest.mark.parametrize("blur", [0.0, 0.05, 1.0])
@cases
def test_bound_of_a_blurred_point_stays_below_the_optimum(classes: int, loss: str, blur: float) -> None:
    """Any mixture of points of the balls gives a valid bound; the optimum is bracketed by a certified solve."""
    problem = make(24, 3, classes, loss, radius=1.0)
    best = ColumnGeneration().solve(problem, tol=1e-3)
    for seed in range(3):
        packed = problem.pack(problem.random_network(2, seed))
        report = problem.dual_point(packed, 0.3, blur)
        assert problem.oracle(report.point).dual <= best.primal * (1 + 1e-9)
        assert report.primal <= problem.objective(packed.unpack()) * (1 + 1e-12)
        assert report.smoothing >= -1e-9


@cases
@pytest.mark.parametrize("blur", [0.0, 0.3])
def test_smoothing_is_all_that_its_gap_leaves_to_slopes_and_points(classes: int, loss: str, blur: float) -> None:
    # Twelve features and few neurons: most of the blur lies where the network is flat.
    problem = make(40, 12, classes, loss)
    functions = 1 if classes == 2 else classes
    net = network(12, functions, 2 * functions, scale=0.3)
    packed = problem.pack(net)
    report = problem.dual_point(packed, 0.5, blur)
    lifted = torch.cat([net.directions, torch.ones(net.size, 1)], dim=1)
    inner = ((lifted.unsqueeze(1) @ report.point.moments[net.function]).squeeze(1) * lifted).sum(1) @ net.weights
    mean_loss = problem.objective(net) - problem.reg * float(net.norm)
    assert report.smoothing == pytest.approx(mean_loss - float(report.point.mass.sum()) + float(inner), rel=1e-9)
    assert report.smoothing >= -1e-9
    if blur:
        assert report.smoothing > problem.dual_point(packed, 0.5, 0.0).smoothing


@pytest.mark.parametrize("held", [1, 1 << 22])
def test_moments_in_single_precision_are_summed_up_in_double(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million rows of the same sign in one product of single precision would lose three digits."""
    monkeypatch.setattr(moments, "_HELD", held)
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(400_000, 3, generator=generator)
    weight = torch.rand(len(x), generator=generator) / len(x)
    forms = Forms.build(2, False, torch.device("cpu"))
    sums = moments.MomentSums(forms, pairwise=False, num_functions=1, d=3, coefficients=(0.09, 0.5, 0.47))
    for part in torch.arange(len(x)).chunk(7):
        sums.add(torch.zeros_like(part), torch.ones(len(part)), weight[part], x[part])
    sums.add_spread(torch.zeros(2, dtype=torch.long), torch.ones(2), torch.tensor([0.1, 0.2]), torch.eye(3)[:2])
    lifted = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    expected = (lifted.T * weight.double()) @ lifted
    expected[:3, :3] *= 0.09
    expected[3, :3] *= 0.25
    expected[:3, 3] *= 0.25
    expected[3, 3] *= 0.47
    expected[0, 0] += 0.09 * 0.1
    expected[1, 1] += 0.09 * 0.2
    torch.testing.assert_close(sums.point.moments[0], expected, rtol=1e-6, atol=0)
    assert float(sums.point.mass) == pytest.approx(float(weight.double().sum()), rel=1e-12)
