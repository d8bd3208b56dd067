"""A folder of images as ImageNet has it, prepared and augmented as in the 2012 paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from .augment import pca_noise, principal_colours, random_crop, random_flip
from .data_module import Batch, ImageDataModule

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class ImageFolderDataModule(ImageDataModule):
    """Images in ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``, and in ``root/test`` if there is one.

    As in Krizhevsky et al. (2012, sections 2 and 4.1) the shorter side is brought to 256, the central square of 256 is
    kept, and training sees random squares of 224 out of it, mirrored at random, with noise along the principal colours.
    Validation sees the central 224; so does testing, or with ``test_views=10`` the whole square, of which
    `ImageClassifier` with the same argument takes ten views. Other sizes keep the ratio 256 / 224.

    Args:
        root: The folder.
        batch_size: Images in a batch.
        num_workers: Processes that load; decoding takes a core or more.
        image_size: Side of the images, None for 224.
        seed: Of the sample that the principal colours are computed from.
        pca_std: Standard deviation of the lighting noise's factors; 0 for none.
        principal_colours: Eigenvalues (3,), and eigenvectors as columns (3, 3), of the colours' covariance. None: of a
            sample of the training images.
        num_pca_images: Size of that sample.
        test_views: 1, or 10 to serve squares that ten views are taken from.
        mean: Mean of each colour from 0 to 1, which is subtracted.
        std: Standard deviation of each colour, which is divided by.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: The folder hasn't this layout, or ``pillow`` is missing.

    Example:
        >>> data = ImageFolderDataModule("imagenet", batch_size=128, num_workers=8)  # doctest: +SKIP

    """

    num_channels = 3

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = None,
        seed: int = 0,
        pca_std: float = 0.1,
        principal_colours: tuple[Sequence[float], Sequence[Sequence[float]]] | None = None,
        num_pca_images: int = 256,
        test_views: int = 1,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, seed, native_size=224)
        if pca_std < 0:
            raise ValueError(f"pca_std must be 0 or more, got {pca_std}")
        if test_views not in (1, 10):
            raise ValueError(f"test_views must be 1 or 10, got {test_views}")
        self.root = Path(root)
        self.classes = find_classes(self.root / "train")
        self.num_classes = len(self.classes)
        self.square_size = round(self.image_size * 256 / 224)
        self.pca_std, self.num_pca_images, self.test_views = pca_std, num_pca_images, test_views
        self.mean, self.std = (torch.tensor(list(values)).view(3, 1, 1) for values in (mean, std))
        self._colours: tuple[Tensor, Tensor] | None = None
        if principal_colours is not None:
            eigenvalues, eigenvectors = principal_colours
            self._colours = torch.tensor(list(eigenvalues)), torch.tensor([list(row) for row in eigenvectors])

    def setup(self, stage: str | None = None) -> None:
        """List the images and, before training, compute the principal colours.

        Args:
            stage: "fit" or None needs the training images, others don't.

        """
        if stage in ("fit", None) and not hasattr(self, "train_set"):
            train = self._set("train")
            if self.pca_std:
                train.colours = self._principal_colours(train)
            train.augment = True
            self.train_set = train
        if not hasattr(self, "val_set"):
            self.val_set = self._set("val")
            test = self._set("test" if (self.root / "test").is_dir() else "val")
            test.crop = self.test_views == 1
            self.test_set = test

    def _set(self, split: str) -> FolderImages:
        files = list_images(self.root / split, self.classes)
        return FolderImages(files, self.image_size, self.square_size, self.mean, self.std, self.pca_std)

    def _principal_colours(self, images: FolderImages) -> tuple[Tensor, Tensor]:
        if self._colours is None:
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(len(images), generator=generator)[: self.num_pca_images]
            self._colours = principal_colours(torch.stack([images.square(int(index)) for index in chosen]))
        return self._colours


class FolderImages(Dataset[Batch]):
    """Image files and their labels, decoded when asked for.

    Args:
        files: Path and label of each image.
        image_size: Side of what is cut out.
        square_size: Side of the central square that it is cut out of.
        mean: Subtracted, shape (3, 1, 1).
        std: Divided by, shape (3, 1, 1).
        pca_std: Standard deviation of the lighting noise's factors.

    """

    def __init__(
        self,
        files: list[tuple[Path, int]],
        image_size: int,
        square_size: int,
        mean: Tensor,
        std: Tensor,
        pca_std: float,
    ) -> None:
        self.files, self.image_size, self.square_size = files, image_size, square_size
        self.mean, self.std, self.pca_std = mean, std, pca_std
        self.augment = False
        self.crop = True
        self.colours: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def square(self, index: int) -> Tensor:
        """Decode an image; shape (3, square_size, square_size), values from 0 to 1."""
        return load_square(self.files[index][0], self.square_size)

    def __getitem__(self, index: int) -> Batch:
        image = self.square(index)
        if self.augment:
            image = random_flip(random_crop(image, self.image_size))
            if self.colours is not None:
                image = pca_noise(image, *self.colours, std=self.pca_std)
        elif self.crop:
            start = (self.square_size - self.image_size) // 2
            image = image[:, start : start + self.image_size, start : start + self.image_size]
        return (image - self.mean) / self.std, torch.tensor(self.files[index][1])


def load_square(path: Path, size: int) -> Tensor:
    """Decode an image, bring its shorter side to ``size`` and keep the central square.

    Args:
        path: The file.
        size: Side of the square.

    Returns:
        Shape (3, size, size), values from 0 to 1.

    Raises:
        MisconfigurationException: The file can't be decoded, or ``pillow`` is missing.

    """
    image_module = _pillow()
    try:
        with image_module.open(path) as file:
            file.draft("RGB", (size, size))  # lets the JPEG decoder skip detail that resizing would throw away
            image = file.convert("RGB")
    except OSError as error:
        raise MisconfigurationException(f"{path} can't be read as an image ({error}); remove or replace it") from error
    ratio = size / min(image.size)
    width, height = (max(size, round(side * ratio)) for side in image.size)
    image = image.resize((width, height), image_module.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    square = image.crop((left, top, left + size, top + size))
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return values.permute(2, 0, 1).float().div_(255)


def find_classes(folder: Path) -> list[str]:
    """List the classes: the folders in ``folder``, sorted.

    Args:
        folder: The training images.

    Raises:
        MisconfigurationException: There are none.

    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not classes:
        raise MisconfigurationException(
            f"{folder} has no folder a class: root must hold train/<class>/*.jpg and val/<class>/*.jpg, as ImageNet "
            "does: squall data=image_folder data.root=/path/to/imagenet"
        )
    return classes


def list_images(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """List the images below ``folder/<class>``, sorted, with their class's number.

    Args:
        folder: One split.
        classes: Names in the order of their numbers.

    Raises:
        MisconfigurationException: There are no images, or a class that training hasn't.

    """
    numbers = {name: number for number, name in enumerate(classes)}
    found: list[tuple[Path, int]] = []
    for entry in find_classes(folder):
        if entry not in numbers:
            raise MisconfigurationException(f"{folder / entry} is a class without training images; remove the folder")
        paths = sorted(path for path in (folder / entry).rglob("*") if path.suffix.lower() in _SUFFIXES)
        found += [(path, numbers[entry]) for path in paths]
    if not found:
        raise MisconfigurationException(
            f"{folder} has no images ({', '.join(sorted(_SUFFIXES))}) in its classes' folders"
        )
    return found


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MisconfigurationException("Image folders need pillow, which is missing: pip install pillow") from error
    return Image
