"""Every benchmark runs in its quick form, in a process of its own, and writes what its README says."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convex_head.data import load_dataset
from convex_head.errors import DatasetNotFoundError
from convex_head.records import EvalRecord

ROOT = Path(__file__).parent.parent
PUBLISHED = (
    "breast_cancer",
    "solvers",
    "distance_speed",
    "forward_overhead",
    "scale",
    "warm_starts",
    "many_classes",
    "coefficients",
    "layerwise",
    "ball_shapes",
    "fashion_mnist",
    "relu_patterns",
)
# What has no published results yet, with what its quick form needs beside the usual.
UNPUBLISHED = {"gpu": ("--device", "cpu")}

# Those that keep finished parts in a folder, which the test must give.
KEEPING = ("fashion_mnist", "solvers", "relu_patterns")
FASHION = ("coefficients", "layerwise", "ball_shapes", "fashion_mnist", "transfer", "relu_patterns")

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("pyautoattack")
pytest.importorskip("torchattacks")

try:
    HAS_FASHION = len(load_dataset("fashion_mnist", n=1)) == 1
except DatasetNotFoundError:
    HAS_FASHION = False


def run(name, *arguments, cwd):
    """Standard output of ``python -m benchmarks.<name>``, which keeps what it has computed in ``cwd``."""
    # One thread: two on a busy machine wait for each other.
    finished = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
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
            if name in FASHION and not HAS_FASHION:
                pytest.skip("Fashion-MNIST is not on this machine")
            extra = ["--folder", str(out)] if name in KEEPING else []
            extra += UNPUBLISHED.get(name, ())
            if name == "solvers" and not HAS_FASHION:
                extra += ["--only", "breast_cancer", "digits"]
            run(name, "--threads", "1", "--out", str(out), *extra, cwd=tmp_path_factory.getbasetemp())
            cache[name] = out
        return cache[name]

    return records_of


@pytest.mark.parametrize("name", (*PUBLISHED, *UNPUBLISHED))
def test_outputs(published, name):
    out = published(name)
    written = json.loads((out / "records.json").read_text())
    assert written["origin"]["command"].startswith(f"python -m benchmarks.{name} --quick")
    assert {"torch", "numpy", "python"} <= set(written["origin"]["versions"])
    assert written["records"]
    for record in written["records"]:  # flat
        assert not any(isinstance(value, dict) for value in record.values())
    tables = [block.splitlines() for block in (out / "table.md").read_text().split("\n\n") if block.startswith("| ")]
    assert tables
    for header, rule, *rows in tables:
        assert rows and all(line.count("|") == header.count("|") for line in (rule, *rows))
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def records(folder):
    return json.loads((folder / "records.json").read_text())["records"]


def test_scale_measures_as_many_neurons_as_it_says(published):
    found = records(published("scale"))
    assert all(record["neurons"] >= (8 if record["classes"] == 10 else 2) for record in found) and len(found) == 6


def test_attacks_never_go_below_the_certificate(published):
    found = records(published("breast_cancer"))
    assert {record["norm"] for record in found} == {"Linf", "L2"}
    for record in found:
        assert record["certified"] <= record["robust"] <= record["clean"]
        assert record["status"] == "converged" and not record.get("flags")


def solves(folder, data):
    """Records of solvers on a data set, by solver and loss."""
    found = [row for row in records(folder) if row["kind"] == "solve" and row["data"] == data]
    return {(row["solver"], row["loss"]): row for row in found}


def test_solvers_meet_at_the_reference(published):
    found = {solver: row for (solver, _), row in solves(published("solvers"), "breast_cancer").items()}
    for name in ("column_generation", "cutting_set", "sdp, SCS", "sdp, CLARABEL"):
        assert found[name]["status"] == "converged"
        assert found[name]["dual"] <= 0.354804 * (1 + 1e-6) and found[name]["primal"] >= 0.354804 * (1 - 1e-5)
        assert abs(found[name]["above_reference"]) <= 1e-3
    assert found["penalty"]["gap"] > 1e-3 and found["penalty"]["margin_overstatement"] > 0


def test_gpu_measures_passes_fits_and_agreement(published):
    parts = {part: [] for part in ("pass", "agree", "fit")}
    for record in records(published("gpu")):
        parts[record["part"]].append(record)
    for record in parts["pass"]:
        assert record["device"] > 0 and record["cpu"] > 0 and record["products"] > 0 and record["reading"] > 0
    # Here both devices are the processor, which rounds alike.
    assert len(parts["agree"]) == 16 and all(record["difference"] == 0 for record in parts["agree"])
    (fit,) = parts["fit"]
    assert fit["gap"] <= fit["tol"] and fit["lower_bound"] <= fit["objective"]
    assert fit["objective"] == pytest.approx(fit["cpu_objective"]) and fit["cpu"] > 0


def test_gpu_compares_in_double_precision():
    from benchmarks.gpu import MU, numbers_of, problem

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=generator, dtype=torch.float64), torch.arange(60) % 10
    p = problem(x, y, "crammer_singer", torch.float64)
    network = p.random_network(2, 0)
    smoothed, gradient, objective, bound = numbers_of(p, network)
    packed = p.pack(network)
    expected = p.evaluate(packed, MU, p.blur(MU))
    assert float(smoothed) == expected.smoothed and torch.equal(gradient, expected.gradient)
    assert float(smoothed) != float(smoothed.float()), "the number would not tell single from double precision"
    assert float(objective) == p.dual_point(packed, MU, p.blur(MU)).primal and bound < objective


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_that_there_is_none():
    from benchmarks.gpu import main
    from convex_head.errors import InputError

    with pytest.raises(InputError, match="found none"):
        main(["--quick", "--out", "nowhere"])


def test_solvers_record_losses_probes_and_accuracies(published):
    folder = published("solvers")
    found = solves(folder, "digits")
    assert {key for key in found if key[0] == "column_generation"} == {
        ("column_generation", loss) for loss in ("one_vs_rest", "crammer_singer", "multi_margin")
    }
    base = found["column_generation", "one_vs_rest"]
    pairs = found["column_generation", "crammer_singer"]
    assert pairs["cpu_seconds_ratio"] == pytest.approx(pairs["cpu_seconds"] / base["cpu_seconds"], rel=1e-4)
    rows = records(folder)
    for row in rows:
        if "robust" in row:
            assert row["robust_low"] <= row["robust"] <= row["robust_high"] and row["robust"] <= row["clean"]
    linear = {row["solver"].split(",")[0] for row in rows if row["kind"] == "control" and row["data"] == "digits"}
    assert linear == {"LinearSVC", "LogisticRegression"}
    gated = [row for row in rows if row["solver"].startswith("pyscnn")]
    assert len(gated) == (importlib.util.find_spec("scnn") is not None)


def test_solvers_put_finished_parts_together(published, tmp_path):
    first = records(published("solvers"))
    options = ("solvers", "--threads", "1", "--folder")
    run(*options, str(published("solvers")), "--only", "digits", "--out", str(tmp_path), cwd=tmp_path)
    assert records(tmp_path) == first
    told = run(*options, str(tmp_path / "none"), "--report", "--out", str(tmp_path / "no"), cwd=tmp_path)
    assert told == "" and not (tmp_path / "no").exists()


def test_solvers_run_again_with_other_settings(tmp_path):
    from benchmarks.solvers import kept, run
    from benchmarks.solvers_controls import Controls

    task = Controls("linear", "digits", n=50, d=64, tests=20)
    run(task, tmp_path, 1)
    before = kept(task, tmp_path, 1)
    assert len(before) == 4 and before[0]["test_n"] == 20
    run(task, tmp_path, 1)
    assert kept(task, tmp_path, 1) == before
    assert kept(task, tmp_path, 2) is None
    assert kept(Controls("linear", "digits", n=60, d=64, tests=20), tmp_path, 1) is None


def test_the_sdp_is_never_given_much():
    from benchmarks.solvers import full, quick

    for tasks, most in ((quick(), 100), (full(), 455)):
        sizes = [
            task.n
            for task in tasks
            for entry in getattr(task, "entries", ())
            if entry.solver.startswith("sdp") or entry.solver == "cutting_set"
        ]
        assert max(sizes) == most
        assert len({task.name for task in tasks}) == len(tasks)


def test_linear_worst_cases():
    from benchmarks.solvers_controls import linear_margins

    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator).double() for shape in ((3, 4), (3,), (6, 4)))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    worst = linear_margins(weight, bias, x, y, 0.5)
    for i in range(6):
        for column, other in enumerate(k for k in range(3) if k != y[i]):
            difference = weight[y[i]] - weight[other]
            step = -0.5 * difference / difference.norm()
            scores = weight @ (x[i] + step) + bias
            assert worst[i, column] == pytest.approx(float(scores[y[i]] - scores[other]))


def test_epochs_are_linear_in_the_rows():
    from benchmarks.solvers_controls import epoch

    # A step of r rows takes 1 + 2 r seconds: 1,050 rows in 11 steps.
    assert epoch(1050, 5.0, 17.0, rows=(2, 8)) == pytest.approx(11 + 2100)
    assert epoch(100, 4.0, 17.0, rows=(2, 8)) == pytest.approx(100 * 13 / 6)


def test_kept_features_are_used_as_they_are(tmp_path):
    from benchmarks.solvers_data import backbone_features

    written = np.arange(5 * 512, dtype=np.float32).reshape(5, 512)
    np.save(tmp_path / "fashion_mnist_resnet18_train.npy", written)
    assert torch.equal(backbone_features(tmp_path, "train", torch.arange(3)), torch.from_numpy(written[:3]))


@pytest.mark.parametrize(
    ("status", "ratio", "shown"),
    [("converged", 2.0, "2"), ("max_time", 2.0, "> 2"), ("max_iter", 2.0, None), ("failed", None, None)],
)
def test_ratios_say_when_they_are_bounds(status, ratio, shown):
    from benchmarks.solvers_report import ratio_shown

    assert ratio_shown(status, ratio) == shown


def test_distances_agree_with_scipy(published):
    (record,) = records(published("distance_speed"))
    assert record["disagreement"] < 1e-5 and record["checked"] >= 5
    assert record["distances_per_second"] > 0


def test_fashion_mnist_keeps_finished_cells(published):
    folder = published("fashion_mnist")
    first = records(folder)
    assert {row["head"] for row in first} == {"own", "mlp_at", "convex"}
    for row in first:
        assert 0 <= row["robust"] <= row["clean"] and row["low"] <= row["robust"] <= row["high"]
    by = {row["head"]: row for row in first}
    assert by["mlp_at"]["backwards_fit"] > 0 and by["convex"]["backwards_fit"] == 0
    run("fashion_mnist", "--folder", str(folder), "--out", str(folder), cwd=folder)
    assert records(folder) == first


def test_fashion_mnist_goes_on_from_a_leaderboard(published, tmp_path):
    from benchmarks.fashion_mnist import finished, take_known
    from convex_head.report.entries import Entry

    records = finished(published("fashion_mnist"))
    entries = tmp_path / "entries"
    for record in records:
        Entry.from_record(record).save(entries)
    other = replace(records[0], name="other", metadata={})
    Entry.from_record(other).save(entries)
    assert take_known(tmp_path, entries) == len(records)
    assert finished(tmp_path) == records
    assert take_known(tmp_path, entries) == 0


def test_fashion_mnist_records_can_be_checked_and_repeated(published):
    from benchmarks.fashion_mnist import QUICK, Plan, parsed
    from convex_head.certificate_check import check_certificate
    from convex_head.feature_files import read_features
    from convex_head.head import ConvexRobustHead

    folder = published("fashion_mnist")
    found = {path.name.split("-")[4]: EvalRecord.load(path) for path in (folder / "records").iterdir()}
    convex, card = found["convex"], found["convex"].metadata
    assert {"status", "objective", "lower_bound", "gap", "radius", "reg", "neurons"} <= set(card)
    assert card["gap"] == pytest.approx((card["objective"] - card["lower_bound"]) / card["objective"])
    head = ConvexRobustHead.load(folder / "heads" / f"{convex.name}.safetensors")
    x, y, _ = read_features(folder / "heads" / f"{convex.name}.npz")
    assert check_certificate(convex, head, x, y).objective == pytest.approx(card["objective"], rel=1e-3)
    large = Plan(arch="small", n=50, attacks="apgd")
    for plan in (QUICK, Plan(), large):
        for cell in plan.cells():
            _, again = parsed(shlex.split(plan.command(cell))[3:])
            assert again.n == plan.n and again.effort == plan.effort and again.schedule == plan.schedule
            assert list(again.cells()) == [cell]
    assert {record.command for record in found.values()} == {QUICK.command(cell) for cell in QUICK.cells()}


def test_bounds_of_gated_heads_keep_their_order(published):
    found = [row for row in records(published("relu_patterns")) if "clean" in row]
    assert {row["kind"] for row in found} == {"polynomial", "relu", "relu, slack 0.1", "gated, cover", "gated, ignore"}
    for row in found:
        assert row["certified"] <= row["attacked"] <= row["clean"] and -1e-9 <= row["gap"] <= 1


def test_layers_and_polynomials_are_certified(published):
    for name in ("layerwise", "coefficients"):
        for row in records(published(name)):
            assert 0 <= row["gap"] < 0.15 and row["neurons"] > 0
    sweep = records(published("coefficients"))
    for row in sweep:
        assert row["exact_1"] <= row["exact_0.5"] <= row["test_clean"]
    five = next(row for row in sweep if row["name"] == "ReLU on [-5, 5]")
    assert (five["a"], five["b"], five["c"]) == pytest.approx((0.09375, 0.5, 0.46875))


def test_shapes_of_the_ball_choose_their_radius_on_validation_images(published):
    groups = {}
    for row in records(published("ball_shapes")):
        groups.setdefault((row["backbone"], row["shape"], row["head"]), []).append(row)
    assert {key[2] for key in groups} == {"convex", "linear"} and {"round", "directions"} <= {key[1] for key in groups}
    for rows in groups.values():
        best = max((row["validation_robust"], row["validation_clean"]) for row in rows)
        assert [(r["validation_robust"], r["validation_clean"]) for r in rows if r["chosen"]] == [best]
        assert all(r["test_8/255"] <= r["test_4/255"] + 0.01 and r["test_4/255"] <= r["test_clean"] for r in rows)


def test_least_squares_coefficients():
    from benchmarks.coefficients import fit_on_interval, fit_to

    assert fit_to(torch.linspace(-3, 3, 20001)) == pytest.approx(fit_on_interval(3.0), abs=1e-3)


def test_published_results_are_complete():
    folders = [path for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_dir()]
    assert set(PUBLISHED) <= {folder.name for folder in folders}
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    for folder in folders:
        written = json.loads((folder / "records.json").read_text())
        assert "--quick" not in written["origin"]["command"] and written["records"]
        assert (folder / "table.md").exists() and (folder / "figure.png").exists()
        assert f"(results/{folder.name}/table.md)" in readme


def test_a_killed_evaluation_ends_in_the_same_record(tmp_path):
    result = json.loads(run("kill_resume", cwd=tmp_path))
    assert result["kills"] == 5 and result["differing_records"] == 0


def test_harness_and_autoattack_agree(tmp_path):
    found = json.loads(run("harness_overhead", "--eps", "0.1", cwd=tmp_path))
    assert len(found["robust_correct"]) == 1 and found["n"] == 24


def test_synthetic_features_share_their_clusters():
    from benchmarks.common import synthetic_features

    first, labels = synthetic_features(2000, 16, 3, seed=0)
    second, others = synthetic_features(2000, 16, 3, seed=1)
    assert not torch.equal(first, second) and float(first.min()) == 0.0
    for label in range(3):
        assert torch.allclose(first[labels == label].mean(0), second[others == label].mean(0), atol=0.15)
