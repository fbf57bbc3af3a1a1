"""Preconditioner of the smoothed training problem in the neurons v_j = sqrt|alpha_j| u_j: two small factorisations.

The curvature of the loss, where a slope is free to move with its margin, is close for each function to C (x) G: G the
second moment of the examples that have such a margin, weighted by 1/mu, C that of the derivatives 2a v_j'x + b |v_j|
of the neurons over them. The regulariser adds 2 reg I. So (2 reg I + C (x) G)^-1 is one eigendecomposition of C and one
of G, and is applied in two products over the neurons, with the eigenvectors of G whose curvature shows beside 2 reg.

Computed on a sample of the rows, because it need not be exact. Source: Kronecker-factored curvature (J. Martens, R.
Grosse, ICML 2015), here of a sum over the examples without the derivative of worst-case points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.adversary.scan import MarginScan
from convex_head.problems.losses import MarginLoss
from convex_head.problems.multipliers import lowered, reach
from convex_head.shards import Whole

# With more functions than this all share one G.
_OWN = 64
# Curvature below this share of that of the regulariser is left out; above so many times it double precision is needed.
_FELT, _STEEP = 0.1, 1e5


def preconditioner(
    scan: MarginScan,
    packed: PackedNetwork,
    loss: MarginLoss,
    *,
    radius: float,
    reg: float,
    mu: float,
    blur: float,
    rows: int,
    shard: Whole,
    centre: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Approximate inverse Hessian at a network, on tensors (F, m, d).

    Args:
        scan: of the sample held here.
        packed: the network.
        loss, radius, reg, mu, blur: of the smoothed problem.
        rows: rows of the samples of all processes.
        shard: adds up over the processes.
        centre: (rows, K) of the smoothing, of the sample's rows, or None.
    """
    spectra = scan.spectra(packed)
    functions, m, d = packed.vectors.shape
    device = scan.rows.device
    gram = torch.zeros(functions if functions <= _OWN else 1, d, d, dtype=torch.float64, device=device)
    outer = torch.zeros(functions, m, m, dtype=torch.float64, device=device)
    count = torch.zeros(functions, dtype=torch.float64, device=device)
    share = loss.share(scan.num_classes) / (mu * rows)
    further = reach(centre, mu)
    for chunk, _, margins, steps in scan.passes(spectra, radius, 1.0 + further, blur, loss.window(mu) + further):
        _, slopes = loss.smoothed(lowered(margins, centre, chunk.rows, mu), scan.num_classes, mu)
        free = loss.free(slopes, scan.num_classes)
        weights = torch.zeros(len(margins) * functions, dtype=margins.dtype, device=device)
        for step in steps:
            group_pass = step.group_pass
            group = group_pass.group
            moving = group_pass.load(free.to(margins.dtype))
            derivatives = group_pass.derivatives(step) * moving.unsqueeze(-1)
            square = (derivatives.mT @ derivatives).double()
            for i, function in enumerate(spectra.forms.take(group.forms).ends()):
                outer.index_add_(0, function, square[:, i * m : (i + 1) * m, i * m : (i + 1) * m])
                weights.index_add_(0, (group.rows * functions + function.unsqueeze(1)).view(-1), moving.view(-1))
        weights = weights.view(-1, functions)
        count += weights.double().sum(0)
        shared = weights.mean(1, keepdim=True) if len(gram) == 1 else weights
        for c, weight in enumerate(shared.unbind(1)):
            here = weight.nonzero().squeeze(1)
            x = chunk.x[here]
            gram[c] += (x.mT @ (weight[here].unsqueeze(1) * x)).double()
    shard.sum(gram, outer, count)
    outer /= count.clamp_min(1)[:, None, None]
    s, left = torch.linalg.eigh(outer)
    gram, dtype = share * gram, scan.rows.dtype
    # An inverse as small as this is a difference that single precision does not give.
    steepest = s.amax(-1) * torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1) / (2 * reg)
    if not bool((steepest <= _STEEP).all()):
        dtype = torch.float64
    g, right = torch.linalg.eigh(gram.to(dtype))
    ratio = s.clamp_min(0).unsqueeze(-1) * g.double().clamp_min(0).unsqueeze(-2) / (2 * reg)
    # Eigenvalues come in ascending order: from the first that makes itself felt anywhere.
    first = int((ratio.amax((0, 1)) <= _FELT).sum())
    right, change = right[..., first:].contiguous(), -ratio[..., first:] / (1 + ratio[..., first:])
    left, right, change = (part.to(dtype) for part in (left, right, change))

    def apply(gradient: Tensor) -> Tensor:
        g = gradient.to(left.dtype)
        return ((g + left @ ((left.mT @ (g @ right)) * change) @ right.mT) / (2 * reg)).to(gradient.dtype)

    return apply
