"""Random gates and the sign patterns d_ip = 1[g_p'xt_i >= 0] that they make on the data; xt = [x; 1].

Source: patterns sampled by Gaussian gates as in arXiv 2405.14033; the gate that is always on is added here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convex_head.errors import SettingError

_ROUNDS = 10


def with_constant(x: Tensor) -> Tensor:
    """(n, d) to (n, d+1) with a last column of ones."""
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def default_patterns(n: int) -> int:
    """P where it is not given: a gate for every 20 examples, between 10 and 100."""
    return max(10, min(100, n // 20))


def sample_gates(x: Tensor, patterns: int | None, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random gates with different sign patterns on the data, and before them the gate that is always on.

    Gates are drawn from N(0, I) in R^(d+1), until there are ``patterns`` with patterns of their own (or ten times as
    many were drawn). Patterns that no example activates are left out; the first gate adds a linear function.

    Args:
        x: (n, d) features.
        patterns: P; None for :func:`default_patterns`.
        seed: of the draw.
        dtype: of the head; gates are rounded to it, so that the problem has the gates that are deployed.

    Returns:
        (at most P + 1, d+1) float64 unit rows.

    Raises:
        SettingError: no gate that was drawn is active for any example.
    """
    wanted = default_patterns(len(x)) if patterns is None else patterns
    generator = torch.Generator().manual_seed(seed)
    wide, width = with_constant(x.double()), x.shape[1] + 1
    first = torch.zeros(1, width, dtype=torch.float64, device=x.device)
    first[0, -1] = 1
    found, seen = [first], {np.packbits(np.ones(len(x), dtype=bool)).tobytes()}
    alive = False
    for _ in range(_ROUNDS):
        drawn = torch.randn(wanted, width, generator=generator, dtype=torch.float64)
        drawn = (drawn / drawn.norm(dim=1, keepdim=True)).to(dtype).double().to(x.device)
        on = (wide @ drawn.mT >= 0).mT.cpu().numpy()
        alive = alive or bool(on.any())
        for gate, row in zip(drawn, on, strict=True):
            key = np.packbits(row).tobytes()
            if row.any() and key not in seen and len(found) <= wanted:
                seen.add(key)
                found.append(gate[None])
        if len(found) > wanted:
            break
    if not alive:
        raise SettingError(
            f"at least one pattern must be active for an example; found none among {wanted * _ROUNDS} gates for "
            f"{len(x)} examples. Raise patterns, or look at the features: are they all the same?"
        )
    return torch.cat(found)
