"""The leaderboard's commands: what is published is what the entries give; add, check with weights, serve; pictures."""

import base64
import dataclasses
import json
import shlex
import struct
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from convex_head import provenance
from convex_head.cli import app
from convex_head.data import load_dataset
from convex_head.errors import EntryError, ImageError, InputError
from convex_head.examples import adversarial_examples, png_uri
from convex_head.head import ConvexRobustHead
from convex_head.history import unknown_commits
from convex_head.page_server import page_server
from convex_head.records import EvalRecord
from convex_head.report import Entry, is_bounded, load_entries, render_markdown, render_page
from convex_head.report.pictures import is_png
from convex_head.threat import ThreatModel

BOARD = Path(__file__).parents[1] / "leaderboard"
RUNNER = CliRunner()


def run(*arguments, code=0):
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def make_record(name="m", robust="11110000", eps="0.1", **fields) -> EvalRecord:
    counts = {"attempted": 8, "broken": robust.count("0"), "skipped": 0, "robust_correct": robust.count("1")}
    values = {
        "name": name,
        "model": {"class": "Net", "parameters": 3, "fingerprint": name},
        "dataset": {"name": "digits", "fingerprint": "f"},
        "threat": ThreatModel("Linf", eps),
        "n": 8,
        "clean_correct": 8,
        "robust_correct": robust.count("1"),
        "attacks": {"apgd-ce": counts},
        "clean": "1" * 8,
        "outcomes": {"apgd-ce": robust},
        "labels": (0, 1) * 4,
    }
    return EvalRecord(**{**values, **fields})


@pytest.mark.parametrize(("name", "render"), [("index.html", render_page), ("LEADERBOARD.md", render_markdown)])
def test_published_pages_are_what_the_entries_give(name, render):
    """Run 'convex-head leaderboard build' when this fails."""
    entries = load_entries(BOARD / "entries")
    assert (BOARD / name).read_text(encoding="utf-8") == render(entries)
    assert render(entries) == render(entries[::-1])


def test_published_entries_are_admissible():
    run("leaderboard", "check", "--dir", BOARD)


def test_published_entries_are_of_this_history_and_their_gaps_have_bounds():
    entries = load_entries(BOARD / "entries")
    assert not unknown_commits(entry.record.commit for entry in entries)
    assert not [entry.id for entry in entries if not is_bounded(entry.record)]


def test_published_commands_ask_for_their_entries(monkeypatch):
    """Parsed as the programs parse them: the row or cell is there, with its threat, points and attacks."""
    from benchmarks.fashion_mnist import Cell, parsed

    asked = []
    monkeypatch.setattr(
        "convex_head.bench_console.run_on_console", lambda settings, *_, **__: not asked.append(settings)
    )
    for entry in load_entries(BOARD / "entries"):
        record = entry.record
        program, *words = shlex.split(record.command)
        if program == "convex-head":
            run(*words)
            settings = asked.pop()
            assert record.name in {row.name for row in settings.rows()}
            assert (settings.threat, settings.n, settings.seed) == (record.threat, record.n, record.seed)
            assert settings.eps_curve == tuple(point["eps_text"] for point in record.curve)
            assert set(settings.attacks) <= set(record.attacks) <= {*settings.attacks, "feature-exact", "smaller-eps"}
        else:
            assert [program, *words[:2]] == ["python", "-m", "benchmarks.fashion_mnist"]
            _, plan = parsed(words[2:])
            cell = Cell(**record.metadata["cell"])
            # Networks that were trained again on another processor (benchmarks/README.md) have names of their own.
            again = "-retrained" if record.name.endswith("-retrained") else ""
            assert (cell.model + again, cell.threat, plan.n) == (record.name, record.threat, record.n)
            cells = list(plan.cells())
            if "--eps" in words:
                assert cells == [cell]
            else:  # before the option --attacks was written down
                assert record.created < "2026-11-25" and dataclasses.replace(cell, attacks="autoattack") in cells


def test_a_commit_of_another_history_is_said(tmp_path):
    """Whatever git can tell, a modified checkout is said; a commit of this history is not."""
    head = provenance.commit()
    commits = ["0" * 40 + "+", *([head.rstrip("+")] if head else [])]
    for k, commit in enumerate(commits):
        make_record(f"m{k}", commit=commit).save(tmp_path / f"{k}.json")
    files = [tmp_path / f"{k}.json" for k in range(len(commits))]
    added = json.loads(run("leaderboard", "add", *files, "--dir", tmp_path / "b", "--json").stdout)
    (note,) = added["notes"]
    assert note.startswith("digits-m0-linf-0-1: its commit 000000000000 is of a modified checkout")
    checked = run("leaderboard", "check", "--dir", tmp_path / "b")
    assert f"note: {note}" in checked.stderr
    assert head is None or unknown_commits(["1" * 40, head.rstrip("+")]) <= {"1" * 40}


def test_a_whole_bench_is_added_in_one_command(tmp_path):
    """Nine rows at two radii, one of them flagged: the others are listed, and the exit code says it."""
    board, files = tmp_path / "board", []
    for eps in ("0.1", "8/255"):
        for k in range(9):
            flagged = {"flags": ("logit_scale",), "flag_details": {"logit_scale": "1e6"}} if k == 8 else {}
            files.append(tmp_path / f"{k}-{eps.replace('/', '_')}.json")
            make_record(f"digits-row-{k}", eps=eps, **flagged).save(files[-1])
    result = run("leaderboard", "add", *files, "--dir", board, code=1)
    assert result.stderr.count("error: ") == 2 and "logit_scale: 1e6" in result.stderr
    ids = {entry.id for entry in load_entries(board / "entries")}
    assert ids == {f"digits-row-{k}-linf-{eps}" for k in range(8) for eps in ("0-1", "8-255")}
    run("leaderboard", "check", "--dir", board)
    page = (board / "index.html").read_text()
    assert page.count("<details id=") == 16 and "Accuracy against eps" in page


def test_two_records_of_one_name_and_threat_are_refused_before_anything_is_written(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    make_record("My model").save(paths[0])
    make_record("my_model", robust="11111111").save(paths[1])
    assert "second time" in run("leaderboard", "add", *paths, "--dir", tmp_path / "board", code=2).stderr
    assert not (tmp_path / "board").exists()


def test_an_empty_leaderboard_builds(tmp_path):
    run("leaderboard", "build", "--dir", tmp_path)
    run("leaderboard", "check", "--dir", tmp_path)
    assert "No entry yet" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("metadata", "ok"),
    [
        ({"objective": 2.0, "lower_bound": 1.9, "gap": 0.05}, True),
        ({"objective": 2.0, "lower_bound": 1.9, "gap": 0.001}, False),
        ({"objective": 2.0, "lower_bound": 2.5, "gap": -0.25}, False),
        ({"objective": 2.0, "lower_bound": 1.9}, False),
        ({"gap": 0.05}, False),
        ({"gap": 0.05, "objective": 2.0}, False),
    ],
)
def test_a_gap_that_is_not_that_of_its_bounds_is_refused(metadata, ok, tmp_path):
    path = tmp_path / "r.json"
    make_record(metadata=metadata).save(path)
    result = run("leaderboard", "add", path, "--dir", tmp_path / "board", code=0 if ok else 1)
    assert ok or "relative gap" in result.stderr or "cannot be recomputed" in result.stderr


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """A folder with head, features and a board with the record of that head."""
    folder = tmp_path_factory.mktemp("certified")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    head = ConvexRobustHead(6, 3, radius=0.3, reg=0.01).fit(x, y, tol=1e-2)
    head.save(folder / "head.safetensors")
    np.savez(folder / "f.npz", features=x.numpy(), labels=y.numpy())
    found = head.result_
    facts = {"gap": found.gap, "objective": found.primal, "lower_bound": found.dual, "radius": 0.3, "reg": 0.01}
    make_record("convex", metadata=facts).save(folder / "r.json")
    run("leaderboard", "add", folder / "r.json", "--dir", folder / "board", "--quiet")
    return folder


def check_weights(folder: Path, code: int, *, head="head.safetensors", features="f.npz") -> str:
    files = ("--head", folder / head, "--features", folder / features)
    result = run("leaderboard", "check", "digits-convex-linf-0-1", *files, "--dir", folder / "board", code=code)
    return " ".join(result.stderr.split())


def test_the_certificate_is_recomputed_from_the_weights(certified):
    assert "the certificate holds" in check_weights(certified, 0)


def test_other_weights_or_features_do_not_confirm_a_certificate(certified):
    head = ConvexRobustHead.load(certified / "head.safetensors")
    head.readout.data *= 1.1
    head.save(certified / "other.safetensors")
    assert "objective" in check_weights(certified, 1, head="other.safetensors")
    with np.load(certified / "f.npz") as archive:
        np.savez(certified / "g.npz", features=archive["features"][::-1], labels=archive["labels"])
    assert "objective" in check_weights(certified, 1, features="g.npz")


def test_a_claimed_gap_below_the_true_one_is_refused(certified):
    """Weights away from the optimum, with an honest objective and a claimed bound that cannot be."""
    head = ConvexRobustHead.load(certified / "head.safetensors")
    head.readout.data *= 1.5
    head.save(certified / "far.safetensors")
    with np.load(certified / "f.npz") as archive:
        problem = head.problem(archive["features"], archive["labels"])
    objective = problem.objective(head.network())
    record = EvalRecord.load(certified / "r.json")
    lie = record.metadata | {"objective": objective, "lower_bound": objective * 0.99, "gap": 0.01}
    dataclasses.replace(record, metadata=lie).save(certified / "lie.json")
    board = certified / "lies"
    run("leaderboard", "add", certified / "lie.json", "--dir", board, "--quiet")
    files = ("--head", certified / "far.safetensors", "--features", certified / "f.npz")
    result = run("leaderboard", "check", "digits-convex-linf-0-1", *files, "--dir", board, code=1)
    assert "the optimum lies between" in " ".join(result.stderr.split())


def test_a_certificate_check_needs_all_its_files(certified):
    arguments = ("leaderboard", "check", "digits-convex-linf-0-1", "--dir", certified / "board")
    assert "give all three" in run(*arguments, code=2).stderr


@pytest.fixture
def served(tmp_path):
    run("leaderboard", "build", "--dir", tmp_path, "--quiet")
    with page_server(tmp_path, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_server_is_on_the_loopback_alone(served):
    assert served.server_address[0] == "127.0.0.1"
    with urllib.request.urlopen(f"http://127.0.0.1:{served.server_port}/", timeout=10) as answer:
        assert b"<h1>Robustness leaderboard</h1>" in answer.read()
    request = urllib.request.Request(f"http://127.0.0.1:{served.server_port}/", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{served.server_port}/../../etc/passwd", timeout=10)


def test_the_server_says_why_it_does_not_start(served, tmp_path_factory):
    with pytest.raises(EntryError, match="leaderboard build"):
        page_server(tmp_path_factory.mktemp("empty"), 0)
    folder = tmp_path_factory.mktemp("second")
    (folder / "index.html").touch()
    with pytest.raises(InputError, match="choose another"):
        page_server(folder, served.server_port)


class Dark(nn.Module):
    """Class 1 where the mean is above one half: descent must darken or brighten."""

    def forward(self, images):
        bright = 40 * (images.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-bright, bright], dim=1)


def test_examples_are_the_first_right_points_and_inside_the_threat():
    images = torch.full((5, 1, 4, 4), 0.45)
    images[1], images[3] = 0.9, 0.55
    labels = torch.tensor([0, 0, 0, 1, 0])  # point 1 is wrong without attack
    found = adversarial_examples(Dark(), (images, labels), ThreatModel("Linf", "0.1"), 3)
    assert [item["label"] for item in found["images"]] == [0, 0, 1]
    assert [item["adversarial_prediction"] for item in found["images"]] == [1, 1, 0]
    weak = adversarial_examples(Dark(), (images, labels), ThreatModel("Linf", "0.01"), 1)["images"]
    assert weak[0]["adversarial_prediction"] == 0
    assert decoded(weak[0]["clean"])[0, 0, 0] == round(0.45 * 255)
    assert np.abs(decoded(weak[0]["clean"]).astype(int) - decoded(weak[0]["adversarial"])).max() <= round(2.55)


def test_pictures_need_images_and_right_points():
    with pytest.raises(ImageError, match="1 or 3 channels"):
        adversarial_examples(Dark(), (torch.rand(2, 2, 4, 4), torch.tensor([0, 1])), ThreatModel("Linf", 0.1))
    dark = (torch.zeros(2, 1, 4, 4), torch.tensor([1, 1]))
    assert adversarial_examples(Dark(), dark, ThreatModel("Linf", 0.1))["images"] == []


def decoded(uri: str) -> np.ndarray:
    """(h, w, c) pixels of an unfiltered PNG, checksums verified: written from the specification alone."""
    content = base64.b64decode(uri.partition(",")[2])
    chunks, place = {}, 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, body = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        assert struct.unpack(">I", content[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, -1)
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:].reshape(height, width, {0: 1, 2: 3}[colour])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_png_holds_the_pixels(shape):
    image = torch.rand(shape)
    expected = (image * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert (decoded(png_uri(image)) == expected).all() and is_png(png_uri(image))
    assert decoded(png_uri(torch.rand(3, 192, 96))).shape == (96, 48, 3)


def test_evaluate_stores_examples_and_the_page_shows_them(tmp_path, monkeypatch):
    (tmp_path / "dark_zoo.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    torch.manual_seed(0)\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out, board = tmp_path / "r.json", tmp_path / "board"
    options = ("--dataset", "digits", "--eps", "0.1", "--attack", "apgd-ce", "--n-ex", 60, "--quiet", "--examples", 2)
    run("evaluate", "--model", "dark_zoo:net", *options, "-o", out)
    record = EvalRecord.load(out)
    right = [k for k, letter in enumerate(record.clean) if letter == "1"][:2]
    images, labels = load_dataset("digits", split="test", n=60)
    listed = record.metadata["examples"]["images"]
    assert [item["label"] for item in listed] == labels[right].tolist()
    assert (decoded(listed[0]["clean"])[..., 0] == (images[right[0], 0] * 255).round().numpy()).all()
    run("leaderboard", "add", out, "--dir", board, "--quiet")
    page = (board / "index.html").read_text()
    assert page.count("<img ") == 4 and "for illustration only" in page
    for suffix, there in (("html", b"<img "), ("tex", b"\\toprule"), ("pdf", b"/Subtype /Image")):
        run("report", out, "--out", tmp_path / f"report.{suffix}", "--quiet")
        assert there in (tmp_path / f"report.{suffix}").read_bytes()
    run("report", out, "--out", tmp_path / "bare.html", "--no-pictures", "--quiet")
    assert "<img " not in (tmp_path / "bare.html").read_text()
    run("report", out, "--out", tmp_path / "bare.pdf", "--no-pictures", "--quiet")
    assert b"/Subtype /Image" not in (tmp_path / "bare.pdf").read_bytes()
    assert "Choose one" in run("report", out, "--out", tmp_path / "r.docx", code=2).stderr


def test_entries_keep_their_examples_through_the_disk(tmp_path):
    examples = {"attack": "a", "images": [{"clean": png_uri(torch.rand(1, 4, 4)), "label": 1}]}
    entry = Entry.from_record(make_record(metadata={"examples": examples}))
    payload = json.loads(entry.save(tmp_path).read_text())
    assert payload["convex_head"]["metadata"]["examples"] == examples
    assert "<img " not in render_page([entry])  # half a pair is not shown
