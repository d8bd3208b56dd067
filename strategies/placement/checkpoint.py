"""Distributed checkpoints: every rank writes and reads its own part, and no rank ever holds it all.

The format is torch's own (``torch.distributed.checkpoint``) for tensors, under the keys and global shapes of one
device, and a small file for the rest of Lightning's checkpoint. It can be read on any number of columns, and turned
into one file and back::

    python -m squall.placement.checkpoint last.ckpt/ whole.ckpt
    python -m squall.placement.checkpoint whole.ckpt last.ckpt/
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.optim import Optimizer

from .optimizers import map_state
from .tensor import ColumnParameter, ColumnTensor, Spec, local_view, no_dispatch

_REST = "rest.pt"
LOADED = "squall_loaded_in_place"


class Part(Tensor):
    """One rank's part of a tensor, in the protocol of torch's distributed checkpoint, which wants a tensor to have it.

    Args:
        local: What this rank holds, a plain tensor; it is read from and written to in place.
        spec: How the tensor is split.
    """

    local: Tensor
    spec: Spec

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Part], local: Tensor, spec: Spec) -> Part:
        """Label ``local``, whose memory it shares."""
        part = local.detach().as_subclass(cls)
        part.local = local.detach()
        part.spec = spec
        return part

    def __init__(self, local: Tensor, spec: Spec) -> None:
        pass

    def size(self, dim: int | None = None) -> Any:
        """The global shape."""
        shape = list(self.local.shape)
        shape[self.spec.dim] = self.spec.partition.size
        return torch.Size(shape) if dim is None else shape[dim]

    def _pieces(self) -> list[tuple[ChunkStorageMetadata, Tensor]]:
        pieces, offset = [], 0
        for start, stop in self.spec.partition.ranges[self.spec.columns.rank]:
            offsets, sizes = [0] * self.local.ndim, list(self.local.shape)
            offsets[self.spec.dim], sizes[self.spec.dim] = start, stop - start
            piece = self.local.narrow(self.spec.dim, offset, stop - start)
            pieces.append((ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), piece))
            offset += stop - start
        return pieces

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk, _ in self._pieces()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._pieces()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(piece for chunk, piece in self._pieces() if chunk.offsets == index.offset)


def is_distributed(path: Path) -> bool:
    """Whether ``path`` is a directory that :func:`save` wrote."""
    return path.is_dir() and (path / ".metadata").is_file()


def labelled_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, with every tensor that is split like its parameter as a :class:`Part`."""
    state = optimizer.state_dict()
    return {**state, "state": map_state(optimizer, state["state"], Part, whole=False)}


def _take_apart(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors under flat names, and everything else with the names in their place."""
    tensors: dict[str, Any] = {}

    def stow(name: str, value: Any) -> Any:
        if isinstance(value, ColumnTensor):
            with no_dispatch():
                value = Part(value.detach().as_subclass(Tensor), value._spec)
        if not isinstance(value, (Tensor, Part)):
            return value
        tensors[name] = value
        return _Name(name)

    rest = dict(checkpoint)
    rest["state_dict"] = {
        key: stow(f"state_dict.{key}", value) for key, value in checkpoint.get("state_dict", {}).items()
    }
    rest["optimizer_states"] = [
        {
            **state,
            "state": {
                key: {name: stow(f"optimizer_states.{index}.{key}.{name}", value) for name, value in entries.items()}
                for key, entries in state["state"].items()
            },
        }
        for index, state in enumerate(checkpoint.get("optimizer_states", []))
    ]
    return tensors, rest


class _Name(str):
    """The name under which a tensor was stowed."""

    __slots__ = ()


def _put_together(rest: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    def fetch(value: Any) -> Any:
        return tensors[value] if isinstance(value, _Name) else value

    whole = dict(rest)
    whole["state_dict"] = {key: fetch(value) for key, value in rest["state_dict"].items()}
    whole["optimizer_states"] = [
        {**state, "state": {key: {n: fetch(v) for n, v in entries.items()} for key, entries in state["state"].items()}}
        for state in rest["optimizer_states"]
    ]
    return whole


def save(checkpoint: dict[str, Any], path: Path, alone: bool = False) -> None:
    """Write a checkpoint whose split tensors are labelled. All ranks must call it.

    Args:
        checkpoint: Lightning's checkpoint.
        path: The directory to write; what stands there is replaced.
        alone: Whether this process is the only one.

    """
    first = alone or dist.get_rank() == 0
    tensors, rest = _take_apart(checkpoint)
    if first:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        path.mkdir(parents=True)
        torch.save(rest, path / _REST)
    if not alone:
        dist.barrier()
    dcp.save(tensors, checkpoint_id=path, no_dist=alone)


def _read_rest(path: Path) -> dict[str, Any]:
    # The file holds what Lightning pickles into any checkpoint, and has the same trust.
    rest: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=False)
    return rest


def load(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Read each rank's part into a placed module, and the optimizers' states beside it. All ranks must call it.

    Raises:
        MisconfigurationException: If the checkpoint is of another architecture.

    """
    rest = _read_rest(path)
    targets: dict[str, Any] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, ColumnParameter):
            with no_dispatch():
                targets[f"state_dict.{key}"] = Part(value.detach().as_subclass(Tensor), value._spec)
        elif isinstance(value, Tensor):
            targets[f"state_dict.{key}"] = value.detach()
    saved = {f"state_dict.{key}" for key in rest["state_dict"]}
    if saved != set(targets):
        missing, unexpected = sorted(set(targets) - saved), sorted(saved - set(targets))
        raise MisconfigurationException(
            f"ckpt_path={str(path)!r} is of another architecture: missing {missing[:5]}, unexpected {unexpected[:5]}."
        )
    states = []
    for index, optimizer in enumerate(optimizers[: len(rest["optimizer_states"])]):
        states.append(_optimizer_targets(index, optimizer, rest["optimizer_states"][index], targets, path))
    try:
        dcp.load(targets, checkpoint_id=path, planner=DefaultLoadPlanner())
    except Exception as error:
        if "mismatch" in str(error).lower():
            raise MisconfigurationException(f"ckpt_path={str(path)!r} is of another architecture: {error}") from error
        raise
    return {**rest, "state_dict": {}, "optimizer_states": states, LOADED: True}


def _optimizer_targets(
    index: int, optimizer: Optimizer, saved: dict[str, Any], targets: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Room for an optimizer's state: local for what is split, whole for what isn't."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[Any, dict[str, Any]] = {}
    for key, entries in saved["state"].items():
        parameter = parameters[key]
        state[key] = {}
        for name, value in entries.items():
            if not isinstance(value, _Name):
                state[key][name] = value
                continue
            stored = shapes[value]
            assert isinstance(stored, TensorStorageMetadata)
            split = isinstance(parameter, ColumnParameter) and stored.size == parameter.shape
            with local_view():
                size = parameter.shape if split else stored.size
            room = torch.empty(size, dtype=stored.properties.dtype)
            state[key][name] = room
            targets[value] = Part(room, parameter._spec) if split else room
    return {**saved, "state": state}


def read_whole(path: Path) -> dict[str, Any]:
    """The whole checkpoint of a directory, as one file would hold it."""
    tensors: dict[str, Any] = {}
    _load_state_dict(
        tensors,
        storage_reader=dcp.FileSystemReader(path),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    flatten("", tensors)
    return _put_together(_read_rest(path), flat)


def main(arguments: Sequence[str] | None = None) -> int:
    """Turn a directory into one file, or a file into a directory."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) != 2:
        print("usage: python -m squall.placement.checkpoint SOURCE TARGET", file=sys.stderr)
        return 2
    source, target = Path(arguments[0]), Path(arguments[1])
    if target.exists():
        print(f"{target} exists already; name a new one.", file=sys.stderr)
        return 1
    if is_distributed(source):
        torch.save(read_whole(source), target)
    elif source.is_file():
        save(torch.load(source, map_location="cpu", weights_only=False), target, alone=True)
    else:
        print(f"{source} is neither a checkpoint file nor a distributed checkpoint.", file=sys.stderr)
        return 1
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
