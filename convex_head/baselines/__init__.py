"""Baselines to compare with: standard, SAM, PGD-AT and TRADES, as whole-network or head-only training.

A new recipe is one file with a subclass of :class:`Recipe` under ``@register_recipe``.
"""

from .heads import MLPHead, linear_head
from .pgd_at import PGDAdversarialTraining
from .preact_resnet import PreActResNet, channel_statistics, preact_resnet18, preact_resnet_small, preact_resnet_tiny
from .recipe import RECIPES, Recipe, register_recipe
from .sam import SAM
from .standard import Standard
from .state import TrainingRecord
from .trades import Trades
from .training import train

__all__ = [
    "RECIPES",
    "SAM",
    "MLPHead",
    "PGDAdversarialTraining",
    "PreActResNet",
    "Recipe",
    "Standard",
    "Trades",
    "TrainingRecord",
    "channel_statistics",
    "linear_head",
    "preact_resnet18",
    "preact_resnet_small",
    "preact_resnet_tiny",
    "register_recipe",
    "train",
]
