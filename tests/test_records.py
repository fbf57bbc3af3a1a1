"""Records keep what was measured, contradict nothing, and compare on the same points."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from convex_head import records
from convex_head.errors import ComparisonError, RecordError
from convex_head.records import EvalRecord
from convex_head.statistics import compare, mcnemar_exact, paired_interval, wilson_interval
from convex_head.threat import ThreatModel

CLEAN = "1110111101"


def record(**changes: Any) -> EvalRecord:
    """Ten points, eight right; pgd breaks one of eight, autoattack two of the seven that are left."""
    values: dict[str, Any] = {
        "name": "net",
        "model": {"class": "Net", "parameters": 3, "fingerprint": "f"},
        "dataset": {"name": "toy", "fingerprint": "d", "image_shape": [1, 2, 2], "num_classes": 3},
        "threat": ThreatModel("Linf", "8/255"),
        "n": 10,
        "clean_correct": 8,
        "robust_correct": 5,
        "clean": CLEAN,
        "attacks": {
            "pgd": {"attempted": 8, "broken": 1, "skipped": 0, "robust_correct": 7, "seconds": 1.0},
            "autoattack": {"attempted": 7, "broken": 2, "skipped": 1, "robust_correct": 5, "seconds": 9.0},
        },
        "outcomes": {"pgd": "101-1111-1", "autoattack": "1-1-1100-1"},
        "labels": (0, 1, 2, 0, 1, 2, 0, 1, 2, 0),
    }
    return EvalRecord(**{**values, **changes})


def test_accuracies_are_over_all_points() -> None:
    found = record()
    assert (found.clean_accuracy, found.robust_accuracy) == (0.8, 0.5)
    assert found.attack_success == pytest.approx(3 / 8)
    assert found.interval == wilson_interval(5, 10)
    assert found.per_example.shape == (10, 2)
    assert found.per_example.all(axis=1).tolist() == found.robust.tolist()
    assert [int(column.sum()) for column in found.per_example.T] == [7, 5]


def test_without_attacks_robust_is_clean() -> None:
    found = record(attacks={}, outcomes={}, robust_correct=8)
    assert found.robust.sum() == 8


def test_saved_and_loaded_record_is_the_same(tmp_path: Path) -> None:
    before = record(flags=("logit_scale",), flag_details={"logit_scale": "why"}, metadata={"gap": 1e-3})
    before.save(tmp_path / "folder" / "record.json")
    after = EvalRecord.load(tmp_path / "folder" / "record.json")
    assert after == before
    assert after.threat.eps_text == "8/255"
    stored = json.loads((tmp_path / "folder" / "record.json").read_text())
    assert stored["robust_accuracy"] == 0.5 and stored["schema"] == 1
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["record.json"]


def test_identity_leaves_out_time_and_place() -> None:
    attacks = {name: {**entry, "seconds": 77.0} for name, entry in record().attacks.items()}
    same = record(attacks=attacks, seconds=5.0, created="later", commit="c", hardware={"cpus": 3}, metadata={"a": 1})
    assert same.identity() == record().identity()
    assert record(seed=1).identity() != record().identity()


def test_a_record_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        record().n = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean_correct": 9}, "clean_correct is 9, but the per-example results give 8"),
        ({"robust_correct": 6}, "robust_correct is 6"),
        ({"robust_correct": 9}, "0 <= robust_correct <= clean_correct"),
        ({"n": 11}, "one label a point"),
        ({"clean": "11"}, "not 10 characters"),
        ({"clean": "x110111101"}, "not 10 characters of '01'"),
        ({"outcomes": {"pgd": "101-1111-1"}}, "Per-example results are of"),
        ({"n": "10"}, "field n of a record has the wrong type"),
        ({"n": True}, "field n of a record has the wrong type"),
        ({"attacks": {"pgd": 3}}, "object of counts"),
        ({"flags": (3,)}, "Flags are names"),
    ],
)
def test_a_record_that_contradicts_itself_cannot_exist(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record(**changes)


def test_counts_of_an_attack_are_those_of_its_points() -> None:
    attacks = {**record().attacks, "pgd": {**record().attacks["pgd"], "broken": 2}}
    with pytest.raises(RecordError, match="of pgd contradict"):
        record(attacks=attacks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update(schema=99), "has schema 1; found 99"),
        (lambda stored: stored.pop("labels"), r"missing \['labels'\]"),
        (lambda stored: stored.update(extra=1), r"unknown \['extra'\]"),
        (lambda stored: stored.update(robust_accuracy=0.6), "robust_accuracy is 0.6"),
        (lambda stored: stored.update(interval=[0.0, 1.0]), "interval is"),
        (lambda stored: stored.update(interval="wide"), "interval is"),
        (lambda stored: stored["threat"].update(eps=0.031), "threat, flags, labels or curve"),
        (lambda stored: stored.update(threat=None), "threat, flags, labels or curve"),
        (lambda stored: stored.update(outcomes={"pgd": 1, "autoattack": 2}), "Per-example results of pgd"),
    ],
)
def test_a_changed_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    stored = json.loads(json.dumps(record().to_dict()))
    change(stored)
    (tmp_path / "record.json").write_text(json.dumps(stored))
    with pytest.raises(RecordError, match=message):
        EvalRecord.load(tmp_path / "record.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"n": NaN}', '{"n": Infinity}', "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RecordError, match="record"):
        EvalRecord.load(tmp_path / "record.json")
    with pytest.raises(RecordError, match="Cannot read the record"):
        EvalRecord.load(tmp_path / "missing.json")


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        record(metadata={"gap": math.nan}).save(tmp_path / "record.json")
    assert list(tmp_path.iterdir()) == []


def test_records_import_no_torch() -> None:
    # The package itself is stood in for, since what else it exports is its own business.
    code = (
        "import sys, types; package = types.ModuleType('convex_head'); "
        f"package.__path__ = [{str(Path(records.__file__).parent)!r}]; sys.modules['convex_head'] = package; "
        "import convex_head.records, convex_head.statistics; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- statistics --------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_interval_is_that_of_scipy(successes: int, n: int) -> None:
    successes = min(successes, n)
    reference = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((reference.low, reference.high), abs=1e-9)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_binomial_test_of_scipy(only_a: int, only_b: int) -> None:
    reference = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(reference, rel=1e-7)


def test_mcnemar_of_thousands_of_points_does_not_overflow() -> None:
    assert 0 <= mcnemar_exact(4000, 3000) < 1e-30
    assert mcnemar_exact(5000, 5000) == 1.0


def test_paired_interval_covers_the_true_difference() -> None:
    generator = np.random.default_rng(0)
    n, shares = 80, [0.15, 0.05]
    covered = 0
    for _ in range(1500):
        only_a, only_b, _ = generator.multinomial(n, [*shares, 1 - sum(shares)])
        low, high = paired_interval(int(only_a), int(only_b), n)
        covered += low <= shares[0] - shares[1] <= high
    assert 0.93 <= covered / 1500 <= 0.98


def test_compare_counts_the_points_that_differ() -> None:
    other = record(
        name="other",
        robust_correct=6,
        attacks={"pgd": {"attempted": 8, "broken": 2, "skipped": 0, "robust_correct": 6}},
        outcomes={"pgd": "011-1101-1"},
    )
    found = compare(record(), other)
    assert (found.both, found.only_a, found.only_b, found.neither) == (4, 1, 2, 3)
    assert found.difference == pytest.approx(-0.1)
    assert found.p_value == 1.0
    assert found.interval[0] < -0.1 < found.interval[1]
    assert "net - other: -10.0 points" in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"fingerprint": "other"}}, "same points"),
        ({"threat": ThreatModel("L2", 0.5)}, "one threat model"),
        ({"clean": "", "outcomes": {}}, "has none"),
    ],
)
def test_records_on_other_points_are_not_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare(record(), replace(record(), **changes))
