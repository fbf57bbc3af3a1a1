"""``ConvexRobustHead``: the classifier that replaces the last layers of a backbone.

    z = (x - mean) / scale,     logits = readout @ s(directions @ z),     s(t) = a t^2 + b t + c

trained to global optimality on the robust problem of ``problems/polynomial.py`` in the standardised units of z. The
certificate that ``fit`` stores is measured on the weights as deployed: rounded to the head's dtype, with the rounded
mean and scale, in float64 arithmetic.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convex_head.adversary.certify import RobustGeometry
from convex_head.errors import (
    ConvergenceWarning,
    FeatureRangeError,
    NotFittedError,
    UnknownActivationError,
)
from convex_head.head_files import damaged, read_head, write_head
from convex_head.problems.base import Network
from convex_head.problems.losses import get_loss
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import Progress, SolveResult, Status, get_solver
from convex_head.solvers.progress import progress_line
from convex_head.solvers.result import relative_gap
from convex_head.validation import (
    check_coefficients,
    check_features,
    check_in_features,
    check_labels,
    check_num_classes,
    check_radius,
    check_reg,
)

_FLOAT32_ABOVE = 30_000_000


class ConvexRobustHead(nn.Module):
    """A two-layer polynomial network, adversarially trained by convex optimisation on features.

    Args:
        in_features: d, width of the features.
        num_classes: C >= 2.
        activation: "polynomial".
        radius: radius of the l2 ball around each standardised feature vector in which the head is trained to be right.
        reg: weight of the regularisation sum_j |alpha_j|.
        loss: "crammer_singer", "multi_margin" or "one_vs_rest"; for C = 2 all are the hinge.
        standardize: scale features to mean 0 and deviation 1 first (constant features keep scale 1). The radius is in
            these units, and the affine map is part of the head.
        coefficients: (a, b, c) of the activation a t^2 + b t + c, a > 0.

    Attributes:
        result_: the :class:`~convex_head.solvers.result.SolveResult` of the last ``fit``; None before.

    Raises:
        InputError: a subclass that names the broken rule, the value found and the next step.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        activation: str = "polynomial",
        radius: float = 0.5,
        reg: float = 1e-3,
        loss: str = "crammer_singer",
        standardize: bool = True,
        coefficients: tuple[float, float, float] = (0.09, 0.5, 0.47),
    ):
        super().__init__()
        if activation != "polynomial":
            raise UnknownActivationError(f"activation must be 'polynomial'; found {activation!r}.")
        self.in_features = check_in_features(in_features)
        self.num_classes = check_num_classes(num_classes)
        self.activation = activation
        self.radius = check_radius(radius)
        self.reg = check_reg(reg)
        self.loss = get_loss(loss).name
        self.standardize = bool(standardize)
        self.coefficients = check_coefficients(coefficients)
        functions = 1 if self.num_classes == 2 else self.num_classes
        self.directions = nn.Parameter(torch.zeros(0, self.in_features), requires_grad=False)
        self.readout = nn.Parameter(torch.zeros(functions, 0), requires_grad=False)
        self.register_buffer("mean", torch.zeros(self.in_features))
        self.register_buffer("scale", torch.ones(self.in_features))
        self.mean: Tensor
        self.scale: Tensor
        self.result_: SolveResult | None = None
        self._factors: tuple[Any, RobustGeometry] | None = None

    # -- inference ------------------------------------------------------------------------------------------

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n, C) of features (n, d), in the head's dtype (autocast is left aside); C = 2: (-f/2, f/2).

        Raises:
            NotFittedError: the head has no weights yet.
        """
        self._check_fitted()
        with torch.autocast(features.device.type, enabled=False):
            a, b, c = self.coefficients
            z = (features.to(self.directions.dtype) - self.mean) / self.scale
            t = functional.linear(z, self.directions)
            f = functional.linear((a * t + b) * t + c, self.readout)
            if self.num_classes == 2:
                f = torch.cat([-0.5 * f, 0.5 * f], dim=-1)
            return f

    @property
    def is_fitted(self) -> bool:
        """The head has weights."""
        return self.directions.shape[0] > 0

    def network(self) -> Network:
        """The deployed network, float64: one neuron for every non-zero readout weight."""
        self._check_fitted()
        function, neuron = (self.readout != 0).nonzero(as_tuple=True)
        directions = self.directions.detach().double()[neuron]
        return Network(directions, self.readout.detach().double()[function, neuron], function)

    def standardised(self, features: Tensor) -> Tensor:
        """Features in the units of the radius, float64."""
        return (features.double() - self.mean.double()) / self.scale.double()

    # -- training -------------------------------------------------------------------------------------------

    def fit(
        self,
        features: Any,
        labels: Any,
        *,
        solver: str = "auto",
        tol: float = 1e-2,
        max_seconds: float | None = None,
        progress: bool | None = None,
        callback: Callable[[Progress], Any] | None = None,
        seed: int = 0,
        start: Network | None = None,
    ) -> ConvexRobustHead:
        """Solve the robust training problem to a relative duality gap of ``tol``.

        Args:
            features: (n, d) array or tensor of the backbone's features; the solve runs on its device.
            labels: (n,) integers in 0..C-1, at least two different ones.
            solver: "auto", "column_generation", "sdp", "cutting_set" or "penalty".
            tol: relative gap (primal - dual) / max(1e-12, primal) to reach.
            max_seconds: wall-clock limit; the best point is kept and its honest gap stored, with a warning.
            progress: True shows a progress line, False none; None shows it on a terminal once a fit takes over 2 s.
            callback: called with a :class:`Progress` an outer iteration; returning True ends the fit.
            seed: seeds the random start.
            start: a network to start from, for example ``other_head.network()``.

        Returns:
            self, with weights and ``result_`` set. A fit that raises leaves the head as it was.

        Raises:
            InputError: a subclass for the broken rule (shapes, NaN, label range, one class only, tol, solver name).
            SolverError: the solver failed without a usable point.
        """
        x = check_features(features, self.in_features)
        y = check_labels(labels, x.shape[0], self.num_classes, training=True).to(x.device)
        mean, scale = self._standardisation(x)
        problem = self.problem(x, y, mean=mean, scale=scale)
        if start is not None:
            start = problem.check_start(start)
        callbacks = [] if callback is None else [callback]
        with progress_line(progress, tol) as show:
            if show is not None:
                callbacks.append(show)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                result = get_solver(solver).solve(
                    problem, tol=tol, max_seconds=max_seconds, callbacks=tuple(callbacks), seed=seed, start=start
                )
        self._deploy(result, problem, mean, scale, tol)
        return self

    def problem(
        self, features: Any, labels: Any, *, mean: Tensor | None = None, scale: Tensor | None = None
    ) -> PolynomialProblem:
        """The convex problem that ``fit`` solves on these data, in the head's standardised units."""
        x = check_features(features, self.in_features)
        y = check_labels(labels, x.shape[0], self.num_classes).to(x.device)
        mean = self.mean if mean is None else mean
        scale = self.scale if scale is None else scale
        z = (x.double() - mean.to(x.device).double()) / scale.to(x.device).double()
        return PolynomialProblem(
            z,
            y,
            num_classes=self.num_classes,
            radius=self.radius,
            reg=self.reg,
            loss=self.loss,
            coefficients=self.coefficients,
            dtype=torch.float32 if z.numel() > _FLOAT32_ABOVE else torch.float64,
        )

    def _standardisation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale in the head's dtype; the problem is posed with exactly these."""
        dtype = self.directions.dtype
        if not self.standardize:
            return x.new_zeros(x.shape[1], dtype=dtype), x.new_ones(x.shape[1], dtype=dtype)
        wide = x.double()
        scale = wide.std(dim=0, unbiased=False)
        constant = scale <= 1e-12 * wide.abs().amax(dim=0).clamp_min(1e-300)
        mean, scale = wide.mean(dim=0).to(dtype), torch.where(constant, 1.0, scale).to(dtype)
        if not bool((mean.isfinite() & scale.isfinite() & (scale > 0)).all()):
            raise FeatureRangeError(
                f"the features' means and deviations must be finite and positive in the head's {dtype}; found features "
                f"of size {float(wide.abs().amax()):.3g}. Rescale the features, or use head.double()."
            )
        return mean, scale

    def _deploy(self, result: SolveResult, problem: PolynomialProblem, mean: Tensor, scale: Tensor, tol: float) -> None:
        """Round to the head's dtype, measure what is deployed, and only then take it over."""
        device, dtype = self.directions.device, self.directions.dtype
        network = result.network
        if network.size == 0:
            network = problem.zero_network()
        directions = network.directions.to(dtype)
        readout = torch.zeros(problem.num_functions, network.size, dtype=dtype, device=directions.device)
        readout[network.function, torch.arange(network.size, device=directions.device)] = network.weights.to(dtype)
        deployed = Network(directions.double(), network.weights.to(dtype).double(), network.function)
        primal = problem.objective(deployed)
        gap = relative_gap(primal, result.dual)
        status = result.status
        if gap <= tol:
            status = Status.CONVERGED
        elif status is Status.CONVERGED:
            status = Status.STALLED
        message = (
            f"{result.solver}: {status.value}, objective {primal:.6g}, relative gap {gap:.3g} as deployed ({dtype})"
        )
        if not bool(network.weights.any()):
            message += "; the best network is the zero network: lower reg or radius"
        if status is not Status.CONVERGED:
            warnings.warn(
                f"{message}; tol = {tol:g} was not reached after {result.seconds:.3g} s. Allow more time "
                "(max_seconds), a larger tol, more regularisation (reg), or a float64 head.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.directions = nn.Parameter(directions.to(device), requires_grad=False)
        self.readout = nn.Parameter(readout.to(device), requires_grad=False)
        self.mean = mean.to(device)
        self.scale = scale.to(device)
        self.result_ = dataclasses.replace(result, status=status, primal=primal, gap=gap, message=message)

    # -- certificates ---------------------------------------------------------------------------------------

    def worst_case_margin(self, features: Any, labels: Any, radius: float | None = None) -> Tensor:
        """Exact min over the feature ball of logit[label] minus the best other logit.

        Args:
            features: (n, d).
            labels: (n,) in 0..C-1.
            radius: of the ball, in standardised units; the head's own if None.

        Returns:
            (n,) float64. Positive means: right for every feature vector in the ball. Exact up to rounding for any C,
            because each pairwise margin is a trust-region subproblem and the minima over classes and points commute.
        """
        return self._geometry().worst_case_margin(*self._inputs(features, labels, radius))

    def worst_case_features(self, features: Any, labels: Any, radius: float | None = None) -> Tensor:
        """The feature vectors (n, d) that attain :meth:`worst_case_margin`, in the features' units and dtype."""
        z, y, r = self._inputs(features, labels, radius)
        worst = self._geometry().worst_case_point(z, y, r)
        raw = self.mean.double() + self.scale.double() * worst
        tensor = check_features(features, self.in_features)
        return raw.to(tensor)

    def distance_to_boundary(self, features: Any, labels: Any = None) -> Tensor:
        """Exact l2 distance (standardised units) to the nearest point where another class wins.

        Args:
            features: (n, d).
            labels: (n,), or None for the predicted labels.

        Returns:
            (n,) float64; 0 where the label does not win already, inf where no other class is reachable.
        """
        if labels is None:
            x = check_features(features, self.in_features)
            labels = self(x.to(self.directions)).argmax(dim=1)
        z, y, _ = self._inputs(features, labels, None)
        return self._geometry().distance_to_boundary(z, y)

    def _inputs(self, features: Any, labels: Any, radius: float | None) -> tuple[Tensor, Tensor, float]:
        self._check_fitted()
        x = check_features(features, self.in_features).to(self.directions.device)
        y = check_labels(labels, x.shape[0], self.num_classes).to(x.device)
        return self.standardised(x), y, self.radius if radius is None else check_radius(radius)

    def _geometry(self) -> RobustGeometry:
        """Factorisations of the deployed weights, made anew when these change."""
        key = tuple((id(t), t._version, t.device) for t in (self.directions, self.readout))
        if self._factors is None or self._factors[0] != key:
            self._factors = (key, RobustGeometry(self.network(), self.num_classes, self.coefficients))
        return self._factors[1]

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError(
                "the head has no weights yet; found 0 neurons. Call fit, load or load_state_dict first."
            )

    # -- files ----------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Settings and size, for print(head)."""
        return (
            f"{self.in_features}, {self.num_classes}, activation={self.activation!r}, radius={self.radius:g}, "
            f"reg={self.reg:g}, loss={self.loss!r}, neurons={self.directions.shape[0]}"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the number of neurons from the incoming tensors, where these are weights of such a head."""
        directions, readout = (state_dict.get(prefix + name) for name in ("directions", "readout"))
        if directions is not None and readout is not None and directions.ndim == readout.ndim == 2:
            neurons, functions = directions.shape[0], self.readout.shape[0]
            fits = directions.shape[1] == self.in_features and readout.shape == (functions, neurons)
            if fits and neurons != self.directions.shape[0]:
                zeros = self.directions.new_zeros
                self.directions = nn.Parameter(zeros(neurons, self.in_features), requires_grad=False)
                self.readout = nn.Parameter(zeros(functions, neurons), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _settings(self) -> dict[str, Any]:
        names = ("in_features", "num_classes", "activation", "radius", "reg", "loss", "standardize", "coefficients")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write weights, settings and certificate to one safetensors file (no pickle), atomically."""
        self._check_fitted()
        path = Path(path)
        write_head(path, self.state_dict(), self._settings(), self.result_)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConvexRobustHead:
        """Read a file written by :meth:`save`.

        Raises:
            RecordError: the file is damaged or not a head.
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        tensors, settings, result = read_head(path)
        try:
            head = cls(**settings).to(tensors["directions"].dtype)
            head.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as fault:
            raise damaged(path, fault) from fault
        head.result_ = result
        return head
