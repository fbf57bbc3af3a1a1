"""extract_features against the direct forward pass; the cache against every change and every accident."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from convex_head import errors
from convex_head.data import Dataset
from convex_head.feature_cache import cache_key
from convex_head.features import extract_features
from convex_head.splice import replace_head

CPU = torch.device("cpu")


class Net(nn.Module):
    """A backbone with every kind of content that features can depend on; counts its calls outside itself."""

    scale = 2.0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.mean = (0.5, 0.25)
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        self.register_forward_pre_hook(lambda module, args: CALLS.sizes.append(len(args[0])))

    def forward(self, images):
        return self.drop(self.bn(self.conv(images * self.scale - self.mean[0]))) + self.shift


class Calls:
    """Batch sizes the backbone was run on; an object of its own class, so no part of a key."""

    def __init__(self):
        self.sizes: list[int] = []


CALLS = Calls()


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.sizes.clear()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images():
    return torch.rand(10, 1, 5, 5, generator=torch.Generator().manual_seed(1))


def direct(net, images):
    with torch.no_grad():
        return copy.deepcopy(net).eval()(images).flatten(1)


# ---- the features


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("form", ["tensor", "dataset", "loader of pairs", "loader of images", "iterable"])
def test_equal_to_the_direct_forward_pass(tmp_path, net, images, form, cached):
    labels = torch.arange(10) % 2

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(images)

    data = {
        "tensor": images,
        "dataset": Dataset(images, labels, "toy", "test", ("a", "b")),
        "loader of pairs": DataLoader(TensorDataset(images, labels), batch_size=3),
        "loader of images": DataLoader(list(images), batch_size=4),
        "iterable": DataLoader(Stream(), batch_size=4),
    }[form]
    features = extract_features(net, data, batch_size=4, cache_dir=tmp_path if cached else None)
    assert features.dtype == torch.float32 and features.device == CPU and not features.requires_grad
    torch.testing.assert_close(features, direct(net, images))


def test_backbone_is_left_as_it_was(net, images):
    net.train()
    net.bn.eval()
    before = copy.deepcopy(net.state_dict())
    extract_features(net, images, device="cpu")
    assert net.training and net.drop.training and not net.bn.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_batches_and_progress(net, images):
    seen: list[tuple[int, int | None]] = []
    extract_features(net, images, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert CALLS.sizes == [4, 4, 2]
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_progress_bar(net, images, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    extract_features(net, images, batch_size=4, progress=True)
    shown = capsys.readouterr()
    assert "10/10 images" in shown.err and shown.out == ""
    extract_features(net, images, batch_size=4)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""


def test_half_precision_and_parameterless_backbones(net, images):
    half = extract_features(nn.Sequential(nn.Flatten(), nn.Linear(25, 2)).half(), images)
    assert half.dtype == torch.float32
    assert torch.equal(extract_features(nn.Flatten(), images), images.flatten(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_and_moves_back(net, images):
    torch.testing.assert_close(extract_features(net, images, device="cuda"), direct(net, images), rtol=1e-2, atol=1e-3)
    assert next(net.parameters()).device == CPU


# ---- the cache


def test_hit_does_not_run_the_backbone(tmp_path, net, images):
    first = extract_features(net, images, batch_size=4, cache_dir=tmp_path)
    CALLS.sizes.clear()
    loader = DataLoader(images, batch_size=3)
    for again in (images, images.clone(), loader):
        assert torch.equal(extract_features(net, again, batch_size=7, cache_dir=tmp_path), first)
    assert torch.equal(extract_features(copy.deepcopy(net), images, cache_dir=tmp_path), first)
    assert CALLS.sizes == []
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    np.testing.assert_array_equal(np.load(next(tmp_path.glob("*.npy")), mmap_mode="r"), first.numpy())


def test_writing_into_cached_features_leaves_the_file_alone(tmp_path, net, images):
    expected = extract_features(net, images)
    extract_features(net, images, cache_dir=tmp_path).zero_()
    extract_features(net, images, cache_dir=tmp_path).zero_()
    assert torch.equal(extract_features(net, images, cache_dir=tmp_path), expected)


def set_weight(net):
    net.conv.weight.data.view(-1)[0] += 1e-6


def set_statistic(net):
    net.bn.running_var.mul_(1.001)


def set_hidden_buffer(net):
    net.shift.add_(1)


def set_constant(net):
    net.mean = (0.5, 0.26)


def set_module(net):
    net.drop = nn.Identity()


def set_option(net):
    net.conv.padding = (1, 1)


def set_dtype(net):
    net.double()


def set_hook(net):
    net.bn.register_forward_hook(lambda module, args, output: output * 2)


def set_method(net):
    constant = 0.3
    net.forward = lambda images: net.conv(images - constant)


CHANGES = [set_weight, set_statistic, set_hidden_buffer, set_constant, set_module, set_option, set_dtype, set_hook]


@pytest.mark.parametrize("change", [*CHANGES, set_method])
def test_any_change_of_the_backbone_changes_the_key(net, change):
    before = cache_key(net, "data", CPU)
    assert cache_key(net, "data", CPU) == before
    assert cache_key(copy.deepcopy(net), "data", CPU) == before
    change(net)
    assert cache_key(net, "data", CPU) != before


def test_code_class_constants_data_and_device_change_the_key(net):
    def class_with(scale, body):
        namespace = {"nn": nn}
        source = f"class Same(nn.Module):\n    scale = {scale}\n    def forward(self, x):\n        return {body}\n"
        exec(source, namespace)
        return namespace["Same"]()

    keys = [
        cache_key(class_with(1.0, "x * self.scale"), "data", CPU),
        cache_key(class_with(2.0, "x * self.scale"), "data", CPU),
        cache_key(class_with(1.0, "x + self.scale"), "data", CPU),
        cache_key(class_with(1.0, "x * self.scale"), "other", CPU),
        cache_key(class_with(1.0, "x * self.scale"), "data", torch.device("cuda")),
    ]
    assert len(set(keys)) == 5
    assert cache_key(class_with(1.0, "x * self.scale"), "data", CPU) == keys[0]


def test_closures_and_their_contents_change_the_key():
    """A normalisation in a lambda, as wrappers of published models have it."""

    class Lambda(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    def normalise(mean):
        return lambda x: x - mean

    def key(mean):
        return cache_key(nn.Sequential(Lambda(normalise(mean)), nn.Flatten()), "data", CPU)

    assert key(torch.tensor([0.5])) == key(torch.tensor([0.5]))
    assert key(torch.tensor([0.5])) != key(torch.tensor([0.6]))
    assert key(0.5) != key(0.6)


def test_cut_changes_the_key(net):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    keys = {cache_key(replace_head(network, nn.Linear(4, 2), at=at).backbone, "data", CPU) for at in "1234"}
    assert len(keys) == 4


def test_changed_images_are_computed_anew(tmp_path, net, images):
    extract_features(net, images, cache_dir=tmp_path)
    for other in (images.flip(0), images[:9], images.transpose(2, 3), images.double()):
        CALLS.sizes.clear()
        torch.testing.assert_close(
            extract_features(net, other, cache_dir=tmp_path), direct(net, other.float()), check_dtype=False
        )
        assert CALLS.sizes[0] > 0


def test_key_is_the_same_in_every_process():
    """Hash seeds and addresses differ between processes; a key that knew them would never be found again."""
    script = (
        "import torch, sys\n"
        "from torch import nn\n"
        "from convex_head.feature_cache import cache_key\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if 'a' in {'a', 'b', 'c', 'dd'} else (lambda y: y + 1)(x)\n"
        "net = nn.Sequential(Net(), nn.BatchNorm2d(3), nn.TransformerEncoderLayer(4, 2), nn.Conv2d(1, 1, 1))\n"
        "for p in net.parameters(): p.data.fill_(0.5)\n"
        "net.names = {'x', 'y', 'z'}\n"
        "net.tool = object()\n"
        "net.register_forward_hook(lambda *a: None)\n"
        "print(cache_key(net, 'data', torch.device('cpu')))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(outputs[0].strip()) == 64
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_extraction_leaves_no_entry(tmp_path, net, images, error):
    def stop(done, total):
        if done >= 8:
            raise error("stopped")

    with pytest.raises(error, match="stopped"):
        extract_features(net, images, batch_size=4, cache_dir=tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []
    torch.testing.assert_close(extract_features(net, images, cache_dir=tmp_path), direct(net, images))


def test_killed_process_leaves_no_valid_entry(tmp_path):
    """A real kill in the middle of writing: nothing can clean up."""
    script = (
        "import os, signal, sys, torch\n"
        "from torch import nn\n"
        "from convex_head.features import extract_features\n"
        "def kill(done, total):\n"
        "    if done >= 8 and len(sys.argv) > 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "x = torch.arange(40.0).reshape(10, 1, 2, 2)\n"
        "print(extract_features(nn.Flatten(), x, batch_size=4, cache_dir=sys.argv[1], progress=kill).sum().item())\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path), "kill"], capture_output=True, check=False)
    assert killed.returncode == -9
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.json"))
    x = torch.arange(40.0).reshape(10, 1, 2, 2)
    assert torch.equal(extract_features(nn.Flatten(), x, cache_dir=tmp_path), x.flatten(1))


def flip_a_byte(array_path, meta_path):
    content = bytearray(array_path.read_bytes())
    content[-1] ^= 1
    array_path.write_bytes(content)


def cut_short(array_path, meta_path):
    array_path.write_bytes(array_path.read_bytes()[:-4])


def cut_to_nothing(array_path, meta_path):
    array_path.write_bytes(b"")


def other_shape(array_path, meta_path):
    np.save(array_path, np.load(array_path).reshape(-1, 1))


def other_type(array_path, meta_path):
    np.save(array_path, np.load(array_path).astype(np.float64))


def no_array(array_path, meta_path):
    array_path.unlink()


def no_description(array_path, meta_path):
    meta_path.unlink()


def half_description(array_path, meta_path):
    meta_path.write_text(meta_path.read_text()[:10])


def list_description(array_path, meta_path):
    meta_path.write_text(json.dumps([1, 2]))


DAMAGES = [flip_a_byte, cut_short, cut_to_nothing, other_shape, other_type]
DAMAGES += [no_array, no_description, half_description, list_description]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_computed_again(tmp_path, net, images, damage):
    expected = extract_features(net, images, cache_dir=tmp_path).clone()
    damage(next(tmp_path.glob("*.npy")), next(tmp_path.glob("*.json")))
    CALLS.sizes.clear()
    assert torch.equal(extract_features(net, images, cache_dir=tmp_path), expected)
    assert CALLS.sizes == [10]
    assert torch.equal(extract_features(net, images, cache_dir=tmp_path), expected)
    assert CALLS.sizes == [10]  # repaired


def test_shuffling_loader_is_refused_by_the_cache(tmp_path, net, images):
    loader = DataLoader(images, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(errors.InputError, match=r"same images.*shuffle=False"):
        extract_features(net, loader, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
