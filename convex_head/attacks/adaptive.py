"""Attacks that know the head: they join the worst-case union whenever a model's head offers what they need.

A head that was evaluated only by attacks blind to it proves little (Tramer et al. 2020, arXiv 2002.08347), so
``evaluate`` adds these by itself; the record lists them beside the attacks that were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from convex_head.attacks.base import Attack
from convex_head.attacks.registry import resolve_attack
from convex_head.threat import ThreatModel

# Attack name -> the method of the head that it uses, for heads that do not say themselves by ``adaptive_attacks``.
_NEEDS = {"feature-exact": "worst_case_features", "soft-gate": "soft_forward"}


def adaptive_attacks(model: nn.Module, threat: ThreatModel, chosen: Sequence[Attack]) -> tuple[Attack, ...]:
    """The adaptive attacks that fit ``model`` and ``threat`` and are not among ``chosen``."""
    parts = dict(model.named_children())
    if "backbone" not in parts:
        return ()
    head = parts.get("head")
    names = {attack.name.partition("(")[0] for attack in chosen}
    wanted = getattr(head, "adaptive_attacks", None)
    if wanted is None:
        wanted = [name for name, method in _NEEDS.items() if callable(getattr(head, method, None))]
    fitting = [resolve_attack(name) for name in wanted if name not in names]
    return tuple(attack for attack in fitting if threat.norm in attack.norms)
