"""Compiled passes where forms are many and are factored for the rows that need them, against the torch ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from test_fused import always, both, cases, check, evaluations, make, network
from test_fused import test_hard_cases_of_whole_networks as check_hard_cases
from test_fused import test_numbers_that_have_no_factors_are_the_fault_that_solvers_know as check_faults
from test_fused import test_odd_networks as check_odd_networks

from convex_head.kernels import factors
from convex_head.kernels import loss as kernel_loss
from convex_head.problems import fused
from convex_head.problems.losses import LOSSES
from convex_head.problems.polynomial import PolynomialProblem

__all__ = ["always"]


@pytest.fixture(params=[1, 7, 512], ids=lambda rows: f"{rows}-rows")
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of forms is many: they are factored for the rows that need them, so many rows at a time."""
    monkeypatch.setattr("convex_head.adversary.margins._EAGER_FORMS", 0)
    monkeypatch.setattr(fused, "_ROWS_OF_FEW", request.param)


@pytest.mark.usefixtures("many")
@both
@cases
def test_it_is_the_torch_pass_where_forms_are_many(classes: int, loss: str, dtype: torch.dtype, tol: float) -> None:
    for n, d, neurons in ((60, 4, 12), (90, 5, 40), (17, 30, 20)):
        problem = make(n, d, classes, loss, dtype=dtype)
        packed = problem.pack(network(d, problem.num_functions, neurons))
        for mu, blur in ((0.3, 0.0), (0.3, 0.01), (0.003, 0.01)):
            check(evaluations(problem, packed, mu, blur), tol * (1 if mu > 0.1 else 30))


@pytest.mark.usefixtures("many")
def test_odd_networks_where_forms_are_many() -> None:
    check_odd_networks(4, "crammer_singer")
    check_hard_cases(3, "crammer_singer")


def test_rows_are_few_where_their_forms_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(30, 4, 4, "crammer_singer")
    packed = problem.pack(network(4, 4, 12))
    expected = evaluations(problem, packed, 0.3)[1]
    monkeypatch.setattr("convex_head.adversary.margins._EAGER_FORMS", 0)
    monkeypatch.setattr(fused, "_BYTES_OF_FEW", 1)
    found = fused.FusedPass(
        problem._scan, packed, LOSSES["crammer_singer"], radius=0.4, mu=0.3, blur=0.0, examples=problem.n
    )
    found.run()
    assert {few.rows for few in found._few} == {1}
    assert float(found.losses[1]) / 30 + 0.02 * float(packed.vectors.square().sum()) == pytest.approx(expected.hard)


@pytest.mark.usefixtures("always")
def test_a_hundred_classes_with_margins_everywhere() -> None:
    """Satisfied, near the smallest, far from it, and several that share the simplex."""
    problem = make(400, 12, 100, "crammer_singer", radius=0.2)
    assert problem._scan.forms.are_many()
    for scale in (0.03, 1.0, 30.0):
        net = problem.discriminant_network()
        packed = problem.pack(replace(net, weights=net.weights * scale))
        for mu in (0.5, 0.05, 0.005):
            check(evaluations(problem, packed, mu, problem.blur(mu)), 1e-10)


@pytest.mark.parametrize("matrix", [[[2.0, 0.0], [0.0, 1.0]], [[1.0, 3.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_eigenvalues_of_two_by_two(matrix: list[list[float]]) -> None:
    given = np.array(matrix)
    values, vectors = eigen(given)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(given), atol=1e-14)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, given, atol=1e-14)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(2), atol=1e-14)


@numba.njit
def eigen(matrix: Any) -> Any:
    return factors._eigen(matrix)


@pytest.mark.usefixtures("always")
def test_streamed_rows_are_put_in_the_order_of_their_labels(tmp_path: Path) -> None:
    whole = make(300, 5, 60, "crammer_singer")
    assert whole._scan.forms.are_many()
    np.save(tmp_path / "x.npy", whole.features.numpy())
    features = np.load(tmp_path / "x.npy", mmap_mode="r")
    options = {"num_classes": 60, "radius": 0.4, "reg": 0.02, "loss": "crammer_singer"}
    streamed = PolynomialProblem(features, whole.labels, stream=True, chunk_rows=128, **options)
    packed = whole.pack(network(5, 60, 90))
    expected = whole.evaluate(packed, 0.3, 0.01)
    check((streamed.evaluate(packed, 0.3, 0.01), expected), 1e-11)
    slopes = whole.dual_point(packed, 0.3, 0.01).slopes
    assert slopes is not None
    whole_slopes = whole.all_multipliers(slopes)
    centred = [
        problem.evaluate(packed, 0.2, 0.01, problem.own_multipliers(whole_slopes)) for problem in (whole, streamed)
    ]
    assert centred[1].smoothed == pytest.approx(centred[0].smoothed, rel=1e-11) != expected.smoothed
    torch.testing.assert_close(centred[1].gradient, centred[0].gradient, rtol=0, atol=1e-11)
    none = torch.zeros(0, 59)
    orders = [fused._by_label(chunk, none)[0].labels for chunk in streamed._rows]
    assert all((labels.diff() >= 0).all() for labels in orders)
    assert not all((chunk.labels.diff() >= 0).all() for chunk in streamed._rows)


@numba.njit
def losses(margins: Any, setting: Any, slopes: Any, sums: Any) -> None:
    order = np.empty(margins.shape[1], margins.dtype)
    for i in range(len(margins)):
        kernel_loss.loss(margins[i], setting, order, slopes[i], sums[i])


@pytest.mark.parametrize("base", [0.0, 0.9999, -5.0])
def test_the_loss_of_many_tied_margins_in_single_precision(base: float) -> None:
    problem, loss = make(5, 3, 3, "crammer_singer", dtype=torch.float32), LOSSES["crammer_singer"]
    packed = problem.pack(network(3, 3, 6))
    for mu in (0.1, 1e-2, 1e-3, 1e-4):
        setting = fused.FusedPass(problem._scan, packed, loss, radius=0.4, mu=mu, blur=0.0, examples=5)._setting
        for spread in (0.0, 0.1 * mu, mu, 10 * mu):
            margins = (base + spread * np.random.default_rng(0).random((20, 999))).astype(np.float32)
            slopes, sums = np.empty_like(margins), np.zeros((20, 2))
            losses(margins, setting, slopes, sums)
            value, expected = loss.smoothed(torch.from_numpy(margins).double(), 1000, mu)
            np.testing.assert_allclose(slopes.sum(1, dtype=float), expected.sum(1).numpy(), atol=5e-3)
            np.testing.assert_allclose(sums[:, 0], value.numpy(), rtol=5e-3, atol=1e-6)


@pytest.mark.usefixtures("many", "always")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_numbers_without_factors_are_the_fault_that_solvers_know(value: float) -> None:
    check_faults(value)
