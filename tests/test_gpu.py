"""What GPUs run, on the processor: dense groups, the kernel in Triton's interpreter, forms factored in threads."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from convex_head import ConvexRobustHead
from convex_head.adversary import ball_triton, margins, scan
from convex_head.adversary.trust_region import minimise_blurred
from convex_head.problems.adjoint import Adjoint
from convex_head.problems.polynomial import PolynomialProblem


def problem(classes: int, loss: str, chunk_rows: int = 40) -> PolynomialProblem:
    n = 90
    generator = torch.Generator().manual_seed(classes)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    # Classes of very different sizes, so that groups are padded and split.
    y = (torch.rand(n, generator=generator) ** 3 * classes).long()
    y[:classes] = torch.arange(classes)
    x += 0.7 * torch.nn.functional.one_hot(y % 6, 6)
    settings = {"num_classes": classes, "radius": 0.4, "reg": 0.05, "loss": loss, "chunk_rows": chunk_rows}
    return PolynomialProblem(x, y, **settings)


@pytest.mark.parametrize(
    "classes, loss", [(2, "one_vs_rest"), (4, "crammer_singer"), (4, "multi_margin"), (5, "one_vs_rest")]
)
@pytest.mark.parametrize("blur", [0.0, 0.02])
def test_dense_groups_give_the_same_pass(classes: int, loss: str, blur: float) -> None:
    few = problem(classes, loss)
    packed = few.pack(few.random_network(3, 0))
    centre = torch.rand(few.n, few.num_margins, dtype=torch.float64)
    centre /= centre.sum(1, keepdim=True)

    def run(given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        settings = {"radius": few.radius, "mu": 0.1, "blur": blur, "examples": few.n}
        adjoint = Adjoint(few._scan, packed, few._loss, centre=given, **settings)
        adjoint.run()
        report = few.dual_point(packed, 0.1, blur, given)
        numbers = torch.tensor([report.primal, report.scale, report.smoothing, few.objective(packed.unpack())])
        # With a centre the hard loss is one of bounds, and means nothing.
        losses = adjoint.losses if given is None else adjoint.losses[:1]
        return losses, adjoint.gradient(), report.point.mass, report.point.moments, report.slopes, numbers

    expected = [run(None), run(centre)]
    few._scan.is_dense = True
    found = [run(None), run(centre)]
    assert few._scan._kept, "no dense groups were made"
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_dense_groups_hold_every_margin_once() -> None:
    few = problem(5, "crammer_singer", chunk_rows=90)
    few._scan.is_dense = True
    for chunk in few._scan.rows:
        seen = torch.zeros(len(chunk.x), few.num_margins, dtype=torch.int64)
        groups = few._scan._all_groups(chunk, 8)
        assert len(groups) > 1, "classes of unequal size should not be padded to one group"
        for group in groups:
            lengths = group.real().sum(1)
            assert lengths.min() > 0.5 * lengths.max()
            seen.index_put_(
                (group.rows[group.real()], group.columns.expand_as(group.rows)[group.real()]),
                torch.tensor(1),
                accumulate=True,
            )
        assert bool((seen == 1).all())


def test_margins_of_dense_groups_are_the_worst_cases() -> None:
    few = problem(4, "crammer_singer")
    network = few.random_network(3, 0)
    expected, points = few.worst_case(network)
    few._scan.is_dense = True
    found, others = few.worst_case(network)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(others, points, rtol=1e-8, atol=1e-10)


# In a process of its own: Triton looks at the variable that asks for its interpreter when it is imported.
INTERPRETED = """
import itertools, json, torch
from convex_head.adversary import ball_triton
from convex_head.adversary.trust_region import minimise_blurred

found = []
shapes = [(1, 1, 1, 1), (2, 5, 3, 3), (3, 70, 7, 20), (2, 33, 20, 64), (2, 40, 60, 60)]
balls = [(0.5, 0.01), (2.0, 0.1), (0.1, 1e-3)]
for dtype, (blocks, rows, k, d), (radius, blur) in itertools.product([torch.float32, torch.float64], shapes, balls):
    generator = torch.Generator().manual_seed(rows)
    eigenvalues = torch.randn(blocks, k, generator=generator, dtype=torch.float64).to(dtype)
    gradient = torch.randn(blocks, rows, k, generator=generator, dtype=torch.float64).to(dtype)
    gradient[:, 0, eigenvalues[0].argmin()] = 0  # the hard case: no gradient along the lowest curvature
    if k == 60:  # many scales, which take Newton many steps
        eigenvalues, gradient = eigenvalues * torch.logspace(-3, 3, k), gradient * torch.logspace(2, -4, k)
        eigenvalues, gradient = eigenvalues.to(dtype), gradient.to(dtype)
    expected = minimise_blurred(eigenvalues, gradient, radius, blur, d)
    got = ball_triton.minimise_blurred(eigenvalues, gradient, radius, blur, d)
    errors = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(got, expected)]
    found.append([torch.finfo(dtype).eps, max(errors)])
ones = torch.ones
others = [(ones(3), ones(5, 3)), (ones(1, 3), ones(2, 5, 3)), (ones(2, 3), ones(2, 0, 3))]
left = [ball_triton.minimise_blurred(*other, 1.0, 0.1, 3) is None for other in others]
print(json.dumps([found, left]))
"""


def test_kernel_gives_the_blurred_minimum() -> None:
    """Interpreted, and it leaves other shapes to the reference."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    found, left = json.loads(run.stdout)
    assert len(found) == 30 and left == [True] * 3
    for eps, error in found:
        assert error < 20 * eps


@pytest.mark.parametrize("missing", [True, False])
def test_a_kernel_that_does_not_work_is_done_without(monkeypatch, caplog, missing: bool) -> None:
    class Broken:
        @staticmethod
        def jit(function, **options):
            raise RuntimeError("no compiler here")

    def broken(name: str) -> type[Broken]:
        if missing:
            raise ImportError("no Triton here")
        return Broken

    monkeypatch.setattr(ball_triton.importlib, "import_module", broken)
    ball_triton.kernel.cache_clear()
    found = ball_triton.kernel()
    ball_triton.kernel.cache_clear()
    assert found is None and ("no Triton here" if missing else "no compiler here") in caplog.text


def test_groups_of_much_data_are_not_kept(monkeypatch) -> None:
    few = problem(4, "crammer_singer")
    few._scan.is_dense = True
    monkeypatch.setattr(scan, "_KEPT", few.n * few.num_margins - 1)
    few.objective(few.random_network(2, 0))
    assert not few._scan._kept


def test_forms_are_factored_in_threads_alike() -> None:
    """And other threads of the process keep their number of threads."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(7, 40, 40, generator=generator, dtype=torch.float64)
    matrices = matrices + matrices.mT
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    margins._pool.cache_clear()
    try:
        values, vectors = margins._in_threads(matrices)
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 3 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices))
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrices)


def test_threads_are_shared_with_the_ranks_beside(monkeypatch) -> None:
    margins._threads.cache_clear()
    alone = margins._threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    margins._threads.cache_clear()
    assert alone >= 1 and margins._threads() == 1
    margins._threads.cache_clear()


def test_each_form_is_factored_by_what_suits_it(monkeypatch) -> None:
    """An eigendecomposition for those with dependent neurons alone, and the same factors as by themselves."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 4, 9, generator=generator, dtype=torch.float64)
    v[1, 2] = v[1, 0]
    gram, alive, seen = v @ v.mT, torch.ones(3, 4, dtype=torch.bool), []
    alone = [margins._root(gram[i : i + 1], 4, alive[i : i + 1]) for i in range(3)]
    monkeypatch.setattr(margins, "_eigh", lambda matrices: (seen.append(len(matrices)), torch.linalg.eigh(matrices))[1])
    found = margins._root(gram, 4, alive)
    assert seen == [1]
    for i, parts in enumerate(alone):
        for one, other in zip(found, parts, strict=True):
            torch.testing.assert_close(one[i], other[0])


@pytest.mark.parametrize("kind", ["independent", "padded", "equal", "ill-conditioned"])
def test_factors_of_neurons_are_orthonormal_whatever_depends(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 6, 9, generator=generator, dtype=torch.float64)
    alive = torch.ones(1, 6, dtype=torch.bool)
    if kind == "padded":
        v[0, 4:], alive[0, 4:] = 0, False
    if kind == "equal":
        v[0, 3] = v[0, 1] * (1 + 1e-9)
    if kind == "ill-conditioned":
        # No neuron is near the span of those before it, and yet they are all but dependent.
        size = 40
        v = (torch.eye(size) - torch.ones(size, size).tril(-1)).double().unsqueeze(0)
        alive = torch.ones(1, size, dtype=torch.bool)
    gram = v @ v.mT
    root, inverse = margins._root(gram, gram.shape[-1], alive)
    basis = v.mT @ inverse
    inner = basis.mT @ basis
    # A projection: orthonormal, but for directions that are left out.
    torch.testing.assert_close(inner @ inner, inner, rtol=0, atol=1e-7)
    expected = torch.where((alive[:, :, None] & alive[:, None, :]), root @ root.mT, 0)
    torch.testing.assert_close(expected, gram, rtol=0, atol=1e-9 * float(gram.abs().max()))
    assert int(inner.diagonal(dim1=1, dim2=2).sum().round()) == {"padded": 4, "equal": 5, "ill-conditioned": 39}.get(
        kind, 6
    )


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("k", [1, 5, 40, 70])
def test_kernel_on_a_gpu_gives_the_blurred_minimum(dtype: torch.dtype, accuracy: float, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    eigenvalues = torch.randn(3, k, generator=generator, dtype=torch.float64).to(dtype)
    gradient = torch.randn(3, 300, k, generator=generator, dtype=torch.float64).to(dtype)
    expected = minimise_blurred(eigenvalues, gradient, 0.5, 0.01, k + 10)
    found = ball_triton.minimise_blurred(eigenvalues.cuda(), gradient.cuda(), 0.5, 0.01, k + 10)
    assert found is not None
    through = minimise_blurred(eigenvalues.cuda(), gradient.cuda(), 0.5, 0.01, k + 10)
    assert all(torch.equal(one, other) for one, other in zip(found, through, strict=True))
    for one, other in zip(found, expected, strict=True):
        assert float((one.cpu() - other).abs().max()) <= accuracy * float(other.abs().max())


@needs_gpu
@pytest.mark.parametrize("classes, loss", [(2, "one_vs_rest"), (4, "crammer_singer"), (5, "one_vs_rest")])
def test_both_devices_solve_the_same_problem(classes: int, loss: str) -> None:
    few = problem(classes, loss)
    x, y = few.features, few.labels
    results = []
    for device in ("cpu", "cuda"):
        head = ConvexRobustHead(6, classes, radius=0.4, reg=0.05, loss=loss).to(device)
        results.append(head.fit(x.to(device), y.to(device), tol=1e-3, progress=False).result_)
    on_gpu = PolynomialProblem(x.cuda(), y.cuda(), num_classes=classes, radius=0.4, reg=0.05, loss=loss)
    on_gpu.objective(on_gpu.random_network(2, 0))
    assert on_gpu._scan.is_dense and on_gpu._scan._kept
    one, other = results
    assert one.gap <= 1e-3 and other.gap <= 1e-3
    assert max(one.dual, other.dual) <= min(one.primal, other.primal) * (1 + 1e-6)
