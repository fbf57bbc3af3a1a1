"""Every benchmark runs in its quick form, in a process of its own, and writes what its README says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PUBLISHED = ("breast_cancer", "solvers_breast_cancer", "distance_speed", "forward_overhead")

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("pyautoattack")
pytest.importorskip("torchattacks")


def run(name, *arguments):
    """Standard output of ``python -m benchmarks.<name>`` from the checkout."""
    # One thread: two on a busy machine wait for each other.
    finished = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Records of a benchmark's quick run, run once."""
    cache = {}

    def records_of(name):
        if name not in cache:
            out = tmp_path_factory.mktemp(name)
            run(name, "--threads", "1", "--out", str(out))
            cache[name] = out
        return cache[name]

    return records_of


@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs(published, name):
    out = published(name)
    written = json.loads((out / "records.json").read_text())
    assert written["origin"]["command"].startswith(f"python -m benchmarks.{name} --quick")
    assert {"torch", "numpy", "python"} <= set(written["origin"]["versions"])
    assert written["records"]
    for record in written["records"]:  # flat
        assert not any(isinstance(value, dict) for value in record.values())
    table = (out / "table.md").read_text().splitlines()
    header = next(line for line in table if line.startswith("| "))
    rows = [line for line in table if line.startswith("| ")]
    assert len(rows) > 2 and all(line.count("|") == header.count("|") for line in rows)
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def records(folder):
    return json.loads((folder / "records.json").read_text())["records"]


def test_attacks_never_go_below_the_certificate(published):
    found = records(published("breast_cancer"))
    assert {record["norm"] for record in found} == {"Linf", "L2"}
    for record in found:
        assert record["certified"] <= record["robust"] <= record["clean"]
        assert record["status"] == "converged" and not record.get("flags")


def test_solvers_meet_at_the_reference(published):
    found = {record["solver"]: record for record in records(published("solvers_breast_cancer"))}
    for name in ("column_generation", "cutting_set", "sdp"):
        assert found[name]["status"] == "converged"
        assert found[name]["dual"] <= 0.354804 * (1 + 1e-6) and found[name]["primal"] >= 0.354804 * (1 - 1e-5)
        assert abs(found[name]["above_reference"]) <= 1e-3
    assert found["penalty"]["gap"] > 1e-3


def test_distances_agree_with_scipy(published):
    (record,) = records(published("distance_speed"))
    assert record["disagreement"] < 1e-5 and record["checked"] >= 5
    assert record["distances_per_second"] > 0


def test_published_results_are_complete():
    for name in PUBLISHED:
        folder = ROOT / "benchmarks" / "results" / name
        written = json.loads((folder / "records.json").read_text())
        assert "--quick" not in written["origin"]["command"] and written["records"]
        assert (folder / "table.md").exists() and (folder / "figure.png").exists()


def test_a_killed_evaluation_ends_in_the_same_record():
    result = json.loads(run("kill_resume"))
    assert result["kills"] == 5 and result["differing_records"] == 0


def test_harness_and_autoattack_agree():
    found = json.loads(run("harness_overhead", "--eps", "0.1"))
    assert len(found["robust_correct"]) == 1 and found["n"] == 24


def test_synthetic_features_share_their_clusters(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.common import synthetic_features

    first, labels = synthetic_features(2000, 16, 3, seed=0)
    second, others = synthetic_features(2000, 16, 3, seed=1)
    assert not torch.equal(first, second) and float(first.min()) == 0.0
    for label in range(3):
        assert torch.allclose(first[labels == label].mean(0), second[others == label].mean(0), atol=0.15)
