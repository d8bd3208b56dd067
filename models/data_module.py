"""What the DataModules share: arguments, loaders, seeded splits, and a set that is served a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import random_flip, random_shift
from .layers import at_least

Batch = tuple[Tensor, Tensor]
Transform = Callable[[Tensor], Tensor]


class ImageDataModule(L.LightningDataModule):
    """Base of the DataModules: a batch is images, float (N, num_channels, image_size, image_size), and labels (N,).

    A subclass sets ``train_set``, ``val_set`` and ``test_set`` in ``setup``. Predictions are made for the test set.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load; 0 loads in the training process.
        image_size: Side of the images in pixels, None for the set's own.
        seed: Of the splits. Order and augmentation follow Torch's default generator (`lightning.seed_everything`).
        native_size: The set's own size.

    Raises:
        ValueError: ``batch_size`` or ``image_size`` is below 1, or ``num_workers`` below 0.

    """

    num_classes: int
    num_channels: int
    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int, image_size: int | None, seed: int, native_size: int) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("num_workers", num_workers, 0)
        self.image_size = native_size if image_size is None else image_size
        at_least("image_size", self.image_size, 1)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=as_is if hasattr(dataset, "__getitems__") else None,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training set in random order, augmented."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation set."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test set."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test set."""
        return self._loader(self.test_set)


class TensorImages(Dataset[Batch]):
    """Images in memory, served a whole batch at a time: one index operation, one transformation, nothing to collate.

    Args:
        images: Shape (N, C, H, W), any type.
        labels: Shape (N,).
        transform: Makes what is served of a batch of images.

    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Serve the images and labels of a batch of indices; the DataLoader asks for them so."""
        chosen = torch.as_tensor(indices)
        return self.transform(self.images[chosen]), self.labels[chosen]


def as_is(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Split a set so that each part has every class in proportion, within one image a class.

    Args:
        labels: Shape (N,).
        sizes: Sizes of the parts; what they leave is a last part.
        seed: Equal seeds make equal splits.

    Returns:
        Indices of each part, one more than ``sizes``.

    Raises:
        ValueError: The sizes leave nothing, or one is negative.

    Example:
        >>> [len(part) for part in stratified_split(torch.arange(10) % 2, [2, 2], seed=0)]
        [2, 2, 6]

    """
    rest = len(labels) - sum(sizes)
    if rest < 1 or min(sizes) < 0:
        raise ValueError(f"sizes {list(sizes)} leave nothing of {len(labels)} images; give smaller ones")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels):  # type: ignore[no-untyped-call]
        members = shuffled[labels[shuffled] == label]
        # Every class is spread evenly over the order, so that each stretch of it has every class in proportion.
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    order = shuffled[place[shuffled].argsort(stable=True)]
    return list(torch.split(order, [*sizes, rest]))


def resize(images: Tensor, size: int) -> Tensor:
    """Bring square images to ``size``: up to 32 pixels with a black border, else by interpolation.

    Args:
        images: Shape (N, C, H, H), floating point.
        size: Side of the result.

    """
    native = images.shape[-1]
    if size == native:
        return images
    if native < size <= 32:
        before = (size - native) // 2
        after = size - native - before
        return F.pad(images, (before, after, before, after))
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def prepare_bytes(images: Tensor, size: int, mean: float, std: float, max_shift: int = 0, flip: bool = False) -> Tensor:
    """Make normalised floats of bytes: scale, shift and mirror at random, resize, normalise.

    Args:
        images: Shape (N, C, H, H), uint8.
        size: Side of the result.
        mean: Mean of the set's values from 0 to 1.
        std: Standard deviation of them.
        max_shift: Largest random shift, in pixels of the original.
        flip: Whether to mirror at random.

    """
    scaled = images.float().div_(255)
    if max_shift:
        scaled = random_shift(scaled, max_shift)
    if flip:
        scaled = random_flip(scaled)
    return resize(scaled, size).sub(mean).div_(std)


def byte_transform(size: int, mean: float, std: float, max_shift: int = 0, flip: bool = False) -> Transform:
    """`prepare_bytes` with all but the images given; it travels to loading processes."""
    return partial(prepare_bytes, size=size, mean=mean, std=std, max_shift=max_shift, flip=flip)
