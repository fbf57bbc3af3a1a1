"""The report of the Fashion-MNIST suite, from made-up records: pairs, means over seeds, networks of several sizes."""

from dataclasses import replace

import pytest

from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel


def test_suite_pairs_and_averages_over_seeds():
    from benchmarks.fashion_mnist_report import rows_of

    rows = rows_of(
        [
            made(head, seed, marks)
            for head, seed, marks in (
                ("own", 0, "11110000"),
                ("own", 1, "11000000"),
                ("convex", 0, "11111100"),
                ("convex", 1, "11110000"),
            )
        ]
    )
    by = {row["head"]: row for row in rows}
    assert by["convex"]["robust"] == pytest.approx(5 / 8) and by["convex"]["seeds"] == 2
    assert by["convex"]["own"]["difference"] == pytest.approx(0.25) and by["convex"]["own"]["p"] == 0.5
    assert by["own"]["own"] is None


def test_suite_tells_architectures_apart():
    from benchmarks.fashion_mnist_report import _panels, rows_of, verdict

    cells = [("own", "11110000", "tiny"), ("own", "11000000", "small"), ("linear", "11100000", "small")]
    cells += [("convex", "11111100", "tiny"), ("convex", "11100000", "small")]
    rows = rows_of([made(head, 0, marks, arch) for head, marks, arch in cells])
    panels = _panels(rows)
    assert list(panels) == [("tiny", "sam", "Linf", "8/255"), ("small", "sam", "Linf", "8/255")]
    assert [len(shown) for shown in panels.values()] == [2, 3]
    tiny, small = verdict(rows)
    assert tiny.startswith("sam + convex, Linf 8/255 (autoattack): 75.0 %") and "against the SAM network +25.0" in tiny
    assert small.startswith("sam (small) + convex") and "against the SAM network +12.5" in small
    assert "best head-only baseline linear 37.5 %" in small and "baseline" not in tiny


def test_single_heads_under_several_threats_have_panels():
    from benchmarks.fashion_mnist_report import _panels, rows_of

    rows = rows_of([made("convex", 0, "11110000"), made("convex", 0, "11110000", "small")])
    assert len(_panels(rows)) == 2


def test_panels_stand_in_a_column_a_backbone_and_a_row_a_threat():
    from benchmarks.fashion_mnist_report import _grid

    def key(name, eps):
        return "tiny", name, "Linf", eps

    several = [key("standard", "8/255"), key("trades", "8/255"), key("trades", "4/255")]
    assert _grid(several) == [several[:2], [None, several[2]]]
    one = [key("sam", f"{eps}/255") for eps in (8, 4, 2, 1)]
    assert _grid(one) == [one[:3], [one[3], None, None]] and _grid(one[:2]) == [one[:2]]


def made(head, seed, marks, arch="tiny"):
    """A record of eight points with these robust outcomes."""
    right = marks.count("1")
    counts = {"attempted": 8, "broken": 8 - right, "robust_correct": right}
    cell = {"arch": arch, "backbone": "sam", "seed": seed, "head": head, "norm": "Linf", "eps": "8/255"}
    cost = {"seconds": 1.0, "forwards": 1, "backwards": 0}
    return EvalRecord(
        name=head,
        model={"fingerprint": head},
        dataset={"name": "fashion_mnist", "fingerprint": "same"},
        threat=ThreatModel("Linf", "8/255"),
        n=8,
        clean_correct=8,
        robust_correct=right,
        attacks={"autoattack": counts},
        clean="1" * 8,
        outcomes={"autoattack": marks},
        metadata={
            "cell": {**cell, "attacks": "autoattack"},
            "train_eps": "8/255",
            "load_average": 0.0,
            "backbone_card": {**cost, "recipe": {}},
        },
    )


def test_measurements_name_the_machine_that_made_them():
    from benchmarks.fashion_mnist_report import flat

    hardware = {"device": "cuda", "device_name": "a GPU", "processor": "a processor", "cpus": 16}
    record = replace(made("own", 0, "11110000"), hardware=hardware, versions={"torch": "2.11.0"}, batch_size=1000)
    found = flat(record)
    assert {name: found[name] for name in hardware} == hardware
    assert found["torch"] == "2.11.0" and found["batch_size"] == 1000
