"""Every column of a replica must see the same batch, random augmentation or not.

Columns load the same batches by keeping their random number generators in step: that sends nothing, and loading is
spread over the hosts. Code that breaks it (data drawn before seeding, the time of day, a generator of one's own) is
noticed by a fingerprint of every batch; from then on the first column loads and sends. So a run is never wrong, at
worst slower.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader

from .columns import Columns

BatchSource = Literal["auto", "broadcast"]
_END = object()
_SAMPLED = 4096  # elements of a large tensor that enter its fingerprint


def _generators(device: torch.device) -> list[Any]:
    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state(), None]
    if device.type == "cuda":
        states[3] = torch.cuda.get_rng_state(device)
    return states


def synchronize_generators(columns: Columns, device: torch.device) -> None:
    """Give every column the first one's states of torch's, NumPy's and Python's generators."""
    if columns.num_columns == 1:
        return
    states = _generators(device)
    dist.broadcast_object_list(states, src=columns.first, group=columns.group, device=device)
    if columns.rank:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if states[3] is not None:
            torch.cuda.set_rng_state(states[3], device)


def fingerprint(batch: Any) -> int:
    """A number that differs, all but surely, when any tensor of the batch does."""
    code = 0
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor) and not leaf.is_sparse:
            flat = leaf.detach().reshape(-1)
            if flat.numel() > _SAMPLED:
                flat = flat[:: flat.numel() // _SAMPLED]
            code = zlib.crc32(str((leaf.shape, leaf.dtype)).encode(), code)
            code = zlib.crc32(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes(), code)
        elif isinstance(leaf, (int, float, str, bytes)):
            code = zlib.crc32(repr(leaf).encode(), code)
    return code


def _fingerprint_of_generators(device: torch.device) -> int:
    python, (kind, keys, *rest), *of_torch = _generators(device)
    code = zlib.crc32(repr((python, kind, rest)).encode())
    for part in (keys, *(state.numpy() for state in of_torch if state is not None)):
        code = zlib.crc32(part.tobytes(), code)
    return code


class BatchSupply:
    """Hands a loader's batches to this column, the same as to the others, and keeps generators in step.

    What a batch's worth of code draws on one column alone (a callback that acts on rank 0, data that only the first
    column loads) would have the columns draw other dropout masks from there on, so they begin each batch with the first
    one's generators.

    Args:
        columns: The columns of one replica.
        device: Where messages between them live.
        source: ``"auto"`` loads on every column, and falls back to ``"broadcast"``, where the first column loads and
            sends.
        start_epoch: Called when an iteration starts, before anything random is drawn.
        all_load: Every column loads even what the first one sends, since loading does more than that.

    """

    def __init__(
        self,
        columns: Columns,
        device: torch.device,
        source: BatchSource,
        start_epoch: Callable[[], None],
        all_load: bool = False,
    ) -> None:
        self.columns = columns
        self.device = device
        self.sends = source == "broadcast"
        self.start_epoch = start_epoch
        self.all_load = all_load

    def iterate(self, open_loader: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Yield what the loader yields, agreed on by all columns."""
        self.start_epoch()
        loader = open_loader() if self.columns.rank == 0 or self.all_load or not self.sends else iter(())
        while True:
            batch = next(loader, _END)
            is_same, is_in_step = (True, False) if self.sends else self._agree(batch)
            if not is_same:
                rank_zero_warn(
                    "The columns of a replica loaded different batches: something random in the data does not follow "
                    "the generators that Squall keeps in step (was it drawn before the run, without "
                    "lightning.seed_everything?). From now on the first column loads and sends to the others. "
                    "Say so with batches='broadcast' to silence this, or seed the data to save the traffic."
                )
                self.sends = True
            if self.sends:
                batch = self._send(batch)
            if not is_in_step:
                synchronize_generators(self.columns, self.device)
            if batch is _END:
                return
            yield batch

    def _agree(self, batch: Any) -> list[bool]:
        """Whether all columns have the same batch, and the same generators."""
        codes = -1 if batch is _END else fingerprint(batch), _fingerprint_of_generators(self.device)
        extremes = torch.tensor([*codes, *(-code for code in codes)], dtype=torch.int64, device=self.device)
        high, low = self.columns.max_(extremes).chunk(2)
        same: list[bool] = (high == -low).tolist()
        return same

    def _send(self, batch: Any) -> Any:
        """Broadcast the first column's batch, tensors as tensors."""
        columns = self.columns
        leaves, structure = tree_flatten(batch) if batch is not _END else ([], None)
        header: list[Any] = [
            None if batch is _END else structure,
            [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            [isinstance(leaf, Tensor) for leaf in leaves],
        ]
        dist.broadcast_object_list(header, src=columns.first, group=columns.group, device=self.device)
        if header[0] is None:
            return _END
        received = []
        for position, (what, is_tensor) in enumerate(zip(header[1], header[2], strict=True)):
            if not is_tensor:
                received.append(what)
                continue
            shape, dtype = what
            buffer = (
                leaves[position].to(self.device).contiguous()
                if columns.rank == 0
                else torch.empty(shape, dtype=dtype, device=self.device)
            )
            received.append(columns.broadcast_(buffer).cpu())
        return tree_unflatten(received, header[0])


class ColumnLoader:
    """A loader of any other kind than ``DataLoader`` whose batches all columns agree on."""

    def __init__(self, loader: Iterable[Any], supply: BatchSupply) -> None:
        self._loader = loader
        self._supply = supply

    def __iter__(self) -> Iterator[Any]:
        return self._supply.iterate(lambda: iter(self._loader))

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "_supply"):  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self._loader, name)


class SizedColumnLoader(ColumnLoader):
    """The same for a loader that has a length."""

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def _agreed_class(kind: type) -> type:
    """A ``DataLoader`` class that iterates agreed batches and is otherwise what the user and Lightning take it for."""

    def iterate(self: Any) -> Iterator[Any]:
        supply: BatchSupply = self._squall_supply
        init = self.worker_init_fn
        if isinstance(init, partial) and init.func is pl_worker_init_function:
            # Lightning seeds workers by global rank; columns of one replica must have the same.
            self.worker_init_fn = partial(pl_worker_init_function, rank=self._squall_data_rank)
        return supply.iterate(lambda: kind.__iter__(self))  # type: ignore[attr-defined]

    members = {"__iter__": iterate, "__module__": kind.__module__, "__slots__": (), "_squall_kind": kind}
    return type(kind.__name__, (kind,), members)


def release_batches(loader: Any) -> None:
    """Give a ``DataLoader`` back as it came: after the run, one rank may iterate it alone."""
    kind = vars(type(loader)).get("_squall_kind")
    if kind is not None:
        loader.__class__ = kind
        del loader._squall_supply, loader._squall_data_rank


def agree_on_batches(loader: Any, supply: BatchSupply, data_rank: int) -> Any:
    """Make all columns iterate the same batches of ``loader``.

    Args:
        loader: A ``DataLoader`` (changed in place, and still one) or any iterable.
        supply: How batches are agreed on.
        data_rank: This replica's index, which seeds its workers.

    """
    if isinstance(loader, DataLoader):
        if not hasattr(loader, "_squall_kind"):
            loader.__class__ = _agreed_class(type(loader))
        loader._squall_supply = supply  # type: ignore[attr-defined]
        loader._squall_data_rank = data_rank  # type: ignore[attr-defined]
        return loader
    return (SizedColumnLoader if hasattr(loader, "__len__") else ColumnLoader)(loader, supply)
