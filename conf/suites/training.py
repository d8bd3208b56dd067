"""What the suites train where only the speed matters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any


def make_classifier(net_arguments: Mapping[str, Any]) -> Any:
    """An AlexNet that trains on a few images again and again, and notes when each step ended.

    Args:
        net_arguments: Arguments of :class:`squall.models.AlexNet`.

    Returns:
        A LightningModule. ``slowdown`` stretches its steps; ``ticks`` is when each ended, on the clock of all processes
        of a host; ``loader(batch_size, num_steps)`` makes its data.

    """
    import torch
    from lightning.pytorch import LightningModule
    from torch import Tensor
    from torch.utils.data import DataLoader, Dataset

    from squall.models import AlexNet

    class Images(Dataset[tuple[Tensor, Tensor]]):
        """The same few images again and again."""

        def __init__(self, images: Tensor, labels: Tensor, num_samples: int) -> None:
            self._images, self._labels, self._num_samples = images, labels, num_samples

        def __len__(self) -> int:
            return self._num_samples

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if not 0 <= index < self._num_samples:
                raise IndexError(index)
            return self._images[index % len(self._images)], self._labels[index % len(self._labels)]

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = AlexNet(**net_arguments)
            self.slowdown = 1.0
            self.ticks: list[float] = []
            self._begin = 0.0

        def loader(self, batch_size: int, num_steps: int) -> DataLoader[tuple[Tensor, Tensor]]:
            side, colours = self.net.image_size, self.net.in_channels
            generator = torch.Generator().manual_seed(1)
            images = torch.randn(batch_size, colours, side, side, generator=generator)
            labels = torch.randint(self.net.num_classes, (batch_size,), generator=generator)
            return DataLoader(Images(images, labels, num_steps * batch_size), batch_size=batch_size)

        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            self._begin = time.perf_counter()
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_after_backward(self) -> None:
            if self.slowdown > 1.0:
                time.sleep((self.slowdown - 1.0) * (time.perf_counter() - self._begin))

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            self.ticks.append(time.monotonic())  # one clock for all processes of a host

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)

    torch.manual_seed(0)
    return Classifier()
