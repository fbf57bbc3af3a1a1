"""The head as an nn.Module: states, files, precisions, compilers, exporters, gradients."""

import copy
import io
import json
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from convex_head import ConvexRobustHead
from convex_head.errors import NotFittedError, RecordError
from convex_head.solvers import Status

RNG = np.random.default_rng(0)
LABELS = RNG.permutation(40) % 3
FEATURES = 2.0 + RNG.normal(size=(3, 4))[LABELS] + 0.7 * RNG.normal(size=(40, 4))
SETTINGS: dict[str, Any] = {
    "radius": 0.25,
    "reg": 0.02,
    "loss": "multi_margin",
    "coefficients": (0.1, 0.4, 0.5),
    "standardize": True,
}


@pytest.fixture(scope="module", params=[2, 3])
def head(request: pytest.FixtureRequest) -> ConvexRobustHead:
    classes = request.param
    return ConvexRobustHead(4, classes, **SETTINGS).fit(FEATURES, LABELS % classes, tol=0.05)


X = torch.from_numpy(FEATURES).float()


def same(one: ConvexRobustHead, other: ConvexRobustHead) -> None:
    """Same logits, certificates and settings."""
    labels = LABELS % one.num_classes
    assert torch.equal(one(X), other(X))
    assert torch.equal(one.worst_case_margin(X, labels), other.worst_case_margin(X, labels))
    assert torch.equal(one.distance_to_boundary(X), other.distance_to_boundary(X))
    assert repr(one) == repr(other) and one.coefficients == other.coefficients


def test_strict_state_dict_into_a_fresh_head(head: ConvexRobustHead) -> None:
    fresh = ConvexRobustHead(4, head.num_classes, **SETTINGS)
    result = fresh.load_state_dict(head.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    same(head, fresh)
    smaller = ConvexRobustHead(4, head.num_classes, **SETTINGS)
    state = head.state_dict()
    smaller.load_state_dict(state | {"directions": state["directions"][:1], "readout": state["readout"][:, :1]})
    assert smaller.directions.shape == (1, 4)
    smaller.load_state_dict(state)
    same(head, smaller)
    parameters = list(smaller.parameters())
    smaller.load_state_dict(state)
    assert all(ours is theirs for ours, theirs in zip(smaller.parameters(), parameters, strict=True))


def test_state_dict_within_a_model(head: ConvexRobustHead) -> None:
    model = nn.Sequential(nn.Linear(4, 4), head)
    fresh = nn.Sequential(nn.Linear(4, 4), ConvexRobustHead(4, head.num_classes, **SETTINGS))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(X), fresh(X))


def test_a_state_of_another_shape_is_refused(head: ConvexRobustHead) -> None:
    for other in (ConvexRobustHead(5, head.num_classes), ConvexRobustHead(4, head.num_classes + 2)):
        with pytest.raises(RuntimeError, match="size mismatch for"):
            other.load_state_dict(head.state_dict())
        with pytest.raises(NotFittedError):
            other(torch.zeros(1, other.in_features))
    with pytest.raises(RuntimeError, match="Missing key"):
        ConvexRobustHead(4, head.num_classes).load_state_dict({})


def test_copies(head: ConvexRobustHead) -> None:
    for clone in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        same(head, clone)
        assert clone.result_.gap == head.result_.gap
        with torch.no_grad():
            clone.readout.zero_()
        assert not torch.equal(clone(X), head(X))
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    same(head, torch.load(file, weights_only=False))
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    fresh = ConvexRobustHead(4, head.num_classes, **SETTINGS)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same(head, fresh)


# -- safetensors ------------------------------------------------------------------------------------------------


def test_file_round_trip(head: ConvexRobustHead, tmp_path: Path) -> None:
    path = head.save(tmp_path / "head.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]
    loaded = ConvexRobustHead.load(path)
    same(head, loaded)
    for name in ("status", "primal", "dual", "gap", "neurons", "seconds", "iterations", "message", "solver"):
        assert getattr(loaded.result_, name) == getattr(head.result_, name)
    assert loaded.result_ is not None and isinstance(loaded.result_.status, Status)
    again = ConvexRobustHead.load(str(loaded.save(str(path))))
    same(head, again)
    # Any reader of the format sees the weights.
    torch.testing.assert_close(load_file(path)["readout"], head.readout.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_files_keep_the_precision(head: ConvexRobustHead, dtype: torch.dtype, tmp_path: Path) -> None:
    other = copy.deepcopy(head).to(dtype)
    loaded = ConvexRobustHead.load(other.save(tmp_path / "h"))
    assert loaded.directions.dtype == dtype
    same(other, loaded)


def test_a_head_without_certificate_is_saved_too(head: ConvexRobustHead, tmp_path: Path) -> None:
    fresh = ConvexRobustHead(4, head.num_classes, **SETTINGS)
    with pytest.raises(NotFittedError):
        fresh.save(tmp_path / "h")
    assert not list(tmp_path.iterdir())
    fresh.load_state_dict(head.state_dict())
    assert ConvexRobustHead.load(fresh.save(tmp_path / "h")).result_ is None


def edit(path: Path, tensors: dict[str, Any] | None = None, **metadata: str | None) -> None:
    """Rewrite a head file with other tensors or metadata (None removes an entry)."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    values = json.loads(raw[8 : 8 + size])["__metadata__"] | metadata
    save_file(load_file(path) if tensors is None else tensors, path, {k: v for k, v in values.items() if v is not None})


def damage(path: Path, kind: str) -> None:
    raw = path.read_bytes()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(raw[: len(raw) // 2])
        case "text":
            path.write_text("not a head")
        case "other format":
            edit(path, format="convex_head.head/99")
        case "no metadata":
            save_file(load_file(path), path)
        case "no settings":
            edit(path, settings=None)
        case "broken settings":
            edit(path, settings="{")
        case "unknown setting":
            edit(path, settings='{"in_features": 4, "colour": 1}')
        case "bad setting":
            edit(path, settings=json.dumps({"in_features": 4, "num_classes": 1, "coefficients": [1, 1, 1]}))
        case "broken certificate":
            edit(path, certificate='{"status": "excellent"}')
        case "no certificate":
            edit(path, certificate=None)
        case "odd settings":
            edit(path, settings="[4, 3]")
        case "no readout":
            edit(path, {k: v for k, v in load_file(path).items() if k != "readout"})
        case "no directions":
            edit(path, {k: v for k, v in load_file(path).items() if k != "directions"})
        case "wrong shape":
            edit(path, load_file(path) | {"readout": torch.zeros(9, 9)})


KINDS = ("empty", "cut", "text", "other format", "no metadata", "no settings", "broken settings", "unknown setting")
KINDS += (
    "bad setting",
    "broken certificate",
    "no certificate",
    "odd settings",
    "no readout",
    "no directions",
    "wrong shape",
)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_named(head: ConvexRobustHead, kind: str, tmp_path: Path) -> None:
    path = head.save(tmp_path / "head.safetensors")
    damage(path, kind)
    with pytest.raises(RecordError, match=r"head\.safetensors must .*; found .*\. Save it again"):
        ConvexRobustHead.load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no head file at .*nothing\. Save one with head\.save"):
        ConvexRobustHead.load(tmp_path / "nothing")


# -- precisions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float16, 2e-2), (torch.bfloat16, 0.15)])
def test_other_precisions(head: ConvexRobustHead, dtype: torch.dtype, tol: float) -> None:
    other = copy.deepcopy(head).to(dtype)
    logits = other(X)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), head(X), atol=tol, rtol=tol)
    # Exactness holds for the rounded head: its own certificate at its own points, in float64.
    labels = LABELS % head.num_classes
    wide = copy.deepcopy(other).double()
    worst = other.worst_case_margin(FEATURES, labels)
    torch.testing.assert_close(worst, wide.worst_case_margin(wide.worst_case_features(FEATURES, labels), labels, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_head(head: ConvexRobustHead, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        logits = head(X)
        rounded = head(X.to(dtype))
    assert logits.dtype == rounded.dtype == torch.float32
    assert torch.equal(logits, head(X))
    assert torch.equal(rounded, head(X.to(dtype).float()))


# -- compilers and exporters ------------------------------------------------------------------------------------


def test_compile(head: ConvexRobustHead) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), head(X))
    x = X.clone().requires_grad_()
    compiled(x).square().sum().backward()
    y = X.clone().requires_grad_()
    head(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_onnx(head: ConvexRobustHead, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "head.onnx"
    rows = torch.export.Dim("rows")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(head).eval(), (X[:5],), path, dynamo=True, dynamic_shapes=({0: rows},), verbose=False
        )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(logits, head(X).numpy(), rtol=1e-4, atol=1e-5)


def test_data_parallel_and_scripting_helpers(head: ConvexRobustHead) -> None:
    torch.testing.assert_close(nn.DataParallel(head)(X), head(X))
    exported = torch.export.export(head, (X,))
    torch.testing.assert_close(exported.module()(X), head(X))
    batched = torch.func.vmap(lambda row: head(row[None])[0])(X)
    torch.testing.assert_close(batched, head(X))


# -- gradients --------------------------------------------------------------------------------------------------


def test_gradients_reach_the_features_only(head: ConvexRobustHead) -> None:
    assert not any(p.requires_grad for p in head.parameters())
    assert next(head.parameters()).device == X.device
    double = copy.deepcopy(head).double()
    x = X[:3].double().requires_grad_()
    assert torch.autograd.gradcheck(double, (x,))
    assert torch.autograd.gradgradcheck(double, (x,))
    head.train()
    assert torch.equal(head(X), head.eval()(X))


def test_queries_need_no_gradient_and_leave_none(head: ConvexRobustHead) -> None:
    labels = torch.from_numpy(LABELS % head.num_classes)
    x = X.clone().requires_grad_()
    unfrozen = copy.deepcopy(head).requires_grad_()
    results = (
        unfrozen.worst_case_margin(x, labels),
        unfrozen.worst_case_features(x, labels),
        unfrozen.distance_to_boundary(x),
    )
    assert not any(r.requires_grad for r in results)
    with torch.inference_mode():
        torch.testing.assert_close(head.worst_case_margin(X, labels), results[0])
        torch.testing.assert_close(head.distance_to_boundary(X), results[2])


def test_description(head: ConvexRobustHead) -> None:
    text = repr(head)
    for part in ("4, ", "activation='polynomial'", "radius=0.25", "reg=0.02", "loss='multi_margin'", "neurons="):
        assert part in text
