"""The one order in which all shards are told what to do, and who hears when it is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .wire import Header
from .worker import Worker

Then = Callable[[list[list[float]]], None]


class Commands:
    """Numbered commands, those behind a snapshot that is being read, and what is announced when they are done.

    Args:
        give: Sends a numbered command to all shards.
        announce: Sends a worker a message.

    """

    def __init__(self, give: Callable[[Header], None], announce: Callable[[Worker, Header, bytes], None]) -> None:
        self._give = give
        self._announce = announce
        self._announcements: deque[tuple[int, Then, Callable[[str], None]]] = deque()  # and what if it fails
        self._numbers: dict[int, list[list[float]]] = {}  # that shards have told, by command
        self._held: list[Header] = []
        self._done: list[int] = []
        self.last = 0  # whether the shards were given it, or it waits for a snapshot to be read
        self.reader: Worker | None = None  # of a snapshot

    @property
    def num_shards(self) -> int:
        """How many shards carry commands out."""
        return len(self._done)

    def expect(self, num_shards: int) -> None:
        """So many shards carry commands out, from here on."""
        self._done = [0] * num_shards

    @property
    def num_done(self) -> int:
        """The last command that all shards have carried out."""
        return min(self._done, default=self.last)

    @property
    def held_mailboxes(self) -> set[str]:
        """Mailboxes that commands need which wait for a snapshot to be read."""
        return {str(command["mailbox"]) for command in self._held if "mailbox" in command}

    def issue(self, command: Header, worker: Worker, announcement: Header, payload: bytes = b"") -> None:
        """Give a command its number; its worker hears when all shards have carried it out."""
        self._number(command)

        def fail(message: str) -> None:
            self._announce(worker, {**announcement, "failed": message}, b"")

        self._announcements.append((self.last, lambda _: self._announce(worker, announcement, payload), fail))
        self._give_or_hold(command)

    def ask(self, command: Header, then: Then) -> None:
        """Give a command its number; what all shards have found goes to ``then``, a list a shard."""
        self._number(command)
        self._announcements.append((self.last, then, lambda message: None))
        self._give_or_hold(command)

    def _number(self, command: Header) -> None:
        self.last += 1
        command["c"] = self.last

    def _give_or_hold(self, command: Header) -> None:
        if self.reader is not None:
            self._held.append(command)
        else:
            self._give(command)
        if not self._done:
            self._tell()

    def done(self, shard: int, command: int, numbers: list[float] | None = None) -> None:
        """A shard has carried out all commands up to this one, which has asked for some numbers."""
        if numbers is not None and command > self._done[shard]:
            self._numbers.setdefault(command, []).append(numbers)
        self._done[shard] = max(self._done[shard], command)
        self._tell()

    def _tell(self) -> None:
        while self._announcements and self._announcements[0][0] <= self.num_done:
            number, then, _ = self._announcements.popleft()
            then(self._numbers.pop(number, []))

    def fail(self, message: str) -> None:
        """Nothing more will be done: say so to who waits for it."""
        for _, _, fail in self._announcements:
            fail(message)
        self._announcements.clear()

    def hold(self, reader: Worker) -> None:
        """Hold all later commands back until a worker has read the shards' memory."""
        self.reader = reader

    def release(self) -> None:
        """Give what was held back."""
        self.reader = None
        held, self._held = self._held, []
        for command in held:
            self._give(command)
