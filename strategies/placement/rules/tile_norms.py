"""Normalisation over tiles: statistics of all tiles, each rank normalising its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import local_response_norm
from ..columns import Columns
from ..exchange import add_up, share
from ..tensor import layer_of, spec_of, tile_rule, wrap
from ..tiles import TileSpec


def _moments(x: Tensor, columns: Columns, name: str) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all tiles, and the number of elements behind them.

    One message, in double precision: what the tiles' means differ by must not be lost in the sum of squares.
    """
    dims = [0, *range(2, x.ndim)]
    count = x.numel() // max(x.shape[1], 1)
    if count:
        variance, mean = torch.var_mean(x.double(), dims, correction=0)
    else:
        variance = mean = x.new_zeros(x.shape[1], dtype=torch.float64)
    total = torch.cat([(mean * count), (variance + mean.square()) * count, mean.new_tensor([count])])
    columns.ledger.record(name, total.numel(), total.element_size(), False)
    columns.sum_(total)
    number = float(total[-1])
    sums, squares = (total[:-1] / max(number, 1)).chunk(2)
    return sums, (squares - sums.square()).clamp_min(0), number


class _Normalize(torch.autograd.Function):
    """Batch normalisation (Ioffe and Szegedy 2015) whose batch is spread over ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, columns: Columns, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance, count = _moments(x, columns, name)
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.options = (eps, columns, name, count)
        ctx.mark_non_differentiable(mean, variance)
        result = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps) if x.numel() else x.clone()
        return result, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, variance = ctx.saved_tensors
        eps, columns, name, count = ctx.options
        if torch.is_grad_enabled():  # gradients of gradients are asked for
            result = _composed(x, weight, bias, eps, columns, name, count)
            wanted = [value for value in (x, weight, bias) if value.requires_grad]
            grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
            return (*(next(grads) if value.requires_grad else None for value in (x, weight, bias)), None, None, None)
        scale = (variance + eps).rsqrt()
        own, by_weight, by_bias = x.new_zeros(x.shape), torch.zeros_like(weight), torch.zeros_like(weight)
        if x.numel():  # as with fixed statistics; what the statistics add is below
            own, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                grad.contiguous(), x, weight, mean, variance, None, None, False, eps, [True, True, True]
            )
        total = torch.cat([by_weight, by_bias])
        columns.ledger.record(name, total.numel(), total.element_size(), True)
        by_weight, by_bias = columns.sum_(total).chunk(2)
        shape = [1, -1] + [1] * (x.ndim - 2)
        slope = -weight * scale.square() * by_weight / count
        offset = -weight * scale * by_bias / count - slope * mean
        own = own.addcmul_(x, slope.reshape(shape).to(x.dtype)).add_(offset.reshape(shape).to(x.dtype))
        return own, by_weight.clone(), by_bias.clone(), None, None, None


def _composed(x: Tensor, weight: Tensor, bias: Tensor, eps: float, columns: Columns, name: str, count: float) -> Tensor:
    """The same from operations that have gradients of any order."""
    dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    with torch.enable_grad():

        def mean_of(value: Tensor) -> Tensor:
            return share(add_up(value.sum(dims, keepdim=True), columns, name) / count, columns, name)

        centred = x - mean_of(x)
        variance = mean_of(centred.square())
        share_of = [share(value, columns, name).reshape(shape) for value in (weight, bias)]
        return centred * (variance + eps).rsqrt() * share_of[0] + share_of[1]


def _after_channels(spec: TileSpec | None) -> bool:
    return spec is not None and spec.dims[0] > 1


@tile_rule(F.batch_norm)
def _batch_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    keys = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    named: dict[str, Any] = {**dict.fromkeys(keys), "training": False, "momentum": 0.1, "eps": 1e-5}
    named.update(zip(keys, args, strict=False))
    named.update(kwargs)
    value, weight, bias = named["input"], named["weight"], named["bias"]
    spec = spec_of(value)
    if not _after_channels(spec):
        return NotImplemented
    name = layer_of([weight]) or "batch_norm"
    columns = spec.columns
    if not named["training"]:
        for key in ("weight", "bias"):
            named[key] = None if named[key] is None else share(named[key], columns, name)
        return wrap(func(**named) if value.numel() else value.clone(), spec.unnamed)
    channels = value.shape[1]
    single = torch.float32 if value.dtype in (torch.half, torch.bfloat16) else value.dtype
    weight = value.new_ones(channels, dtype=single) if weight is None else weight
    bias = value.new_zeros(channels, dtype=weight.dtype) if bias is None else bias
    result, mean, variance = _Normalize.apply(value.as_subclass(Tensor), weight, bias, named["eps"], columns, name)
    if named["running_mean"] is not None:
        count = value.shape[0] * _places(value, spec)
        with torch.no_grad():
            unbiased = variance * (count / max(count - 1, 1))
            for buffer, new in ((named["running_mean"], mean), (named["running_var"], unbiased)):
                buffer.mul_(1 - named["momentum"]).add_(new.to(buffer.dtype), alpha=named["momentum"])
    return wrap(result, spec.unnamed)


def _places(value: Tensor, spec: TileSpec) -> int:
    """Places of an image of all tiles."""
    shape = list(value.shape)
    for axis in spec.axes:
        shape[axis.dim] = axis.partition.size
    return torch.Size(shape[2:]).numel()


def _grouped(value: Tensor, spec: TileSpec, groups: int, named: dict[str, Any], name: str) -> Any:
    """Normalise each group of channels of each image: channels of a batch of one."""
    columns = spec.columns
    samples, channels = value.shape[:2]
    grouped = value.as_subclass(Tensor).reshape(1, samples * groups, channels // groups, *value.shape[2:])
    single = torch.float32 if value.dtype in (torch.half, torch.bfloat16) else value.dtype
    one, zero = (value.new_full((samples * groups,), fill, dtype=single) for fill in (1.0, 0.0))
    result, _, _ = _Normalize.apply(grouped, one, zero, named["eps"], columns, name)
    result = result.reshape(value.shape)
    shape = [-1] + [1] * (value.ndim - 2)
    if named.get("weight") is not None:
        result = result * share(named["weight"], columns, name).reshape(shape)
    if named.get("bias") is not None:
        result = result + share(named["bias"], columns, name).reshape(shape)
    return wrap(result, spec.unnamed)


@tile_rule(F.group_norm)
def _group_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = {"eps": 1e-5, **dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)), **kwargs}
    value, groups = named["input"], named["num_groups"]
    spec = spec_of(value)
    if not _after_channels(spec) or value.shape[1] % groups:
        return NotImplemented
    return _grouped(value, spec, groups, named, layer_of([named.get("weight")]) or "group_norm")


@tile_rule(F.instance_norm)
def _instance_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Without running statistics; with them, it's rare enough to be gathered."""
    keys = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    named = {"eps": 1e-5, **dict(zip(keys, args, strict=False)), **kwargs}
    value = named["input"]
    spec = spec_of(value)
    if not _after_channels(spec) or named.get("running_mean") is not None:
        return NotImplemented
    return _grouped(value, spec, value.shape[1], named, layer_of([named.get("weight")]) or "instance_norm")


@tile_rule(F.layer_norm)
def _layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Over channels that were moved behind the places; over places it is gathered."""
    named = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False))
    named.update(kwargs)
    value = named["input"]
    spec = spec_of(value)
    if spec is None or spec.dims[-1] >= value.ndim - len(named["normalized_shape"]):
        return NotImplemented
    name = layer_of([named.get("weight")]) or "layer_norm"
    for key in ("weight", "bias"):
        named[key] = None if named.get(key) is None else share(named[key], spec.columns, name)
    return wrap(func(**named), spec.unnamed)


@tile_rule(F.local_response_norm, local_response_norm)
def _response_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Windows of channels (Krizhevsky et al. 2012, section 3.3): every place alone."""
    spec = spec_of(args[0])
    if not _after_channels(spec):
        return NotImplemented
    plain = args[0].as_subclass(Tensor)  # what an autograd function saves must not be taken for a split tensor
    return wrap(func(plain, *args[1:], **kwargs) if plain.numel() else plain.clone(), spec.unnamed)
