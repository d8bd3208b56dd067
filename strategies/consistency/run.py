"""One run, as the process that coordinates it sees it: workers, shards of this host, and those of other hosts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from .coordinator import Coordinator, RunOptions
from .mailbox import NUM_SLOTS, part_name
from .memory import Segment
from .requests import check_request
from .sandblaster.coordinator import BatchCoordinator
from .shard import Spec
from .supervisor import Loop, Shards
from .wire import Buffered, Header

_LEASES = 4  # that a silent host gets before its shards are restored here


class Post:
    """Another host with shards."""

    def __init__(self, node: int, connection: Buffered, host: str, port: int, now: float) -> None:
        self.node = node
        self.connection = connection
        self.host, self.port = host, port
        self.ready = False
        self.last_seen = now


class Run:
    """The state of one run.

    Args:
        loop: Looks after all connections.
        number: Of the run in its job.
        options: Of the run.
        num_nodes: Hosts that have shards.
        name: Of a run whose coordinator was lost, to go on with what it has left in memory.

    """

    def __init__(self, loop: Loop, number: int, options: RunOptions, num_nodes: int, name: str = "") -> None:
        self._loop = loop
        self.number = number
        self.name = name or f"squall-{os.getpid()}-{number}-{os.urandom(4).hex()}"
        of_batches = options.sandblaster is not None
        self.coordinator = (BatchCoordinator if of_batches else Coordinator)(options, self._send, self._command)
        self.shards = Shards(loop, self.name, 0, self._done, self._ready, self.fail)
        self.peers: set[Buffered] = set()
        self.posts: dict[int, Post] = {}
        self.num_nodes = num_nodes
        self.spec: Spec | None = None
        self.on_go: Callable[[Header], None] | None = None
        self._version = 0
        self._mailboxes: set[str] = set()
        self._ready_since = 0.0
        self._kept_version = 0  # of the memory that is kept for other hosts' shards
        self.rests = False

    def _send(self, peer: Any, header: Header, payload: bytes) -> None:
        if peer in self.peers:
            peer.send(header, payload)
            self._loop.watch(peer)

    def _command(self, command: Header) -> None:
        self.shards.command(command)
        for post in self.posts.values():
            self._tell(post, {"op": "command", "command": command})

    def _tell(self, post: Post, header: Header) -> None:
        post.connection.send(header)
        self._loop.watch(post.connection)

    # ------------------------------------------------------------------ the beginning

    def start(self, spec: Spec | None, version: int, on_go: Callable[[Header], None]) -> None:
        """Start this host's shards on memory that is filled.

        Args:
            spec: Of all shards; None where workers share memory without any.
            version: Number of updates that the weights come from.
            on_go: Hears when the shards are ready, or why they can't be.

        """
        self._version = self._kept_version = version
        if spec is None:
            self.coordinator.start(version, 0)
            on_go({})
            return
        self.spec, self.on_go = spec, on_go
        self.coordinator.prepare(spec, self.name)
        self.shards.start(spec)

    def _ready(self) -> None:
        self._ready_since = time.monotonic()
        if self.on_go is not None:
            self.on_go({})
            self.on_go = None
        self._begin()

    def _begin(self) -> None:
        """Let workers in as soon as every group of shards is somewhere."""
        if self.spec is None or not self._ready_since or self.coordinator.started or self.coordinator.failure:
            return
        waits = time.monotonic() - self._ready_since < self.coordinator.options.join_timeout
        missing = [node for node in range(1, self.num_nodes) if node not in self.posts or not self.posts[node].ready]
        if missing and waits:
            return
        for node in missing:
            sys.stderr.write(f"squall: host {node} has not come; its shards begin on host 0.\n")
            self._adopt(node, 0)
        self._tell_places()
        self.coordinator.start(self._version, len(self.spec.plan.slices))

    def _tell_places(self) -> None:
        places: list[Header] = []
        for node in range(self.num_nodes):
            post = self.posts.get(node)
            places.append({"node": 0} if post is None else {"node": node, "host": post.host, "port": post.port})
        self.coordinator.places = places

    def _adopt(self, node: int, last_command: int) -> None:
        post = self.posts.pop(node, None)
        if post is not None:
            self._loop.forget(post.connection)
        assert self.spec is not None
        self.shards.adopt(self.spec.plan.group(node), last_command)

    # ------------------------------------------------------------------ shards

    def _done(self, shard: int, command: int, numbers: list[float] | None = None) -> None:
        if self.coordinator.started:
            self.coordinator.commands.done(shard, command, numbers)

    def fail(self, message: str) -> None:
        """The run can't go on."""
        self.coordinator.fail(message)
        if self.on_go is not None:
            self.on_go({"failed": message})
            self.on_go = None

    # ------------------------------------------------------------------ other hosts

    def enlist(self, connection: Buffered, header: Header, now: float) -> None:
        """A host offers to have shards."""
        node, host, port = header.get("node"), header.get("host"), header.get("port")
        if type(node) is not int or type(port) is not int or not isinstance(host, str):
            raise ValueError(f"a host says {str(header)[:100]}")
        known = 1 <= node < self.num_nodes and node not in self.posts and not self.coordinator.started
        connection.send({"op": "enlisted", "run": self.name, "wanted": known})
        self._loop.watch(connection)
        if known:
            self.posts[node] = Post(node, connection, host, port, now)

    def post_of(self, connection: Buffered) -> Post | None:
        """The host behind a connection."""
        return next((post for post in self.posts.values() if post.connection is connection), None)

    def post_said(self, post: Post, header: Header, now: float) -> None:
        """Hear from another host."""
        post.last_seen = now
        operation = header.get("op")
        if operation == "ready":
            post.ready = True
            self._begin()
        elif operation == "done":
            shard, command = header.get("shard"), header.get("command")
            # Its shards may be ready before this host's, and nobody here knows yet which ones it has.
            mine = None if self.spec is None else self.spec.plan.group(post.node)
            if type(shard) is not int or (mine is not None and shard not in mine) or type(command) is not int:
                raise ValueError(f"a host says {str(header)[:100]}")
            self._done(shard, command, header.get("numbers"))
        elif operation == "failed":
            self.fail(str(header.get("message")))
        elif operation != "alive":
            raise ValueError(f"a host says {str(header)[:100]}")

    def post_gone(self, post: Post) -> None:
        """Restore a lost host's shards here, from the last checkpoint of them."""
        if self.posts.get(post.node) is not post:
            return
        if self.rests:
            del self.posts[post.node]
            return
        if not self.coordinator.started:
            del self.posts[post.node]
            self._begin()
            return
        version = self.coordinator.version
        if version > self._kept_version:  # and not at the end of a run, when hosts go one after the other
            sys.stderr.write(
                f"squall: host {post.node} was lost; its shards go on here with the weights of version"
                f" {self._kept_version}, the last that was looked at, in place of {version}.\n"
            )
        self.coordinator.num_rolled_back += version - self._kept_version
        last = self.coordinator.commands.last  # those that wait name mailboxes that went with the host
        self._adopt(post.node, last)
        self._tell_places()
        self.coordinator.displace()
        assert self.spec is not None
        for shard in self.spec.plan.group(post.node):
            self.coordinator.commands.done(shard, last)

    def kept(self, version: int) -> None:
        """The memory that is kept for other hosts' shards holds this version."""
        self._kept_version = version

    # ------------------------------------------------------------------ workers

    def worker_said(self, peer: Buffered, header: Header, payload: bytes, now: float) -> None:
        """Take one message of a worker."""
        self.peers.add(peer)
        operation = check_request(header)
        if operation == "join" and header.get("mailbox"):
            is_whole = self._find_mailbox(header["mailbox"])
            self._mailboxes.add(header["mailbox"])
            if not is_whole:
                peer.send({"re": header.get("id"), "moved": True})
                self._loop.watch(peer)
                return
        elif operation == "join" and self.shards.processes:
            raise ValueError("a worker has to name the mailbox that the shards read its pushes from")
        elif operation in ("commit", "fetch", "write"):
            self._check_places(header)
        self.coordinator.handle(peer, header, payload, now)

    def _find_mailbox(self, name: str) -> bool:
        """Shards attach to it by its name, and it is unlinked in the end: it must be there, and one of this run's.

        Returns:
            Whether it has a part for shards that have come here from a lost host meanwhile.

        """
        if not name.startswith(f"{self.name}-w") or not name.isascii():
            raise ValueError(f"{name[:80]!r} is no mailbox of this run")
        try:
            Segment(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"the mailbox {name[:80]!r} can't be attached to: {error}") from error
        try:
            for group in range(1, self.num_nodes):
                if group not in self.posts:
                    Segment(part_name(name, self.name, 0, group))
        except OSError:
            return False
        return True

    def _check_places(self, header: Header) -> None:
        """A place that no mailbox has would be an error in a shard, and the end of the run."""
        num_buffers = 2 if self.spec is None else self.spec.num_buffers
        buffers = [header.get(name) for name in ("base_buffer", "fetch", "buffer")]
        if header.get("slot", 0) >= NUM_SLOTS or any(b is not None and b >= num_buffers for b in buffers):
            raise ValueError(f"a mailbox has {NUM_SLOTS} slots and {num_buffers} buffers: {str(header)[:200]}")

    def worker_gone(self, peer: Buffered, now: float) -> None:
        """A worker's connection has ended."""
        if peer in self.peers:
            self.peers.discard(peer)
            self.coordinator.lost(peer, now)
            if not self.peers:  # after an exception: whoever began the run may live on
                self.rest()

    # ------------------------------------------------------------------ from time to time

    def look_after(self, now: float) -> None:
        """Do what is due."""
        self.coordinator.tick(now)
        used = {worker.mailbox for worker in self.coordinator.live} | self.coordinator.commands.held_mailboxes
        for name in self._mailboxes - used:
            self._mailboxes.discard(name)
            self.shards.forget(name)
            for post in self.posts.values():
                self._tell(post, {"op": "forget", "mailbox": name})
        self.shards.look_after()
        for post in list(self.posts.values()):
            if now - post.last_seen > _LEASES * self.coordinator.options.lease_timeout:
                self.post_gone(post)
        self._begin()

    def excuse(self, seconds: float) -> None:
        """Nobody could be heard for so long, through no fault of theirs."""
        self.coordinator.excuse(seconds)
        for post in self.posts.values():
            post.last_seen += seconds

    def rest(self) -> None:
        """Give the memory and the shards back: all that workers still want is to talk to each other."""
        self.rests = True
        for post in self.posts.values():
            self._tell(post, {"op": "rest"})
        self.shards.end()

    def end(self) -> None:
        """Hang up, and leave nothing behind."""
        for post in self.posts.values():
            self._loop.forget(post.connection)
        self.posts.clear()
        for peer in list(self.peers):
            self._loop.forget(peer)
        self.shards.end()
