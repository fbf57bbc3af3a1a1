"""Fake robustness is refused or flagged; honest models are neither."""

from __future__ import annotations

import cProfile
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from convex_head.errors import EvaluationWarning, InputError, ModelContractError
from convex_head.evaluate import evaluate
from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel

THREAT = ThreatModel("Linf", 0.2)
ATTACKS = (("apgd-ce", {}), ("square", {"queries": 200}))


def toy(n: int = 24, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bright blobs in one of ``classes`` columns of a 6 x 6 image, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = 0.3 + 0.12 * torch.randn(n, 1, 6, 6, generator=generator)
    for column in range(classes):
        images[labels == column, :, :, 2 * column : 2 * column + 2] += 0.35
    return images.clamp(0, 1), labels


def trained(model: nn.Module, steps: int = 60, seed: int = 0) -> nn.Module:
    images, labels = toy(240, seed=1)
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, 3)
    )


class Quadratic(nn.Module):
    """A polynomial network, as the convex heads are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(36, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.hidden(x.flatten(1))
        return self.out(0.09 * t * t + 0.5 * t + 0.47)


class Wrapped(nn.Module):
    """A trained honest network behind something dishonest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained(mlp())


class OneLogit(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :1]


class NanLogits(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * math.nan


class InfiniteLogits(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.net(x) > 0, math.inf, 0.0)


class Softmax(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(dim=1)


class WrongShape(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[None]


class Integers(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(dim=1)


class Scaled(Wrapped):
    factor = 1e6

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor


class Tiny(Scaled):
    factor = 1e-9


class Quantised(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net((8 * x).round() / 8)


class HardOutput(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return functional.one_hot(self.net(x).argmax(dim=1), 3).float() * 5


class Saturated(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return (1000 * self.net(x)).sigmoid() * 3


class Noisy(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.randn(len(x), 3)


class ForcedDropout(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(functional.dropout(x, 0.3, training=True))


class ForcedBatchNorm(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(0.4 + 0.2 * functional.batch_norm(x, None, None, training=True))


class Caching(Wrapped):
    """Returns what it returned for the last batch of this size."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.last.setdefault(len(x), self.net(x).detach())


class Tiring(Wrapped):
    """Honest for its first calls, then constant: the drift shows only at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x if self.calls < 40 else torch.zeros_like(x))


class Shattered(Wrapped):
    """A fast ripple of small amplitude hides the slope below it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 1e-3 * torch.sin(3e5 * x))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class ReversedGradient(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(_Reversed.apply(x))


class GradModeDependent(Wrapped):
    """Another function while gradients are recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(1 - x if torch.is_grad_enabled() and x.requires_grad else x)


class Purifier(Wrapped):
    """Moves the image towards what the network is sure of before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = x.detach().requires_grad_()
            gradient = torch.autograd.grad(self.net(moved).logsumexp(dim=1).sum(), moved)[0]
        return self.net(x + 0.01 * gradient.detach())


class Decoy(Wrapped):
    """A hard decision, and a small smooth term that leads away from its boundary."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return 30 * functional.one_hot(logits.argmax(dim=1), 3) - 0.1 * logits


REFUSED = {
    OneLogit: "at least two logits",
    NanLogits: "Logits are finite",
    InfiniteLogits: "Logits are finite",
    Softmax: "probabilities",
    WrongShape: r"logits \(n, classes\)",
    Integers: r"logits \(n, classes\)",
}
FLAGGED = {
    Scaled: "logit_scale",
    Tiny: "logit_scale",
    Quantised: "zero_gradient",
    HardOutput: "zero_gradient",
    Saturated: "zero_gradient",
    Noisy: "nondeterministic",
    ForcedDropout: "nondeterministic",
    ForcedBatchNorm: "stateful",
    Caching: "stateful",
    Tiring: "stateful",
    Shattered: "shattered_gradient",
    ReversedGradient: "shattered_gradient",
    GradModeDependent: "stateful",
    Decoy: "unbounded_eps",
    Purifier: "optimises_in_forward",
}
HONEST = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    "mlp": mlp,
    "convolutional": convolutional,
    "quadratic": Quadratic,
    "tanh": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 3)),
    "double": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.GELU(), nn.Linear(16, 3)),
}


def evaluated(model: nn.Module, threat: ThreatModel = THREAT) -> EvalRecord:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvaluationWarning)
        return evaluate(model, toy(), threat, ATTACKS, batch_size=24)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_no_classifier_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ModelContractError, match=REFUSED[kind]):
        evaluate(kind().eval(), toy(), THREAT, ATTACKS)


@pytest.mark.parametrize("kind", FLAGGED, ids=lambda kind: kind.__name__)
def test_fake_robustness_is_flagged(kind: type[nn.Module]) -> None:
    with pytest.warns(EvaluationWarning, match=FLAGGED[kind]):
        record = evaluate(kind().eval(), toy(), THREAT, ATTACKS, batch_size=24)
    assert FLAGGED[kind] in record.flags
    assert record.flag_details[FLAGGED[kind]]


@pytest.mark.parametrize(
    ("name", "threat"),
    [*((name, THREAT) for name in HONEST), ("mlp", ThreatModel("L2", 1.0)), ("quadratic", ThreatModel("L1", 3.0))],
    ids=str,
)
def test_honest_model_is_not_flagged(name: str, threat: ThreatModel) -> None:
    model = trained(HONEST[name]())
    if name == "double":
        model = model.double()
    assert evaluated(model, threat).flags == ()


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.5])
def test_honest_model_is_not_flagged_at_any_eps(eps: float) -> None:
    assert evaluated(trained(mlp()), ThreatModel("Linf", eps)).flags == ()


def test_nan_around_the_data_is_no_robustness() -> None:
    class NanNearby(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            far = (x[:, None] - toy()[0][None]).flatten(2).abs().amax(dim=2).amin(dim=1) > 0
            return torch.where(far[:, None], math.nan, self.net(x))

    record = evaluated(NanNearby().eval())
    assert record.robust_correct == 0 or record.flags


def test_rescaled_logits_give_the_robust_accuracy_of_the_model_below() -> None:
    honest = evaluated(trained(mlp()))
    assert 0 < honest.robust_correct < honest.clean_correct
    for kind in (Scaled, Tiny):
        assert evaluated(kind().eval()).robust_correct == pytest.approx(honest.robust_correct, abs=1)


def test_black_box_that_beats_white_box_is_flagged() -> None:
    record = evaluated(Quantised().eval(), ThreatModel("Linf", 0.24))
    assert record.attacks["square(queries=200)"]["broken"] >= 2
    assert {"black_box_wins", "accuracy_rises_with_eps", "zero_gradient"} <= set(record.flags)


def test_training_mode_matters_only_with_layers_that_have_one() -> None:
    assert evaluated(trained(mlp()).train()).flags == ()
    model = trained(convolutional()).train()
    statistics = model[1].running_mean.clone()
    record = evaluated(model)
    assert record.flags == ("train_mode",)
    assert record.outcomes == evaluated(model.eval()).outcomes
    assert torch.equal(statistics, model[1].running_mean)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (toy()[0] * 255, toy()[1], r"\[0, 1\]"),
        (toy()[0] - 0.5, toy()[1], r"\[0, 1\]"),
        (toy()[0], toy()[1].float(), "integers"),
        (toy()[0], functional.one_hot(toy()[1]), "vector"),
        (toy()[0], toy()[1] + 1, r"Labels are 0..2 for 3 logits; found 3"),
    ],
)
def test_data_that_are_no_images_or_no_labels_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises((InputError, ModelContractError), match=message):
        evaluate(trained(mlp(), steps=1), (images, labels), THREAT, ATTACKS)


def test_a_running_profiler_is_put_back() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        record = evaluated(trained(mlp(), steps=1))
        assert record.n > 0
    finally:
        profiler.disable()
    profiler.create_stats()
    # A call after the check of the model: the profiler saw it.
    assert any(name == "record" for _, _, name in profiler.stats)
