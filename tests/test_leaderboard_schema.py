"""leaderboard/schema.json: every published entry and every entry that is written conforms, and wrong ones do not."""

import json
from pathlib import Path

import pytest
from json_schema import faults
from report_cases import make_record

from convex_head.records import SCHEMA, EvalRecord
from convex_head.report import Entry
from convex_head.report.entries import ROBUSTBENCH_FIELDS
from convex_head.report.facts import STATUSES
from convex_head.solvers.result import Status

BOARD = Path(__file__).parents[1] / "leaderboard"
WRITTEN = json.loads((BOARD / "schema.json").read_text(encoding="utf-8"))
ENTRIES = sorted((BOARD / "entries").glob("*.json"))
# As RobustBench's own model_info files have them.
ROBUSTBENCH = {
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture"),
    *("eps", "clean_acc", "reported", "autoattack_acc"),
}


def test_published_entries_conform():
    assert ENTRIES
    for path in ENTRIES:
        assert faults(json.loads(path.read_text(encoding="utf-8")), WRITTEN) == [], path.name


def test_entries_have_robustbench_fields_and_one_object_of_ours():
    assert set(ROBUSTBENCH_FIELDS) == ROBUSTBENCH
    for path in ENTRIES:
        assert set(json.loads(path.read_text(encoding="utf-8"))) - {"external"} == {*ROBUSTBENCH, "convex_head"}
    kinds = {str: "string", bool: "boolean", int: "integer"}
    for name, kind in ROBUSTBENCH_FIELDS.items():
        assert WRITTEN["properties"][name]["type"] == kinds[kind]


def test_the_schema_names_its_version_and_every_field():
    record = WRITTEN["properties"]["convex_head"]
    assert WRITTEN["$id"].endswith(f":{SCHEMA}") and WRITTEN["title"].endswith(f"schema {SCHEMA}")
    assert record["properties"]["schema"]["const"] == SCHEMA
    fields = set(make_record().to_dict())
    assert set(record["properties"]) == fields and set(record["required"]) == fields - {"curve"}
    statuses = record["properties"]["metadata"]["properties"]["status"]["enum"]
    assert tuple(statuses) == STATUSES == tuple(status.value for status in Status)


def test_what_is_written_conforms(tmp_path):
    point = {"eps": 0.05, "eps_text": "0.05", "robust_correct": 7, "robust": "1111111000"}
    for record in (make_record(curve=(point,)), make_record(seed=None, commit="0" * 40 + "+")):
        payload = json.loads(Entry.from_record(record).save(tmp_path).read_text(encoding="utf-8"))
        assert faults(payload, WRITTEN) == []
        assert EvalRecord.from_dict(payload["convex_head"]) == record


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("eps",), 0.1, "$.eps: type"),
        (("additional_data",), 1, "$.additional_data: type"),
        (("number_forward_passes",), True, "$.number_forward_passes: type"),
        (("clean_acc",), "1e2", "$.clean_acc: pattern"),
        (("link",), "javascript:alert(1)", "$.link: pattern"),
        (("authors",), "x" * 301, "$.authors: maxLength"),
        (("more",), 1, "$.more: additionalProperties"),
        (("convex_head", "more"), 1, "$.convex_head.more: additionalProperties"),
        (("convex_head", "schema"), 2, "$.convex_head.schema: const"),
        (("convex_head", "flags"), ["zero_gradient"], "$.convex_head.flags: maxItems"),
        (("convex_head", "robust_accuracy"), 1.5, "$.convex_head.robust_accuracy: maximum"),
        (("convex_head", "attacks", "autoattack", "broken"), -1, "$.convex_head.attacks.autoattack.broken: minimum"),
        (("convex_head", "interval"), [0.1], "$.convex_head.interval: minItems"),
        (("convex_head", "clean"), "12", "$.convex_head.clean: pattern"),
        (("convex_head", "commit"), "main", "$.convex_head.commit: pattern"),
        (("convex_head", "metadata", "status"), "optimal", "$.convex_head.metadata.status: enum"),
        (("convex_head", "metadata", "reg"), 0, "$.convex_head.metadata.reg: exclusiveMinimum"),
    ],
)
def test_a_wrong_value_breaks_the_schema(path, value, fault):
    entry = json.loads((BOARD / "entries" / "digits-sam-convex-linf-0-1.json").read_text(encoding="utf-8"))
    target = entry
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert fault in faults(entry, WRITTEN)
