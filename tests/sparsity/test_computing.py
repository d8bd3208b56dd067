"""Sparse passes in training equal dense masked ones, and step aside where a dense gradient is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squall.kernels import native
from squall.models import AlexNet
from squall.sparsity import find_layers
from squall.sparsity.computing import SparseComputation

pytestmark = pytest.mark.skipif(native.isa() == "torch", reason="needs the compiled kernels")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 4, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.strided(F.relu(self.conv(x)))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def masked(net: nn.Module, density: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, parameter in find_layers(net).items():
        masks[name] = torch.rand(parameter.shape, generator=generator) < density
        parameter.data *= masks[name]
    return masks


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize(("make", "shape"), [(Net, (5, 3, 10, 10)), (lambda: AlexNet(5, 32, 2, 0.1), (17, 3, 32, 32))])
def test_equals_masked_dense_training(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = make().eval()
    masks = masked(net, 0.1)
    x = torch.randn(shape)
    expected, output = gradients(net, x), net(x)
    computation = SparseComputation(net, lambda: masks, lambda name: False)
    assert computation.install(find_layers(net)) == list(masks)
    found = gradients(net, x)
    torch.testing.assert_close(net(x), output, rtol=1e-4, atol=1e-5)
    for name, gradient in expected.items():
        wanted = gradient * masks[name] if name in masks else gradient
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6)
        assert name not in masks or not found[name][~masks[name]].any(), "no dense gradient was computed"
    computation.remove()
    assert "forward" not in vars(net.get_submodule("conv1" if hasattr(net, "conv1") else "conv"))
    assert torch.equal(gradients(net, x)[next(iter(masks))], expected[next(iter(masks))])


def test_other_masks_are_noticed() -> None:
    net = Net().eval()
    masks = masked(net, 0.1)
    computation = SparseComputation(net, lambda: masks, lambda name: False)
    computation.install(find_layers(net))
    x = torch.randn(2, 3, 10, 10)
    net(x)
    masks["conv.weight"] = torch.zeros_like(masks["conv.weight"])
    masks["conv.weight"][0, 0, 0, 0] = True
    net.conv.weight.data.zero_()
    net.conv.weight.data[0, 0, 0, 0] = 3.0
    expected = F.conv2d(x, net.conv.weight, net.conv.bias, padding=1)
    torch.testing.assert_close(net.conv(x), expected)


def test_dense_where_it_is_asked_for() -> None:
    net = Net().eval()
    masks, asked = masked(net, 0.1), {"conv.weight"}
    x = torch.randn(2, 3, 10, 10)
    expected = gradients(net, x)
    SparseComputation(net, lambda: masks, lambda name: name in asked).install(find_layers(net))
    found = gradients(net, x)
    assert found["conv.weight"][~masks["conv.weight"]].any()
    torch.testing.assert_close(found["conv.weight"], expected["conv.weight"], rtol=1e-3, atol=1e-6)
    assert not found["fc1.weight"][~masks["fc1.weight"]].any()


def test_what_kernels_cant_do_is_dense() -> None:
    net = Net().eval()
    masks = masked(net, 0.1)
    masks["fc1.weight"] = torch.ones_like(masks["fc1.weight"])
    x = torch.randn(2, 3, 10, 10)
    expected = gradients(net, x)["fc1.weight"]
    SparseComputation(net, lambda: masks, lambda name: False).install(find_layers(net))
    torch.testing.assert_close(gradients(net, x)["fc1.weight"], expected, rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 10, 10)).dtype == torch.bfloat16
    net.double()
    assert net(torch.randn(2, 3, 10, 10, dtype=torch.float64)).dtype == torch.float64
