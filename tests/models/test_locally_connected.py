"""Locally connected layers against loops over places, and the network that learns without labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squall.kernels import locally_connected2d, locally_connected_transpose2d
from squall.models import LocallyConnected2d, LocallyConnectedAutoencoder, PhotographDataModule
from squall.models.photographs import load_photographs, whiten


def by_place(x: Tensor, layer: LocallyConnected2d) -> Tensor:
    """Every output on its own."""
    height, width, channels, _, side, _ = layer.weight.shape
    output = x.new_zeros(x.shape[0], channels, height, width)
    for row in range(height):
        for column in range(width):
            top, left = row * layer.stride, column * layer.stride
            window = x[:, :, top : top + side, left : left + side]
            output[:, :, row, column] = torch.einsum("nchw,ochw->no", window, layer.weight[row, column])
            if layer.bias is not None:
                output[:, :, row, column] += layer.bias[row, column]
    return output


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "kernel", "stride"), [((9, 7), 3, 2), (6, 2, 1), ((5, 5), 5, 3), (8, 1, 3)])
def test_each_place_has_weights_of_its_own(size: int | tuple[int, int], kernel: int, stride: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = LocallyConnected2d(2, 3, size, kernel, stride, bias).double()
    x = torch.randn(2, 2, *layer.image_size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_place(x, layer))
    assert torch.autograd.gradcheck(lambda x, weight: locally_connected2d(x, weight, None, stride), (
        x.requires_grad_(), layer.weight,
    ))  # fmt: skip


def test_the_transpose_is_one() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 9, 8, dtype=torch.float64), torch.randn(3, 4, 4, 3, dtype=torch.float64)
    weight = torch.randn(4, 3, 4, 2, 3, 3, dtype=torch.float64)
    there = (locally_connected2d(x, weight, stride=2) * y).sum()
    back = (locally_connected_transpose2d(y, weight, (9, 8), 2) * x).sum()
    torch.testing.assert_close(there, back)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 5"):
        LocallyConnected2d(1, 1, 4, 5)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        LocallyConnected2d(1, 1, 4, 2, 0)
    with pytest.raises(ValueError, match=r"has \(3, 3\) places of 1 channels, but \(4, 4\) windows fit into x"):
        LocallyConnected2d(1, 1, 4, 2)(torch.zeros(1, 1, 5, 5))
    with pytest.raises(ValueError, match="windows fit into size"):
        locally_connected_transpose2d(torch.zeros(1, 1, 3, 3), torch.zeros(3, 3, 1, 1, 2, 2), (5, 5))
    with pytest.raises(ValueError, match="pool_size must be odd"):
        LocallyConnectedAutoencoder(pool_size=2)


def test_photographs_are_real_and_white() -> None:
    for photograph in load_photographs():
        assert photograph.shape == (427, 640)
        white = whiten(photograph)
        assert white.mean().abs() < 1e-4
        grey = (photograph - photograph.mean()) / photograph.std()
        neighbours = [float((image[1:] * image[:-1]).mean()) for image in (white, grey)]
        assert neighbours[0] < 0.75 < 0.9 < neighbours[1]


def test_it_learns_to_make_images_again() -> None:
    torch.manual_seed(0)
    data = PhotographDataModule(num_images=500)
    data.setup()
    net = LocallyConnectedAutoencoder(num_filters=6)
    optimizer = net.configure_optimizers()
    errors = []
    for step in range(60):
        images = data.train_set.images[step % 4 * 100 : step % 4 * 100 + 100]
        error, activity = net.loss(images)
        (error + net.sparsity * activity).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(float(error))
    assert errors[-1] < 0.6 * errors[0]
    assert net(images).shape == (100, 6, 5, 5)
