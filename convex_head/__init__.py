"""Swap a network's last layers for a head that is adversarially trained by convex optimisation, with a certificate."""

from convex_head.head import ConvexRobustHead
from convex_head.solvers.result import SolveResult

__version__ = "0.1.0"

__all__ = ["ConvexRobustHead", "SolveResult", "__version__"]
