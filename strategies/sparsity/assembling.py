"""A module for inference put together from a compressed file: sparse layers straight from positions and codes."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from squall.kernels import native
from squall.kernels.sparse_linear import pack_codes, pack_gaps, pack_values

from .coding import CompressedFileError, file, streams
from .coding.state import read_coded
from .coding.tensors import CodedTensor, Live, LiveGaps
from .fusing import follow_without_tensors
from .sparse_layers import MOST_CODES, SparseConv2d, SparseLinear, padding_of

DENSEST = 0.7  # share of live weights above which nobody needs to measure


class Assembled(NamedTuple):
    """A module with the weights of a file.

    Args:
        module: In evaluation mode.
        layers: Its linear layers and convolutions by name, sparse or dense, with their densities.
        graph: What it does; None if that isn't known yet.

    """

    module: nn.Module
    layers: dict[str, tuple[nn.Module, float]]
    graph: fx.Graph | None


def assemble(module: nn.Module, path: str | os.PathLike[str]) -> Assembled:
    """Make a copy of a module with the weights of a file.

    Args:
        module: Its own weights don't matter, and may be on the meta device.
        path: What :func:`~squall.sparsity.save_compressed` has written.

    Raises:
        CompressedFileError: The file is damaged.
        ValueError: It isn't of this module.

    """
    file.expect(path)
    # Until the file is there, whatever needs nothing of it.
    expected = module.state_dict(keep_vars=True)
    result = _copy_without(module, expected).eval()
    graph = follow_without_tensors(result)
    entries = read_coded(path)
    _check_fit(module, expected, entries, path)
    layers = _find_layers(result, entries)
    streams.decode_together([stream for entry in entries.values() for stream in file.streams_of(entry)])
    own = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    keys = {name: f"{name}.weight" if name else "weight" for name in layers}
    found, sparse = dict[str, tuple[nn.Module, float]](), dict[str, nn.Module]()
    with file.naming(Path(path)):
        for name, made in _make_all({name: (layers[name], keys[name]) for name in layers}, entries, own).items():
            if made.layer is None:
                entries[keys[name]] = made.weight
            else:
                del entries[keys[name]]
                device = _device(own[keys[name]])
                sparse[name] = made.layer if device.type == "cpu" else made.layer.to(device)
            found[name] = sparse.get(name, layers[name]), made.density
        _load(result, own, entries)
    for name, layer in sparse.items():
        parent, _, child = name.rpartition(".")
        bias: Tensor | None = layers[name].bias
        layer.register_buffer("bias", None if bias is None else bias.detach())
        if name:
            setattr(result.get_submodule(parent), child, layer)
    return Assembled(sparse[""], found, None) if "" in sparse else Assembled(result, found, graph)


def copy_module(module: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """Copy a module without the Trainer that it may be attached to.

    Args:
        module: What to copy.
        memo: What stands for parts of it in the copy, by :func:`id`.

    """
    others = (getattr(module, name, None) for name in ("_trainer", "_fabric"))
    return copy.deepcopy(module, {**{id(other): None for other in others if other is not None}, **memo})


def _device(own: Tensor) -> torch.device:
    return torch.device("cpu") if own.is_meta else own.device


def _check_fit(
    module: nn.Module, expected: Mapping[str, Any], entries: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Refuse a file that isn't the module's, before anything is decoded."""
    name = type(module).__name__
    for key, own in expected.items():
        if key not in entries:
            raise ValueError(f"{path} has no {key!r}, which {name} has: is the file of another module?")
        stored = entries[key]
        shape = stored.info.shape if isinstance(stored, CodedTensor) else getattr(stored, "shape", None)
        if isinstance(own, Tensor) and (shape is None or tuple(shape) != tuple(own.shape)):
            stored_shape = "no tensor" if shape is None else tuple(shape)
            raise ValueError(f"{path}: {key!r} is {stored_shape}, and that of {name} is {tuple(own.shape)}.")
    for key in entries:
        if key not in expected:
            raise ValueError(f"{path} has {key!r}, which {name} hasn't: is the file of another module?")
    for key, buffer in module.named_buffers():
        if buffer.is_meta and key not in expected:
            raise ValueError(
                f"{key} is on the meta device, and no state_dict has it: build {name} on the CPU, where it is computed."
            )


def _copy_without(module: nn.Module, expected: Mapping[str, Any]) -> nn.Module:
    """Copy a module, but for the memory of what the file has."""
    empty: dict[int, Tensor] = {}
    for key, own in expected.items():
        if isinstance(own, UninitializedParameter):
            raise ValueError(f"{key} has no shape yet: run the module once, on any input of the right size.")
        if isinstance(own, nn.Parameter):
            empty[id(own)] = nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=False)
        elif isinstance(own, Tensor):
            empty[id(own)] = torch.empty_like(own, device="meta")
    return copy_module(module, empty)


def _find_layers(result: nn.Module, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Find the layers that can be sparse: no subclass, no hooks, one name, and weights that nobody else has."""
    everywhere = result.named_modules(remove_duplicate=False)
    owners = Counter(id(part) for _, layer in everywhere for part in layer._parameters.values())
    layers: dict[str, Any] = {}
    for name, layer in result.named_modules():
        if type(layer) not in (nn.Linear, nn.Conv2d) or layer._forward_hooks or layer._forward_pre_hooks:
            continue
        weight: Tensor = layer.weight  # type: ignore[assignment]
        stored = entries.get(f"{name}.weight" if name else "weight")
        if not isinstance(stored, CodedTensor) or owners[id(weight)] > 1 or not stored.info.dtype.is_floating_point:
            continue
        if weight.dtype in (torch.float32, torch.float64) and can_be_sparse(layer):
            layers[name] = layer
    return layers


def can_be_sparse(layer: nn.Module) -> bool:
    """Tell whether there is a sparse layer in place of a linear one or a convolution."""
    if isinstance(layer, nn.Conv2d):
        try:
            padding_of(layer)
        except ValueError:
            return False
    return True


class _Made(NamedTuple):
    """What has become of a layer: a sparse one without a bias yet, or its dense weight."""

    layer: nn.Module | None
    weight: Tensor | None
    density: float


def _make_all(
    layers: Mapping[str, tuple[Any, str]], entries: Mapping[str, CodedTensor], own: Mapping[str, Tensor]
) -> dict[str, _Made]:
    """Decode layers' weights, given with their keys; on threads, if there are any: hardly any of it is Python.

    Nor does much of it call torch, which would start threads of its own on each of these.
    """
    works = {name: partial(_make, layer, key, entries[key], own[key].dtype) for name, (layer, key) in layers.items()}
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return {name: work() for name, work in works.items()}
    longest_first = sorted(works, key=lambda name: -entries[layers[name][1]].num_stored)
    with ThreadPoolExecutor(num_threads) as threads:
        started = {name: threads.submit(works[name]) for name in longest_first}
        return {name: started[name].result() for name in works}


def _make(layer: Any, key: str, stored: CodedTensor, dtype: torch.dtype) -> _Made:
    with file.naming(key):
        density = stored.num_stored / max(1, stored.info.num_elements)
        # What can be packed as it lies in the file needs no positions.
        gaps = stored.gaps() if type(layer) is nn.Linear and density <= DENSEST and native.serves() else None
        if gaps is not None:
            return _Made(_linear(layer, gaps, dtype), None, density)
        live = stored.live()
    live = live._replace(values=live.values.to(dtype))
    if live.density > DENSEST:
        return _Made(None, live.dense(), live.density)
    return _Made(_sparse(layer, live), None, live.density)


def _linear(layer: nn.Linear, gaps: LiveGaps, dtype: torch.dtype) -> SparseLinear:
    codes, values = gaps.codes, gaps.values.to(dtype)
    if codes is not None:
        is_few = len(values) <= MOST_CODES
        codes, values = (codes.to(torch.uint8), values) if is_few else (None, values[codes.long()])
    try:
        packed = pack_gaps(gaps.gaps, gaps.longest, codes, values, (layer.out_features, layer.in_features))
    except ValueError as error:
        raise CompressedFileError(f"its {error}") from None
    return SparseLinear(packed)


def _sparse(layer: Any, live: Live) -> nn.Module:
    """Make a sparse layer of the same function; without a bias yet."""
    if isinstance(layer, nn.Conv2d):
        positions = torch.from_numpy(live.positions.numpy().astype(np.int64))
        return SparseConv2d(
            live.each(), positions, live.shape, None, layer.stride, padding_of(layer), layer.dilation, layer.groups
        )
    shape = layer.out_features, layer.in_features
    if live.codes is not None and len(live.values) <= MOST_CODES:
        return SparseLinear(pack_codes(live.positions, live.codes.to(torch.uint8), live.values, shape))
    return SparseLinear(pack_values(live.positions, live.each(), shape))


def _load(result: nn.Module, own: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
    """Give a copy the rest of what the file has, as it is."""
    state_dict = file.dense(entries)
    for key in own.keys() & state_dict.keys():
        state_dict[key] = state_dict[key].to(_device(own[key]), own[key].dtype)
    result.load_state_dict(state_dict, strict=False, assign=True)
