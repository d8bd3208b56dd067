"""Fashion-MNIST from idx files, as Debian's package or torchvision's folder has them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .data_module import ImageDataModule, TensorImages, byte_transform, stratified_split
from .layers import at_least

_MEAN, _STD = 0.2860, 0.3530
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FOLDERS = ("", "FashionMNIST/raw", "raw")
"""Where below ``root`` the four files may be; the second is torchvision's."""


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 images of clothes to train on, 10,000 to test, ten classes.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load; the set is in memory, so 0 is fastest.
        image_size: Side of the images, None for 28; up to 32 there is a black border, else they are interpolated.
        seed: Of the split into training and validation.
        root: Folder with the four idx files, gzipped or not, or torchvision's folder that has ``FashionMNIST/raw``.
            None: ``data`` in the current folder if it has them, else where Debian's ``dataset-fashion-mnist`` is.
        val_size: Training images kept for validation, every class alike.
        max_shift: Pixels by which a training image is shifted at random at most; 0 for none.
        flip: Whether training images are mirrored at random.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: In ``prepare_data`` or ``setup``: the files aren't there, or aren't idx files.

    Example:
        >>> data = FashionMNISTDataModule(batch_size=100)
        >>> data.num_classes, data.num_channels, data.image_size
        (10, 1, 28)

    """

    num_classes = 10
    num_channels = 1

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        seed: int = 0,
        root: str | Path | None = None,
        val_size: int = 5000,
        max_shift: int = 2,
        flip: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, seed, native_size=28)
        at_least("val_size", val_size, 1)
        at_least("max_shift", max_shift, 0)
        self.root, self.val_size, self.max_shift, self.flip = root, val_size, max_shift, flip

    def prepare_data(self) -> None:
        """Check that the files are there, before anything else starts."""
        for split in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                self._find(f"{split}-{kind}-ubyte")

    def setup(self, stage: str | None = None) -> None:
        """Read the files, once.

        Args:
            stage: Any; the whole set is read.

        """
        if hasattr(self, "train_set"):
            return
        images, labels = self._read("train")
        val, train = stratified_split(labels, [self.val_size], self.seed)
        plain = byte_transform(self.image_size, _MEAN, _STD)
        augmented = byte_transform(self.image_size, _MEAN, _STD, self.max_shift, self.flip)
        self.train_set = TensorImages(images[train], labels[train], augmented)
        self.val_set = TensorImages(images[val], labels[val], plain)
        self.test_set = TensorImages(*self._read("t10k"), plain)

    def _find(self, name: str) -> Path:
        roots = [Path("data"), _DEBIAN] if self.root is None else [Path(self.root)]
        for root in roots:
            for folder in _FOLDERS:
                for suffix in ("", ".gz"):
                    path = root / folder / (name + suffix)
                    if path.is_file():
                        return path
        where = " or ".join(str(root) for root in roots)
        raise MisconfigurationException(
            f"Fashion-MNIST's {name}[.gz] isn't in {where} (nor in FashionMNIST/raw below): "
            "apt-get install dataset-fashion-mnist, or give root=..."
        )

    def _read(self, split: str) -> tuple[Tensor, Tensor]:
        images = read_idx(self._find(f"{split}-images-idx3-ubyte"))
        labels = read_idx(self._find(f"{split}-labels-idx1-ubyte"))
        return images.unsqueeze(1), labels.long()


def read_idx(path: Path) -> Tensor:
    """Read an idx file of bytes: two zeros, a type, the number of dimensions, their sizes, the values.

    Args:
        path: The file; gunzipped if it ends in ``.gz``.

    Returns:
        A uint8 tensor.

    Raises:
        MisconfigurationException: It isn't an idx file of bytes, or it is cut short.

    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise MisconfigurationException(f"{path} isn't an idx file of bytes; get the set again")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">i4").tolist()
    values = np.frombuffer(content, np.uint8, offset=min(header, len(content)))
    if len(shape) != content[3] or values.size != np.prod(shape, dtype=np.int64):
        raise MisconfigurationException(f"{path} holds {values.size} values, not {shape}; get the set again")
    return torch.from_numpy(values.reshape(shape).copy())
