"""The bench in its quick form: rows, resume, choices on training data only; and the processes it runs on."""

import dataclasses
import functools
import importlib
import json
import os
import shlex
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from convex_head.bench import BenchSettings, Row, plan, record_path, row_key, run_bench
from convex_head.certificate_check import check_certificate
from convex_head.cli import app
from convex_head.feature_files import read_features
from convex_head.head import ConvexRobustHead
from convex_head.records import EvalRecord
from convex_head.workers import Task, run_tasks

QUICK = BenchSettings().quick()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run: its folder, events and records."""
    out, events = tmp_path_factory.mktemp("bench"), []
    records = run_bench(QUICK, out, jobs=1, listener=events.append)
    return out, events, records


def test_rows_records_and_certificate(finished):
    out, events, records = finished
    assert [record.name for record in records] == ["digits-standard-linear", "digits-standard-convex"]
    assert [event.kind for event in events if event.kind != "progress"] == ["start", "done"] * 3
    for record, row in zip(records, QUICK.rows(), strict=True):
        assert EvalRecord.load(record_path(out, row)) == record
        assert record.n == QUICK.n and record.threat == QUICK.threat and record.seed == QUICK.seed
        assert record.clean_accuracy > 0.2  # three epochs see more than chance
    convex = records[1].metadata
    assert convex["gap"] <= QUICK.tol and convex["status"] == "converged"
    assert convex["objective"] >= convex["lower_bound"] > 0
    assert (convex["radius"],) == QUICK.radii and (convex["reg"],) == QUICK.regs
    assert records[0].dataset["fingerprint"] == records[1].dataset["fingerprint"]


def test_the_files_beside_a_convex_row_confirm_its_certificate(finished):
    out, _, records = finished
    head = ConvexRobustHead.load(out / "heads" / "digits-standard-convex.safetensors")
    x, y, _ = read_features(out / "heads" / "digits-standard-convex.npz")
    found = check_certificate(records[1], head, x, y)
    assert found.objective == pytest.approx(records[1].metadata["objective"], rel=1e-6)
    assert found.gap <= records[1].metadata["gap"] * 1.01
    assert not (out / "heads" / "digits-standard-linear.npz").exists()


@pytest.mark.parametrize(
    "settings",
    [
        BenchSettings(),
        QUICK,
        BenchSettings(eps="8/255", eps_curve=("0.05", "0.2"), n=40, seed=3, recipes=("trades", "sam")),
        BenchSettings(n=5, eps_curve=("0.2",), seed=1).quick(),
    ],
)
def test_the_command_of_a_row_asks_for_these_settings(settings, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "convex_head.bench_console.run_on_console", lambda settings, *_, **__: not asked.append(settings)
    )
    program, *words = shlex.split(settings.command())
    assert program == "convex-head"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and asked == [settings], result.output


def test_finished_rows_are_kept_and_lost_ones_made_again(finished):
    out, _, records = finished
    assert plan(QUICK, out) == []
    assert run_bench(QUICK, out, jobs=1, listener=lambda event: pytest.fail("nothing was left to do")) == records
    path = record_path(out, Row("standard", "convex"))
    path.write_text(path.read_text()[:100])
    assert [task.name for task in plan(QUICK, out)] == ["train standard", "digits-standard-convex"]
    again = run_bench(QUICK, out, jobs=2, listener=lambda event: None)
    assert [record.identity() for record in again] == [record.identity() for record in records]


@pytest.mark.parametrize("change", [{"eps": "0.05"}, {"n": 10}, {"seed": 1}, {"radii": (0.5,)}, {"epochs": 4}])
def test_another_setting_is_another_row(change):
    row = Row("standard", "convex")
    assert row_key(dataclasses.replace(QUICK, **change), row) != row_key(QUICK, row)
    assert row_key(dataclasses.replace(QUICK, heads=("convex",)), row) == row_key(QUICK, row)


def test_the_default_covers_the_main_job():
    settings = BenchSettings()
    assert {(row.recipe, row.head) for row in settings.rows()} == {
        (recipe, head) for recipe in ("standard", "sam", "pgd_at") for head in ("own", "linear", "convex")
    }
    assert "autoattack" in settings.attacks
    assert sum(name.startswith("torchattacks:") for name in settings.attacks) == 2


TASKS = """
import os, time, torch
from convex_head.errors import InputError

def square(number, report):
    report(0.5, "half")
    return number * number, torch.get_num_threads(), os.getpid()

def fail(report):
    raise InputError("rule broken, found this; do that.")

def die(report):
    os._exit(3)

def sleep(report):
    time.sleep(60)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module of task functions that other processes can import too."""
    (tmp_path / "some_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_tasks")
    sys.modules.pop("some_tasks")


@pytest.mark.parametrize("jobs", [1, 2])
def test_tasks_run_in_order_of_need(jobs, work):
    events = []
    tasks = [
        Task("bad", work.fail),
        Task("two", functools.partial(work.square, 2)),
        Task("after bad", functools.partial(work.square, 3), after="bad"),
        Task("after that", functools.partial(work.square, 3), after="after bad"),
        Task("after two", functools.partial(work.square, 4), after="two"),
    ]
    run_tasks(tasks, jobs, events.append)
    ended = {event.task: event for event in events if event.kind in ("done", "failed")}
    assert {name: event.kind for name, event in ended.items()} == {
        "bad": "failed",
        "two": "done",
        "after bad": "failed",
        "after that": "failed",
        "after two": "done",
    }
    assert ended["bad"].text == "rule broken, found this; do that." and "Traceback" in ended["bad"].details
    assert ended["after that"].text == "not started, because after bad failed"
    assert ended["after two"].value[:2] == (16, 1)
    assert (ended["after two"].value[2] == os.getpid()) is (jobs == 1)
    order = [(event.task, event.kind) for event in events]
    assert order.index(("two", "done")) < order.index(("after two", "start"))
    assert ("two", "progress") in order


def test_a_process_that_dies_is_a_failed_task(work):
    events = []
    run_tasks([Task("dies", work.die), Task("two", functools.partial(work.square, 2))], 2, events.append)
    ended = {event.task: (event.kind, event.text) for event in events if event.kind in ("done", "failed")}
    assert ended["dies"][0] == "failed" and "exit code 3" in ended["dies"][1]
    assert ended["two"][0] == "done"


def test_an_interrupt_stops_the_processes(work):
    def interrupt(event):
        raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_tasks([Task("a", work.sleep), Task("b", work.sleep)], 2, interrupt)
    assert time.perf_counter() - began < 30


def test_threads_are_restored(work):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_tasks([Task("bad", work.fail)], 1, lambda event: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_records_hold_plain_json(finished):
    out, _, _ = finished
    for path in (out / "records").glob("*.json"):
        assert json.loads(path.read_text())["metadata"]["backbone"] == "PreAct ResNet 4-8"
