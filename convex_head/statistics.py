"""How sure a robust accuracy is, and whether two of them differ on the same points.

Wilson interval for k of n with z the normal quantile (Wilson 1927):

    (k + z^2/2)/(n + z^2) +- z/(n + z^2) sqrt(k (n - k)/n + z^2/4)

Paired comparison of two classifiers on the same n points, b right only under A, c right only under B:
the exact McNemar test is the two-sided binomial test of b against c with probability 1/2, and the
interval of the difference (b - c)/n is the one of Agresti and Min (2005), which adds half a point to each
of the four cells before the Wald formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from convex_head.errors import ComparisonError

if TYPE_CHECKING:
    from convex_head.records import EvalRecord


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) when n = 0."""
    if n == 0:
        return (0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return (max(0.0, centre - half), min(1.0, centre + half))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar p-value of ``only_a`` against ``only_b`` discordant points; 1 without any."""
    discordant = only_a + only_b
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (discordant - k) // (k + 1)
        tail += term
    # Integers divide exactly here; 2**discordant overflows a float from about 1,000 points on.
    return min(1.0, 2 * tail / 2**discordant)


def paired_interval(only_a: int, only_b: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Agresti-Min interval of (only_a - only_b)/n for paired proportions, clipped to [-1, 1]."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    total = n + 2
    difference = (only_a - only_b) / total
    variance = max(0.0, (only_a + only_b + 1) / total - difference**2) / total
    half = z * math.sqrt(variance)
    return (max(-1.0, difference - half), min(1.0, difference + half))


@dataclass(frozen=True)
class Comparison:
    """Two records on the same points.

    Attributes:
        name_a, name_b: names of the records.
        n: number of points.
        both, only_a, only_b, neither: how many points are robustly right under both, one, none.
        difference: robust accuracy of A minus that of B.
        interval: 95 % interval of the difference (Agresti-Min).
        p_value: two-sided exact McNemar test of "no difference".
    """

    name_a: str
    name_b: str
    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    interval: tuple[float, float]
    p_value: float

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return (
            f"{self.name_a} - {self.name_b}: {100 * self.difference:+.1f} points "
            f"(95 % {low:+.1f} to {high:+.1f}), McNemar p = {self.p_value:.3g}, "
            f"{self.only_a} against {self.only_b} of {self.n} points"
        )


def compare(record_a: EvalRecord, record_b: EvalRecord) -> Comparison:
    """Paired comparison of two robust accuracies on the same points.

    Args:
        record_a, record_b: records with per-example results on the same images and labels and under
            the same threat model.

    Returns:
        the :class:`Comparison`; ``difference`` is positive when A is more robust.

    Raises:
        ComparisonError: the points or the threat models differ, or a record has no per-example results.
    """
    for record in (record_a, record_b):
        if not record.clean:
            raise ComparisonError(
                f"A paired test needs per-example results; the record {record.name!r} has none. "
                "Evaluate its model with convex_head.evaluate."
            )
    fingerprints = [record.dataset.get("fingerprint") for record in (record_a, record_b)]
    if record_a.n != record_b.n or fingerprints[0] != fingerprints[1]:
        raise ComparisonError(
            "A paired test needs the same points in the same order; "
            f"{record_a.name!r} has {record_a.n} points with fingerprint {fingerprints[0]}, "
            f"{record_b.name!r} has {record_b.n} with {fingerprints[1]}. Evaluate both on the same data."
        )
    if record_a.threat != record_b.threat:
        raise ComparisonError(
            f"A paired test needs one threat model; found {record_a.threat} and {record_b.threat}. "
            "Evaluate both under the same norm and eps."
        )
    a, b = record_a.robust, record_b.robust
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    both = int((a & b).sum())
    n = record_a.n
    return Comparison(
        name_a=record_a.name,
        name_b=record_b.name,
        n=n,
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=n - both - only_a - only_b,
        difference=(only_a - only_b) / n,
        interval=paired_interval(only_a, only_b, n),
        p_value=mcnemar_exact(only_a, only_b),
    )
