"""Locally connected layers with untied weights, and the network that learned from images without labels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from squall.kernels import locally_connected2d, locally_connected_transpose2d

from .layers import at_least, pooled


class LocallyConnected2d(nn.Module):
    """A convolution whose weights are other ones at each place (Coates et al. 2013, section 4.1).

    Args:
        in_channels: Channels read.
        out_channels: Units at each place.
        image_size: Height and width of the images, or one number for both.
        kernel_size: Side of the windows.
        stride: Places between two windows.
        bias: Whether each unit has one.

    Raises:
        ValueError: No window fits into an image, or a count is below 1.

    Example:
        >>> LocallyConnected2d(1, 4, image_size=12, kernel_size=4, stride=2)(torch.zeros(3, 1, 12, 12)).shape
        torch.Size([3, 4, 5, 5])

    """

    num_places = 2  # slides windows over images of two dimensions
    placed_parameters = {"weight": 2, "bias": 2}  # noqa: RUF012  (how many of their first dimensions are places)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | tuple[int, int],
        kernel_size: int,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("stride", stride)):
            at_least(name, value, 1)
        at_least("image_size", min(sides), kernel_size)
        self.image_size, self.kernel_size, self.stride = sides, kernel_size, stride
        places = tuple(pooled(side, kernel_size, stride) for side in sides)
        self.weight = nn.Parameter(torch.empty(*places, out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(*places, out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as a convolution's are drawn: uniform, within one over the root of what a unit reads."""
        bound = 1 / math.sqrt(self.weight[0, 0, 0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        return locally_connected2d(x, self.weight, self.bias, self.stride)

    def extra_repr(self) -> str:
        """Show sizes as a convolution does."""
        height, width, out_channels, in_channels, *_ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, image_size={self.image_size}, places={(height, width)}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, bias={self.bias is not None}"
        )


class LocallyConnectedAutoencoder(LightningModule):
    r"""One macro-layer of the paper's network: untied filters, L2 pooling, local contrast normalisation.

    It learns from images without labels: what the filters :math:`W` say of an image has to suffice to make it again,
    and pooled responses are to be few (reconstruction ICA, Le et al. 2011, as trained by Coates et al. 2013, section
    4): the mean over pixels of :math:`\|W^T W x - x\|^2`, plus ``sparsity`` times the mean of
    :math:`\sqrt{\epsilon + \mathrm{pool}((W x)^2)}` over pooled units.

    Args:
        image_size: Side of the images.
        in_channels: Their channels.
        num_filters: Filters at each place.
        kernel_size: Side of a filter.
        stride: Places between two filters.
        pool_size: Side of the square of places over which responses of a filter are pooled, odd.
        sparsity: Weight of the second term.
        lr: Learning rate of AdamW, which falls to 0 along a cosine over the run.
        weight_decay: What images say nothing of, such as the finest detail, is to fade from the filters.

    Example:
        >>> net = LocallyConnectedAutoencoder(image_size=16, num_filters=3)
        >>> net(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 3, 5, 5])

    """

    def __init__(
        self,
        image_size: int = 16,
        in_channels: int = 1,
        num_filters: int = 8,
        kernel_size: int = 8,
        stride: int = 2,
        pool_size: int = 3,
        sparsity: float = 0.5,
        lr: float = 5e-3,
        weight_decay: float = 0.3,
    ) -> None:
        super().__init__()
        at_least("pool_size", pool_size, 1)
        if pool_size % 2 == 0:
            raise ValueError(f"pool_size must be odd, so that pooling keeps the places, got {pool_size}")
        self.filters = LocallyConnected2d(in_channels, num_filters, image_size, kernel_size, stride, bias=False)
        self.pool_size, self.sparsity, self.lr, self.weight_decay = pool_size, sparsity, lr, weight_decay
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)

    def _pool(self, squares: Tensor) -> Tensor:
        return F.avg_pool2d(squares, self.pool_size, 1, self.pool_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images: pooled responses, their local mean subtracted, over their local deviation.

        Args:
            x: Shape (N, in_channels, image_size, image_size).

        Returns:
            Shape (N, num_filters, H', W').

        """
        pooled_units = (self._pool(self.filters(x).square()) + 1e-4).sqrt()
        centred = pooled_units - self._pool(pooled_units).mean(1, keepdim=True)
        deviation = (self._pool(centred.square()).mean(1, keepdim=True) + 1e-4).sqrt()
        return centred / deviation

    def reconstruct(self, responses: Tensor) -> Tensor:
        """What the filters make of their responses: the image again, if they have learned."""
        filters = self.filters
        return locally_connected_transpose2d(responses, filters.weight, filters.image_size, filters.stride)

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both terms of the objective, the second one without its weight."""
        responses = self.filters(x)
        error = (self.reconstruct(responses) - x).square().mean()
        return error, (self._pool(responses.square()) + 1e-4).sqrt().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log both terms; a batch is images, or images and something that is not looked at."""
        error, activity = self.loss(batch[0] if isinstance(batch, (tuple, list)) else batch)
        self.log_dict({"reconstruction": error, "activity": activity}, prog_bar=True)
        return error + self.sparsity * activity

    def configure_optimizers(self) -> Any:
        """AdamW, with a schedule of steps where a Trainer says how many there will be."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self._trainer is None:
            return optimizer
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
