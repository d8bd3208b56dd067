"""A coordinator without sockets: a test says who asks what in which order, and sees what is answered."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from squall.consistency.coordinator import Coordinator, RunOptions
from squall.consistency.events import to_pairs, unpack
from squall.consistency.order import Order


@dataclass
class Asked:
    """One request, and its answer once there is one."""

    reply: dict[str, Any] | None = None
    payload: bytes = b""

    @property
    def waits(self) -> bool:
        return self.reply is None

    def __getitem__(self, key: str) -> Any:
        assert self.reply is not None, "not answered yet"
        return self.reply[key]

    def __contains__(self, key: str) -> bool:
        return self.reply is not None and key in self.reply


@dataclass
class ScriptedRun:
    """A run whose every message is the test's.

    Args:
        world_size: Number of workers.
        num_shards: Shards, whose work the test reports by :meth:`carry_out`; none are always done at once.
        options: Further ones.

    """

    world_size: int
    num_shards: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = 0.0
        self.commands: list[dict[str, Any]] = []
        self.told: list[tuple[Any, dict[str, Any]]] = []  # announcements that answer no request
        self.peers: dict[int, str] = {}
        self._asked: dict[int, Asked] = {}
        self._num_hellos = 0
        self.coordinator = Coordinator(RunOptions(self.world_size, **self.options), self._send, self.commands.append)

    def _send(self, peer: Any, header: dict[str, Any], payload: bytes) -> None:
        if "re" in header:
            asked = self._asked[header["re"]]
            assert asked.reply is None, "answered twice"
            asked.reply, asked.payload = header, payload
        else:
            self.told.append((peer, header))

    def ask(self, rank: int, operation: str, payload: bytes = b"", /, **fields: Any) -> Asked:
        """Let a rank's present generation ask."""
        number = len(self._asked)
        asked = self._asked[number] = Asked()
        self.coordinator.handle(self.peers[rank], {"op": operation, "id": number, **fields}, payload, self.now)
        return asked

    def hello(self, rank: int, same_connection: bool = False) -> Asked:
        """Let a rank come, or come again."""
        if not same_connection:
            self._num_hellos += 1
            self.peers[rank] = f"{rank}#{self._num_hellos}"
        return self.ask(rank, "hello", rank=rank, run=1)

    def join(self, rank: int) -> Asked:
        return self.ask(rank, "join", mailbox=f"m{rank}")

    def begin(self, *sizes: int, epoch: int = 0) -> ScriptedRun:
        """Let all come, start, and open an epoch of batches of these sizes."""
        for rank in range(self.world_size):
            self.hello(rank)
        self.coordinator.start(0, self.num_shards)
        for rank in range(self.world_size):
            self.join(rank)
        self.open(epoch, *sizes)
        return self

    def open(self, epoch: int, *sizes: int) -> None:
        order = Order(array("q", sizes), array("q", range(sum(sizes))), bytearray(len(sizes)))
        self.ask(0, "order", order.pack(), epoch=epoch, num_batches=len(order))

    def lease(self, rank: int, epoch: int = 0, last: bool = False) -> Asked:
        return self.ask(rank, "lease", epoch=epoch, last=last)

    def commit(self, rank: int, base: int, *tickets: Any, **fields: Any) -> Asked:
        header = {"slot": 0, "base": base, "base_buffer": 0, "absent": [], "fetch": 1, "hyper_version": 0, **fields}
        return self.ask(rank, "commit", tickets=list(tickets), **header)

    def fetch(self, rank: int) -> Asked:
        return self.ask(rank, "fetch", buffer=0)

    def lose(self, rank: int) -> None:
        self.coordinator.lost(self.peers[rank], self.now)

    def carry_out(self, up_to: int, shard: int = 0) -> None:
        self.coordinator.commands.done(shard, up_to)

    def applied(self) -> list[tuple[str, int]]:
        """Whose pushes reached the shards, in order, and what version each made."""
        return [(command["mailbox"], command["version"]) for command in self.commands if command["op"] == "apply"]

    @property
    def report(self) -> dict[str, Any]:
        return self.coordinator.report()

    @property
    def events(self) -> list[list[Any]]:
        asked = self.ask(0, "events")
        assert not asked.waits
        return to_pairs(unpack(asked.payload))
