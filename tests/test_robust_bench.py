"""RobustBench on a fresh install: imported, entered, run, exchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convex_head import robust_bench
from convex_head.attacks.conformance import linear_case, linear_distance
from convex_head.errors import InputError, MissingExtraError, RecordError, WeightsNotFoundError
from convex_head.evaluate import evaluate
from convex_head.records import EvalRecord
from convex_head.robust_bench_json import export_record, import_record
from convex_head.threat import ThreatModel

try:
    robust_bench.import_robustbench()
except MissingExtraError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ENTRY = {
    "link": "https://arxiv.org/abs/2003.09461",
    "name": "Adversarial Robustness on In- and Out-Distribution Improves Explainability",
    "authors": "Maximilian Augustin, Alexander Meinke, Matthias Hein",
    "additional_data": True,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "ECCV 2020",
    "architecture": "ResNet-50",
    "eps": "0.5",
    "clean_acc": "91.08",
    "reported": "73.27",
    "autoattack_acc": "72.91",
}
DETAILS: dict[str, Any] = {
    "authors": "A. Author",
    "link": "https://example.org",
    "venue": "Unpublished",
    "architecture": "ResNet-18",
    "additional_data": False,
}


class Zoo(nn.Module):
    """A model whose keys hold what RobustBench cuts out: "model." and "module.", in front and inside."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.ModuleDict({"module": nn.ModuleDict({"model": nn.Linear(12, 10)})})

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head["module"]["model"](self.model(x))  # type: ignore[index, operator]
        return logits


def test_a_fresh_process_imports_robustbench_or_is_left_as_it_was() -> None:
    code = """
import sys
from convex_head.errors import MissingExtraError
from convex_head.robust_bench import import_robustbench

names = {"autoattack", "pkg_resources", "robustbench"}
before = names & set(sys.modules)
sys.modules["gdown"] = None
try:
    import_robustbench()
except MissingExtraError as error:
    print("gdown" in str(error) and "pip install" in str(error))
print(names & set(sys.modules) == before)
del sys.modules["gdown"]
import_robustbench()
from robustbench import benchmark
from robustbench.loaders import pkg_resources
from robustbench.utils import load_model
print(names & set(sys.modules) == before | {"robustbench"})
print(pkg_resources.resource_filename("robustbench.loaders", "helper_files/imagenet_test_image_ids.txt"))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    *answers, path = done.stdout.split()
    assert answers == ["True", "True", "True"]
    assert Path(path).is_file()


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_load_model_returns_a_registered_model_offline(tmp_path: Path, dataset: str) -> None:
    from robustbench.utils import load_model

    torch.manual_seed(0)
    model = Zoo()
    path = robust_bench.register(model, "Ours2026Test", dataset=dataset, threat_model="L2", model_dir=tmp_path)
    assert path == tmp_path / dataset / "L2" / "Ours2026Test.pt"
    images = torch.rand(5, 3, 4, 4)
    expected = model.eval()(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loaded = load_model("Ours2026Test", model_dir=str(tmp_path), dataset=dataset, threat_model="L2")
    assert type(loaded) is Zoo and not loaded.training
    assert torch.equal(loaded(images), expected)
    # The weights come from the file: with another one the model is another.
    stored = torch.load(path, weights_only=True)["state_dict"]
    torch.save({"state_dict": {key: torch.zeros_like(value) for key, value in stored.items()}}, path)
    assert not load_model("Ours2026Test", model_dir=str(tmp_path), dataset=dataset, threat_model="L2")(images).any()
    # An ordinary module again: its own state dict loads.
    loaded.load_state_dict(model.state_dict())


def test_an_entry_can_be_registered_again_but_not_over_robustbench(tmp_path: Path) -> None:
    for _ in range(2):
        robust_bench.register(Zoo(), "Ours2026Again", model_dir=tmp_path)
    with pytest.raises(InputError, match="'Carmon2019Unlabeled' is empty, a path"):
        robust_bench.register(Zoo(), "Carmon2019Unlabeled", model_dir=tmp_path)
    with pytest.raises(InputError, match="found 'mnist' and 'Linf'"):
        robust_bench.register(Zoo(), "Ours2026Again", dataset="mnist", model_dir=tmp_path)
    with pytest.raises(InputError, match="found 'cifar10' and 'corruptions'"):
        robust_bench.register(Zoo(), "Ours2026Again", threat_model="corruptions", model_dir=tmp_path)


def test_zoo_architectures_come_with_random_weights() -> None:
    model = robust_bench.zoo_model("Rebuffi2021Fixing_R18_ddpm", pretrained=False)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(InputError, match="RobustBench has no 'Nobody2020'"):
        robust_bench.zoo_model("Nobody2020")


def test_weights_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("robustbench.utils.gdown.download", offline)
    with pytest.raises(WeightsNotFoundError, match=r"Wong2020Fast are not in .*no route to host.*pretrained=False"):
        robust_bench.zoo_model("Wong2020Fast", model_dir=tmp_path)


# -- benchmark ---------------------------------------------------------------------------------------------


def ten_classes(norm: str) -> tuple[nn.Module, Tensor, Tensor, float]:
    """Six points, one of them wrong; the eps leaves one or two."""
    model, images, labels = linear_case(10, 6)
    eps = float(linear_distance(model, images, labels, norm).sort().values[-2]) * 0.99
    labels = labels.clone()
    labels[0] = (labels[0] + 1) % 10
    return model, images, labels, eps


def test_benchmark_and_evaluate_agree() -> None:
    model, images, labels, eps = ten_classes("Linf")
    model.train()
    state = torch.get_rng_state()
    clean, robust = robust_bench.benchmark(model, eps=eps, data=(images, labels), batch_size=4, seed=5)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    record = evaluate(model, (images, labels), ThreatModel("Linf", eps), batch_size=4, seed=5)
    assert (clean, robust) == (pytest.approx(record.clean_accuracy), pytest.approx(record.robust_accuracy))
    assert 0 < robust < clean < 1


def test_what_robustbench_cannot_run_is_refused_before_the_attack() -> None:
    model, images, labels = linear_case(4)
    with pytest.raises(InputError, match="needs 10 classes; the model has 4"):
        robust_bench.benchmark(model, eps=0.1, data=(images, labels))
    with pytest.raises(InputError, match="found 'digits'"):
        robust_bench.benchmark(model, eps=0.1, dataset="digits", data=(images, labels))


def test_the_stand_in_keeps_autoattacks_old_signature(tmp_path: Path) -> None:
    attack = robust_bench._autoattack()["autoattack"].AutoAttack
    model, images, labels = linear_case(10, 3)
    adversary = attack(
        model, "Linf", 0.05, seed=0, attacks_to_run=["apgd-ce"], version="custom", log_path=str(tmp_path / "log.txt")
    )
    adversary.apgd.n_restarts = 1
    found = adversary.run_standard_evaluation(images, labels, bs=3)
    assert found.shape == images.shape
    pair = adversary.run_standard_evaluation(images, labels, bs=3, return_labels=True)
    assert torch.equal(pair[0], found) and pair[1].shape == labels.shape
    assert "initial accuracy" in (tmp_path / "log.txt").read_text()
    assert not adversary.logger.handlers
    with pytest.raises(InputError, match=r"convex_head\.evaluate"):
        adversary.run_standard_evaluation(images, labels, state_path=tmp_path / "state")


# -- JSON --------------------------------------------------------------------------------------------------


def cifar_record(**changes: Any) -> EvalRecord:
    values: dict[str, Any] = {
        "name": "net",
        "model": {"class": "Net", "parameters": 1, "fingerprint": "f"},
        "dataset": {"name": "cifar10", "fingerprint": "d", "image_shape": [3, 32, 32], "num_classes": 10},
        "threat": ThreatModel("Linf", "8/255"),
        "n": 10_000,
        "clean_correct": 8459,
        "robust_correct": 5071,
        "attacks": {"autoattack": {"attempted": 8459, "broken": 3388, "skipped": 0, "robust_correct": 5071}},
    }
    return EvalRecord(**{**values, **changes})


def test_export_has_exactly_the_fields_of_an_official_entry() -> None:
    entry = export_record(cifar_record(), **DETAILS)
    assert list(entry) == list(ENTRY)
    assert {key: type(value) for key, value in entry.items()} == {key: type(value) for key, value in ENTRY.items()}
    assert (entry["eps"], entry["clean_acc"], entry["autoattack_acc"]) == ("8/255", "84.59", "50.71")
    # RobustBench's own reader of entries takes it.
    from robustbench.utils import ModelInfo

    assert ModelInfo(**entry).reported == "50.71"


def test_a_stronger_attack_becomes_external() -> None:
    attacks = {
        **cifar_record().attacks,
        "feature-exact": {"attempted": 5071, "broken": 60, "skipped": 3388, "robust_correct": 5011},
    }
    entry = export_record(cifar_record(attacks=attacks, robust_correct=5011), **DETAILS)
    assert (entry["autoattack_acc"], entry["external"]) == ("50.71", "50.11")
    back = import_record(entry, threat_model="Linf")
    assert (back.robust_correct, back.attacks["autoattack"]["robust_correct"]) == (5011, 5071)


def test_import_and_export_are_inverse(tmp_path: Path) -> None:
    record = import_record(json.loads(json.dumps(ENTRY)), threat_model="L2")
    assert (record.n, record.clean_correct, record.robust_correct) == (10_000, 9108, 7291)
    assert record.threat == ThreatModel("L2", "0.5") and record.clean == ""
    record.save(tmp_path / "record.json")
    assert EvalRecord.load(tmp_path / "record.json") == record
    details = {key: ENTRY[key] for key in (*DETAILS, "reported", "number_forward_passes")}
    assert export_record(record, **details) == ENTRY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"name": "digits"}}, "the record is on 'digits'"),
        ({"threat": ThreatModel("L1", 12)}, "under L1"),
        ({"flags": ("zero_gradient",)}, "flagged record is not exported; found zero_gradient"),
        ({"attacks": {}, "robust_correct": 8459}, "has no 'autoattack'"),
    ],
)
def test_records_that_do_not_fit_are_not_exported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        export_record(cifar_record(**changes), **DETAILS)


@pytest.mark.parametrize("change", [{"eps": None}, {"clean_acc": "n/a"}, {"autoattack_acc": "101"}, {"dataset": "x"}])
def test_entries_that_are_not_understood(change: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="An entry of RobustBench has"):
        import_record({**ENTRY, **change}, threat_model="Linf")
