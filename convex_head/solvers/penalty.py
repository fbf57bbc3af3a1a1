"""The published scalable method, for comparison: Adam on the SDP with its constraints as penalties.

Variables Z_c, Z'_c ((d+1) x (d+1), started at zero) and for every margin w_ik and l_ik; a batch minimises

    mean loss(w) + reg * sum_c (z4_c + z4'_c)
      + rho * ( sum of negative eigenvalues, in modulus, of the batch's LMIs and of the symmetrised Z_c, Z'_c
                + mean |tr Z1 - z4| + sum (-l)_+ )                     with the LMIs of solvers/sdp.py

Source: the torch code of arXiv 2405.14033, one-vs-rest, Adam with rate 0.01, 5 epochs, batches of 100, rho = 1.
Two of its defects are left out to be fair to the method: a minus before b d2 / 2 in the LMI, and w, l made anew
for every batch. The pairs of classes of the other losses are run the same way, with their own forms.

Nothing is feasible at the end, so the method's own objective means little: what is returned is the network of
the projected Z_c, Z'_c of the best epoch with its exact objective, and ``extra`` holds the violations left:

    claimed_objective       loss(w) + reg * norm by the method's own variables
    margin_overstatement    largest w_ik above the exact worst case of the returned network
    lmi_min_eigenvalue      most negative eigenvalue of the LMIs (0 if none is negative)
    lmi_mean_violation      mean over the LMIs of their negative eigenvalues' sum, in modulus
    psd_min_eigenvalue      the same most negative eigenvalue for Z_c, Z'_c
    trace_mismatch          largest |tr Z1 - z4|
    multiplier_min          most negative l_ik (0 if none is negative)

The LMIs are those of the first 1,000 examples: one eigenvalue call each would cost a whole epoch otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.decomposition import network_from_moments
from convex_head.problems.base import Network
from convex_head.problems.losses import get_loss
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.conic import form_signs, quadratic_mask

_MEASURED = 1000


@dataclass(frozen=True)
class Iterate:
    """The method's variables.

    Attributes:
        matrices: (F, 2, d+1, d+1) Z_c and Z'_c.
        margins, multipliers: (n, K) w and l.
    """

    matrices: Tensor
    margins: Tensor
    multipliers: Tensor

    @staticmethod
    def zero(problem: PolynomialProblem) -> Iterate:
        """The published start, float64."""
        size, shape = problem.d + 1, (problem.n, problem.num_margins)
        zeros = [torch.zeros(*s) for s in ((problem.num_functions, 2, size, size), shape, shape)]
        return Iterate(*(zero.to(problem.features).requires_grad_() for zero in zeros))

    def tensors(self) -> list[Tensor]:
        """What Adam updates."""
        return [self.matrices, self.margins, self.multipliers]

    def symmetric(self) -> Tensor:
        """(F, 2, d+1, d+1) symmetric parts of the matrices."""
        return (self.matrices + self.matrices.mT) / 2

    def copy(self) -> Iterate:
        """The same values, detached."""
        return Iterate(*(tensor.detach().clone() for tensor in self.tensors()))


class Objective:
    """The penalised objective of a batch and the violations behind it."""

    def __init__(self, problem: PolynomialProblem, rho: float):
        self.problem, self.rho = problem, rho
        self.features = problem.features
        device = self.features.device
        signs = form_signs(problem.labels.cpu().numpy(), problem.num_classes, problem.loss)
        self.signs = torch.from_numpy(signs).to(device)
        self.mask = torch.from_numpy(quadratic_mask(problem.d, problem.coefficients)).to(device)

    def value(self, iterate: Iterate, rows: Tensor) -> Tensor:
        """Loss, regularisation and penalties of the examples ``rows`` (B,); scalar."""
        matrices = iterate.symmetric()
        penalty = (
            negative_part(torch.linalg.eigvalsh(self.inequalities(iterate, rows))).sum()
            + negative_part(torch.linalg.eigvalsh(matrices)).sum()
            + trace_mismatch(matrices).abs().mean()
            + negative_part(iterate.multipliers[rows]).sum()
        )
        return self.unpenalised(iterate, rows) + self.rho * penalty

    def unpenalised(self, iterate: Iterate, rows: Tensor) -> Tensor:
        """mean loss(w) + reg * sum_c (z4_c + z4'_c), as the method itself sees it; scalar."""
        problem = self.problem
        loss = get_loss(problem.loss).value(iterate.margins[rows], problem.num_classes).mean()
        return loss + problem.reg * iterate.matrices[..., -1, -1].sum()

    def inequalities(self, iterate: Iterate, rows: Tensor) -> Tensor:
        """(B, K, d+1, d+1) matrices of the S-lemma that ought to be positive semidefinite."""
        x, signs = self.features[rows], self.signs[rows]
        matrices = iterate.symmetric()
        quadratics = self.mask * (matrices[:, 0] - matrices[:, 1])
        lifted = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        moved = torch.einsum("bp,cpq->bcq", lifted, quadratics)
        value = torch.einsum("bcq,bq->bc", moved, lifted)
        lmi = torch.einsum("bkc,cpq->bkpq", signs, quadratics)
        gradient = torch.einsum("bkc,bcq->bkq", signs, moved[..., :-1])
        slack = iterate.multipliers[rows]
        corner = (signs @ value[..., None])[..., 0] - iterate.margins[rows] - slack * self.problem.radius**2
        inner = lmi[..., :-1, :-1] + slack[..., None, None] * torch.eye(x.shape[1]).to(x)
        upper = torch.cat([inner, gradient[..., None]], dim=-1)
        lower = torch.cat([gradient, corner[..., None]], dim=-1)
        return torch.cat([upper, lower[..., None, :]], dim=-2)

    @torch.no_grad()
    def violations(self, iterate: Iterate, network: Network, batch_size: int) -> dict[str, float]:
        """The measurements of the module docstring."""
        matrices = iterate.symmetric()
        everything = torch.arange(self.problem.n, device=self.features.device)
        eigenvalues = torch.cat(
            [
                torch.linalg.eigvalsh(self.inequalities(iterate, rows))
                for rows in everything[:_MEASURED].split(batch_size)
            ]
        )
        worst, _ = self.problem.worst_case(network)
        return {
            "claimed_objective": float(self.unpenalised(iterate, everything)),
            "margin_overstatement": float((iterate.margins - worst).max()),
            "lmi_min_eigenvalue": float(eigenvalues.min().clamp_max(0)),
            "lmi_mean_violation": float(negative_part(eigenvalues).sum(-1).mean()),
            "psd_min_eigenvalue": float(torch.linalg.eigvalsh(matrices).min().clamp_max(0)),
            "trace_mismatch": float(trace_mismatch(matrices).abs().max()),
            "multiplier_min": float(iterate.multipliers.min().clamp_max(0)),
        }


class Penalty(Solver):
    """See the module docstring. A warm start is not used: the published method starts at zero.

    Args:
        epochs: passes over the data, an outer iteration each.
        batch_size: examples a step.
        learning_rate: of Adam.
        rho: weight of the penalties.
    """

    name = "penalty"

    def __init__(self, epochs: int = 5, batch_size: int = 100, learning_rate: float = 0.01, rho: float = 1.0):
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.rho = learning_rate, rho

    def _solve(self, problem: PolynomialProblem, run: Run) -> None:
        objective = Objective(problem, self.rho)
        iterate = Iterate.zero(problem)
        optimiser = torch.optim.Adam(iterate.tensors(), lr=self.learning_rate)
        generator = torch.Generator().manual_seed(run.seed)
        best = iterate.copy()
        for _ in range(self.epochs):
            for rows in torch.randperm(problem.n, generator=generator).split(self.batch_size):
                optimiser.zero_grad()
                objective.value(iterate, rows.to(problem.features.device)).backward()
                optimiser.step()
                if run.out_of_time():
                    break
            previous = run.primal
            self._report(problem, iterate, run)
            if run.primal < previous:
                best = iterate.copy()
            if run.finished():
                break
        run.extra |= objective.violations(best, run.network, self.batch_size)

    def _report(self, problem: PolynomialProblem, iterate: Iterate, run: Run) -> None:
        """The network of the projected matrices, and the lower bound that its own worst points prove."""
        matrices = iterate.matrices.detach()
        network = network_from_moments(list(matrices[:, 0]), list(matrices[:, 1]))
        margins, points = problem.worst_case(network)
        _, slopes = get_loss(problem.loss).smoothed(margins, problem.num_classes, 1.0)
        dual = problem.dual_value(slopes / problem.n, points)
        run.report(primal=problem.objective(network), dual=dual, network=network, neurons=network.size)


def negative_part(values: Tensor) -> Tensor:
    """(-v)_+, with slope 0 at 0."""
    return torch.relu(-values)


def trace_mismatch(matrices: Tensor) -> Tensor:
    """tr Z1 - z4 of (..., d+1, d+1) matrices."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * matrices[..., -1, -1]
