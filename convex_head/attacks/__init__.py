"""Attacks: one small interface, a registry, and one adapter a file."""

from convex_head.attacks.base import Attack, AttackResult
from convex_head.attacks.registry import attack_names, register_attack, resolve_attack
from convex_head.attacks.view import ModelView

__all__ = ["Attack", "AttackResult", "ModelView", "attack_names", "register_attack", "resolve_attack"]
