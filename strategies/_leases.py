"""A stock DataLoader whose batches come from the queue of the run, under a stock training loop."""

from __future__ import annotations

import copy
import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from .consistency.order import Order
from .consistency.queue import Ticket

_WHOLE = (RandomSampler, SequentialSampler, DistributedSampler)  # list all samples, the last one of a world of one

Call = Callable[..., tuple[dict[str, Any], bytearray]]  # asks the coordinator: header, payload -> header, payload


class Dealt(NamedTuple):
    """A batch that the queue has dealt out.

    Args:
        ticket: Which.
        is_spare: Whether its gradient is worth nothing: it only keeps a worker's epoch open while others are not done.

    """

    ticket: Ticket
    is_spare: bool = False


class LeasedBatches:
    """A batch sampler that asks the coordinator for each batch.

    Args:
        loader: The user's loader, whose sampler says the order of an epoch.
        num_batches: How many of them an epoch has, over all workers.
        seed: Of all orders, the same on all workers.

    """

    def __init__(self, loader: DataLoader[Any], num_batches: int, seed: int) -> None:
        self._source = loader
        self._num_batches = num_batches
        self._seed = seed
        self._single = loader.batch_sampler is None  # the data set makes batches of its own
        self.call: Call | None = None
        self.epoch: Callable[[], tuple[int, bool]] = lambda: (0, False)
        self.on_reply: Callable[[dict[str, Any]], None] = lambda reply: None
        self.done_before: dict[int, Order] = {}
        self.dealt: deque[Dealt] = deque()  # to batches that have not reached the loop
        self.in_hand = False  # whether the loop is about to compute one
        self._one_order: Order | None = None  # of all epochs

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        self.in_hand = False
        self.give_back()
        epoch, last = self.epoch()
        call = self.call
        assert call is not None
        self._propose(call, epoch)
        while True:
            is_ahead = self.in_hand or any(not dealt.is_spare for dealt in self.dealt)
            reply, payload = call({"op": "lease", "epoch": epoch, "last": last, "ahead": is_ahead})
            self.on_reply(reply)
            if reply.get("end"):
                return
            number, position = reply["ticket"]
            self.dealt.append(Dealt((int(number), int(position)), bool(reply.get("spare"))))
            indices = memoryview(payload).cast("q").tolist()
            yield indices[0] if self._single else indices

    def _propose(self, call: Call, epoch: int) -> None:
        """Say the order of an epoch, unless somebody has."""
        reply, _ = call({"op": "epoch", "epoch": epoch})
        if reply["open"]:
            return
        for earlier in sorted(number for number in self.done_before if number < epoch):
            self._say(call, earlier, self.done_before[earlier])  # what a lost worker left behind in it
        self._say(call, epoch, self.done_before.get(epoch) or self.order(epoch))

    @staticmethod
    def _say(call: Call, epoch: int, order: Order) -> None:
        call({"op": "order", "epoch": epoch, "num_batches": len(order)}, order.pack())

    def order(self, epoch: int) -> Order:
        """The batches of an epoch, from the user's sampler under a seed of the epoch's own."""
        if self._one_order is not None:
            return self._one_order
        sampler = self._source.sampler
        with seeded(self._seed + epoch):
            for part in (sampler, self._source.batch_sampler):
                if callable(getattr(part, "set_epoch", None)):
                    part.set_epoch(epoch)  # type: ignore[union-attr]
            if self._single:
                batches: list[Any] = [[index] for index in sampler]
            else:
                assert self._source.batch_sampler is not None
                batches = [list(batch) for batch in self._source.batch_sampler]
        for batch in batches:
            if not all(isinstance(index, (int, np.integer)) for index in batch):
                raise MisconfigurationException(
                    f"{type(sampler).__name__} yields {type(batch[0]).__name__}s. The queue deals out sample numbers:"
                    " let the sampler yield integers, and the data set translate them."
                )
        return Order.of(batches[: self._num_batches])

    def keep_one_order(self, num_samples: int | None) -> Order:
        """Have the same batches in each epoch.

        Args:
            num_samples: How many samples they are to have, or up to a batch more; None for all.

        """
        order = self.order(0)
        if num_samples is not None:
            starts = list(accumulate(order.sizes, initial=0))
            self._num_batches = max(1, sum(start < num_samples for start in starts[:-1]))
            size, count = sum(order.sizes[: self._num_batches]), self._num_batches
            order = Order(order.sizes[:count], order.samples[:size], order.done[:count])
        self._one_order = order
        return order

    def digest(self) -> str:
        """Which samples an epoch has: the same on all workers, unless a sampler deals out a worker's share by itself.

        Samplers that are known to list all samples are not asked.
        """
        loader = self._source
        if type(loader.sampler) in _WHOLE and type(loader.batch_sampler) in (BatchSampler, type(None)):
            return ""
        indices = np.sort(np.array(self.order(self.epoch()[0]).samples))
        return hashlib.sha256(indices.tobytes()).hexdigest()

    def continued(self, order: Order) -> Order:
        """An epoch that an earlier run began, with what is left of it in batches as the loader makes them now.

        Args:
            order: Its batches, and which of them have been trained on.

        """
        loader = self._source
        size = loader.batch_size
        if size is None or type(loader.batch_sampler) is not BatchSampler or max(order.sizes, default=size) == size:
            return order
        left = [index for position, done in enumerate(order.done) if not done for index in order.batch(position)]
        stop = len(left) - len(left) % size if loader.drop_last else len(left)
        made = [order.batch(position) for position, done in enumerate(order.done) if done]
        return Order.of(made + [left[at : at + size] for at in range(0, stop, size)], range(len(made)))

    def give_back(self) -> None:
        """Return what was dealt to batches that nobody will see."""
        if self.dealt and self.call is not None:
            tickets = [dealt.ticket for dealt in self.dealt if not dealt.is_spare]
            self.dealt.clear()
            if tickets:
                self.call({"op": "return", "tickets": tickets})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed in here, and outside as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def can_be_leased(loader: Any) -> bool:
    """Whether a loader has samples that can be dealt out by number."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader._index_sampler, "__len__")
    )


def lease(loader: DataLoader[Any], limit: int | float | None, num_workers: int, seed: int) -> DataLoader[Any]:
    """A copy of a loader whose batches come from the queue.

    Args:
        loader: The user's.
        limit: Trainer's ``limit_train_batches``: a fraction of an epoch, or batches per worker.
        num_workers: Workers that the queue serves.
        seed: Of the orders.

    """
    whole = _undistributed(loader)
    num_batches = len(whole)
    if isinstance(limit, float):
        num_batches = int(num_batches * limit)
    elif limit is not None:
        num_batches = min(num_batches, limit * num_workers)
    leased = copy.copy(whole)
    if loader.num_workers and not getattr(loader, "in_order", True):
        rank_zero_warn(
            "DataLoader(in_order=False) is taken for in_order=True: the queue is told of batches in the order in which"
            " it has dealt them out. A rank that is fast gets more of them anyway."
        )
        leased.in_order = True
    batches = LeasedBatches(whole, num_batches, seed)
    # A loader lets nobody set these after it is made; made anew, it would need the arguments of the user's subclass.
    object.__setattr__(leased, "sampler" if batches._single else "batch_sampler", batches)
    object.__setattr__(leased, "_iterator", None)
    return leased


def split(loader: DataLoader[Any], num_workers: int, rank: int, seed: int) -> DataLoader[Any]:
    """A loader of one worker's share, where no queue deals samples out."""
    if num_workers == 1 or isinstance(loader.sampler, DistributedSampler):
        return loader
    sampler: DistributedSampler[Any]
    if isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        shuffles = isinstance(loader.sampler, RandomSampler)
        sampler = DistributedSampler(loader.dataset, num_workers, rank, shuffle=shuffles, seed=seed)
    else:
        sampler = DistributedSamplerWrapper(loader.sampler, num_replicas=num_workers, rank=rank)
    shared: DataLoader[Any] = _update_dataloader(loader, sampler, mode=RunningStage.TRAINING)
    return shared


def leased_batches(loader: Any) -> LeasedBatches | None:
    """The queue's end in a loader that :func:`lease` made."""
    if not isinstance(loader, DataLoader):
        return None
    for part in (loader.batch_sampler, loader.sampler):
        if isinstance(part, LeasedBatches):
            return part
    return None


def _undistributed(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of all samples, where the user's deals out one rank's share."""
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler) or sampler.num_replicas == 1:
        return loader
    alone: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, 1, 0, shuffle=sampler.shuffle, seed=sampler.seed
    )
    whole = copy.copy(loader)
    object.__setattr__(whole, "sampler", alone)
    if loader.batch_sampler is not None:
        batch_sampler: Any = copy.copy(loader.batch_sampler)
        batch_sampler.sampler = alone
        object.__setattr__(whole, "batch_sampler", batch_sampler)
    return whole
