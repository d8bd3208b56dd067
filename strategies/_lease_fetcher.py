"""A stock training loop's way to batches that a queue deals out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher

from ._leases import Dealt, LeasedBatches
from .consistency.queue import Ticket


class LeaseFetcher(_PrefetchDataFetcher):
    """Knows one batch ahead whether more will come, though nobody knows how many batches a worker will get."""

    def __init__(
        self,
        batches: LeasedBatches,
        on_batch: Callable[[Ticket | None, bool], None],
        on_empty: Callable[[], None],
        takes_spare: bool,
    ) -> None:
        super().__init__(prefetch_batches=1)
        self._leased = batches
        self._on_batch = on_batch
        self._on_empty = on_empty
        self._takes_spare = takes_spare
        self._dealt: deque[Dealt] = deque()  # of batches that are here

    @classmethod
    def in_place_of(cls, fetcher: _DataFetcher, *args: Any) -> LeaseFetcher:
        """Take over a stock fetcher's loader, and the iterator that it has made already."""
        ours = cls(*args)
        ours.setup(fetcher.combined_loader)
        ours.iterator = fetcher.iterator
        return ours

    def __iter__(self) -> LeaseFetcher:
        self._leased.dealt.extend(self._dealt)  # if a hook has ended the epoch before they were seen
        self._dealt.clear()
        _DataFetcher.__iter__(self)
        return self

    def reset(self) -> None:
        """Forget how long the loader says it is: that is the length for all workers together."""
        super().reset()
        self.length = None
        self.done = False

    def __next__(self) -> Any:
        while True:
            if not self.batches:
                if self.done:
                    raise StopIteration
                self._leased.in_hand = False
                try:
                    self._fetch()
                except StopIteration:
                    self._on_empty()
                    raise
            batch = self.batches.pop(0)
            dealt = self._dealt.popleft()
            self._leased.in_hand = not dealt.is_spare
            try:
                self._fetch()
            except StopIteration:
                self.done = True
            if not dealt.is_spare or (self.done and self._takes_spare):  # which an epoch without any other ends with
                self._on_batch(None if dealt.is_spare else dealt.ticket, self.done)
                return batch
            if self.done:
                self._on_empty()
                raise StopIteration

    def _fetch(self) -> None:
        batch = _DataFetcher.__next__(self)
        self.batches.append(batch)
        self._dealt.append(self._leased.dealt.popleft())

    def teardown(self) -> None:
        """Forget what was fetched; its leases end with the loop."""
        self._dealt.clear()
        super().teardown()
