"""``ConvexRobustHead``: the classifier that replaces the last layers of a backbone.

    z = (x - mean) / scale W,     logits = f(z) of a two-layer network with the activation's formula (activations/)

trained to global optimality on the activation's robust problem (problems/) in the standardised units of z. The
certificate that ``fit`` stores is measured on the weights as deployed: rounded to the head's dtype, with the rounded
mean and scale. Arithmetic is float64; on large data (activations/polynomial.py) the passes run in float32 with float64
sums, which on 3,000 rows of 512 features moved the objective by 7e-9 and the bound by 2e-6, relative.
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

from convex_head.activations import Geometry, Task, TrainingData, make_activation
from convex_head.console import messages
from convex_head.errors import ConvergenceWarning, NotFittedError, SettingError
from convex_head.fit_progress import fit_progress
from convex_head.head_files import damaged, read_head, write_head
from convex_head.problems.losses import get_loss
from convex_head.rows import is_mapped
from convex_head.shards import Shard, Whole
from convex_head.solvers import Progress, SolveResult, get_solver
from convex_head.solvers.base import check_positive
from convex_head.solvers.result import as_deployed, network_of
from convex_head.standardisation import Standardised, mean_and_scale
from convex_head.threads import one_thread_if_small
from convex_head.validation import (
    check_features,
    check_in_features,
    check_labels,
    check_num_classes,
    check_radius,
    check_reg,
)

_BALLS = ("l2", "linf")
_SETTINGS = ("in_features", "num_classes", "activation", "radius", "reg", "loss", "standardize")


class ConvexRobustHead(Standardised):
    """A two-layer network, adversarially trained by convex optimisation on features.

    Args:
        in_features: d, width of the features.
        num_classes: C >= 2.
        activation: "polynomial", "relu" or "gated_relu".
        radius: radius of the ball around each standardised feature vector in which the head is trained to be right.
        reg: weight of the regularisation: sum_j |alpha_j| of unit neurons (polynomial), sum |v| of the vectors that
            belong to a gate, bias included (relu, gated_relu).
        loss: "crammer_singer", "multi_margin" or "one_vs_rest"; for C = 2 all are the hinge.
        standardize: scale features to mean 0 and deviation 1 first (constant features keep scale 1). The radius is in
            these units, and the affine map is part of the head.
        whitening: (d, d) matrix W that standardised features are multiplied by; the ball, its radius and all distances
            are then those behind it: an ellipsoid of features (``displacement.whitening``). None: the round ball.
        coefficients: (a, b, c) of the polynomial activation a t^2 + b t + c, a > 0; None for the fit to a ReLU.
        patterns: relu, gated_relu: number of random sign patterns; None for one every 20 examples, 10 to 100.
        slack: relu: weight of violated cone constraints (None: 1); inf makes them hard.
        flips: gated_relu: "cover" (None) counts the gates that a perturbation can flip, "ignore" does not.
        ball: "l2", or "linf" for relu and gated_relu: the shape of the feature ball.

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
        whitening: Tensor | None = None,
        coefficients: tuple[float, float, float] | None = None,
        patterns: int | None = None,
        slack: float | None = None,
        flips: str | None = None,
        ball: str = "l2",
    ):
        super().__init__()
        self.in_features = check_in_features(in_features)
        self.num_classes = check_num_classes(num_classes)
        self.activation = activation
        self.radius = check_radius(radius)
        self.reg = check_reg(reg)
        self.loss = get_loss(loss).name
        self.standardize = bool(standardize)
        if ball not in _BALLS:
            raise SettingError(f"ball must be {' or '.join(map(repr, _BALLS))}; found {ball!r}. Leave it out for 'l2'.")
        settings = {"coefficients": coefficients, "patterns": patterns, "slack": slack, "flips": flips}
        # The default ball is everybody's; another one only some activations have.
        self._activation = make_activation(activation, settings | {"ball": None if ball == "l2" else ball})
        for name, value in self._activation.settings.items():
            setattr(self, name, value)
        self.ball = ball
        empty = self._activation.empty(self.in_features, self._task().functions)
        self._weight_names = tuple(empty)
        self._set_weights(empty)
        self._register_units(self.in_features, whitening)
        self.result_: SolveResult | None = None
        self._factors: tuple[Any, Geometry] | None = None

    # -- inference ------------------------------------------------------------------------------------------

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n, C) of features (n, d), in the head's dtype (autocast is left aside); C = 2: (-f/2, f/2).

        Raises:
            NotFittedError: the head has no weights yet.
        """
        self._check_fitted()
        with torch.autocast(features.device.type, enabled=False):
            z = self.in_units(features.to(self.mean.dtype) - self.mean)
            return self._logits(self._activation.forward(self._weights(), z))

    def soft_forward(self, features: Tensor, temperature: float) -> Tensor:
        """Logits with gates 1[t >= 0] replaced by sigmoid(t / temperature), for attacks that need their gradient.

        Raises:
            SettingError: the activation has no gates.
        """
        self._check_fitted()
        z = self.in_units(features.to(self.mean.dtype) - self.mean)
        f = self._activation.soft_forward(self._weights(), z, temperature)
        if f is None:
            raise SettingError(f"soft_forward needs an activation with gates; found {self.activation!r}.")
        return self._logits(f)

    def _logits(self, f: Tensor) -> Tensor:
        return torch.cat([-0.5 * f, 0.5 * f], dim=-1) if self.num_classes == 2 else f

    @property
    def is_fitted(self) -> bool:
        """The head has weights."""
        return self.num_neurons > 0

    @property
    def num_neurons(self) -> int:
        """Neurons of the deployed network; 0 before the head is fitted."""
        return self._activation.size(self._weights())

    @property
    def certificate(self) -> str:
        """What margins and distances are: "exact" or "lower bound"."""
        return self._activation.certificate

    @property
    def solvers(self) -> tuple[str, ...]:
        """Names that ``fit(solver=...)`` takes; "auto" is the first."""
        return self._activation.solvers

    @property
    def adaptive_attacks(self) -> tuple[str, ...]:
        """Names of the attacks that an evaluation of this head must not leave out."""
        return self._activation.adaptive_attacks

    def network(self) -> Any:
        """The deployed network, float64, in the form that :meth:`problem` measures and ``fit(start=...)`` takes."""
        self._check_fitted()
        return self._activation.network(self._weights())

    def _weights(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._weight_names}

    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            if value.is_floating_point():
                setattr(self, name, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(name, value)

    def _task(self, tol: float = 0.0) -> Task:
        return Task(self.num_classes, self.radius, self.reg, self.loss, tol)

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
        start: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        distributed: bool = False,
    ) -> ConvexRobustHead:
        """Solve the robust training problem to a relative duality gap of ``tol``.

        Args:
            features: (n, d) array or tensor of the backbone's features; the solve runs on its device. A numpy.memmap
                stays on disk and is read in every pass (polynomial activation), for data larger than memory.
            labels: (n,) integers in 0..C-1, at least two different ones.
            solver: "auto" or a name of the activation's ``solvers``.
            tol: relative gap (primal - dual) / max(1e-12, primal) to reach.
            max_seconds: wall-clock limit, which includes the last bound of column_generation; the best point is kept
                and its honest gap stored, with a warning.
            progress: True shows a progress line, False none; None shows it on a terminal once a fit takes over 2 s.
            callback: called with a :class:`Progress` an outer iteration; returning True ends the fit.
            seed: seeds the random start.
            start: a network to start from, for example ``other_head.network()``; its gates, where it has any, are kept.
                ``other_head.result_`` of a fit on the same rows is a better start: it has their multipliers too.
            checkpoint: file that holds where the fit stands; where it exists, the fit goes on from it, to the same
                result (solver column_generation). It stays when the fit ends.
            distributed: features and labels are this process's shard; sums go over all processes of torch.distributed,
                which ends with the same head in each (polynomial activation, column_generation).

        Returns:
            self, with weights and ``result_`` set. A fit that raises leaves the head as it was.

        Raises:
            InputError: a subclass for the broken rule (shapes, NaN, label range, one class only, tol, solver name).
            SolverError: the solver failed without a usable point.
            ResumeMismatchError: the checkpoint is damaged or belongs to another problem.
            ShardError: torch.distributed is not initialised, or another process was lost.
        """
        x = check_features(features, self.in_features)
        shard = Shard(x.shape[0], x.device) if distributed else Whole()
        y = check_labels(labels, x.shape[0], self.num_classes, training=shard).to(x.device)
        mean, scale = mean_and_scale(x, self.mean.dtype, shard, features, none=not self.standardize)
        algorithm = get_solver(solver, self.solvers)
        data = TrainingData(features if is_mapped(features) else x, y, mean, scale, self.whitening, shard)
        before = network_of(start)
        check_positive("tol", tol)
        weights = self._weights_on(y)
        problem = self._activation.problem(data, self._task(tol), weights=weights, start=before, seed=seed)
        if before is not None:
            before = problem.check_start(before)
            start = dataclasses.replace(start, network=before) if isinstance(start, SolveResult) else before
        callbacks = [] if callback is None else [callback]
        with fit_progress(messages(), tol, max_seconds, show=progress) as show:
            if show is not None:
                callbacks.append(show)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                options = {"tol": tol, "max_seconds": max_seconds, "seed": seed, "start": start}
                result = algorithm.solve(problem, **options, callbacks=tuple(callbacks), checkpoint=checkpoint)
        self._deploy(result, problem, mean, scale, tol)
        return self

    def problem(self, features: Any, labels: Any) -> Any:
        """The convex problem that ``fit`` solves on these data, in the head's units, with its gates, for any tol."""
        self._check_fitted()
        x = check_features(features, self.in_features)
        y = check_labels(labels, x.shape[0], self.num_classes).to(x.device)
        data = TrainingData(x, y, self.mean, self.scale, self.whitening)
        return self._activation.problem(data, self._task(), weights=self._weights_on(y))

    def _weights_on(self, other: Tensor) -> dict[str, Tensor]:
        return {name: value.to(other.device) for name, value in self._weights().items()}

    def _deploy(self, result: SolveResult, problem: Any, mean: Tensor, scale: Tensor, tol: float) -> None:
        """Round to the head's dtype, measure what is deployed, and only then take it over."""
        device, dtype = self.mean.device, self.mean.dtype
        weights = self._activation.deploy(result.network, problem, dtype)
        primal = problem.objective(self._activation.network(weights))
        extra = result.extra | self._activation.measure(weights, problem)
        result = as_deployed(result, primal, tol, f"{dtype}", zero=self._activation.is_zero(weights))
        self._set_weights({name: value.to(device) for name, value in weights.items()})
        self.mean = mean.to(device)
        self.scale = scale.to(device)
        self.result_ = dataclasses.replace(result, extra=extra)

    # -- certificates ---------------------------------------------------------------------------------------

    def worst_case_margin(self, features: Any, labels: Any, radius: float | None = None) -> Tensor:
        """Min over the feature ball of logit[label] minus the best other logit: exact, or a certified lower bound.

        ``certificate`` says which. Exact for the polynomial activation; for relu and gated_relu a bound that no point
        of the ball undercuts, exact where no neuron changes its sign and no gate flips.

        Args:
            features: (n, d).
            labels: (n,) in 0..C-1.
            radius: of the ball, in standardised units; the head's own if None.

        Returns:
            (n,) float64. Positive means: right for every feature vector in the ball.
        """
        z, y, r = self._inputs(features, labels, radius)
        with one_thread_if_small(z.numel()):
            return self._geometry().worst_case_margin(z, y, r)

    def worst_case_features(self, features: Any, labels: Any, radius: float | None = None) -> Tensor:
        """Feature vectors (n, d) of the ball with the smallest margin, in the features' units and dtype.

        They attain :meth:`worst_case_margin` where ``certificate`` is "exact"; else they are the worst that descent
        inside the ball found, so that the true worst case lies between the bound and the margin there.
        """
        z, y, r = self._inputs(features, labels, radius)
        with one_thread_if_small(z.numel()):
            worst = self._geometry().worst_case_point(z, y, r)
        return self.from_units(worst).to(check_features(features, self.in_features))

    def distance_to_boundary(self, features: Any, labels: Any = None) -> Tensor:
        """Distance (standardised units, norm of the ball) to the nearest point where another class wins.

        Exact, or a certified lower bound: ``certificate`` says which.

        Args:
            features: (n, d).
            labels: (n,), or None for the predicted labels.

        Returns:
            (n,) float64; 0 where the label does not win already, inf where no other class is reachable.
        """
        if labels is None:
            x = check_features(features, self.in_features)
            labels = self(x.to(self.mean)).argmax(dim=1)
        z, y, _ = self._inputs(features, labels, None)
        with one_thread_if_small(z.numel()):
            return self._geometry().distance_to_boundary(z, y)

    def _inputs(self, features: Any, labels: Any, radius: float | None) -> tuple[Tensor, Tensor, float]:
        self._check_fitted()
        x = check_features(features, self.in_features).to(self.mean.device)
        y = check_labels(labels, x.shape[0], self.num_classes).to(x.device)
        return self.standardised(x), y, self.radius if radius is None else check_radius(radius)

    def _geometry(self) -> Geometry:
        """Factorisations of the deployed weights, made anew when these change."""
        weights = self._weights()
        key = tuple((id(t), t._version, t.device) for t in weights.values())
        if self._factors is None or self._factors[0] != key:
            self._factors = (key, self._activation.geometry(weights, self.num_classes))
        return self._factors[1]

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("the head has no weights yet; found 0 neurons. Call fit, load or load_state_dict.")

    # -- files ----------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Settings and size, for print(head)."""
        return (
            f"{self.in_features}, {self.num_classes}, activation={self.activation!r}, radius={self.radius:g}, "
            f"reg={self.reg:g}, loss={self.loss!r}, neurons={self.num_neurons}"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the sizes from the incoming tensors, where these are weights of such a head."""
        incoming = {name: state_dict[prefix + name] for name in self._weight_names if prefix + name in state_dict}
        sized = self._activation.sized_like(incoming, self.in_features, self._task().functions)
        current = self._weights()
        if sized is not None and any(value.shape != current[name].shape for name, value in sized.items()):
            like = self.mean
            self._set_weights({n: v.to(like) if v.is_floating_point() else v.to(like.device) for n, v in sized.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_SETTINGS, *self._activation.settings)}

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
            head = cls(**settings).to(tensors["mean"].dtype)
            head.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as fault:
            raise damaged(path, fault) from fault
        head.result_ = result
        return head
