"""Curves against eps: ends known by hand, monotone by construction, and refused when a file contradicts itself."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from convex_head import ThreatModel, evaluate, evaluate_curve, register_attack
from convex_head.attacks import registry
from convex_head.cli import app
from convex_head.eps_curve import SMALLER, join
from convex_head.errors import ComparisonError, InputError, RecordError, ThreatModelError
from convex_head.records import EvalRecord

# Distance of each point's mean to the boundary at 0.5: broken from this Linf radius on.
DISTANCES = (0.01, 0.03, 0.05, 0.07, 0.09, 0.30)


class Bright(nn.Module):
    """Class 1 where the mean is above one half."""

    def forward(self, images):
        bright = 40 * (images.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-bright, bright], dim=1)


@pytest.fixture
def points():
    images = torch.stack([torch.full((1, 4, 4), 0.5 + distance) for distance in DISTANCES])
    return images, torch.ones(len(DISTANCES), dtype=torch.int64)


@pytest.fixture
def timid(monkeypatch):
    """An attack that is exact for ``Bright``, but only tries at eps below 0.06."""
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @register_attack("timid")
    def attack(model, images, labels, threat, *, seed):
        return (images - threat.eps).clamp(0, 1) if threat.eps < 0.06 else images

    return "timid"


def test_the_curve_is_that_of_known_distances(points):
    record = evaluate_curve(Bright(), points, ThreatModel("Linf", "0.06"), ["0.1", "0.02", "0.04"], "apgd-ce")
    assert [item["eps_text"] for item in record.curve] == ["0.02", "0.04", "0.1"]
    assert [item["robust"] for item in record.curve] == ["011111", "001111", "000001"]
    alone = evaluate(Bright(), points, ThreatModel("Linf", "0.06"), "apgd-ce")
    assert record.attacks.keys() == alone.attacks.keys()
    assert (record.robust == alone.robust).all() and record.robust_correct == 3


def test_a_point_broken_at_an_eps_stays_broken_at_larger_ones(points, timid):
    """The attack gives up at the record's eps: what it did at 0.04 counts there."""
    record = evaluate_curve(Bright(), points, ThreatModel("Linf", "0.08"), ["0.04", "0.2"], timid)
    assert record.attacks[timid]["broken"] == 0 and record.attacks[SMALLER]["broken"] == 2
    assert record.outcomes[SMALLER] == "001111" and record.robust_correct == 4
    assert record.curve[1]["robust"] == "001111"
    assert EvalRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_flags_of_any_radius_are_flags_of_the_record(points):
    threat = ThreatModel("Linf", "0.06")
    main, other = (evaluate(Bright(), points, one, "apgd-ce") for one in (threat, ThreatModel("Linf", "0.02")))
    flagged = dataclasses.replace(other, flags=("stateful",), flag_details={"stateful": "why"})
    joined = join(main, [flagged])
    assert joined.flags == ("stateful",) and joined.flag_details == {"stateful": "at eps 0.02: why"}


def test_curves_of_other_points_are_refused(points):
    images, labels = points
    one = evaluate(Bright(), points, ThreatModel("Linf", "0.06"), "apgd-ce")
    two = evaluate(Bright(), (images.flip(0), labels), ThreatModel("Linf", "0.02"), "apgd-ce")
    with pytest.raises(ComparisonError, match="does not shuffle"):
        join(one, [two])


@pytest.mark.parametrize("eps", [[], ["0.06"], ["0", "0.1"]])
def test_a_curve_needs_another_positive_eps(points, eps):
    with pytest.raises(InputError, match="beside"):
        evaluate_curve(Bright(), points, ThreatModel("Linf", "0.06"), eps, "apgd-ce")
    with pytest.raises(ThreatModelError, match="fraction"):
        evaluate_curve(Bright(), points, ThreatModel("Linf", "0.06"), ["wide"], "apgd-ce")


GOOD = {"eps": 0.02, "eps_text": "0.02", "robust_correct": 5, "robust": "011111"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"robust_correct": 4}, "number of ones"),
        ({"robust": "111", "robust_correct": 3}, "marks"),
        ({"eps": 0.03}, "is not"),
        ({"eps_text": "wide"}, "cannot be read"),
        ({"robust": "000111", "robust_correct": 3}, "broken before"),
        ({"eps": 0.06, "eps_text": "0.06"}, "ascend"),
        ({"more": 1}, "is not"),
    ],
)
def test_a_curve_that_contradicts_itself_is_refused(points, change, message):
    record = evaluate(Bright(), points, ThreatModel("Linf", "0.04"), "apgd-ce")
    payload = record.to_dict()
    assert EvalRecord.from_dict({**payload, "curve": [GOOD]}).curve == (GOOD,)
    payload["threat"] = ThreatModel("Linf", "0.06" if "eps" in change and change["eps"] == 0.06 else "0.04").to_dict()
    with pytest.raises(RecordError, match=message):
        EvalRecord.from_dict({**payload, "curve": [{**GOOD, **change}]})


def test_a_curve_is_short(points):
    record = evaluate(Bright(), points, ThreatModel("Linf", "0.04"), "apgd-ce")
    with pytest.raises(RecordError, match="at most 100"):
        dataclasses.replace(record, curve=(GOOD,) * 101)


def test_records_without_the_field_are_still_read(points):
    payload = evaluate(Bright(), points, ThreatModel("Linf", "0.04"), "apgd-ce").to_dict()
    del payload["curve"]
    assert EvalRecord.from_dict(payload).curve == ()


def test_the_command_writes_a_curve_and_goes_on_from_its_files(tmp_path, monkeypatch):
    (tmp_path / "curve_zoo.py").write_text(
        "import torch\nfrom torch import nn\nfrom convex_head import load_dataset\n"
        "def net():  # nearest class mean\n"
        "    data = load_dataset('digits', split='train')\n"
        "    means = torch.stack([data.images[data.labels == k].flatten(1).mean(0) for k in range(10)])\n"
        "    linear = nn.Linear(64, 10)\n"
        "    linear.weight.data, linear.bias.data = means, -means.square().sum(1) / 2\n"
        "    return nn.Sequential(nn.Flatten(), linear)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "r.json"
    asked = ["evaluate", "--model", "curve_zoo:net", "--dataset", "digits", "--n-ex", "40", "--attack", "apgd-ce"]
    asked += ["--eps", "0.05", "--eps-curve", "0.01, 8/255", "--state", str(tmp_path / "s.json"), "-o", str(out), "-q"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    record = EvalRecord.load(out)
    assert [item["eps_text"] for item in record.curve] == ["0.01", "8/255"]
    counts = [record.clean_correct, *(item["robust_correct"] for item in record.curve), record.robust_correct]
    assert counts == sorted(counts, reverse=True) and np.ptp(counts) > 0
    assert {path.name for path in tmp_path.glob("s.json*")} == {"s.json", "s.json.eps-0.01", "s.json.eps-8_255"}
    assert CliRunner().invoke(app, [*asked[:-5], "--eps-curve", "0.05", "-q"]).exit_code == 2
