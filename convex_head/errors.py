"""Every error and warning that convex_head raises on purpose.

One root, :class:`ConvexHeadError`; one class per broken rule. A message states the rule, the value
found and the next step. Classes that describe bad arguments also derive from ``ValueError``, missing
packages from ``ImportError``, so that ordinary ``except`` clauses keep working.
"""

from __future__ import annotations

from typing import Any


class ConvexHeadError(Exception):
    """Root of all errors of this package."""


class InputError(ConvexHeadError, ValueError):
    """An argument breaks a stated rule."""


class FeatureShapeError(InputError):
    """Features are not a non-empty (n, d) array of the declared width."""


class NonFiniteFeaturesError(InputError):
    """Features hold NaN or infinity."""


class FeatureTypeError(InputError):
    """Features are not real numbers."""


class EmptyDataError(InputError):
    """There is no example to work on."""


class LabelShapeError(InputError):
    """Labels are not a vector with one entry an example."""


class LabelTypeError(InputError):
    """Labels are not integers."""


class LabelRangeError(InputError):
    """A label lies outside 0..num_classes-1."""


class SingleClassError(InputError):
    """All examples carry the same label."""


class RadiusError(InputError):
    """A feature radius is negative or not finite."""


class RegularisationError(InputError):
    """The regularisation weight is not a positive finite number."""


class CoefficientError(InputError):
    """The polynomial activation needs three finite coefficients with a > 0."""


class ToleranceError(InputError):
    """A tolerance or a time limit is not a positive finite number."""


class ClassCountError(InputError):
    """A classifier needs at least two classes."""


class UnknownActivationError(InputError):
    """The activation has no implementation under that name."""


class SettingError(InputError):
    """A setting does not belong to this activation, or has a value that it cannot have."""


class InfeasibleError(ConvexHeadError, ValueError):
    """Hard constraints leave the zero network only."""


class UnknownLossError(InputError):
    """The loss has no implementation under that name."""


class UnknownSolverError(InputError):
    """The solver has no implementation under that name, or not for this problem."""


class DecompositionError(InputError):
    """A matrix is not in the set that has a neural decomposition."""


class NotFittedError(ConvexHeadError):
    """The head has no weights yet."""


class SolverError(ConvexHeadError):
    """A solver failed; ``best`` carries the best certified point, if there is one."""

    def __init__(self, message: str, best: Any = None):
        super().__init__(message)
        self.best = best


class CutPointError(InputError):
    """The backbone has no node of the name given in ``at``."""


class ClassifierNotFoundError(InputError):
    """No final classifier was found in the backbone."""


class ModelContractError(ConvexHeadError, ValueError):
    """A model is not a map from images in [0, 1] to finite logits of at least two classes."""


class ThreatModelError(InputError):
    """A norm or an eps is not understood."""


class DatasetNotFoundError(ConvexHeadError, FileNotFoundError):
    """A dataset is not on this machine; the message says how to get it."""


class DatasetFormatError(ConvexHeadError, ValueError):
    """A dataset file is damaged, or not in the format that its name promises."""


class SubsetError(InputError):
    """A subset asks for examples that the dataset does not have."""


class ImageError(InputError):
    """Images are not a batch of floating-point tensors, one a label."""


class ImageRangeError(ImageError, ModelContractError):
    """Images hold values outside [0, 1], or NaN."""


class UnknownDatasetError(InputError):
    """No dataset is registered under that name."""


class UnknownAttackError(InputError):
    """No attack is registered under that name."""


class ResumeMismatchError(ConvexHeadError):
    """Saved progress belongs to another model, dataset, threat, attack list, seed or version."""


class RecordError(ConvexHeadError, ValueError):
    """A record file is damaged, of another schema, or contradicts itself."""


class MissingExtraError(ConvexHeadError, ImportError):
    """An optional package is not installed; the message names the extra."""


class ConvergenceWarning(UserWarning):
    """A solver stopped before its tolerance; the result carries its honest gap."""


class ChoiceWarning(UserWarning):
    """No candidate keeps what was asked for; the nearest one is taken."""


class EvaluationWarning(UserWarning):
    """An evaluation raised a flag; its robust accuracy is not to be trusted as it stands."""


class ComparisonError(InputError):
    """Two records were not taken on the same points, or hold no per-example results."""


class AttackError(InputError):
    """An attack does not fit the model, the threat, the data or its own settings."""


class AttackContractError(ConvexHeadError):
    """An attack returned something that is no batch of images of the shape it was given."""


class EntryError(ConvexHeadError, ValueError):
    """A leaderboard entry is damaged, contradicts its record, or may not be listed."""


class ModelSpecError(InputError):
    """The text that names a model cannot be resolved."""


class CheckpointError(InputError):
    """A file of weights is missing, damaged, or for another architecture."""


class FeatureFileError(InputError):
    """A file of features or labels cannot be read."""


class WeightsNotFoundError(ConvexHeadError, FileNotFoundError):
    """A zoo model's weights are not on this machine and could not be downloaded."""


class FeatureRangeError(InputError):
    """Features are so large or so small that their mean or scale is lost in the head's precision."""


class ShardError(ConvexHeadError):
    """Processes that fit together are not set up, or one of them was lost."""


class SolveCheckpointError(InputError):
    """The solver cannot keep or go on from a checkpoint."""


class StartError(InputError):
    """A warm start is not a network on the features and functions of the problem."""
