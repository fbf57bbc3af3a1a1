"""The command line as a user runs it: outputs, exit codes, one-line errors."""

import json
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from convex_head import errors
from convex_head.baselines import preact_resnet_small
from convex_head.bench import BenchSettings
from convex_head.cli import app
from convex_head.doctor import examine
from convex_head.feature_files import read_features
from convex_head.head import ConvexRobustHead
from convex_head.model_specs import build_model, load_weights
from convex_head.records import EvalRecord

RUNNER = CliRunner()


def run(*arguments, code=0):
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """An importable module ``zoo`` with a small digits network."""
    (tmp_path / "zoo.py").write_text(
        "import torch\n"
        "from convex_head.baselines import preact_resnet_small\n"
        "def net(num_classes=10):\n"
        "    torch.manual_seed(0)\n"
        "    return preact_resnet_small(num_classes, 1, widths=(4, 8))\n"
        "def loud():\n"
        "    return torch.nn.Sequential(net(), Scale())\n"
        "class Scale(torch.nn.Module):\n"
        "    def forward(self, x): return x * 1e8\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("zoo", None)


@pytest.fixture
def features(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5))
    path = tmp_path / "f.npz"
    np.savez(path, features=x, labels=(x[:, 0] > 0).astype(int))
    return path


ATTACK = ("--attack", "apgd-ce", "--eps", "0.05", "--dataset", "digits", "--n-ex", 12, "--quiet")


def test_help_documents_commands_and_exit_codes():
    text = run("--help").output
    for command in ("bench", "fit", "evaluate", "leaderboard", "doctor"):
        assert command in text
    assert "130" in text and "interrupted" in text


@pytest.mark.parametrize("arguments", [("nonsense",), ("evaluate",), ("bench", "--n-ex", "many")])
def test_wrong_usage_is_exit_code_2(arguments):
    run(*arguments, code=2)


def test_evaluate_writes_the_record_it_prints(factory, tmp_path):
    out = tmp_path / "record.json"
    result = run("evaluate", "--model", "zoo:net", *ATTACK, "--json", "-o", out)
    record = EvalRecord.load(out)
    assert json.loads(result.stdout) == record.to_dict()
    assert record.n == 12 and record.threat.eps == 0.05 and record.name == "zoo:net"
    table = run("evaluate", "--model", "zoo:net", *ATTACK)
    assert f"{100 * record.clean_accuracy:.1f}" in table.stdout and table.stderr == ""


def test_evaluate_takes_robustbench_spellings(factory):
    spelled = ("--threat_model", "L2", "--n_ex", 4, "--batch_size", 2, "--data_dir", ".", "--model_dir", ".")
    result = run("evaluate", "--model_name", "zoo:net", *ATTACK, *spelled, "--json")
    payload = json.loads(result.stdout)
    assert payload["threat"]["norm"] == "L2" and payload["n"] == 4 and payload["batch_size"] == 2


@pytest.mark.parametrize("more", [(), ("--eps-curve", "0.02, 0.03", "--attack", "torchattacks:PGD(steps=2)")])
def test_the_command_in_a_record_computes_it_again(factory, tmp_path, more):
    options = ("--model_name", "zoo:net", *ATTACK, "--n_ex", 6, "--no-pretrained", *more, "--out", tmp_path / "r.json")
    run("evaluate", *options)
    record = EvalRecord.load(tmp_path / "r.json")
    program, *words = shlex.split(record.command)
    assert program == "convex-head" and words[0] == "evaluate" and "--no-pretrained" in words
    assert not {"--out", "--quiet", "--json"} & set(words)
    again = json.loads(run(*words, "--json", "--quiet").stdout)
    assert EvalRecord.from_dict(again).identity() == record.identity() and again["command"] == record.command


def test_evaluate_exits_1_on_a_flagged_record(factory):
    result = run("evaluate", "--model", "zoo:loud", *ATTACK, "--json", code=1)
    assert "logit_scale" in json.loads(result.stdout)["flags"]


def test_fit_then_evaluate_with_the_head(factory, tmp_path):
    from convex_head.data import load_dataset
    from convex_head.features import extract_features
    from convex_head.splice import replace_head

    data = load_dataset("digits", split="train", n=100, seed=0)
    net = build_model("zoo:net", num_classes=10)
    x = extract_features(replace_head(net, nn.Identity()).backbone, data.images)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", data.labels.numpy())
    head = tmp_path / "head.safetensors"
    arguments = ("--labels", tmp_path / "y.npy", "-o", head, "--radius", 0.05, "--tol", 0.1, "--quiet", "--json")
    facts = json.loads(run("fit", tmp_path / "x.npy", *arguments).stdout)
    assert facts["gap"] <= 0.1 and ConvexRobustHead.load(head).radius == 0.05
    record = json.loads(run("evaluate", "--model", "zoo:net", "--head", head, *ATTACK, "--json").stdout)
    assert record["metadata"]["head"] == "convex" and record["metadata"]["gap"] == pytest.approx(facts["gap"])


def test_fit_that_does_not_converge_is_exit_code_1(features, tmp_path):
    arguments = ("-o", tmp_path / "h.safetensors", "--tol", 1e-12, "--max-seconds", 0.2, "--json", "--quiet")
    facts = json.loads(run("fit", features, *arguments, code=1).stdout)
    assert facts["status"] != "converged" and facts["gap"] > 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--model", "zoo"), "module:factory"),
        (("evaluate", "--model", "zoo:nothing"), "cannot be found"),
        (("evaluate", "--model", "zoo:net", "--dataset", "digitz"), "digitz"),
        (("evaluate", "--model", "zoo:net", "--threat-model", "L7"), "L7"),
        (("evaluate", "--model", "zoo:net", "--attack", "pgdd"), "pgdd"),
        (("evaluate", "--model", "zoo:net", "--checkpoint", "none.pt"), "none.pt"),
        (("bench", "--eps", "two"), "two"),
        (("bench", "--eps-curve", "0.1,x"), "'x'"),
        (("bench", "--n-ex", "0"), "--n-ex is at least 1"),
        (("fit", "none.npz"), "none.npz"),
        (("leaderboard", "build", "--dir", "none"), "leaderboard add"),
        (("report", "none.json", "-o", "r.html"), "none.json"),
        (("evaluate", "--model", "zoo:net", "--attack", "fgsm", "--quiet", "--out", "/dev/null/r.json"), "/dev/null"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(factory, arguments, message):
    if arguments[0] == "evaluate" and "--dataset" not in arguments:
        arguments = (*arguments, "--dataset", "digits", "--n-ex", 4)
    result = run(*arguments, code=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    debug = run(*arguments, "--debug", code=2)
    assert "Traceback" in debug.stderr


def test_leaderboard_from_records(factory, tmp_path):
    board, out = tmp_path / "board", tmp_path / "record.json"
    run("evaluate", "--model", "zoo:net", *ATTACK, "-o", out)
    run("leaderboard", "add", out, "--dir", board, "--authors", "Me", "--quiet")
    run("leaderboard", "check", "--dir", board)
    assert "zoo:net" in (board / "LEADERBOARD.md").read_text()
    assert "exists" in run("leaderboard", "add", out, "--dir", board, code=2).stderr
    run("leaderboard", "add", out, "--dir", board, "--replace")
    (entry,) = json.loads(run("leaderboard", "export", "--dir", board).stdout)
    assert entry["name"] == "zoo:net" and entry["eps"] == "0.05"
    left = run("leaderboard", "export", "--dir", board, "--robustbench", tmp_path / "rb")
    assert "left out digits-zoo-net-linf-0-05" in left.stderr
    (board / "LEADERBOARD.md").write_text("edited by hand")
    assert "LEADERBOARD.md is not what the entries give" in run("leaderboard", "check", "--dir", board, code=1).stderr
    path = board / "entries" / "digits-zoo-net-linf-0-05.json"
    path.write_text(path.read_text().replace('"clean_acc": "', '"clean_acc": "9'))
    assert "clean_acc" in run("leaderboard", "check", "--dir", board, code=1).stderr


def test_leaderboard_refuses_flagged_records(factory, tmp_path):
    out = tmp_path / "record.json"
    run("evaluate", "--model", "zoo:loud", *ATTACK, "-o", out, code=1)
    assert "flagged" in run("leaderboard", "add", out, "--dir", tmp_path / "board", code=1).stderr
    assert not (tmp_path / "board").exists()


def test_doctor_reports_what_is_there():
    findings = {finding.subject: finding for finding in json.loads(run("doctor", "--json").stdout) and examine()}
    assert findings["torch"].state == "ok" and torch.__version__.startswith(findings["torch"].detail.split("+")[0])
    assert findings["conic solvers"].state == "ok"
    assert "conic solvers" in run("doctor").stdout


def test_doctor_names_the_extra_of_a_missing_package(monkeypatch):
    from importlib.metadata import PackageNotFoundError, version

    def without_timm(name):
        if name == "timm":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("convex_head.doctor.version", without_timm)
    (finding,) = [finding for finding in examine() if finding.subject == "timm"]
    assert finding.state == "missing" and ".[vision]" in finding.remedy


def test_checkpoints_hold_weights_only(tmp_path):
    net = preact_resnet_small(10, 1, widths=(4, 8))
    other = preact_resnet_small(10, 1, widths=(4, 8))
    prefixed = {f"module.{name}": value for name, value in net.state_dict().items()}
    for content in (net.state_dict(), {"state_dict": prefixed}, {"model": net.state_dict(), "epoch": 3}):
        torch.save(content, tmp_path / "w.pt")
        load_weights(other, tmp_path / "w.pt")
        assert torch.equal(other.fc.weight, net.fc.weight)
        nn.init.zeros_(other.fc.weight)
    torch.save(net, tmp_path / "code.pt")
    with pytest.raises(errors.CheckpointError, match="weights_only"):
        load_weights(other, tmp_path / "code.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    with pytest.raises(errors.CheckpointError, match="no state dict"):
        load_weights(other, tmp_path / "number.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(errors.CheckpointError, match="does not fit"):
        load_weights(other, tmp_path / "other.pt")


def test_weights_of_torchvision_and_timm_are_read_as_these_save_them(tmp_path):
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    nets = {
        "torchvision:resnet18": torchvision.models.resnet18(num_classes=7),
        "timm:resnet10t": timm.create_model("resnet10t", num_classes=7),
    }
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for spec, net in nets.items():
        torch.save(net.state_dict(), tmp_path / "w.pt")
        model = build_model(spec, num_classes=7, checkpoint=tmp_path / "w.pt")
        expected = net.eval()((images - mean[:, None, None]) / std[:, None, None])
        assert torch.allclose(model(images), expected, atol=1e-4)


def test_models_by_name(factory):
    assert build_model("zoo:net", num_classes=7)(torch.rand(1, 1, 8, 8)).shape == (1, 7)
    net = build_model("torchvision:resnet18", num_classes=4)
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 4) and not net.training
    tiny = build_model("timm:resnet10t", num_classes=3)
    assert tiny(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(errors.ModelSpecError, match="cannot be built"):
        build_model("torchvision:resnet1", num_classes=4)
    with pytest.raises(errors.ModelSpecError, match="neither a module"):
        build_model("zoo:number", num_classes=4)


def test_feature_files_are_checked(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.zeros((2, 2)))
    with pytest.raises(errors.FeatureFileError, match=r"missing \['labels'\]"):
        read_features(tmp_path / "a.npz")
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    with pytest.raises(errors.FeatureFileError, match="--labels"):
        read_features(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.zeros(2))
    with pytest.raises(errors.FeatureFileError, match="labels integers"):
        read_features(tmp_path / "x.npy", tmp_path / "y.npy")
    np.savez(tmp_path / "o.npz", features=np.array([{}]), labels=np.zeros(1, int))
    with pytest.raises(errors.FeatureFileError, match="pickle"):
        read_features(tmp_path / "o.npz")


def test_bench_quick(tmp_path, monkeypatch):
    result = run("bench", "--quick", "--jobs", 1, "--out", tmp_path)
    assert "digits-standard-convex - digits-standard-linear" in result.stdout
    assert "done digits-standard-convex" in result.stderr
    assert "digits-standard-convex" in (tmp_path / "index.html").read_text()
    rows = json.loads(run("bench", "--quick", "--out", tmp_path, "--json", "--quiet").stdout)
    assert [row["name"] for row in rows] == ["digits-standard-linear", "digits-standard-convex"]
    # A row that fails is one line; the others are shown.
    (tmp_path / "records" / "digits-standard-convex.json").unlink()
    monkeypatch.setattr("convex_head.bench.robustify", None)
    result = run("bench", "--quick", "--jobs", 1, "--out", tmp_path, code=1)
    assert "error: digits-standard-convex: " in result.stderr and "linear" in result.stdout


def test_bench_refuses_unknown_training(tmp_path):
    result = run("bench", "--training", "sam", "--training", "magic", "--out", tmp_path, code=2)
    assert "--training is one of pgd_at, sam, standard, trades; found magic" in " ".join(result.stderr.split())
    assert BenchSettings(recipes=("trades",)).command().endswith(" --seed 0 --training trades")
    assert "--training" not in BenchSettings().command()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_bench_interrupted_keeps_what_is_done(tmp_path):
    command = [sys.executable, "-m", "convex_head", "bench", "--quick", "--out", str(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A shell's background jobs ignore SIGINT, and what they start does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    while not any("done train standard" in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(signal.SIGINT)
    stdout, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "interrupted" in rest and "rows are in" in rest and "Traceback" not in rest
    assert stdout == "" and list((tmp_path / "backbones").glob("*.pt"))


def test_warnings_are_one_line_after_the_result(features, tmp_path):
    arguments = ("fit", features, "-o", tmp_path / "h.safetensors", "--tol", 1e-12, "--max-seconds", 0.2)
    lines = run(*arguments, code=1).stderr.splitlines()
    assert [line.startswith("warning: ") for line in lines] == [False, True]
    assert "fit: gap" in lines[0] and "was not reached" in lines[1]
    assert run(*arguments, "--quiet", code=1).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "nonsense"),
        (("evaluate",), "--model"),
        (("bench", "--n-ex", "many"), "--n-ex"),
        (("bench", "--fast"), "--fast"),
        (("leaderboard", "chekc"), "chekc"),
    ],
)
def test_wrong_usage_is_one_line_with_the_next_step(arguments, message):
    (line,) = run(*arguments, code=2).stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line and "--help' lists" in line


def test_without_a_command_there_is_the_help():
    assert "Commands" in run(code=2).output and "Commands" in run("leaderboard", code=2).output


def test_a_pipe_that_closes_is_no_error(tmp_path):
    code = "import os, sys; sys.stdout.close(); os._exit(0)"
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    reader.wait()
    process = subprocess.Popen(
        [sys.executable, "-m", "convex_head", "doctor", "--json"],
        stdout=reader.stdin, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    reader.stdin.close()
    stderr = process.communicate(timeout=120)[1]
    assert "unexpected" not in stderr and process.returncode != 70


def commands():
    """(names, command) of every command of the program."""
    import typer.main

    def walk(group, names):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, (*names, name))
            else:
                yield (*names, name), command

    return list(walk(typer.main.get_command(app), ()))


def test_every_command_has_json_quiet_and_debug():
    assert len(commands()) == 10
    for names, command in commands():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet", "--debug"} <= options, names
        assert "Exit codes" in command.epilog


def test_doctor_is_silent_beside_its_result():
    done = subprocess.run(
        [sys.executable, "-m", "convex_head", "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == ""
    assert {"python", "torch"} <= {finding["subject"] for finding in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("arguments", "target", "message"),
    [
        (("evaluate", "--model", "z:n", "--dataset", "digits"), "data.load_dataset", "nothing is kept without --state"),
        (("evaluate", "--model", "zoo:net", "--state", "s"), "data.load_dataset", "what is finished is kept"),
        (("fit", "x.npz"), "feature_files.read_features", "nothing is kept without --checkpoint"),
        (("fit", "x.npz", "--checkpoint", "c"), "feature_files.read_features", "what is finished is kept"),
        (("doctor",), "doctor.examine", "interrupted"),
    ],
)
def test_an_interrupt_says_what_is_kept(arguments, target, message, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"convex_head.{target}", interrupt)
    assert message in run(*arguments, code=130).stderr
