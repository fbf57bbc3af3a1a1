"""The threat model: which perturbations of an image an attacker may use.

    { x' in [0, 1]^(c h w) : |x' - x|_p <= eps },   p in {inf, 2, 1},

in pixel space, where images live in [0, 1]. Norms carry RobustBench's spelling (``Linf``, ``L2``, ``L1``).
``eps`` is kept twice: as the number that is computed with and as the text that was given, since
leaderboards name threats by text: 0.031 is not 8/255.

This module needs no torch of its own (it only calls methods of the tensors it is given), so that records
can hold a threat model without importing it.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from convex_head.errors import ThreatModelError

if TYPE_CHECKING:
    from torch import Tensor

NORMS = ("Linf", "L2", "L1")
_SPELLINGS = {"inf": "Linf", "infinity": "Linf", "∞": "Linf", "2": "L2", "1": "L1"}


@dataclass(frozen=True, init=False)
class ThreatModel:
    """A norm and a radius in pixel space.

    Args:
        norm: "Linf", "L2" or "L1"; case, "_", "-" and a missing "L" do not matter ("l_inf", "inf", "2").
        eps: finite and >= 0; a number, or text such as "8/255" or "0.5".

    Attributes:
        norm: "Linf", "L2" or "L1".
        eps: the radius as a float, in units of pixel values in [0, 1].
        eps_text: the text as given; for a number, the shorter of its decimal form and an exact k/255.
            Two threat models with equal norm and eps are equal, whatever the text.

    Raises:
        ThreatModelError: the norm or the eps is not understood.
    """

    norm: str
    eps: float
    eps_text: str = field(compare=False, init=False)

    def __init__(self, norm: str, eps: float | str | Fraction) -> None:
        object.__setattr__(self, "norm", _read_norm(norm))
        value, text = _read_eps(eps)
        object.__setattr__(self, "eps", value)
        object.__setattr__(self, "eps_text", text)

    def __str__(self) -> str:
        return f"{self.norm}:{self.eps_text}"

    @classmethod
    def parse(cls, text: str) -> ThreatModel:
        """Read "norm:eps", for example "Linf:8/255"; the inverse of ``str``.

        Raises:
            ThreatModelError: the text has no colon, or one of its parts is not understood.
        """
        norm, colon, eps = str(text).partition(":")
        if not colon:
            raise ThreatModelError(f"a threat model reads norm:eps, got {text!r}; write for example 'Linf:8/255'")
        return cls(norm, eps)

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Size of each example's perturbation: |x_adv - x|_p over all but the first dimension.

        Args:
            x, x_adv: (n, ...) tensors of one shape.

        Returns:
            (n,) norms.

        Raises:
            ThreatModelError: the shapes differ.
        """
        delta = _difference(x, x_adv).abs()
        if self.norm == "Linf":
            return delta.amax(dim=1)
        return delta.sum(dim=1) if self.norm == "L1" else delta.square().sum(dim=1).sqrt()

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Bring ``x_adv`` back into the threat set around ``x``: first onto the ball, then into [0, 1].

        Args:
            x: (n, ...) images in [0, 1].
            x_adv: (n, ...) points of the same shape.

        Returns:
            (n, ...) points within eps of ``x`` (up to rounding) and in [0, 1]. For Linf it is the nearest
            such point; for L2 and L1 each of the two steps is the nearest point, and the second never
            leaves the ball because ``x`` itself is in [0, 1].

        Raises:
            ThreatModelError: the shapes differ.
        """
        delta = _difference(x, x_adv)
        if self.norm == "Linf":
            delta = delta.clamp(-self.eps, self.eps)
        elif self.norm == "L2":
            length = delta.square().sum(dim=1, keepdim=True).sqrt()
            delta = delta * (self.eps / length.clamp_min(1e-30)).clamp_max(1.0)
        else:
            delta = _project_l1(delta, self.eps)
        return (x + delta.reshape(x.shape)).clamp(0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: norm, eps and eps_text."""
        return {"norm": self.norm, "eps": self.eps, "eps_text": self.eps_text}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ThreatModel:
        """The inverse of :meth:`to_dict`.

        Raises:
            ThreatModelError: a key is missing, a value is not understood, or eps and eps_text disagree.
        """
        missing = {"norm", "eps", "eps_text"} - set(data)
        if missing:
            raise ThreatModelError(f"a stored threat has norm, eps and eps_text; missing {sorted(missing)}; add them")
        threat = cls(data["norm"], data["eps_text"])
        if threat.eps != data["eps"]:
            raise ThreatModelError(
                f"eps_text {data['eps_text']!r} is {threat.eps!r}, but eps is {data['eps']!r}; correct one"
            )
        return threat


def _read_norm(norm: str) -> str:
    compact = str(norm).strip().lower().replace("_", "").replace("-", "")
    found = _SPELLINGS.get(compact.removeprefix("l"))
    if found is None:
        raise ThreatModelError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}; pick one of these")
    return found


def _read_eps(eps: float | str | Fraction) -> tuple[float, str]:
    """The value and the text of ``eps``."""
    advice = "write a number such as 0.5 or a fraction such as '8/255'"
    if isinstance(eps, bool) or not isinstance(eps, (str, numbers.Real)):
        raise ThreatModelError(f"eps must be a number or its text, got {eps!r}; {advice}")
    try:
        value = _text_to_float(eps) if isinstance(eps, str) else float(eps)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ThreatModelError(f"eps is not a number: {eps!r}; {advice}") from None
    if not (math.isfinite(value) and value >= 0):
        raise ThreatModelError(f"eps must be finite and >= 0, got {eps!r}; {advice}")
    return value, eps.strip() if isinstance(eps, str) else _float_to_text(value)


def _text_to_float(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator) if slash else float(text)


def _float_to_text(value: float) -> str:
    """8/255 as "8/255", 0.2 as "0.2" although it also is 51/255: whichever exact form is shorter."""
    decimal = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    pixel_steps = round(value * 255)
    fraction = f"{pixel_steps}/255"
    return fraction if pixel_steps / 255 == value and len(fraction) < len(decimal) else decimal


def _difference(x: Tensor, x_adv: Tensor) -> Tensor:
    """(n, d) flattened x_adv - x."""
    if x.shape != x_adv.shape or x.ndim < 2:
        raise ThreatModelError(
            f"x and x_adv must share one shape (n, ...), got {tuple(x.shape)} and {tuple(x_adv.shape)}; "
            "pass two batches of images"
        )
    return (x_adv - x).flatten(1)


def _project_l1(delta: Tensor, eps: float) -> Tensor:
    """Nearest points of the l1 ball (Duchi et al. 2008, figure 1: sort, then soft-threshold); (n, d)."""
    size = delta.abs()
    ranked = size.sort(dim=1, descending=True).values
    count = ranked.new_ones(ranked.shape[1]).cumsum(0)
    excess = (ranked.cumsum(dim=1) - eps) / count
    active = (ranked > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, active - 1).clamp_min(0.0)
    return delta.sign() * (size - threshold).clamp_min(0.0)
