"""A trained sparse network made fast: each layer runs sparse where that was measured to be faster, else dense."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from squall.kernels.native import memory

from .assembling import DENSEST, assemble, can_be_sparse, copy_module
from .fusing import fuse_relu
from .sparse_layers import MaxPool2d, SparseConv2d, SparseLinear

_MOST_SECONDS = 1.0  # of a layer's measurement
_FEW_PRODUCTS = 150  # weights of an output channel: those of a first layer


@dataclass(frozen=True)
class LayerChoice:
    """What was measured of a layer.

    Args:
        name: The layer's in the module.
        weight_shape: Of its weight.
        density: Share of the weights that aren't zero.
        dense_bytes: Of the dense weight.
        sparse_bytes: Of what the sparse layer reads in its place.
        is_sparse: Whether it is the sparse layer that runs: the faster one, where both were measured.
        dense_flops: Of the example input; NaN if none was run.
        sparse_flops: Likewise, of live weights alone.
        dense_ms: Milliseconds of the dense layer, the median; NaN if it wasn't measured.
        sparse_ms: Of the sparse one, likewise.

    """

    name: str
    weight_shape: tuple[int, ...]
    density: float
    dense_bytes: int
    sparse_bytes: int
    is_sparse: bool
    dense_flops: float = math.nan
    sparse_flops: float = math.nan
    dense_ms: float = math.nan
    sparse_ms: float = math.nan


class InferenceReport(list[LayerChoice]):
    """What :func:`to_inference` has measured, a row a layer; prints as a table."""

    def table(self) -> Table:
        """Make a table of it, with the sums in the last row; of a pair the first number is of the dense layer."""
        table = Table("layer", "weight", title="Sparse where faster: dense > sparse")
        for head in ("live %", "MB", "MFLOP", "ms"):
            table.add_column(head, justify="right")
        table.add_column("runs")
        for row in self:
            table.add_row(
                row.name, "x".join(map(str, row.weight_shape)), f"{100 * row.density:.1f}",
                _pair(row.dense_bytes / 1e6, row.sparse_bytes / 1e6),
                _pair(row.dense_flops / 1e6, row.sparse_flops / 1e6),
                _pair(row.dense_ms, row.sparse_ms), "sparse" if row.is_sparse else "dense",
            )  # fmt: skip
        sums = [
            (sum(getattr(row, f"dense_{what}") for row in self),
             sum(getattr(row, f"{'sparse' if row.is_sparse else 'dense'}_{what}") for row in self))
            for what in ("bytes", "flops", "ms")
        ]  # fmt: skip
        table.add_section()
        table.add_row(
            "all as they run", "", "", _pair(*(value / 1e6 for value in sums[0])),
            _pair(*(value / 1e6 for value in sums[1])), _pair(*sums[2]), "",
        )  # fmt: skip
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _pair(dense: float, sparse: float) -> str:
    if math.isnan(dense):
        return "-"
    return f"{dense:.3g}" if math.isnan(sparse) else f"{dense:.3g} > {sparse:.3g}"


@torch.no_grad()
def to_inference(
    module: nn.Module,
    example_input: Any = None,
    *,
    path: str | os.PathLike[str] | None = None,
    num_runs: int = 7,
    show: bool = True,
) -> nn.Module:
    """Make a copy of a module whose linear layers and convolutions run sparse where that is faster here.

    Each layer is run both ways with what the example input brings to it, in turn, on as many threads as torch has now;
    the faster one stays. Those with more than 70 % of their weights are tried only if they are convolutions of so few
    channels that memory is what takes time. What it comes to depends on the machine, the batch and the density: it is
    measured and never assumed. A ReLU that follows a sparse layer becomes part of it where :mod:`torch.fx` can follow
    the module, one that follows a dense layer works in place, and maxima are taken without keeping where they came
    from.

    Weights that are zero count as absent: prune first, or load what :class:`~squall.sparsity.DeepCompression` has
    written. Layers with few different values keep a codebook of them.

    With `path` the weights are those of a compressed file, and never become dense: layers are made of the positions and
    codes in it. So nothing is measured, and what the file has 70 % of or less runs sparse. The other layers, those
    that share their weights, and biases are as they always are.

    Args:
        module: A trained module; it stays as it is. With `path` its own weights don't matter: build it under
            ``torch.device("meta")``, and it takes neither memory nor time.
        example_input: A tensor, or a tuple of positional arguments: of the size that will be run. With `path` it is run
            once if it is given, so that the first batch finds everything prepared.
        path: What :func:`~squall.sparsity.save_compressed`, :class:`~squall.sparsity.DeepCompression` or
            ``squall-compress`` has written for this module, or a compressed checkpoint.
        num_runs: How often a layer is run each way, at least; without `path`.
        show: Whether to print the table.

    Returns:
        The copy, in evaluation mode, for inference alone. ``inference_report`` is what was measured
        (:class:`InferenceReport`).

    Raises:
        ValueError: ``num_runs`` is below 1, there is neither an example nor a file, or the file isn't of this module:
            the message names the key.
        CompressedFileError: The file is damaged.

    Example:
        >>> net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> _ = net[0].weight.data.masked_fill_(torch.rand(512, 512) > 0.02, 0)
        >>> fast = to_inference(net, torch.ones(1, 512), show=False)
        >>> [row.name for row in fast.inference_report]
        ['0', '2']

    """
    if num_runs < 1:
        raise ValueError(f"num_runs={num_runs} must be at least 1")
    if example_input is None and path is None:
        raise ValueError("to_inference needs an example_input, to measure with, or the path of a compressed file.")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    memory.let_freed_blocks_stay()  # or what dense layers take would hang on what was run before
    faster, graph = dict[nn.Module, nn.Module](), None
    if path is None:
        result = copy_module(module, {}).eval()
        report = _measure_all(result, arguments, num_runs, faster)
        result = faster.get(result, result)
    else:
        result, layers, graph = assemble(module, path)
        report = InferenceReport(_unmeasured(name, *layer) for name, layer in layers.items())
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if child in faster:
                setattr(parent, name, faster[child])
            elif type(child) is nn.MaxPool2d and not child.return_indices and not child._forward_hooks:
                setattr(parent, name, MaxPool2d(child))
    result = fuse_relu(result, graph).eval()
    for parameter in result.parameters():
        parameter.requires_grad_(False)
    if path is not None and example_input is not None:
        result(*arguments)
    result.inference_report = report  # type: ignore[assignment]
    if show:
        Console().print(report.table())
    return result


def _measure_all(
    module: nn.Module, arguments: tuple[Any, ...], num_runs: int, faster: dict[nn.Module, nn.Module]
) -> InferenceReport:
    """Measure each layer both ways; `faster` gets those that are to be replaced."""
    report = InferenceReport()
    for layer, (name, x) in _inputs_of(module, arguments).items():
        choice, sparse = _measure(name, layer, x, num_runs)
        report.append(choice)
        if sparse is not None and choice.is_sparse:
            faster[layer] = sparse
    return report


def _unmeasured(name: str, layer: nn.Module, density: float) -> LayerChoice:
    is_sparse = isinstance(layer, SparseConv2d | SparseLinear)
    weight: Any = None if is_sparse else layer.weight
    shape = tuple(layer.weight_shape if weight is None else weight.shape)  # type: ignore[arg-type]
    dtype: torch.dtype = layer.values.dtype if weight is None else weight.dtype  # type: ignore[union-attr,assignment]
    num_bytes: Any = layer.num_bytes if is_sparse else 0
    return LayerChoice(name, shape, density, math.prod(shape) * dtype.itemsize, num_bytes, is_sparse)


def _inputs_of(module: nn.Module, arguments: tuple[Any, ...]) -> dict[nn.Module, tuple[str, Tensor]]:
    """Run a module once; returns what its linear layers and convolutions were given, in the order of their calls."""
    found: dict[nn.Module, tuple[str, Tensor]] = {}
    hooks = []
    for name, layer in module.named_modules():
        # A subclass may mean something else, and a hook wants to be called.
        if type(layer) in (nn.Linear, nn.Conv2d) and not layer._forward_hooks and not layer._forward_pre_hooks:

            def remember(layer: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                found.setdefault(layer, (name, given[0].detach()))

            hooks.append(layer.register_forward_pre_hook(remember))
    try:
        module(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _measure(name: str, layer: nn.Module, x: Tensor, num_runs: int) -> tuple[LayerChoice, nn.Module | None]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    num_live = int(weight.count_nonzero())
    density = num_live / max(1, weight.numel())
    output = layer(x)
    outputs = output.numel() / max(1, weight.shape[0])  # how often each weight is used
    # With few products a number it is memory that takes time, and a direct convolution needs less of it.
    has_few = isinstance(layer, nn.Conv2d) and weight[:1].numel() <= _FEW_PRODUCTS
    sparse = _sparse(layer) if density <= DENSEST or has_few else None
    ways: list[Callable[[Tensor], Tensor]] = [layer] if sparse is None else [layer, sparse]
    times = [statistics.median(of_one) for of_one in _time(ways, x, num_runs)]
    choice = LayerChoice(
        name, tuple(weight.shape), density, weight.numel() * weight.element_size(),
        0 if sparse is None else sparse.num_bytes, sparse is not None and times[1] < times[0],
        2.0 * outputs * weight.numel(), 2.0 * outputs * num_live,
        1e3 * times[0], 1e3 * times[1] if sparse is not None else math.nan,
    )  # fmt: skip
    return choice, sparse


def _sparse(layer: nn.Module) -> SparseConv2d | SparseLinear | None:
    if layer.weight.dtype not in (torch.float32, torch.float64) or not can_be_sparse(layer):  # type: ignore[union-attr]
        return None
    if isinstance(layer, nn.Linear):
        return SparseLinear.from_dense(layer)
    assert isinstance(layer, nn.Conv2d)
    return SparseConv2d.from_dense(layer)


def _time(ways: Sequence[Callable[[Tensor], Tensor]], x: Tensor, num_runs: int) -> list[list[float]]:
    """Run each way in turn; returns the seconds of each run."""

    def run(way: Callable[[Tensor], Tensor]) -> float:
        begin = time.perf_counter()
        way(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for way in ways:
        run(way)
    times: list[list[float]] = [[] for _ in ways]
    begin = time.perf_counter()
    for number in range(num_runs):
        for way, mine in zip(ways, times, strict=True):
            mine.append(run(way))
        if number >= 2 and time.perf_counter() - begin > _MOST_SECONDS:
            break
    return times
