"""What stands beside the solvers in :mod:`benchmarks.solvers`: controls without certificate, and the cost of a pass.

Linear heads f_c(x) = w_c'x + b_c have their worst case in closed form: in the l2 ball of radius r the margin of y over
k loses r |w_y - w_k|.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from benchmarks.common import Record, load_average
from benchmarks.solvers_cases import RADIUS, limited, problem_of
from benchmarks.solvers_data import Split, held_out, load
from convex_head import provenance
from convex_head.console import messages
from convex_head.errors import ConvergenceWarning, MissingExtraError
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.column_generation import ColumnGeneration
from convex_head.solvers.penalty import Iterate, Objective

_MAX_ITER = 1000
_BATCH = 100
_REPEATS = 3


@dataclass(frozen=True)
class Controls:
    """Linear probes of scikit-learn: C = 1, its default, and C = 1 / (reg n), which weighs the mean loss against reg.

    Attributes:
        name: of the file that keeps the measurements.
        part, n, d, tests: data set, rows, features, held-out rows.
        reg: regularisation of the second probe of each kind.
    """

    name: str
    part: str
    n: int
    d: int
    tests: int
    reg: float = 0.1

    def measure(self, folder: Path, threads: int) -> list[Record]:
        """Four records."""
        split = load(self.part, self.n, self.d, self.tests, folder)
        records = []
        with limited(threads):
            for kind in (LinearSVC, LogisticRegression):
                for strength, shown in ((1.0, "C = 1"), (1 / (self.reg * self.n), f"C = 1/({self.reg:g} n)")):
                    label = f"{kind.__name__}, {shown}"
                    messages().print(f"{self.name}: {label}")
                    records.append(self._fit(split, kind(C=strength, max_iter=_MAX_ITER), label, threads))
        return records

    def _fit(self, split: Split, model: Any, label: str, threads: int) -> Record:
        record = _record(self, label, threads)
        x, y = split.x.double().numpy(), split.y.numpy()
        began, cpu_began = time.perf_counter(), time.process_time()
        with warnings.catch_warnings(action="ignore"):
            model.fit(x, y)
        record |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
        ended = int(np.max(model.n_iter_)) < _MAX_ITER
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if split.num_classes == 2:
            weight, bias = (torch.cat([torch.zeros_like(part), part]) for part in (weight, bias))
        margins = {
            name: linear_margins(weight, bias, split.test_x.double(), split.test_y, radius)
            for name, radius in (("clean", 0.0), ("robust", RADIUS))
        }
        correct = held_out({name: worst.amin(1) > 0 for name, worst in margins.items()})
        return record | {"status": "converged" if ended else "max_iter"} | correct


def linear_margins(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """(n, C - 1) least margins of y over the other classes in the l2 balls around x (n, d), weight (C, d)."""
    scores, distance = x @ weight.mT + bias, torch.cdist(weight, weight)
    margins = scores.gather(1, y[:, None]) - scores - radius * distance[y]
    others = torch.arange(len(weight)) != y[:, None]
    return margins[others].reshape(len(x), -1)


@dataclass(frozen=True)
class Pyscnn:
    """pyscnn's R-FISTA: gated ReLU, squared loss on -1 and 1, no adversary.

    Attributes:
        name, part, n, d, tests: as in :class:`Controls`.
        gates: sampled gates.
        reg: of the group l1 norm.
    """

    name: str
    part: str
    n: int
    d: int
    tests: int
    gates: int = 50
    reg: float = 1e-2

    def measure(self, folder: Path, threads: int) -> list[Record]:
        """One record.

        Raises:
            MissingExtraError: pyscnn is not installed.
        """
        try:
            names = ("models", "solvers", "regularizers", "metrics", "activations", "optimize")
            scnn = {name: import_module(f"scnn.{name}") for name in names}
        except ImportError as fault:
            raise MissingExtraError(f"pyscnn does not import ({fault}); run: pip install pyscnn.") from fault
        split = load(self.part, self.n, self.d, self.tests, folder)
        classes = torch.arange(split.num_classes)[1 if split.num_classes == 2 else 0 :]
        target = (2 * (split.y[:, None] == classes).double() - 1).numpy()
        gates = scnn["activations"].sample_gate_vectors(0, self.d, self.gates)
        model = scnn["models"].ConvexGatedReLU(gates, c=len(classes))
        with limited(threads):
            record = _record(self, f"pyscnn, {self.gates} gates", threads) | {"version": version("pyscnn")}
            messages().print(f"{self.name}: pyscnn")
            began, cpu_began = time.perf_counter(), time.process_time()
            fitted, _ = scnn["optimize"].optimize_model(
                model,
                scnn["solvers"].RFISTA(model),
                scnn["metrics"].Metrics(),
                split.x.numpy(),
                target,
                regularizer=scnn["regularizers"].NeuronGL1(self.reg),
                return_convex=True,
                dtype="float64",
            )
            record |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
            scores = torch.from_numpy(np.asarray(fitted(split.test_x.numpy()))).reshape(len(split.test_x), -1)
        chosen = (scores[:, 0] > 0).long() if split.num_classes == 2 else scores.argmax(1)
        return [record | held_out({"clean": chosen == split.test_y})]


def _record(task: Controls | Pyscnn, solver: str, threads: int) -> Record:
    return {
        "kind": "control",
        "data": task.part,
        "n": task.n,
        "d": task.d,
        "radius": 0.0,
        "solver": solver,
        "threads": threads,
        "load_average": load_average(),
        "commit": provenance.commit(),
    }


@dataclass(frozen=True)
class PassCost:
    """One pass over all rows: worst cases, objective and gradient, against matrix products and the penalty method.

    The network is column generation's after a fit of ``fit_rows`` rows. The penalty method's pass is one epoch in
    batches of 100. Its steps are timed with two small numbers of rows at the true d, in float32 like the exact pass,
    after three steps of Adam; a step costs fixed + slope * rows, and n rows take n / 100 such steps.

    Attributes:
        name, part, n, d: as in :class:`Controls`.
        reg: regularisation.
        neurons: of each sign and class that the fit starts from.
        fit_rows, fit_seconds: of the fit.
        rows: the two numbers of rows of the penalty method's steps.
    """

    name: str
    part: str
    n: int
    d: int
    reg: float = 0.1
    neurons: int = 8
    fit_rows: int = 4096
    fit_seconds: float = 60.0
    rows: tuple[int, int] = (2, 8)

    def measure(self, folder: Path, threads: int) -> list[Record]:
        """Records of the two products, of the exact pass early and late in a solve, and of the penalty method."""
        split = load(self.part, self.n, self.d, 1, folder)
        messages().print(f"{self.name}: a fit of {self.fit_rows} rows, then passes over {self.n}")
        with limited(threads):
            problem = problem_of(split, "crammer_singer", self.reg)
            load_began = load_average()
            sample = problem.sample(min(self.fit_rows, self.n), 0)
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                fitted = ColumnGeneration(neurons=self.neurons).solve(sample, tol=0.1, max_seconds=self.fit_seconds)
            packed = problem.pack(fitted.network)
            flat = packed.vectors[packed.signs != 0].to(split.x.dtype)

            def floor() -> None:
                for part in split.x.split(4096):
                    (part @ flat.mT).mT @ part

            found = {"two matrix products": timed(floor)}
            for mu in (0.1, 0.01):
                blur = problem.blur(mu)
                found[f"exact pass, mu = {mu:g}"] = timed(lambda mu=mu, blur=blur: problem.evaluate(packed, mu, blur))
            found["penalty method, an epoch"] = self._epoch(split)
        products, exact, _, _ = found.values()
        return [
            {
                "kind": "pass",
                "data": self.part,
                "n": self.n,
                "d": self.d,
                "classes": split.num_classes,
                "neurons": None if "penalty" in label else fitted.neurons,
                "widest": packed.vectors.shape[1],
                "solver": label,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "to_products": cpu_seconds / products[1],
                "to_exact": cpu_seconds / exact[1],
                "seconds_to_exact": seconds / exact[0],
                "extrapolated_from": list(self.rows) if "penalty" in label else None,
                "threads": threads,
                "load_average": load_began,
                "commit": provenance.commit(),
            }
            for label, (seconds, cpu_seconds) in found.items()
        ]

    def _epoch(self, split: Split) -> tuple[float, float]:
        """Wall and CPU seconds of an epoch of the penalty method, from steps of few rows."""
        few, more = (penalty_step(split, rows, self.reg) for rows in self.rows)
        seconds, cpu_seconds = (epoch(self.n, *pair, rows=self.rows) for pair in zip(few, more, strict=True))
        return seconds, cpu_seconds


def epoch(n: int, few: float, more: float, *, rows: tuple[int, int]) -> float:
    """Seconds of n rows in batches of 100 from those of steps of rows[0] and rows[1] rows, linear in the rows."""
    slope = (more - few) / (rows[1] - rows[0])
    fixed = max(0.0, few - slope * rows[0])
    return math.ceil(n / _BATCH) * fixed + n * slope


def penalty_step(split: Split, rows: int, reg: float) -> tuple[float, float]:
    """Wall and CPU seconds of one step of the penalty method on the first rows, in float32."""
    options = {"num_classes": split.num_classes, "radius": RADIUS, "reg": reg}
    problem = PolynomialProblem(split.x[:rows].double(), split.y[:rows], **options)
    objective = Objective(problem, 1.0)
    for name in ("features", "signs", "mask"):
        setattr(objective, name, getattr(objective, name).float())
    iterate = Iterate(*(tensor.detach().float().requires_grad_() for tensor in Iterate.zero(problem).tensors()))
    optimiser = torch.optim.Adam(iterate.tensors(), lr=0.01)
    everything = torch.arange(rows)

    def step() -> None:
        optimiser.zero_grad()
        objective.value(iterate, everything).backward()
        optimiser.step()

    for _ in range(3):  # at its start all matrices are zero, and cheaper
        step()
    return timed(step)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Least wall and CPU seconds of three runs after one that is not counted."""
    work()
    found = []
    for _ in range(_REPEATS):
        began, cpu_began = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - began, time.process_time() - cpu_began))
    return min(seconds for seconds, _ in found), min(cpu for _, cpu in found)
