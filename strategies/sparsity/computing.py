"""Layers that compute with live weights alone while they are trained, and densely only where an algorithm asks.

A layer's ``forward`` is replaced on the module itself, so that users' code, hooks and checkpoints see what they saw
before. Its weight stays the dense parameter that the optimizer steps: only the passes are sparse, and the gradient is
0 where nothing lives. In a step whose dense gradient is read, for growing, the layer runs as it would without this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from squall.kernels import native, sparse_conv2d, sparse_linear_live
from squall.kernels.sparse_linear import LivePositions, PackedWeight, pack_live

from .sparse_layers import padding_of

_DENSEST = {nn.Conv2d: 0.2, nn.Linear: 0.3}  # share of live weights above which dense kernels are faster


@dataclass
class _Live:
    """Where a mask lets weights live, in the form that kernels read."""

    mask: Tensor
    positions: Tensor
    packed: tuple[PackedWeight, LivePositions] | None


class _Forward:
    """In place of a layer's ``forward``; a copy of the layer, or a pickled one, has its own again."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        self._layer, self._function = layer, function

    def __call__(self, x: Tensor) -> Tensor:
        return self._function(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_forward(memo.get(id(self._layer), self._layer))

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self._layer,)


def _own_forward(layer: nn.Module) -> MethodType:
    return MethodType(type(layer).forward, layer)


class SparseComputation:
    """Sparse passes of some layers of a module, from :meth:`install` to :meth:`remove`.

    Args:
        module: Whose layers they are.
        masks: Tells the masks, by parameter.
        wants_dense: Tells for a parameter whether the dense gradient of this step will be read.

    """

    def __init__(
        self, module: nn.Module, masks: Callable[[], Mapping[str, Tensor]], wants_dense: Callable[[str], bool]
    ) -> None:
        self._module, self._masks, self._wants_dense = module, masks, wants_dense
        self._layers: dict[str, nn.Module] = {}
        self._live: dict[str, _Live] = {}

    def install(self, names: Mapping[str, nn.Parameter]) -> list[str]:
        """Replace what can be replaced.

        Args:
            names: The masked parameters.

        Returns:
            Those whose layers compute sparsely from now on.

        """
        for layer in self._module.modules():
            if type(layer) not in _DENSEST or isinstance(vars(layer).get("forward"), _Forward):
                continue
            if isinstance(layer, nn.Conv2d) and not _is_plain(layer):
                continue
            for name, parameter in names.items():
                if vars(layer)["_parameters"].get("weight") is parameter:
                    self._layers[name] = layer
                    layer.forward = _Forward(layer, self._forward_of(name, layer))
        return list(self._layers)

    def remove(self) -> None:
        """Give every layer its own ``forward`` back."""
        for layer in self._layers.values():
            del layer.forward  # type: ignore[method-assign]
        self._layers.clear()
        self._live.clear()

    def _forward_of(self, name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not self._suits(name, layer, x):
                result: Tensor = type(layer).forward(layer, x)
                return result
            live = self._find(name, layer)
            weight: Any = layer.weight
            values = weight.reshape(-1).index_select(0, live.positions)
            if isinstance(layer, nn.Conv2d):
                return sparse_conv2d(
                    x, values, live.positions, weight.shape, layer.bias, layer.stride, padding_of(layer),
                    layer.dilation, layer.groups,
                )  # fmt: skip
            assert live.packed is not None
            bias: Tensor | None = layer.bias  # type: ignore[assignment]
            return sparse_linear_live(x, values, *live.packed, bias)

        return forward

    def _suits(self, name: str, layer: nn.Module, x: Tensor) -> bool:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        autocast = torch.is_autocast_enabled(x.device.type)
        if not native.serves(x, weight, dtypes=native.SINGLE) or autocast or torch.compiler.is_compiling():
            return False
        if isinstance(layer, nn.Conv2d) and x.ndim != 4:
            return False
        mask = self._masks().get(name)
        if mask is None or (torch.is_grad_enabled() and self._wants_dense(name)):
            return False
        live = self._find(name, layer)
        return len(live.positions) <= _DENSEST[type(layer)] * mask.numel()  # type: ignore[index]

    def _find(self, name: str, layer: nn.Module) -> _Live:
        """What kernels read of a mask; until another takes its place, as masks are never changed in place."""
        mask, live = self._masks()[name], self._live.get(name)
        if live is None or live.mask is not mask:
            positions = mask.flatten().nonzero().squeeze(1)
            packed = None
            if isinstance(layer, nn.Linear):
                shape = (layer.out_features, layer.in_features)
                packed = pack_live(positions, layer.weight.detach().reshape(-1)[positions], shape)
            live = self._live[name] = _Live(mask, positions, packed)
        return live


def _is_plain(layer: nn.Conv2d) -> bool:
    try:
        padding_of(layer)
    except ValueError:
        return False
    return True
