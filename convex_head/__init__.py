"""Swap a network's last layers for a head that is adversarially trained by convex optimisation, with a certificate."""

from convex_head.attacks import register_attack
from convex_head.data import load_dataset
from convex_head.eps_curve import evaluate_curve
from convex_head.evaluate import evaluate
from convex_head.head import ConvexRobustHead
from convex_head.records import EvalRecord
from convex_head.robustify import robustify
from convex_head.solvers.result import SolveResult
from convex_head.splice import replace_head
from convex_head.statistics import compare
from convex_head.threat import ThreatModel

__version__ = "0.1.0"

__all__ = [
    "ConvexRobustHead",
    "EvalRecord",
    "SolveResult",
    "ThreatModel",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_curve",
    "load_dataset",
    "register_attack",
    "replace_head",
    "robustify",
]
