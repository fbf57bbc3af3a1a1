"""``evaluate``: the numbers of AutoAttack itself, unions, cost, and runs that were interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from convex_head.attacks import Attack, ModelView, register_attack
from convex_head.attacks.auto_attack import AutoAttack, Component
from convex_head.attacks.conformance import linear_case, linear_distance
from convex_head.errors import AttackError, InputError, ResumeMismatchError
from convex_head.evaluate import evaluate
from convex_head.evaluation_progress import EvalProgress
from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel

QUICK = ("fgsm", ("pgd", {"steps": 5}), ("apgd-ce", {}))


def case(num_classes: int = 4, n: int = 24, norm: str = "Linf") -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    """A linear model with two wrong labels, and an eps that breaks about half."""
    model, images, labels = linear_case(num_classes, n)
    eps = 1.01 * float(linear_distance(model, images, labels, norm).median())
    labels = labels.clone()
    labels[:2] = (labels[:2] + 1) % num_classes
    return model, images, labels, ThreatModel(norm, eps)


@pytest.mark.parametrize(("num_classes", "norm"), [(10, "Linf"), (4, "L2")])
def test_same_points_as_autoattack_itself(num_classes: int, norm: str) -> None:
    """Same images, seed, batch size and version: AutoAttack's own run breaks exactly the same points."""
    model, images, labels, threat = case(num_classes, 6, norm)
    reference = pyautoattack.AutoAttack(model, norm=norm, eps=threat.eps, seed=3, version="standard")
    reference.apgd_targeted.n_target_classes = reference.fab.n_target_classes = min(9, num_classes - 1)
    # Square is the last of the four; 60 of its 5,000 queries are enough to compare.
    reference.square.n_queries = 60
    adversarial, _ = reference.run_standard_evaluation(images, labels, batch_size=4)
    expected = model(adversarial).argmax(dim=1) == labels

    class Short(AutoAttack):
        def stages(self, model: ModelView, num_classes: int, threat: ThreatModel) -> tuple[Attack, ...]:
            *others, _ = super().stages(model, num_classes, threat)
            return (*others, Component("square", queries=60))

    record = evaluate(model, (images, labels), threat, Short(), batch_size=4, seed=3)
    assert record.robust.tolist() == expected.tolist()
    assert 0 < record.robust_correct < record.clean_correct < record.n
    assert list(record.attacks["autoattack"]["stages"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_linear_model_has_its_exact_robust_accuracy(norm: str) -> None:
    model, images, labels, threat = case(4, 24, norm)
    record = evaluate(model, (images, labels), threat, "apgd-ce")
    exact = (linear_distance(model, images, labels, norm) > threat.eps) & (model(images).argmax(dim=1) == labels)
    assert record.robust.tolist() == exact.tolist()


def test_union_is_taken_point_by_point_and_broken_points_are_skipped() -> None:
    model, images, labels, _ = case()
    given: dict[str, list[int]] = {}

    def breaking(name: str, picks: set[int]) -> None:
        @register_attack(name)
        def attack(view: ModelView, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
            index = [int((images == point).flatten(1).all(dim=1).nonzero()) for point in x]
            given.setdefault(name, []).extend(index)
            moved = x.clone()
            for row, point in enumerate(index):
                if point in picks:
                    # Another image of the other side, pulled in by an unbounded threat model.
                    other = images[(labels != labels[point]).nonzero()[3:][0]]
                    moved[row] = other
            return moved

    breaking("first", {4, 5, 6})
    breaking("second", {6, 7})
    wide = ThreatModel("Linf", 1.0)
    record = evaluate(model, (images, labels), wide, ["first", "second"], batch_size=5)
    assert record.clean[:2] == "00" and record.clean_correct == 22
    assert set(given["first"]) == set(range(2, 24))
    assert set(given["second"]) == set(range(2, 24)) - {4, 5, 6}
    assert np.flatnonzero(~record.robust).tolist() == [0, 1, 4, 5, 6, 7]
    assert record.attacks["second"]["skipped"] == 3
    assert record.attacks["second"]["robust_correct"] == record.robust_correct == 18

    alone = evaluate(model, (images, labels), wide, ["first", "second"], batch_size=5, skip_broken=False)
    assert (alone.attacks["second"]["skipped"], alone.attacks["second"]["robust_correct"]) == (0, 20)
    assert alone.robust.tolist() == record.robust.tolist()


def test_cost_is_counted() -> None:
    model, images, labels, threat = case()
    record = evaluate(model, (images, labels), threat, [("pgd", {"steps": 5})], batch_size=7)
    entry = record.attacks["pgd(steps=5)"]
    # Five steps forward and back, and one forward to measure.
    assert (entry["forwards"], entry["backwards"]) == (22 * 6, 22 * 5)
    assert entry["seconds"] > 0
    assert entry["settings"] == {"steps": 5}


@pytest.mark.parametrize("shape", [(108,), (6, 18), (3, 6, 6), (1, 3, 6, 6)], ids=str)
def test_any_shape_of_data(shape: tuple[int, ...]) -> None:
    model, images, labels, threat = case()
    shaped = images.reshape(len(images), *shape)
    record = evaluate(model, (shaped, labels), threat, ["apgd-ce", ("square", {"queries": 20})])
    assert record.dataset["image_shape"] == list(shape)
    assert record.robust_correct < record.clean_correct


def test_data_as_loader_arrays_and_first_n() -> None:
    model, images, labels, threat = case()
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    records = [
        evaluate(model, loader, threat, "fgsm", n=10),
        evaluate(model, (images.numpy(), labels.numpy()), threat, "fgsm", n=10, dataset_name="toy"),
    ]
    assert records[0].outcomes == records[1].outcomes and records[0].n == 10
    assert records[1].dataset["name"] == "toy"


def test_no_attack_gives_the_clean_accuracy() -> None:
    model, images, labels, threat = case()
    record = evaluate(model, (images, labels), threat, ())
    assert record.robust_correct == record.clean_correct == 22


def test_a_model_that_is_never_right() -> None:
    model, images, _, threat = case()
    record = evaluate(model, (images, (model(images).argmax(dim=1) + 1) % 4), threat, "autoattack")
    assert (record.clean_correct, record.robust_correct, record.flags) == (0, 0, ())
    assert record.attacks["autoattack"]["success_rate"] is None


def test_the_model_is_left_as_it_was() -> None:
    model, images, labels, threat = case()
    model.train()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    evaluate(model, (images, labels), threat, QUICK)
    assert model.training and model[1].weight.requires_grad
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))


def test_progress_events_and_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, images, labels, threat = case()
    events: list[EvalProgress] = []
    record = evaluate(model, (images, labels), threat, QUICK, batch_size=8, progress=events.append)
    assert [event.fraction for event in events] == sorted(event.fraction for event in events)
    assert events[-1].fraction == 1.0 and events[-1].robust_correct == record.robust_correct
    assert [event.attack for event in events if event.batch == 0] == list(record.attacks)
    evaluate(model, (images, labels), threat, "fgsm", progress=True)
    assert "fgsm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"threat": "Linf"}, InputError, "ThreatModel"),
        ({"batch_size": 0}, InputError, "batch_size is at least 1"),
        ({"attacks": "feature-exact"}, AttackError, "replace_head"),
        ({"attacks": "soft-gate"}, AttackError, "soft_forward"),
        ({"attacks": "torchattacks:PGDL2"}, AttackError, "searches in L2"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model, images, labels, threat = case()
    arguments: dict[str, Any] = {"threat": threat, "attacks": "fgsm", **changes}
    with pytest.raises(error, match=message):
        evaluate(model, (images, labels), **arguments)


# -- resume ------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Ends a run from its progress listener, as a signal would."""


def interrupted(after: int, **arguments: Any) -> None:
    events = 0

    def listener(event: EvalProgress) -> None:
        nonlocal events
        events += 1
        if events > after:
            raise Stop

    with pytest.raises(Stop):
        evaluate(progress=listener, **arguments)


def test_interrupted_anywhere_ends_in_the_same_record(tmp_path: Path) -> None:
    model, images, labels, threat = case()
    arguments: dict[str, Any] = {
        "model": model,
        "data": (images, labels),
        "threat": threat,
        "attacks": ("fgsm", ("pgd", {"steps": 4}), ("apgd-ce", {}), ("square", {"queries": 5})),
        "batch_size": 12,
    }
    events: list[EvalProgress] = []
    reference = evaluate(progress=events.append, **arguments).identity()
    for after in range(len(events)):
        state = tmp_path / f"{after}.json"
        interrupted(after, state=state, **arguments)
        torch.manual_seed(after)
        assert evaluate(state=state, **arguments).identity() == reference
    # A finished run is repeated from its file, without one more attack.
    again = evaluate(state=state, **arguments)
    assert again.identity() == reference


def test_many_interruptions_in_a_row(tmp_path: Path) -> None:
    model, images, labels, threat = case()
    arguments: dict[str, Any] = {"model": model, "data": (images, labels), "threat": threat, "attacks": QUICK}
    reference = evaluate(batch_size=4, **arguments)
    for _ in range(6):
        interrupted(2, state=tmp_path / "run.json", batch_size=4, **arguments)
    record = evaluate(state=tmp_path / "run.json", batch_size=4, **arguments)
    assert record.identity() == reference.identity()


def changed_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[1].weight[0, 0] += 1e-3  # type: ignore[index, union-attr, operator]
    return model


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a | {"model": changed_weights(a["model"])}, "model was"),
        (lambda a: a | {"data": (a["data"][0] * 0.99, a["data"][1])}, "dataset was"),
        (lambda a: a | {"data": (a["data"][0], a["data"][1].roll(1))}, "dataset was"),
        (lambda a: a | {"n": 12}, "n was 24, now 12"),
        (lambda a: a | {"threat": ThreatModel("Linf", "8/255")}, "threat was .*8/255"),
        (lambda a: a | {"attacks": ("fgsm",)}, "attacks was"),
        (lambda a: a | {"attacks": ("fgsm", ("pgd", {"steps": 4}))}, "attacks was"),
        (lambda a: a | {"seed": 1}, "seed was 0, now 1"),
        (lambda a: a | {"batch_size": 5}, "batch_size was"),
        (lambda a: a | {"skip_broken": False}, "skip_broken was"),
    ],
)
def test_another_evaluation_does_not_resume(tmp_path: Path, change: Any, what: str) -> None:
    model, images, labels, threat = case()
    arguments: dict[str, Any] = {
        "model": model,
        "data": (images, labels),
        "threat": threat,
        "attacks": ("fgsm", ("pgd", {"steps": 5})),
        "state": tmp_path / "run.json",
    }
    interrupted(1, **arguments)
    with pytest.raises(ResumeMismatchError, match=what):
        evaluate(**change(arguments))


def test_another_version_does_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels, threat = case()
    evaluate(model, (images, labels), threat, "fgsm", state=tmp_path / "run.json")
    monkeypatch.setattr("convex_head.provenance.versions", lambda: {"torch": "0.1"})
    with pytest.raises(ResumeMismatchError, match=r"versions was .* now .*0\.1"):
        evaluate(model, (images, labels), threat, "fgsm", state=tmp_path / "run.json")


def test_code_that_changed_under_the_same_weights_does_not_resume(tmp_path: Path) -> None:
    class Model(nn.Module):
        sign = 1.0

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.sign * self.net(x)  # type: ignore[no-any-return]

    net, images, labels, threat = case()
    model = Model(net)
    evaluate(model, (images, labels), threat, "fgsm", state=tmp_path / "run.json")
    Model.sign = -1.0
    with pytest.raises(ResumeMismatchError, match=r"predicts \d+ of 24 clean images otherwise"):
        evaluate(model, (images, labels), threat, "fgsm", state=tmp_path / "run.json")


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "list"])
def test_a_damaged_progress_file_is_named(tmp_path: Path, damage: str) -> None:
    model, images, labels, threat = case()
    state = tmp_path / "run.json"
    evaluate(model, (images, labels), threat, "fgsm", state=state)
    text = state.read_text()
    stored = json.loads(text)
    stored["stages"]["fgsm/fgsm"]["row"] = "1" * 24
    texts = {"truncated": text[:-40], "changed": json.dumps(stored), "empty": "", "list": "[1]"}
    state.write_text(texts[damage])
    with pytest.raises(ResumeMismatchError, match=r"run\.json"):
        evaluate(model, (images, labels), threat, "fgsm", state=state)


def test_record_of_a_resumed_run_can_be_saved(tmp_path: Path) -> None:
    model, images, labels, threat = case()
    arguments: dict[str, Any] = {"model": model, "data": (images, labels), "threat": threat, "attacks": QUICK}
    interrupted(1, state=tmp_path / "run.json", **arguments)
    record = evaluate(state=tmp_path / "run.json", name="net", **arguments)
    record.save(tmp_path / "record.json")
    assert EvalRecord.load(tmp_path / "record.json") == record


def test_killed_by_the_system(tmp_path: Path) -> None:
    """The benchmark that kills 200 times, here once."""
    pytest.importorskip("fcntl", reason="it forks")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--kills", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kills"] == 1 and json.loads(done.stdout)["differing_records"] == 0
