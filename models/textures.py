"""Procedural colour textures of any size and number, for work without a dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from .data_module import Batch, ImageDataModule
from .layers import at_least


class TextureDataModule(ImageDataModule):
    """Coloured stripes with noise, made when asked for: an image depends on its number and the seed and nothing else.

    A class is a direction, a frequency and two colours; an image of it has its own phase, tilt, lighting and noise.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that make images.
        image_size: Side of the images, None for 64.
        seed: Of classes and images.
        num_images: Training images.
        num_classes: Classes.
        num_val_images: Images for validation, and as many to test; None for a tenth of the training images.
        noise: Standard deviation of a pixel's noise, values being from 0 to 1.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> data = TextureDataModule(num_images=100, num_classes=4, image_size=224)
        >>> data.setup()
        >>> data.train_set[3][0].shape
        torch.Size([3, 224, 224])

    """

    num_channels = 3

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        seed: int = 0,
        num_images: int = 10_000,
        num_classes: int = 10,
        num_val_images: int | None = None,
        noise: float = 0.1,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, seed, native_size=64)
        at_least("num_images", num_images, 1)
        at_least("num_classes", num_classes, 1)
        if noise < 0:
            raise ValueError(f"noise must be 0 or more, got {noise}")
        self.num_images, self.num_classes, self.noise = num_images, num_classes, noise
        self.num_val_images = max(1, num_images // 10) if num_val_images is None else num_val_images
        at_least("num_val_images", self.num_val_images, 1)

    def setup(self, stage: str | None = None) -> None:
        """Say which numbers make the three sets; there is nothing to load.

        Args:
            stage: Any.

        """
        first_val = self.num_images
        first_test = first_val + self.num_val_images
        self.train_set = self._set(0, self.num_images)
        self.val_set = self._set(first_val, self.num_val_images)
        self.test_set = self._set(first_test, self.num_val_images)

    def _set(self, first: int, num_images: int) -> Textures:
        return Textures(first, num_images, self.num_classes, self.image_size, self.seed, self.noise)


class Textures(Dataset[Batch]):
    """The textures number ``first`` to ``first + num_images``; number n has class n modulo ``num_classes``.

    Args:
        first: Number of the first image.
        num_images: How many.
        num_classes: Classes.
        image_size: Side in pixels.
        seed: Of classes and images.
        noise: Standard deviation of a pixel's noise.

    """

    def __init__(
        self, first: int, num_images: int, num_classes: int, image_size: int, seed: int, noise: float = 0.1
    ) -> None:
        self.first, self.num_images, self.num_classes = first, num_images, num_classes
        self.image_size, self.seed, self.noise = image_size, seed, noise
        draws = torch.rand(num_classes, 8, generator=torch.Generator().manual_seed(seed))
        # Neighbouring classes differ in direction as much as they can; everything else is drawn.
        self.angles = (torch.arange(num_classes) + 0.5 * draws[:, 0]) * (math.pi / num_classes)
        self.frequencies = 2.0 + 6.0 * draws[:, 1]
        self.colours = draws[:, 2:].view(num_classes, 2, 3)

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Make a batch of images, normalised to about mean 0 and deviation 1, and their labels."""
        numbers = torch.as_tensor(indices) + self.first
        labels = numbers % self.num_classes
        size, count = self.image_size, len(numbers)
        noise = torch.empty(count, 3, size, size)
        draws = torch.empty(count, 4)
        for place, number in enumerate(numbers.tolist()):
            # Each image has a generator of its own: it is the same in any batch, order or process.
            generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_000_007 + number)
            torch.rand(4, generator=generator, out=draws[place])
            torch.randn(3, size, size, generator=generator, out=noise[place])
        phase, tilt, light, stretch = draws.T[:, :, None, None]
        angle = self.angles[labels, None, None] + 0.1 * (tilt - 0.5)
        frequency = self.frequencies[labels, None, None] * (0.9 + 0.2 * stretch)
        line = torch.arange(size) / size
        along = line[:, None] * angle.sin() + line * angle.cos()
        wave = 0.5 + 0.5 * torch.sin(2 * math.pi * (frequency * along + phase))
        dark, bright = self.colours[labels].unbind(1)
        images = torch.lerp(dark[:, :, None, None], bright[:, :, None, None], wave.unsqueeze(1))
        images = images * (0.8 + 0.4 * light.unsqueeze(1)) + self.noise * noise
        return (images - 0.5) / 0.25, labels
