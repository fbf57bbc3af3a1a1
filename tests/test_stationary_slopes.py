"""Least squares for slopes at which given neurons are stationary, against dense algebra and numerical derivatives."""

import pytest
import torch
from torch import Tensor

from convex_head.problems import stationary_slopes as module
from convex_head.problems.dual_rows import DualRows, RowLayout
from convex_head.problems.moments import moment_of
from convex_head.shards import Whole

COEFFICIENTS = (0.09, 0.5, 0.47)
CAP, REG = 0.05, 0.02


def random_rows(d: int = 4) -> DualRows:
    """Twenty examples of one to three margins between three functions; sums at the limit and below."""
    generator = torch.Generator().manual_seed(0)
    example = torch.arange(20).repeat_interleave(torch.arange(20) % 3 + 1)
    count = len(example)
    p = torch.randint(3, (count,), generator=generator)
    functions = torch.stack([p, (p + 1 + torch.randint(2, (count,), generator=generator)) % 3], dim=1)
    slope = torch.rand(count, generator=generator, dtype=torch.float64)
    total = torch.zeros(20, dtype=torch.float64).index_add_(0, example, slope)
    slope = CAP * slope / torch.where(torch.arange(20) % 2 == 0, total, total.clamp_min(2.0))[example]
    points = torch.randn(count, d, generator=generator, dtype=torch.float64)
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0).double()
    return DualRows(points, example, functions, sign, slope)


def random_neurons(d: int = 4) -> tuple[Tensor, Tensor]:
    """Two of every function, of either sign, and one column that counts for the first alone."""
    generator = torch.Generator().manual_seed(1)
    neurons = torch.randn(3, 3, d, generator=generator, dtype=torch.float64)
    signs = torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]], dtype=torch.float64)
    return neurons / neurons.norm(dim=-1, keepdim=True), signs


def residual(rows: DualRows, slope: Tensor, neurons: Tensor, signs: Tensor) -> Tensor:
    """r_u as the gradient in v of reg |v|^2 - sigma [v; |v|]'A[v; |v|] at the unit vector u, by autograd."""
    parts = zip(RowLayout(rows, 3).spread(slope), RowLayout(rows, 3).points, strict=True)
    moments = torch.stack([moment_of(weight, x, COEFFICIENTS) for weight, x in parts])
    v = neurons.clone().requires_grad_()
    lifted = torch.cat([v, v.norm(dim=-1, keepdim=True)], dim=-1)
    value = REG * v.square().sum(-1) * signs.abs() - signs * ((lifted @ moments) * lifted).sum(-1)
    gradient: Tensor = torch.autograd.grad(value.sum(), v)[0]
    return gradient


def test_the_residual_is_the_gradient_of_what_a_neuron_is_worth() -> None:
    rows, (neurons, signs) = random_rows(), random_neurons()
    system = module._Stationarity(RowLayout(rows, 3), neurons, signs, COEFFICIENTS, Whole())
    here = 2 * REG * signs.abs().unsqueeze(-1) * neurons - system.apply(rows.slope)
    torch.testing.assert_close(here, residual(rows, rows.slope, neurons, signs))


@pytest.mark.parametrize("is_far", [False, True])
@pytest.mark.parametrize("joint", [True, False])
def test_slopes_are_the_least_squares_ones_on_their_face(
    monkeypatch: pytest.MonkeyPatch, joint: bool, is_far: bool
) -> None:
    """Against the normal equations, written out in a basis of the face; of some functions residuals count double."""
    monkeypatch.setattr(module, "_STEPS", 500)
    monkeypatch.setattr(module, "_TOL", 1e-10)
    rows, (neurons, signs) = random_rows(), random_neurons()
    signs = signs * torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).unsqueeze(1)
    count = len(rows.slope)
    system = module._Stationarity(RowLayout(rows, 3), neurons, signs, COEFFICIENTS, Whole())
    dense = torch.stack([system.apply(unit).flatten() for unit in torch.eye(count, dtype=torch.float64)], dim=1)
    transposed = torch.stack([system.transpose(unit.view(3, 3, 4)) for unit in torch.eye(36, dtype=torch.float64)])
    torch.testing.assert_close(transposed, dense)
    is_full = torch.zeros(20, dtype=torch.float64).index_add_(0, rows.example, rows.slope) > 0.999 * CAP
    alone = torch.bincount(rows.example) == 1
    free = ~(is_full & alone)[rows.example] if joint else rows.slope < 0.999 * CAP
    assert 0 < int(free.sum()) < count
    if is_far:
        free = torch.ones_like(free)
    projector = torch.diag(free.double())
    for e in range(20) if not is_far else ():
        here = ((rows.example == e) & free).double()
        if joint and bool(is_full[e]) and float(here.sum()) > 0:
            projector -= torch.outer(here, here) / here.sum()
    wanted = dense.T @ (2 * REG * signs.abs().unsqueeze(-1) * neurons - system.apply(rows.slope)).flatten()
    if is_far:  # half the squares of residuals of 2 reg t, less lambda times 1 + t of the slopes, is least at t = 0.1
        wanted = wanted + 0.1 * (2 * REG * signs).square().sum() / rows.slope.sum()
    image = dense @ free.double()
    pull = module._PULL * float(image @ image) / float(free.sum())
    face = torch.linalg.eigh(projector).eigenvectors[:, -round(float(projector.trace())) :]
    square = face.T @ (dense.T @ dense) @ face + pull * torch.eye(face.shape[1], dtype=torch.float64)
    change = face @ torch.linalg.solve(square, face.T @ wanted)
    expected = module._Face(rows, CAP, joint, is_far).into_set(rows.slope + change)
    how = {"joint": joint, "cap": CAP, "coefficients": COEFFICIENTS, "reg": REG, "shard": Whole(), "is_far": is_far}
    found = module.stationary_slopes(rows, neurons, signs, **how)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
    before, after = (residual(rows, slope, neurons, signs).norm() for slope in (rows.slope, rows.slope + change))
    assert float(after) < 0.9 * float(before)


@pytest.mark.parametrize("joint", [True, False])
def test_changes_stay_on_their_face_and_slopes_in_their_set(joint: bool) -> None:
    """Four examples with a limit of 1: sums at it, below it, two at it where one has all, one at its own limit."""
    example = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    slope = torch.tensor([0.5, 0.3, 0.2, 0.3, 0.4, 1.0, 0.1], dtype=torch.float64)
    rows = DualRows(torch.zeros(7, 2), example, torch.zeros(7, 2).long(), slope.sign(), slope)
    downhill = torch.tensor([2.0, 1.0, 0.0, 1.0, -2.0, 3.0, -5.0], dtype=torch.float64)
    face = module._Face(rows, 1.0, joint, is_far=False)
    change = face.project(downhill)
    expected = [1.0, 0.0, -1.0, 1.0, -2.0, 0.0, -5.0] if joint else [2.0, 1.0, 0.0, 1.0, -2.0, 0.0, -5.0]
    assert change.tolist() == expected
    torch.testing.assert_close(face.project(change), change)
    everywhere = module._Face(rows, 1.0, joint, is_far=True)
    torch.testing.assert_close(everywhere.project(downhill), downhill)
    for either in (face, everywhere):
        moved = either.into_set(slope + 2 * downhill)
        most = torch.zeros(4, dtype=torch.float64).index_add_(0, example, moved) if joint else moved
        assert float(moved.min()) >= 0 and float(most.max()) <= 1 + 1e-12
        torch.testing.assert_close(either.into_set(slope), slope)


def test_nothing_to_move_moves_nothing() -> None:
    """No neuron that counts, and no row."""
    rows, (neurons, signs) = random_rows(), random_neurons()
    how = {"joint": True, "cap": CAP, "coefficients": COEFFICIENTS, "reg": REG, "shard": Whole()}
    torch.testing.assert_close(module.stationary_slopes(rows, neurons, 0 * signs, **how), rows.slope)  # type: ignore[arg-type]
    none = rows.some(torch.zeros(len(rows.slope), dtype=torch.bool))
    assert len(module.stationary_slopes(none, neurons, signs, **how)) == 0  # type: ignore[arg-type]
