"""After the attacks: signs that a robust accuracy was not earned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from convex_head.evaluation_run import EvaluationRun


def check_after(run: EvaluationRun, robust: Tensor, fingerprint: str) -> dict[str, str]:
    """Flags -> one sentence with the value found."""
    return {}
