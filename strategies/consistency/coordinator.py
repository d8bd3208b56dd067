"""Who does what in an asynchronous run, decided in one place: the order of updates, the queue, who is alive.

Weights and gradients never pass here; what passes is a few hundred bytes per update. Since every push is *committed*
here, and all shards then apply it under the same number, there is one order of updates, one version of the weights,
and one answer to whether a push was applied or lost, whichever process dies when. What waits (for a slower worker,
for the end of an epoch, for its turn in a replayed schedule) waits here too, as a parked request.

This class is a state machine without sockets, clocks or threads: requests go in, messages come out. Tests script it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .commands import Commands
from .mates import Mates
from .meetings import Board, Meetings
from .order import Order, pack_orders
from .queue import Ticket, WorkQueue
from .replay import Replay
from .requests import check_request
from .staleness import StalenessStatistics
from .wire import Header
from .worker import LEADER, Peer, Worker

VALIDATION = "validation"  # what the leader's last one said: its place on the board

Send = Callable[[Peer, Header, bytes], None]


@dataclass
class RunOptions:
    """What the coordinator has to know of a run.

    Args:
        world_size: Number of workers that begin together.
        max_staleness: How many of its own steps a worker may be ahead of the slowest; None for any.
        warm_start_steps: Updates that the leader makes alone.
        max_steps: Updates after which the run ends; -1 for no limit.
        lease_timeout: Seconds without a sign of life after which a worker counts as lost.
        join_timeout: Seconds that the first workers wait for the others, before they begin without them.
        schedule: Events of an earlier run to repeat in their order.
        sandblaster: Settings of an optimization over a whole batch; None where each push is an update.

    """

    world_size: int
    max_staleness: int | None = None
    warm_start_steps: int = 0
    max_steps: int = -1
    lease_timeout: float = 30.0
    join_timeout: float = 120.0
    schedule: array[int] | None = None
    sandblaster: dict[str, Any] | None = None


@dataclass
class _Parked:
    worker: Worker
    header: Header
    payload: bytes


class Coordinator:
    """The state machine.

    Args:
        options: Of the run.
        send: Sends a message to a worker.
        command: Sends a numbered command to all shards.
        num_shards: How many shards carry commands out.

    """

    def __init__(self, options: RunOptions, send: Send, command: Callable[[Header], None], num_shards: int = 0) -> None:
        self.options = options
        self.queue = WorkQueue()
        self.statistics = StalenessStatistics()
        self.version = 0  # updates committed
        self.num_lost = 0  # pushes that were not applied
        self.num_rolled_back = 0  # updates that a lost host's shards have had in vain
        self.num_joined = 0
        self.places: list[Header] = [{"node": 0}]  # where each group of shards is
        self.started = False
        self.stopped = ""
        self.leader_lost = False
        self.workers: dict[int, Worker] = {}
        self.failure = ""
        self.commands = Commands(command, self._announce)
        self.commands.expect(num_shards)
        self._send = send
        self._by_peer: dict[Peer, Worker] = {}
        self._mates = Mates(self._admit, self._refuse, self._bury)
        self._generations: dict[int, int] = {}
        self._parked: list[_Parked] = []
        self._meetings = Meetings(self._answer)
        self._board = Board()
        self._num_validations = 0
        self._replay = Replay(options.schedule, lambda worker: self.queue.revoke(worker.key))
        self._gathered: dict[str, set[int]] = {}
        self._claimed: Worker | None = None
        self._hyper: Any = None
        self._hyper_version = 0
        self._first_hello: float | None = None
        self._waits_for_all = True

    # ------------------------------------------------------------------ who is there

    @property
    def live(self) -> list[Worker]:
        """All workers that are alive, by rank."""
        return [worker for _, worker in sorted(self.workers.items()) if worker.alive]

    def lost(self, peer: Peer, now: float = 0.0) -> None:
        """A worker's connection has ended, or that of one of its ranks."""
        self._mates.lost(peer)
        worker = self._by_peer.pop(peer, None)
        if worker is not None:
            self._bury(worker)
        self._progress(now)

    def tick(self, now: float) -> None:
        """Look for workers that have not been heard of for too long."""
        for worker in self.live:
            if now - worker.last_seen > self.options.lease_timeout:
                self._bury(worker)
        self._mates.tick(now, self.options.lease_timeout, self.options.join_timeout)
        if self._first_hello is not None and now - self._first_hello > self.options.join_timeout:
            self._waits_for_all = False
        self._progress(now)
        waiting = {parked.worker.rank: str(parked.header["op"]) for parked in self._parked if parked.worker.in_loop}
        reason = self._replay.hangs(now, self.options.join_timeout, waiting, self.workers)
        if reason:
            self.fail(reason)

    def excuse(self, seconds: float) -> None:
        """Nobody could be heard for so long, through no fault of theirs."""
        for worker in self.live:
            worker.last_seen += seconds
        self._mates.excuse(seconds)

    def _bury(self, worker: Worker) -> None:
        if not worker.alive:
            return
        worker.alive = False
        if worker.in_loop and not worker.finished:
            self._replay.lost(worker, at_once=self.leader_lost)
        else:
            self.queue.revoke(worker.key)
        # It may only have been stopped: then it must not wait for ever for answers that it was owed.
        for parked in [parked for parked in self._parked if parked.worker is worker]:
            self._parked.remove(parked)
            self._revoked(worker, parked.header)
        for header in self._meetings.leave(worker):
            self._revoked(worker, header)
        if self.commands.reader is worker:
            self.commands.release()
        if self._claimed is worker:
            self._claimed = None
        if worker.rank == LEADER and self.started and not worker.finished:
            self.leader_lost = True

    def _revoked(self, worker: Worker, header: Header) -> None:
        """Tell a worker that was given up so. What it came to push is lost: others have its samples."""
        if header.get("op") == "commit":
            self.num_lost += 1
        self._answer(worker, header, {"revoked": True})

    def _successor(self) -> int:
        """Who writes down what was learned, if the leader is lost."""
        return min((worker.rank for worker in self.live), default=LEADER)

    # ------------------------------------------------------------------ requests

    def handle(self, peer: Peer, header: Header, payload: bytes = b"", now: float = 0.0) -> None:
        """Take one message of a worker.

        Args:
            peer: Who sent it.
            header: ``op`` says what it wants; ``id`` comes back with the answer.
            payload: Bytes that belong to it.
            now: Seconds, on any clock that goes on.

        Raises:
            ValueError: If it makes no sense; the peer is not to be listened to any more.

        """
        operation = check_request(header)
        if operation == "hello":
            if header.get("column"):
                self._mates.hello(peer, header, self.workers.get(int(header["rank"])), now)
                self._progress(now)
            else:
                self._hello(peer, header, now)
            return
        if operation == "alive" and self._mates.seen(peer, now):
            return
        worker = self._by_peer.get(peer)
        if worker is None:
            raise ValueError(f"{operation!r} before hello")
        worker.last_seen = now
        if not worker.alive:
            if operation != "alive":
                self._revoked(worker, header)
            return
        if self.failure:
            self._answer(worker, header, {"failed": self.failure})
            return
        if not getattr(self, f"_on_{operation}")(worker, header, payload):
            self._parked.append(_Parked(worker, header, payload))
        self._progress(now)

    def fail(self, message: str) -> None:
        """The run can't go on: say so to everybody who waits, and to everybody who asks."""
        self.failure = self.failure or message
        for parked in self._parked:
            self._answer(parked.worker, parked.header, {"failed": self.failure})
        self._parked.clear()
        self.commands.fail(self.failure)

    def _answer(self, worker: Worker, header: Header, reply: Header, payload: bytes = b"") -> bool:
        if "id" in header:
            self._send(worker.peer, {"re": header["id"], **reply}, payload)
        return True

    def _announce(self, worker: Worker, header: Header, payload: bytes) -> None:
        if self._by_peer.get(worker.peer) is worker:  # alive, or given up and about to learn so: it waits for this
            self._send(worker.peer, header, payload)

    def _progress(self, now: float) -> None:
        """Look again at everything that waits, until nothing moves."""
        moved = True
        while moved:
            moved, position = False, self._replay.position
            for parked in list(self._parked):
                if parked not in self._parked:
                    continue
                handler = getattr(self, f"_on_{parked.header['op']}")
                if handler(parked.worker, parked.header, parked.payload):
                    if parked in self._parked:
                        self._parked.remove(parked)
                    moved = True
            # Who still waits may have done what a schedule has next, and so it is another's turn.
            moved = self._meetings.end(self._are_all) or moved or self._replay.position != position

    def _hello(self, peer: Peer, header: Header, now: float) -> None:
        rank = int(header["rank"])
        known = self._by_peer.get(peer)
        if known is not None and known.rank != rank:
            raise ValueError(f"rank {known.rank} says that it is rank {rank}")
        if self._first_hello is None:
            self._first_hello = now
        before = self.workers.get(rank)
        if before is not None:
            self._bury(before)
            self._by_peer.pop(before.peer, None)
            if before.peer != peer:
                self._send(before.peer, {"failed": f"Another process has taken this one's place as rank {rank}."}, b"")
        generation = self._generations.get(rank, -1) + 1
        self._generations[rank] = generation
        self.num_joined += 1
        worker = Worker(rank, generation, peer, now, rendezvous=int(header.get("rendezvous", 0)))
        self.workers[rank] = worker
        self._by_peer[peer] = worker
        self._answer(worker, header, self._welcome(worker))
        self._mates.worker_is_there(worker, now)
        self._progress(now)

    def _welcome(self, worker: Worker) -> Header:
        return {
            "generation": worker.generation, "started": self.started, "epoch": self.queue.last_epoch,
            "version": self.version,
        }  # fmt: skip

    def _admit(self, peer: Peer, header: Header, worker: Worker) -> None:
        """Tell a rank where the others of its worker meet."""
        self._send(peer, {"re": header.get("id"), **self._welcome(worker), "rendezvous": worker.rendezvous}, b"")

    def _refuse(self, peer: Peer, header: Header) -> None:
        message = (
            f"The first rank of replica {header['rank']} has not come, or is gone, so this one has nobody to follow."
        )
        self._send(peer, {"re": header.get("id"), "failed": message}, b"")

    def _on_alive(self, worker: Worker, header: Header, payload: bytes) -> bool:
        return True

    # ------------------------------------------------------------------ meetings: collectives of the live

    def _on_meet(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """A collective: over when every live worker has come to it, or has gone on into the loop."""
        self._meetings.come(worker, header, payload)
        self._meetings.end(self._are_all)
        return True

    def _are_all(self, present: set[int]) -> bool:
        """Whether a meeting that these have come to can be held."""
        if self._waits_for_all and not self.started and len(self.workers) < self.options.world_size:
            return False
        # Once the leader is out of the loop, all who are in it are about to follow, if they have only just come.
        leader = self.workers.get(LEADER)
        at_the_end = leader is not None and leader.finished and not leader.in_loop
        return {worker.rank for worker in self.live if at_the_end or not worker.in_loop} <= present

    def _on_share(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Leave a value on the board, and take everybody's latest: nobody waits."""
        if not self._comes_to("share", worker):
            return False
        alive = {other.rank for other in self.live}
        self._num_validations += worker.rank == LEADER and header["key"] == VALIDATION
        return self._answer(worker, header, *self._board.share(worker, header, payload, alive))

    def _on_gather(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Wait for certain ranks, but not for the lost and the finished; for scripted interleavings."""
        key = str(header["key"])
        here = self._gathered.setdefault(key, set())
        here.add(worker.rank)
        there = {int(rank) for rank in header["ranks"]}
        if self.started and not self.stopped and not self.leader_lost:
            absent = there - here - {rank for rank, other in self.workers.items() if not other.alive or other.finished}
            if absent:
                return False
        return self._answer(worker, header, {"version": self.version})

    # ------------------------------------------------------------------ the loop

    def prepare(self, spec: Any, name: str) -> None:
        """Learn what the shards of the run of a name are made from, before the start."""

    def start(self, version: int = 0, num_shards: int | None = None) -> None:
        """The shards hold the weights: workers may begin."""
        self.started = True
        self.version = version
        if num_shards is not None:
            self.commands.expect(num_shards)
        self._progress(0.0)

    def _on_places(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Where the shards are, once they are."""
        if not self.started:
            return self._begins_in_vain(worker, header)
        return self._answer(worker, header, {"places": self.places})

    def _begins_in_vain(self, worker: Worker, header: Header) -> bool:
        leader = self.workers.get(LEADER)
        if leader is None or leader.alive:
            return False
        return self._answer(worker, header, {"failed": "Rank 0 was lost before training began."})

    def _on_join(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Enter the loop, once there is something to train."""
        worker.mailbox = str(header.get("mailbox", ""))  # none where there is nobody to push to
        if not self.started:
            return self._begins_in_vain(worker, header)
        if not worker.joined:  # and not just once more, with another mailbox
            worker.clock = self._slowest_clock(but=worker)
            worker.finished = worker.is_leaving = worker.idle = False
        worker.joined = worker.in_loop = True
        worker.displaced = False
        return self._answer(worker, header, {"version": self.version, "num_shards": self.commands.num_shards})

    def _on_epoch(self, worker: Worker, header: Header, payload: bytes) -> bool:
        return self._answer(worker, header, {"open": self.queue.is_open(int(header["epoch"]))})

    def _on_order(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """The order of an epoch, packed."""
        self.queue.open(int(header["epoch"]), Order.unpack(int(header["num_batches"]), payload))
        return self._answer(worker, header, {})

    def _on_lease(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """A batch of an epoch; the end of the epoch; or nothing yet."""
        epoch = int(header["epoch"])
        if self._over(worker, header):
            return True
        if self._waits_for_the_warm_start(worker):
            return False
        ends = self._turn("end", worker)
        if not ends and not self._turn("lease", worker):
            return False
        kept = {number for number in self.queue.epochs(epoch) if self._is_the_leaders(worker, number)}
        passed_over = ends and self._replay.goes_on and not self.leader_lost
        ticket = None if passed_over else self.queue.lease(worker.key, epoch, kept)
        if ticket is not None:
            if worker.idle:  # nobody has to wait until it has made up for the time that it had no data
                worker.idle = False
                worker.clock = max(worker.clock, self._slowest_clock(but=worker))
            worker.epoch = max(worker.epoch, ticket[0])
            self._replay.happened("lease", worker)
            reply = {"ticket": ticket, "validations": self._num_validations}
            return self._answer(worker, header, reply, self.queue.samples(ticket).tobytes())
        # What others still hold may come back. Somebody has to stay for it: the leader, whose run ends last.
        last = bool(header.get("last"))
        if last and worker.rank == LEADER and not self.queue.is_covered(epoch, but=worker.key):
            worker.idle = True
            return False
        worker.idle = False
        self._replay.happened("end", worker)
        return self._answer(worker, header, {"end": True})

    def _is_the_leaders(self, worker: Worker, epoch: int) -> bool:
        """Whether the last batch of an epoch is kept for the leader, which has had none: it validates on its last."""
        leader = self.workers.get(LEADER)
        if worker.rank == LEADER or leader is None or not leader.alive or leader.finished or leader.epoch >= epoch:
            return False
        return self.queue.num_left(epoch) == 1

    def _turn(self, kind: str, worker: Worker) -> bool:
        """Whether a replayed schedule has come to this event."""
        return self.leader_lost or self._replay.is_turn(kind, worker, self.workers)

    def _comes_to(self, kind: str, worker: Worker) -> bool:
        """Whether a schedule has come to something that is an event inside the loop alone; it is noted, if so."""
        if worker.in_loop and not worker.finished:
            if not self._turn(kind, worker):
                return False
            self._replay.happened(kind, worker)
        return True

    def _slowest_clock(self, but: Worker) -> int:
        """Of those who train; 0 if nobody else does."""
        clocks = (w.clock for w in self.live if w is not but and w.in_loop and not w.finished and not w.idle)
        return min(clocks, default=0)

    def _over(self, worker: Worker, header: Header) -> bool:
        if self.leader_lost or self.stopped:
            return self._answer(worker, header, {"end": True, **self._state()})
        return False

    def _state(self) -> Header:
        """How the run is going, for those who are in the loop."""
        state: Header = {"version": self.version, "validations": self._num_validations}
        if self.leader_lost:
            return state | {"leader_lost": True, "successor": self._successor()}
        return state | ({"stopped": self.stopped} if self.stopped else {})

    def _waits_for_the_warm_start(self, worker: Worker) -> bool:
        """Whether a worker is not to begin yet: the leader makes the first updates alone, as long as it makes any."""
        leader = self.workers.get(LEADER)
        alone = leader is not None and leader.alive and not leader.finished and not self.stopped
        return alone and worker.rank != LEADER and self.version < self.options.warm_start_steps

    def _on_gate(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Wait for the warm start, and for the slowest if staleness is bounded: not for the dead or who has no data."""
        if self._waits_for_the_warm_start(worker):
            return False
        bound = self.options.max_staleness
        if bound is not None and not self.stopped and not self.leader_lost:
            clocks = [other.clock for other in self.live if other.in_loop and not other.finished and not other.idle]
            waits = self.version >= self.options.warm_start_steps or worker.rank != LEADER
            if waits and worker.clock - min(clocks, default=worker.clock) > bound:
                return False
        return self._answer(worker, header, self._state())

    def _on_await(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Wait for a version; for scripted interleavings."""
        # Whoever has no data waits for this worker, or for nothing.
        others = any(other is not worker and not other.finished and not other.idle for other in self.live)
        if self.version < int(header["version"]) and others and not self.stopped and not self.leader_lost:
            return False
        return self._answer(worker, header, {"version": self.version})

    def _on_commit(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """A push whose bytes lie ready: give it its place in the order of updates, or say why not."""
        tickets: list[Ticket] = [(int(epoch), int(position)) for epoch, position in header["tickets"]]
        if int(header["base"]) > self.version or not worker.joined:
            raise ValueError(f"a push from version {header['base']}, ahead of version {self.version}, or before join")
        # What is refused is no event, and waits for no turn.
        if worker.displaced:
            return self._answer(worker, header, {"moved": True})
        if not self.queue.holds(worker.key, tickets):
            self.num_lost += 1
            self.queue.give_back(worker.key, tickets)  # what it still held of a push of several batches
            return self._answer(worker, header, {"lost": "its samples were given to others"})
        if self.stopped or 0 <= self.options.max_steps <= self.version:
            self._stop("max_steps")
            self.queue.give_back(worker.key, tickets)
            return self._answer(worker, header, {"finished": self.stopped, "version": self.version})
        if not self._turn("commit", worker):
            return False
        staleness = self.version - int(header["base"])
        self._replay.happened("commit", worker)
        self.version += 1
        worker.clock += 1
        worker.sequence += 1
        if self.version == self.options.warm_start_steps:  # nobody has to catch up with what was made alone
            for other in self.live:
                other.clock = worker.clock
        self.statistics.add(staleness)
        self.queue.complete(worker.key, tickets)
        if header.get("buffers"):
            worker.buffers = payload
        if worker.rank == LEADER and header.get("hyper") is not None:
            self._hyper, self._hyper_version = header["hyper"], self._hyper_version + 1
        command: Header = {
            "op": "apply",
            "mailbox": worker.mailbox,
            "slot": header["slot"],
            "absent": header.get("absent", []),
            "staleness": staleness,
            "base": header.get("base_buffer"),
            "fetch": header.get("fetch"),
            "hyper": [self._hyper_version, self._hyper],
            "version": self.version,
        }
        self.commands.issue(command, worker, {"done": worker.sequence, "version": self.version})
        if 0 <= self.options.max_steps <= self.version:
            self._stop("max_steps")
        reply = {
            "version": self.version, "staleness": staleness, "sequence": worker.sequence,
            "progress": self.queue.progress(),
        }  # fmt: skip
        if header.get("hyper_version") != self._hyper_version:
            reply |= {"hyper": self._hyper, "hyper_version": self._hyper_version}
        return self._answer(worker, header, reply)

    def _on_fetch(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Weights as they are at this point of the order."""
        if not worker.joined:
            raise ValueError("a fetch before join")
        if worker.displaced:
            return self._answer(worker, header, {"moved": True})
        if not self._turn("fetch", worker):
            return False
        self._replay.happened("fetch", worker)
        command = {"op": "fetch", "mailbox": worker.mailbox, "fetch": header["buffer"]}
        self.commands.issue(command, worker, {"re": header["id"], "version": self.version, "hyper": self._hyper,
                                      "hyper_version": self._hyper_version})  # fmt: skip
        return True

    def _on_claim(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Be the only one, until ``free`` or the worker's end: to make an optimizer's first state, which all share."""
        if self._claimed is not None and self._claimed is not worker:
            return False
        self._claimed = worker
        return self._answer(worker, header, {})

    def _on_free(self, worker: Worker, header: Header, payload: bytes) -> bool:
        if self._claimed is worker:
            self._claimed = None
        return self._answer(worker, header, {})

    def _on_write(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Weights that a worker has edited, in place of the shards' own."""
        if not worker.joined:
            raise ValueError("a write before join")
        if worker.displaced:
            return self._answer(worker, header, {"moved": True})
        if not self._comes_to("write", worker):
            return False
        command = {"op": "write", "mailbox": worker.mailbox, "fetch": header["buffer"]}
        self.commands.issue(command, worker, {"re": header["id"], "version": self.version})
        return True

    def _on_done(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Batches that led to no update: the user's step skipped them."""
        tickets = [(int(epoch), int(position)) for epoch, position in header["tickets"]]
        if self.queue.holds(worker.key, tickets):
            self.queue.complete(worker.key, tickets)
        return self._answer(worker, header, {})

    def _on_return(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Batches that will not be trained on, for others to have."""
        if not self._comes_to("return", worker):
            return False
        self.num_lost += bool(header.get("lost"))
        self.queue.give_back(worker.key, [(int(epoch), int(position)) for epoch, position in header["tickets"]])
        return self._answer(worker, header, {})

    def _on_stop(self, worker: Worker, header: Header, payload: bytes) -> bool:
        self._stop(str(header.get("why", "stop")))
        return self._answer(worker, header, {})

    def _stop(self, why: str) -> None:
        self.stopped = self.stopped or why

    def _on_leave(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """The end of a worker's loop: it waits for the others, so that all end with the same weights."""
        if not self._comes_to("leave", worker):
            return False
        worker.finished = True
        self.queue.revoke(worker.key)
        if worker.rank == LEADER and header.get("stop", True):
            self._stop("the leader has finished")
        if any(not other.finished for other in self.live if other.in_loop) and not self.leader_lost:
            return False
        worker.in_loop = False
        reply = {"version": self.version, "leader_lost": self.leader_lost, "successor": self._successor()}
        return self._answer(worker, header, reply)

    # ------------------------------------------------------------------ shards

    def displace(self) -> None:
        """Shards are somewhere else from now on: what workers have prepared for them is worth nothing."""
        for worker in self.live:
            worker.displaced = worker.joined

    def _on_snapshot(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Hold all later commands back until the worker has read the shards' memory.

        Which samples are left is said if it is asked for: that is megabytes, and only a checkpoint needs it.
        """
        if self.commands.reader is not None or not self._comes_to("snapshot", worker):
            return False
        # The queue's state belongs to the same moment as the weights.
        said, orders = pack_orders(self.queue.state() if header.get("queue") else {})
        state = self.report() | {"re": header["id"], "queue": said, "hyper_version": self._hyper_version}
        self.commands.issue({"op": "mark"}, worker, state, orders)
        self.commands.hold(worker)
        return True

    def _on_release(self, worker: Worker, header: Header, payload: bytes) -> bool:
        if self.commands.reader is worker:
            self.commands.release()
        return self._answer(worker, header, {})

    # ------------------------------------------------------------------ what can be asked

    def _on_buffers(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """The latest buffers (running statistics) of every worker that has any."""
        if not self._comes_to("buffers", worker):
            return False
        shown = [other.buffers for other in self.live if other.buffers]
        return self._answer(worker, header, {"sizes": [len(data) for data in shown]}, b"".join(shown))

    def _on_report(self, worker: Worker, header: Header, payload: bytes) -> bool:
        return self._answer(worker, header, self.report())

    def report(self) -> Header:
        """What happened so far, in numbers."""
        return {
            "version": self.version,
            "num_lost": self.num_lost,
            "num_rolled_back": self.num_rolled_back,
            "num_live": len(self.live),
            "num_joined": self.num_joined,
            "num_samples": self.queue.num_samples,
            "num_reissued": self.queue.num_reissued,
            "progress": self.queue.progress(),
            "staleness": sorted(self.statistics.counts.items()),
            "stopped": self.stopped,
            "leader_lost": self.leader_lost,
        }

    def _on_events(self, worker: Worker, header: Header, payload: bytes) -> bool:
        return self._answer(worker, header, {}, self._replay.log.packed())
