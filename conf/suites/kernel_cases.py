"""What suite ``kernels`` runs: for each piece of work the dense way or ways, ours, and dense in bfloat16."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Work = Callable[[], object]


@dataclass
class Ways:
    """One piece of work, done several ways.

    Args:
        dense: Stock Torch's; the fastest counts.
        ours: With Squall's kernels.
        beside: Others, to be shown.
        repeats: How often a way does it before another has its turn.
        prepare: What is done before each turn, and not timed.

    """

    dense: dict[str, Work]
    ours: Work
    beside: dict[str, Work] = field(default_factory=dict)
    repeats: int = 1
    prepare: Work | None = None


def _mask(weight: Tensor, density: float) -> Tensor:
    import torch

    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) < density


def prune(module: nn.Module, density: float, whole: str) -> nn.Module:
    """Set weights to zero at random.

    Args:
        module: Whose.
        density: Share of each layer's weights that stays.
        whole: Name of the layer that is left as it is, with a dot.

    Raises:
        ValueError: There is no such layer.

    """
    if not any(name.startswith(whole) for name, _ in module.named_parameters()):
        raise ValueError(f"whole={whole!r}: {type(module).__name__} has no such layer.")
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and not name.startswith(whole):
            parameter.data.mul_(_mask(parameter, density))
    return module


@contextmanager
def response_norm() -> Iterator[Ways]:
    """Local response normalisation, forward and backward, of AlexNet's first layer."""
    import torch
    import torch.nn.functional as F

    from squall.kernels import local_response_norm

    x, grad = torch.randn(64, 96, 55, 55, requires_grad=True), torch.randn(64, 96, 55, 55)

    def pass_of(function: Callable[..., Tensor], x: Tensor, grad: Tensor) -> Work:
        def work() -> None:
            x.grad = None
            function(x, 5, 1e-4, 0.75, 2.0).backward(grad)

        return work

    yield Ways({"stock": pass_of(F.local_response_norm, x, grad)}, pass_of(local_response_norm, x, grad))


def _stock_norm(groups: int) -> nn.Module:
    """The same normalisation of ReLUs, from stock modules."""
    import torch
    from torch import nn

    class StockNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)

        def forward(self, x: Tensor) -> Tensor:
            # Torch has none in bfloat16.
            parts = [self.norm(part) for part in x.relu().float().chunk(groups, 1)]
            return torch.cat(parts, 1).to(x.dtype)

    return StockNorm()


def _trainer_of(net: nn.Module, x: Tensor, num_classes: int) -> Work:
    import torch
    import torch.nn.functional as F

    labels = torch.randint(num_classes, (len(x),), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)

    def work() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x).float(), labels).backward()
        optimizer.step()

    return work


@contextmanager
def alexnet_step() -> Iterator[Ways]:
    """A training step of AlexNet-2012, 64 images; dense both ways: it is the normalisation that differs."""
    import torch

    from squall.models import AlexNet

    ours, stock, half = AlexNet(), AlexNet(), AlexNet()
    for net in (stock, half):
        for name in ("norm1", "norm2"):
            net.register_module(name, _stock_norm(2))
    x = torch.randn(64, 3, 224, 224)
    yield Ways(
        {"stock": _trainer_of(stock, x, 1000)},
        _trainer_of(ours, x, 1000),
        {"bf16": _trainer_of(half.bfloat16(), x.bfloat16(), 1000)},
    )


@contextmanager
def linear(batch: int, density: float, bits: int | None) -> Iterator[Ways]:
    """AlexNet's fc6, 9216 -> 4096."""
    import torch
    import torch.nn.functional as F

    from squall.kernels.sparse_linear import pack_codes, pack_dense, sparse_linear

    x, weight = torch.randn(batch, 9216), torch.randn(4096, 9216)
    positions = _mask(weight, density).flatten().nonzero().squeeze(1)
    if bits is None:
        packed = pack_dense(weight * _mask(weight, density))
    else:
        codes = torch.randint(2**bits, (len(positions),), dtype=torch.uint8)
        packed = pack_codes(positions, codes, torch.randn(2**bits), (4096, 9216))
    csr = (weight * _mask(weight, density)).to_sparse_csr()
    columns, half_x, half = x.T.contiguous(), x.bfloat16(), weight.bfloat16()
    with torch.inference_mode():
        yield Ways(
            {"stock": lambda: F.linear(x, weight)},
            lambda: sparse_linear(x, packed),
            {"bf16": lambda: F.linear(half_x, half), "CSR": lambda: csr @ columns},
            repeats=3,
        )


@contextmanager
def convolution(density: float) -> Iterator[Ways]:
    """A 3x3 convolution, 512 -> 512 channels of 14 x 14, 16 images."""
    import torch
    import torch.nn.functional as F

    from squall.kernels import sparse_conv2d

    x, weight = torch.randn(16, 512, 14, 14), torch.randn(512, 512, 3, 3)
    positions = _mask(weight, density).flatten().nonzero().squeeze(1)
    values = weight.flatten()[positions]
    last = torch.channels_last
    x_last, weight_last = x.to(memory_format=last), weight.to(memory_format=last)
    half_x, half = x_last.bfloat16(), weight_last.bfloat16()
    rows = (weight * _mask(weight, density)).view(512, -1).to_sparse_csr()

    def textbook() -> Tensor:  # im2col, and a sparse matrix times it
        return rows @ F.unfold(x, 3, padding=1).transpose(0, 1).reshape(9 * 512, -1)

    with torch.inference_mode():
        yield Ways(
            {"NCHW": lambda: F.conv2d(x, weight, padding=1),
             "NHWC": lambda: F.conv2d(x_last, weight_last, padding=1)},
            lambda: sparse_conv2d(x, values, positions, weight.shape, padding=1),
            {"bf16": lambda: F.conv2d(half_x, half, padding=1), "CSR": textbook},
        )  # fmt: skip


@contextmanager
def network(name: str, density: float, batch: int, whole: str) -> Iterator[Ways]:
    """A whole network, in evaluation mode."""
    import torch

    from squall import models
    from squall.sparsity import to_inference

    net = prune(getattr(models, name)(), density, whole).eval()
    x = torch.randn(batch, 3, 224, 224)
    sparse = to_inference(net, x, show=False)
    half, half_x = copy.deepcopy(net).bfloat16(), x.bfloat16()
    last: Any = copy.deepcopy(net)
    last.to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        yield Ways(
            {"NCHW": lambda: net(x), "NHWC": lambda: last(x_last)},
            lambda: sparse(x),
            {"bf16": lambda: half(half_x)},
        )


@contextmanager
def first_answer(from_disk: bool) -> Iterator[Ways]:
    """AlexNet-2012 from a file to its first answer: from what Deep Compression makes of it, and from a checkpoint.

    Args:
        from_disk: Whether the system is made to forget the files before each turn.

    """
    import torch
    from safetensors.torch import load_file, save_file

    from squall.conf.suites.compression import make_state_dict
    from squall.models import AlexNet
    from squall.sparsity import save_compressed, to_inference

    x = torch.randn(1, 3, 224, 224)

    def empty() -> AlexNet:
        with torch.device("meta"):
            return AlexNet()

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        compressed, checkpoint, tensors = (str(Path(folder) / name) for name in ("compressed", "checkpoint", "tensors"))
        state_dict = make_state_dict("alexnet_2012")
        save_compressed(state_dict, compressed)
        torch.save(state_dict, checkpoint)
        save_file(state_dict, tensors)
        del state_dict

        def from_dense(load: Callable[[], dict[str, Tensor]]) -> Tensor:
            net = empty().eval()
            net.load_state_dict(load(), assign=True)  # the quickest: nothing is copied
            answer: Tensor = net(x)
            return answer

        def forget() -> None:
            for path in (compressed, checkpoint, tensors):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        yield Ways(
            {"torch.load": lambda: from_dense(lambda: torch.load(checkpoint, weights_only=True)),
             "mapped": lambda: from_dense(lambda: torch.load(checkpoint, weights_only=True, mmap=True)),
             "safetensors": lambda: from_dense(lambda: load_file(tensors))},
            lambda: to_inference(empty(), path=compressed, show=False)(x),
            prepare=forget if from_disk else None,
        )  # fmt: skip


@contextmanager
def sparse_step(density: float, batch: int) -> Iterator[Ways]:
    """A training step of VGG-D on images of 32 x 32; masked, dense computation against sparse."""
    import torch

    from squall.models import VGGD
    from squall.sparsity import find_layers
    from squall.sparsity.computing import SparseComputation

    net = VGGD()
    x = torch.randn(batch, 3, 32, 32)
    masks = {name: _mask(parameter, density) for name, parameter in find_layers(net).items()}
    for name, parameter in find_layers(net).items():
        parameter.data.mul_(masks[name])
    dense, half = copy.deepcopy(net), copy.deepcopy(net).bfloat16()
    computation = SparseComputation(net, lambda: masks, lambda name: False)
    computation.install(find_layers(net))
    steps = []
    for of_one, images in ((dense, x), (net, x), (half, x.bfloat16())):
        step = _trainer_of(of_one, images, 10)
        dead = [(parameter, ~masks[name]) for name, parameter in find_layers(of_one).items()]

        def work(step: Work = step, dead: list[Any] = dead) -> None:
            step()
            for parameter, places in dead:
                parameter.data.masked_fill_(places, 0)

        steps.append(work)
    try:
        yield Ways({"stock": steps[0]}, steps[1], {"bf16": steps[2]})
    finally:
        computation.remove()
