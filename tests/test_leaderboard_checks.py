"""'leaderboard check' refuses every kind of contradiction, and the commands' --json says what they did."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convex_head.cli import app

BOARD = Path(__file__).parents[1] / "leaderboard"
ENTRY = "digits-sam-convex-linf-0-1"
RUNNER = CliRunner()


def run(*arguments, code=0):
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The published digits entries, whose numbers a test may change."""
    folder = tmp_path_factory.mktemp("copied") / "board"
    (folder / "entries").mkdir(parents=True)
    for path in (BOARD / "entries").glob("digits-*.json"):
        shutil.copy(path, folder / "entries")
    run("leaderboard", "build", "--dir", folder, "--quiet")
    return folder


def turned(marks, old, new):
    place = marks.index(old)
    return marks[:place] + new + marks[place + 1 :]


def drop_attack(entry, name="feature-exact"):
    del entry["convex_head"]["attacks"][name], entry["convex_head"]["outcomes"][name]


def add(*path):
    """Add one to the number at ``path`` of the record."""

    def change(entry):
        *keys, last = path
        target = entry["convex_head"]
        for key in keys:
            target = target[key]
        target[last] += 1

    return change


def put(value, *path):
    """Put a value at ``path`` of the entry."""

    def change(entry):
        *keys, last = path
        target = entry
        for key in keys:
            target = target[key]
        target[last] = value

    return change


def rising(entry):
    """A point that some attack has broken at eps 0.1 is right at 0.2."""
    record = entry["convex_head"]
    broken = next(k for k, marks in enumerate(zip(*record["outcomes"].values(), strict=True)) if "0" in marks)
    marks = record["curve"][-1]["robust"]
    record["curve"][-1] |= {"robust": marks[:broken] + "1" + marks[broken + 1 :]}
    record["curve"][-1]["robust_correct"] += 1


STAGES = ("convex_head", "attacks", "autoattack", "stages")
PICTURE = ("convex_head", "metadata", "examples", "images", 0)
PGD = ("convex_head", "attacks", "torchattacks:PGD(steps=20)")

CHANGES = {
    "clean count": (add("clean_correct"), "clean_correct is {clean}"),
    "robust count": (add("robust_correct"), "robust_correct is {robust}"),
    "points": (add("n"), "one label a point"),
    "interval": (add("interval", 0), "interval is"),
    "accuracy": (put(0.9, "convex_head", "robust_accuracy"), "robust_accuracy is 0.9"),
    "broken": (add("attacks", "autoattack", "broken"), "contradict its per-example results"),
    "skipped": (add("attacks", "autoattack", "skipped"), "skipped of autoattack is {skipped}"),
    "success rate": (add("attacks", "autoattack", "success_rate"), "success_rate of autoattack"),
    "stage": (add("attacks", "autoattack", "stages", "apgd-t", "broken"), "its stages say"),
    "stage lost": (put({}, "convex_head", "attacks", "autoattack", "stages", "apgd-t"), "a stage has no counts"),
    "attack left out": (drop_attack, "leaves out only"),
    "one point right": (
        lambda e: e["convex_head"].update(clean=turned(e["convex_head"]["clean"], "0", "1")),
        "clean_correct is {published}",
    ),
    "one attack survived": (
        lambda e: e["convex_head"]["outcomes"].update(
            {"feature-exact": turned(e["convex_head"]["outcomes"]["feature-exact"], "0", "1")}
        ),
        "contradict its per-example results",
    ),
    "label": (put(99, "convex_head", "labels", 0), "class indices below 10"),
    "flag": (put(["logit_scale"], "convex_head", "flags"), "flagged"),
    "hidden flag": (put({"logit_scale": "1e6"}, "convex_head", "flag_details"), "explains the flags"),
    "gap": (put(1e-6, "convex_head", "metadata", "gap"), "relative gap"),
    "lower bound": (put(0.477, "convex_head", "metadata", "lower_bound"), "relative gap"),
    "percentage": (put("99.99", "clean_acc"), "clean_acc is '99.99'"),
    "eps": (put("0.2", "eps"), "eps is '0.2'"),
    "threat": (put(0.2, "convex_head", "threat", "eps"), "eps_text"),
    "curve": (add("curve", 0, "robust_correct"), "A point of a curve"),
    "points' hash": (put("0" * 64, "convex_head", "dataset", "fingerprint"), "other fingerprints of the images"),
    "weights' hash": (put("taken", "convex_head", "model", "fingerprint"), "other models"),
    "name": (put("better", "name"), "name is 'better'"),
    "record's name": (put("better", "convex_head", "name"), "Rename it to that"),
    "architecture": (put("WRN", "architecture"), "architecture is 'WRN'"),
    "passes": (put(2, "number_forward_passes"), "number_forward_passes is 2"),
    "reported": (put("nan", "reported"), "reported is 'nan'"),
    "too much": (put("100.01", "reported"), "reported is '100.01'"),
    "link": (put("javascript:alert(1)", "link"), "link is 'javascript:alert(1)'"),
    "external": (put("10.00", "external"), "external is '10.00'"),
    "dataset": (put("cifar10", "dataset"), "dataset is 'cifar10'"),
    "clean accuracy": (add("clean_accuracy"), "clean_accuracy is"),
    "robust accuracy": (add("robust_accuracy"), "robust_accuracy is"),
    "narrow interval": (put([0.1, 0.2], "convex_head", "interval"), "interval is [0.1, 0.2]"),
    "stage's rate": (put(0.5, *STAGES, "square", "success_rate"), "success_rate of square is 0.5"),
    "stage's skipped": (put(7, *STAGES, "apgd-ce", "skipped"), "skipped of apgd-ce is 7"),
    "stage's cost": (add("attacks", "autoattack", "stages", "square", "forwards"), "its stages add up to"),
    "negative cost": (
        put(-1, "convex_head", "attacks", "feature-exact", "backwards"),
        "backwards of feature-exact is -1",
    ),
    "setting": (
        put(99, *PGD, "settings", "steps"),
        "those of its name",
    ),
    "curve rises": (rising, "broken before"),
    "curve's order": (lambda e: e["convex_head"]["curve"].reverse(), "ascend"),
    "curve's eps": (put(0.07, "convex_head", "curve", 0, "eps"), "A point of a curve"),
    "status": (put("optimal", "convex_head", "metadata", "status"), "status of the head is 'optimal'"),
    "radius": (put(0.5, "convex_head", "metadata", "radius"), "others did better on its path"),
    "negative radius": (put(-1.0, "convex_head", "metadata", "radius"), "radius of the head is -1.0"),
    "passed over": (put(False, "convex_head", "metadata", "path", 0, "allowed"), "passed over"),
    "a wider one that pays": (
        lambda e: e["convex_head"]["metadata"]["path"][8].update(allowed=False, clean=1.0),
        "passed over",
    ),
    "not a flag": (put("no", "convex_head", "metadata", "path", 0, "allowed"), "true or false"),
    "chosen": (put(True, "convex_head", "metadata", "path", 0, "chosen"), "chosen candidates"),
    "candidate": (put(1.5, "convex_head", "metadata", "path", 0, "robust"), "an accuracy outside [0, 1]"),
    "seed": (put(0.5, "convex_head", "seed"), "seed is 0.5"),
    "another seed": (put(1, "convex_head", "seed"), "its command has --seed 0, the record 1"),
    "command": (
        put("convex-head bench --eps 0.3", "convex_head", "command"),
        "command has --eps 0.3, the record 0.1",
    ),
    "commit": (put("main", "convex_head", "commit"), "commit is 'main'"),
    "date": (put("yesterday", "convex_head", "created"), "created is 'yesterday'"),
    "version": (put({"torch": 2}, "convex_head", "versions"), "the version of torch is 2"),
    "hardware": (put(0, "convex_head", "hardware", "cpus"), "cpus is 0"),
    "no hash": (put(None, "convex_head", "model", "fingerprint"), "the model's fingerprint is None"),
    "classes": (put(11, "convex_head", "dataset", "num_classes"), "other sizes or classes"),
    "picture": (put("data:image/png;base64,AAAA", *PICTURE, "clean"), "pairs of PNG pictures"),
    "picture's class": (put(3, *PICTURE, "clean_prediction"), "pairs of PNG pictures"),
    "schema": (put(2, "convex_head", "schema"), "schema 1"),
    "number": (put(float("nan"), "convex_head", "seconds"), "no JSON number"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_entry_is_refused(copied, kind, tmp_path):
    change, message = CHANGES[kind]
    board = tmp_path / "board"
    shutil.copytree(copied, board)
    path = board / "entries" / f"{ENTRY}.json"
    entry = json.loads(path.read_text())
    record = entry["convex_head"]
    clean, robust, skipped = (
        record["clean_correct"],
        record["robust_correct"],
        record["attacks"]["autoattack"]["skipped"],
    )
    message = message.format(clean=clean + 1, robust=robust + 1, skipped=skipped + 1, published=clean)
    if kind == "weights' hash":  # that of another model of the board
        other = json.loads((board / "entries" / "digits-sam-own-linf-0-1.json").read_text())
        put(other["convex_head"]["model"]["fingerprint"], "convex_head", "model", "fingerprint")(entry)
    else:
        change(entry)
    path.write_text(json.dumps(entry))
    result = run("leaderboard", "check", "--dir", board, "--json", code=1)
    found = json.loads(result.stdout)
    assert found["consistent"] is False and any(message in problem for problem in found["problems"]), found
    assert all(line.startswith("error: ") and "digits-" in line for line in result.stderr.splitlines())
    assert len(result.stderr.splitlines()) == len(found["problems"])


def test_a_wider_radius_that_does_not_pay_may_be_passed_over(copied, tmp_path):
    board = tmp_path / "board"
    shutil.copytree(copied, board)
    path = board / "entries" / f"{ENTRY}.json"
    entry = json.loads(path.read_text())
    put(False, "convex_head", "metadata", "path", 9, "allowed")(entry)
    path.write_text(json.dumps(entry, indent=2))
    run("leaderboard", "build", "--dir", board, "--quiet")
    run("leaderboard", "check", "--dir", board)


def test_commands_say_in_json_what_they_did(copied, tmp_path):
    board = tmp_path / "board"
    shutil.copytree(copied, board)
    count = len(list((board / "entries").iterdir()))
    found = json.loads(run("leaderboard", "check", "--dir", board, "--json").stdout)
    assert found == {"entries": count, "consistent": True, "problems": [], "notes": []}
    result = run("leaderboard", "build", "--dir", board, "--json")
    written = [str(board / name) for name in ("index.html", "LEADERBOARD.md")]
    assert json.loads(result.stdout) == {"entries": count, "written": written} and result.stderr == ""
    record = tmp_path / "record.json"
    payload = json.loads((board / "entries" / f"{ENTRY}.json").read_text())["convex_head"]
    record.write_text(json.dumps(payload | {"name": "mine"}))
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(payload | {"name": "bad", "flags": ["loss"], "flag_details": {"loss": "0"}}))
    found = json.loads(run("leaderboard", "add", record, bad, "--dir", board, "--json", code=1).stdout)
    assert found["added"] == ["digits-mine-linf-0-1"] and "loss" in found["refused"][0]
    assert found["written"][1:] == written
    listed = json.loads(run("leaderboard", "export", "--dir", board, "--json").stdout)
    assert len(listed) == count + 1 and {"name", "eps", "autoattack_acc"} <= set(listed[0])
    left = run("leaderboard", "export", "--dir", board, "--robustbench", tmp_path / "rb", "--json")
    assert len(json.loads(left.stdout)["left_out"]) == count + 1 and left.stderr == ""
    result = run("report", record, "-o", tmp_path / "r.tex", "--json")
    expected = {"written": str(tmp_path / "r.tex"), "records": ["mine"], "flagged": []}
    assert json.loads(result.stdout) == expected and result.stderr == ""


def test_add_refuses_what_contradicts_the_board(copied, tmp_path):
    board = tmp_path / "board"
    shutil.copytree(copied, board)
    payload = json.loads((board / "entries" / f"{ENTRY}.json").read_text())["convex_head"]
    payload |= {"name": "other images", "dataset": payload["dataset"] | {"fingerprint": "1" * 64}}
    (tmp_path / "r.json").write_text(json.dumps(payload))
    result = run("leaderboard", "add", tmp_path / "r.json", "--dir", board, code=1)
    assert "give its dataset another name" in result.stderr
    run("leaderboard", "check", "--dir", board)
