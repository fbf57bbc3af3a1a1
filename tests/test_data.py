"""Datasets: shapes, fixed splits and draws, file formats, and every way in which data can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from convex_head import data_sources, errors
from convex_head.data import Dataset, as_pair, load_dataset, register_dataset
from convex_head.data_sources import DEBIAN_FASHION_MNIST, Examples, read_idx

needs_fashion_mnist = pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed"
)


def toy(n: int = 12, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    return Dataset(torch.rand(n, 1, 2, 2, generator=generator), labels, "toy", "test", ("a", "b", "c"))


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


# ---- sklearn's datasets


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "classes"),
    [("digits", (1, 8, 8), (1347, 450), 10), ("breast_cancer", (1, 1, 30), (426, 143), 2)],
)
def test_sklearn_datasets(name, shape, sizes, classes):
    pytest.importorskip("sklearn")
    train, test = load_dataset(name, split="train"), load_dataset(name)
    assert (len(train), len(test)) == sizes
    assert train.images.shape[1:] == test.images.shape[1:] == shape
    assert (train.num_classes, train.split, test.split, train.name) == (classes, "train", "test", name)
    for dataset in (train, test):
        images, labels = dataset
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == 0 and images.max() == 1
        assert set(labels.tolist()) == set(range(classes))
    # Stratified: the two splits have the same share of each class, up to rounding.
    shares = [torch.bincount(d.labels).double() / len(d) for d in (train, test)]
    torch.testing.assert_close(*shares, atol=0.005, rtol=0)


def test_digits_splits_partition_sklearns_images():
    datasets = pytest.importorskip("sklearn.datasets")
    raw = datasets.load_digits()
    ours = torch.cat([load_dataset("digits", split=split).images.flatten(1) for split in ("train", "test")])
    rows = {tuple(row) for row in (ours * 16).int().tolist()}
    assert len(ours) == len(raw.data)
    assert rows == {tuple(row) for row in raw.data.astype(int).tolist()}


def test_breast_cancer_is_scaled_by_the_train_split_only():
    pytest.importorskip("sklearn")
    train, test = load_dataset("breast_cancer", split="train"), load_dataset("breast_cancer")
    assert (train.images.amin(0) == 0).all() and (train.images.amax(0) == 1).all()
    assert not ((test.images.amin(0) == 0).all() and (test.images.amax(0) == 1).all())


def test_digits_is_the_same_everywhere():
    """Frozen by value: another sklearn or platform must not silently change a published split."""
    pytest.importorskip("sklearn")
    images, labels = load_dataset("digits")
    assert labels[:12].tolist() == [2, 0, 4, 9, 4, 1, 2, 4, 6, 7, 9, 1]
    digest = hashlib.sha256((images * 16).byte().numpy().tobytes()).hexdigest()
    assert digest.startswith("e3452c6e88f0f147")


# ---- subsets


def test_take_without_seed_is_the_first_n():
    dataset = toy()
    taken = dataset.take(5)
    assert torch.equal(taken.images, dataset.images[:5]) and torch.equal(taken.labels, dataset.labels[:5])
    assert (taken.name, taken.split, taken.classes) == ("toy", "test", ("a", "b", "c"))


def test_take_with_seed_is_stratified_nested_and_fixed():
    pytest.importorskip("sklearn")
    dataset = load_dataset("digits")
    hundred = dataset.take(100, seed=3)
    counts = torch.bincount(hundred.labels, minlength=10)
    assert counts.min() >= 9 and counts.max() <= 11
    assert torch.equal(dataset.take(100, seed=3).images, hundred.images)
    assert torch.equal(dataset.take(200, seed=3).images[:100], hundred.images)
    assert not torch.equal(dataset.take(100, seed=4).images, hundred.images)
    assert torch.equal(load_dataset("digits", n=100, seed=3).images, hundred.images)
    everything = dataset.take(len(dataset), seed=3)  # a permutation: nothing twice
    assert torch.equal(
        everything.images.flatten(1).sum(1).sort().values, dataset.images.flatten(1).sum(1).sort().values
    )


def test_take_keeps_unequal_proportions():
    labels = torch.tensor([0] * 90 + [1] * 10)
    dataset = Dataset(torch.rand(100, 1, 1, 1), labels, "toy", "test", ("a", "b"))
    for n in (10, 20, 50):
        share = dataset.take(n, seed=0).labels.float().sum().item()
        assert abs(share - n / 10) <= 1


@pytest.mark.parametrize("n", [0, -1, 13, 2.0, True, "3"])
def test_take_of_a_bad_number(n):
    with pytest.raises(errors.SubsetError, match=r"1\.\.12"):
        toy().take(n, seed=0)


def test_subset_by_positions():
    dataset = toy()
    assert torch.equal(dataset.subset([3, 1, -1]).images, dataset.images[[3, 1, 11]])
    assert torch.equal(dataset.subset(np.array([2])).labels, dataset.labels[2:3])
    with pytest.raises(errors.SubsetError, match="12 examples of toy"):
        dataset.subset([12])
    with pytest.raises(errors.SubsetError, match="integers"):
        dataset.subset(torch.tensor([0.5]))
    with pytest.raises(errors.SubsetError, match="integers"):
        dataset.subset(torch.ones(12, dtype=torch.bool))


# ---- the registry


def test_unknown_name_lists_the_names():
    with pytest.raises(errors.UnknownDatasetError, match=r"'mnits'.*breast_cancer, cifar10, cifar100, digits"):
        load_dataset("mnits")


def test_unknown_split():
    with pytest.raises(errors.SubsetError, match="'valid'"):
        load_dataset("digits", split="valid")


def test_a_new_dataset_is_one_function(monkeypatch):
    monkeypatch.setitem(data_sources.REGISTRY, "squares", None)  # so that it is removed afterwards

    @register_dataset("squares")
    def squares(split, data_dir, download, *, value=255):
        images = torch.full((4, 1, 2, 2), value, dtype=torch.uint8)
        return Examples(images, torch.tensor([0, 1, 0, 1]), ("a", "b"))

    assert load_dataset("squares").images.unique().tolist() == [1.0]
    assert load_dataset("squares", value=51, n=2).images.unique().tolist() == pytest.approx([0.2])
    with pytest.raises(TypeError, match="colour"):
        load_dataset("squares", colour=1)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("digits", "sklearn", "bench"), ("cifar10", "torchvision", "vision")]
)
def test_missing_packages_name_their_extra(monkeypatch, name, module, extra):
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to make an import fail
    with pytest.raises(errors.MissingExtraError, match=rf"needs {module}.*\.\[{extra}\]"):
        load_dataset(name)


# ---- Fashion-MNIST and idx files


@needs_fashion_mnist
def test_debian_fashion_mnist():
    test = load_dataset("fashion_mnist")
    assert test.images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert test.classes[9] == "Ankle boot" and test.labels[0] == 9
    assert test.images.max() == 1 and test.images.min() == 0


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_local_idx_folder(tmp_path, ending, layout):
    folder = tmp_path / layout
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    write_idx(folder / f"t10k-images-idx3-ubyte{ending}", images)
    write_idx(folder / f"t10k-labels-idx1-ubyte{ending}", np.arange(6))
    dataset = load_dataset("fashion_mnist", data_dir=tmp_path)
    np.testing.assert_allclose(dataset.images[:, 0].numpy() * 255, images, atol=1e-4)
    assert dataset.labels.tolist() == list(range(6))


def test_idx_files_that_contradict_each_other(tmp_path):
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((6, 28, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(5))
    with pytest.raises(errors.DatasetFormatError, match=r"one image a label.*\(6, 28, 28\) and \(5,\)"):
        load_dataset("fashion_mnist", data_dir=tmp_path)


GOOD_IDX = b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abc"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD_IDX[:-1], "11 bytes, but has 10"),
        (GOOD_IDX + b"x", "11 bytes, but has 12"),
        (GOOD_IDX[:6], "0x00000801"),
        (b"\0\0\x0d\x01" + GOOD_IDX[4:], "0x00000d01"),
        (b"\0\0\x08\x00", "0x00000800"),
        (b"", "starts with 0x000008"),
        (b"<html>404</html>", "0x3c68746d"),
        (gzip.compress(GOOD_IDX, mtime=0)[:-9], "damaged gzip"),
        (b"\x1f\x8b" + b"\0" * 20, "damaged gzip"),
    ],
)
def test_damaged_idx_files(tmp_path, content, message):
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(errors.DatasetFormatError, match=message):
        read_idx(path)


def test_missing_fashion_mnist_names_three_ways(tmp_path):
    with pytest.raises(
        errors.DatasetNotFoundError, match=r"\(1\).*dataset-fashion-mnist.*\(2\).*data_dir.*\(3\).*download"
    ):
        load_dataset("fashion_mnist", data_dir=tmp_path)


# ---- CIFAR and folders


def fake_cifar10(monkeypatch, root, n=4):
    """A CIFAR-10 folder of four images whose checksums torchvision is told to expect."""
    cifar = pytest.importorskip("torchvision.datasets").CIFAR10
    folder = root / cifar.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    files = {"test_batch": {"data": pixels.reshape(n, -1), "labels": list(range(n))}}
    files["batches.meta"] = {"label_names": [f"class{i}" for i in range(10)]}
    checksums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "train_list", [])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": checksums["batches.meta"]})
    return folder, pixels


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_folder(monkeypatch, tmp_path, inside):
    folder, pixels = fake_cifar10(monkeypatch, tmp_path)
    dataset = load_dataset("cifar10", data_dir=folder if inside else tmp_path, n=3)
    np.testing.assert_allclose(dataset.images.numpy() * 255, pixels[:3], atol=1e-4)
    assert dataset.labels.tolist() == [0, 1, 2] and dataset.classes[0] == "class0"


def test_damaged_cifar10_is_refused(monkeypatch, tmp_path):
    folder, _ = fake_cifar10(monkeypatch, tmp_path)
    with (folder / "test_batch").open("ab") as file:
        file.write(b"x")
    with pytest.raises(errors.DatasetNotFoundError, match="intact"):
        load_dataset("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_names_three_ways(tmp_path, name):
    pytest.importorskip("torchvision")
    with pytest.raises(errors.DatasetNotFoundError, match=rf"{name}.*\(1\).*\(2\).*data_dir.*\(3\).*download=True"):
        load_dataset(name, data_dir=tmp_path)


def save_pictures(root, sizes, split=""):
    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for label, size in enumerate(sizes):
        folder = root / split / ("ant", "bee")[label % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image_module.new("RGB", size, (label * 51, 0, 255)).save(folder / f"{label}.png")


def test_picture_folder(tmp_path):
    save_pictures(tmp_path, [(4, 6)] * 4)
    dataset = load_dataset("folder", data_dir=tmp_path)
    assert dataset.images.shape == (4, 3, 6, 4)
    assert (dataset.classes, dataset.split) == (("ant", "bee"), "all")
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.images[:, 0, 0, 0].tolist() == pytest.approx([0, 0.4, 0.2, 0.6])
    assert (dataset.images[:, 2] == 1).all()


def test_picture_folder_with_splits_and_resize(tmp_path):
    save_pictures(tmp_path, [(8, 8), (12, 8)], split="test")
    save_pictures(tmp_path, [(8, 8)] * 4, split="train")
    assert len(load_dataset("folder", data_dir=tmp_path, split="train")) == 4
    with pytest.raises(errors.DatasetFormatError, match=r"\(8, 8\) and \(8, 12\).*resize"):
        load_dataset("folder", data_dir=tmp_path)
    resized = load_dataset("folder", data_dir=tmp_path, resize=5)
    assert resized.images.shape == (2, 3, 5, 5) and resized.split == "test"


def test_picture_folder_faults(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(errors.DatasetNotFoundError, match="data_dir"):
        load_dataset("folder")
    with pytest.raises(errors.DatasetNotFoundError, match="<class>"):
        load_dataset("folder", data_dir=tmp_path)
    save_pictures(tmp_path, [(4, 4)])
    (tmp_path / "ant" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(errors.DatasetFormatError, match="cannot be read"):
        load_dataset("folder", data_dir=tmp_path)


# ---- as_pair


@pytest.mark.parametrize("form", ["dataset", "tuple", "list", "numpy", "loader"])
def test_every_form_of_data_gives_the_same_pair(form):
    dataset = toy()
    data = {
        "dataset": dataset,
        "tuple": (dataset.images, dataset.labels),
        "list": [dataset.images.double(), dataset.labels.int()],
        "numpy": (dataset.images.numpy(), dataset.labels.numpy()),
        "loader": DataLoader(TensorDataset(dataset.images, dataset.labels), batch_size=5),
    }[form]
    for kwargs in ({}, {"n": 5}, {"n": 5, "seed": 1}):
        images, labels = as_pair(data, **kwargs)
        expected = dataset.take(kwargs["n"], kwargs.get("seed")) if kwargs else dataset
        assert torch.equal(images, expected.images) and torch.equal(labels, expected.labels)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64


def test_as_pair_of_a_name_passes_options_on():
    pytest.importorskip("sklearn")
    images, labels = as_pair("digits", split="train", n=7, seed=0)
    expected = load_dataset("digits", split="train").take(7, 0)
    assert torch.equal(images, expected.images) and torch.equal(labels, expected.labels)
    with pytest.raises(errors.InputError, match="split applies to a dataset name only"):
        as_pair(toy(), split="train")


IMAGES = torch.rand(4, 1, 2, 2)


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (IMAGES, torch.tensor([0.0, 1, 0, 1]), errors.LabelTypeError, "float32"),
        (IMAGES, torch.tensor([True, False, True, True]), errors.LabelTypeError, "bool"),
        (IMAGES, ["a", "b", "c", "d"], errors.LabelTypeError, "integers"),
        (IMAGES, torch.eye(4, dtype=torch.int64), errors.LabelShapeError, r"\(4, 4\)"),
        (IMAGES, torch.tensor([0, 1, 0]), errors.LabelShapeError, "4 images, 3 labels"),
        (IMAGES, torch.tensor([0, -1, 0, 1]), errors.LabelRangeError, "found -1"),
        (IMAGES[:0], torch.zeros(0, dtype=torch.int64), errors.EmptyDataError, "at least one"),
        ((IMAGES * 255).byte(), torch.zeros(4, dtype=torch.int64), errors.ImageError, r"uint8.*/ 255"),
        (torch.rand(4), torch.zeros(4, dtype=torch.int64), errors.ImageError, r"\(4,\)"),
        ("images", torch.zeros(4, dtype=torch.int64), errors.ImageError, "tensor or an array"),
        (IMAGES * 255, torch.zeros(4, dtype=torch.int64), errors.ImageRangeError, r"in \[0, 1\]"),
        (IMAGES * 255, torch.zeros(4, dtype=torch.int64), errors.ModelContractError, r"in \[0, 1\]"),
        (IMAGES - 1, torch.zeros(4, dtype=torch.int64), errors.ImageRangeError, r"in \[0, 1\]"),
        (IMAGES * torch.nan, torch.zeros(4, dtype=torch.int64), errors.ImageRangeError, "nan"),
    ],
)
def test_bad_pairs(images, labels, error, message):
    with pytest.raises(error, match=message):
        as_pair((images, labels))


@pytest.mark.parametrize("data", [None, 3, (1, 2, 3), torch.rand(4, 1, 2, 2)])
def test_data_of_unknown_form(data):
    with pytest.raises(errors.InputError, match="dataset name"):
        as_pair(data)


def test_loaders_that_give_nothing_or_no_pairs():
    with pytest.raises(errors.InputError, match="pairs"):
        as_pair(DataLoader(IMAGES, batch_size=2))
    with pytest.raises(errors.EmptyDataError, match="DataLoader gave none"):
        as_pair(DataLoader(TensorDataset(IMAGES[:0], torch.zeros(0)), batch_size=2))


def test_dataset_checks_itself():
    with pytest.raises(errors.LabelRangeError, match="below the number of classes 2, found 2"):
        Dataset(IMAGES, torch.tensor([0, 1, 2, 0]), "toy", "test", ("a", "b"))
    with pytest.raises(errors.ImageError, match=r"\(4, 4\)"):
        Dataset(torch.rand(4, 4), torch.tensor([0, 1, 1, 0]), "toy", "test", ("a", "b"))
