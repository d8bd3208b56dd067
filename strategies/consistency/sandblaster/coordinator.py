"""Who coordinates an optimization over a whole batch: deals portions out, and has L-BFGS done by the shards.

It holds no vector. What passes here of an iteration is a few hundred bytes a vector operation and a portion.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..coordinator import Coordinator, RunOptions, Send
from ..queue import Ticket
from ..wire import Header
from ..worker import LEADER, Worker
from .keeping import KeptPoint
from .lbfgs import Lbfgs, Operation, Point, Steps
from .operations import Combine, Evaluate, join_parts
from .pace import Pace
from .portions import Portions
from .vectors import VectorSpec

_RESTART = 1 << 32  # evaluations are numbered on from here by who takes a lost coordinator's place


class BatchCoordinator(Coordinator):
    """The state machine, for one evaluation after the other.

    An *evaluation* is loss and gradient over all portions; the leader's epoch of the same number. Workers whose epoch
    is ahead of it compute what others have not handed in. Tickets have the evaluation's own number.

    Args:
        options: Of the run.
        send: Sends a message to a worker.
        command: Sends a numbered command to all shards.

    """

    def __init__(self, options: RunOptions, send: Send, command: Callable[[Header], None]) -> None:
        super().__init__(options, send, self._count_and(command))
        self.portions = Portions()
        self.queue: Any = self.portions  # it can do all that the base class wants of its own
        self.point: Point | None = None
        self.num_scalar_bytes = 0  # told to shards and by them, besides what concerns a portion
        self.num_thinking = 0  # vector operations so far
        self._backs_up = bool((options.sandblaster or {}).get("backup_portions", True))
        self._steps: Steps | None = None
        self._kept: KeptPoint | None = None
        self._is_thinking = False  # the shards are at work
        self._first_iteration = 0  # of this coordinator's
        self._evaluation = 0  # the leader's epoch that the present one belongs to
        self._first_serial = 0
        self._into = 0  # where its gradient is summed
        self._pace = Pace()

    def _count_and(self, command: Callable[[Header], None]) -> Callable[[Header], None]:
        def counted(header: Header) -> None:
            if header["op"] == "combine":
                self.num_scalar_bytes += self.commands.num_shards * len(json.dumps(header))
            command(header)

        return counted

    # ------------------------------------------------------------------ the optimizer

    def prepare(self, spec: Any, name: str) -> None:
        """Learn what the optimizer is to do, and where one that was lost has come to."""
        assert isinstance(spec, VectorSpec)
        self._kept = KeptPoint(name, spec.options.history_size)
        self.begin(spec, (self._kept.find() if spec.num_restarts else None) or spec.point)

    def begin(self, spec: VectorSpec, point: Point | None) -> None:
        """Be ready to start."""
        self.point = point
        self._evaluation = spec.evaluation - 1
        self._first_serial = _RESTART * spec.num_restarts
        self._steps = Lbfgs(spec.options, point).steps()

    def start(self, version: int = 0, num_shards: int | None = None) -> None:
        """The shards hold the weights: the first evaluation may begin."""
        iteration = 0 if self.point is None else self.point.iteration
        self._first_iteration = iteration
        super().start(iteration, num_shards)
        self._advance(None)

    def _advance(self, answer: Any) -> None:
        """Do what the optimizer wants, until somebody else has something to do."""
        assert self._steps is not None
        self._is_thinking = True
        while True:
            try:
                wanted: Operation = self._steps.send(answer)
            except StopIteration as end:
                self._stop(str(end.value))
                break
            except FloatingPointError as error:
                self.fail(str(error))
                break
            if isinstance(wanted, Combine):
                self.num_thinking += 1
                self._ask(wanted)
                return
            if isinstance(wanted, Evaluate):
                self._evaluate(wanted)
                break
            self.point, answer = wanted, None
            self.version = wanted.iteration
            if self._kept is not None:
                self._kept.keep(wanted)
        self._is_thinking = False
        self._progress(0.0)

    def _ask(self, wanted: Combine) -> None:
        command = wanted.header()

        def then(parts: list[list[float]]) -> None:
            self.num_scalar_bytes += sum(len(json.dumps(part)) for part in parts)
            self._advance(join_parts(command["reductions"], parts))

        self.commands.ask(command, then)

    def _evaluate(self, wanted: Evaluate) -> None:
        self._into = wanted.gradient
        self.commands.ask(Combine(wanted.gradient).header(), lambda parts: None)
        self._evaluation += 1
        self.portions.begin(self._first_serial + self._evaluation, self._evaluation)

    # ------------------------------------------------------------------ portions

    def _on_epoch(self, worker: Worker, header: Header, payload: bytes) -> bool:
        return self._answer(worker, header, {"open": self.portions.order is not None})

    def _on_lease(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """A portion; a spare one, which is worth nothing; the end of the worker's epoch; or nothing yet."""
        if self._over(worker, header):
            return True
        epoch, portions = int(header["epoch"]), self.portions
        if not self.started:  # a loader with worker processes asks before training begins
            return self._spare(worker, header)
        is_ahead = bool(header.get("ahead"))  # of what it has not computed yet
        ends_last = worker.rank == LEADER and bool(header.get("last")) and epoch == self._evaluation
        if epoch >= self._evaluation and portions.is_open:
            ticket = portions.lease(worker.key)
            if ticket is None and (not is_ahead or ends_last):
                ticket = self._lease_again(worker)
            if ticket is not None:
                if epoch == self._evaluation:
                    worker.epoch = epoch
                reply = {"ticket": ticket, "left": portions.num_left}
                return self._answer(worker, header, reply, portions.samples(ticket).tobytes())
            # What others still have may come back. Somebody has to stay for it: the leader, whose run ends last.
            if ends_last and not portions.is_covered(worker.key):
                return False
        waits = epoch > self._evaluation
        if waits and not is_ahead:
            return False
        needs_one = worker.rank == LEADER and worker.epoch < epoch and not is_ahead
        if (waits or needs_one) and portions.order is not None:
            worker.epoch = epoch if needs_one else worker.epoch
            return self._spare(worker, header)
        return self._answer(worker, header, {"end": True})

    def _spare(self, worker: Worker, header: Header) -> bool:
        """A portion whose gradient nobody wants."""
        spare: Ticket = (max(self.portions.serial, 0), 0)
        reply = {"ticket": spare, "spare": True, "left": 0}
        return self._answer(worker, header, reply, self.portions.samples(spare).tobytes())

    def _lease_again(self, worker: Worker) -> Ticket | None:
        """A portion that others have, if this worker may well be faster."""
        if not self._backs_up:
            return None
        return self.portions.lease_again(worker.key, lambda holders: self._pace.are_late(holders, worker.key))

    def handle(self, peer: Any, header: Header, payload: bytes = b"", now: float = 0.0) -> None:
        """Take one message of a worker."""
        self._pace.now = max(self._pace.now, now)
        worker = self._by_peer.get(peer)
        if worker is not None and header.get("op") == "lease":
            self._pace.asks(worker.key)
        super().handle(peer, header, payload, now)

    def _answer(self, worker: Worker, header: Header, reply: Header, payload: bytes = b"") -> bool:
        if header["op"] == "lease":
            self._pace.is_answered(worker.key)
        return super()._answer(worker, header, reply, payload)

    def tick(self, now: float) -> None:
        """Look for workers that have not been heard of for too long."""
        self._pace.now = max(self._pace.now, now)
        super().tick(now)

    def _on_commit(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """A gradient of portions whose bytes lie ready: have it added, or say why not."""
        tickets: list[Ticket] = [(int(serial), int(position)) for serial, position in header["tickets"]]
        losses = [float(loss) for loss in header.get("losses", ())]
        if not worker.joined or len(losses) != len(tickets):
            raise ValueError("a push before join, or with another number of losses than portions")
        if worker.displaced:
            return self._answer(worker, header, {"moved": True})
        portions = self.portions
        if not portions.holds(worker.key, tickets):
            self.num_lost += 1
            portions.give_back(worker.key, tickets)  # what it still had of a push of several portions
            return self._answer(worker, header, {"lost": "its portions were handed in by others"})
        if self.stopped:
            portions.give_back(worker.key, tickets)
            return self._answer(worker, header, {"finished": self.stopped, "version": self.version})
        worker.sequence += 1
        worker.clock += len(tickets)
        if header.get("buffers"):
            worker.buffers = payload
        portions.complete(worker.key, tickets, losses)
        command = {
            "op": "add", "mailbox": worker.mailbox, "slot": header["slot"], "absent": header.get("absent", []),
            "into": self._into,
        }  # fmt: skip
        self.commands.issue(command, worker, {"done": worker.sequence, "version": self.version})
        self._answer(worker, header, {
            "version": self.version, "staleness": 0, "sequence": worker.sequence, "progress": portions.progress(),
        })  # fmt: skip
        if portions.is_done:
            loss = portions.loss
            portions.close()
            self._advance(loss)
        return True

    def _on_done(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Portions that were computed for nothing are others' again."""
        return self._on_return(worker, header, payload)

    # ------------------------------------------------------------------ weights

    def _on_fetch(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """The point that is evaluated; for who has finished, the one that the optimizer has come to."""
        if not worker.joined:
            raise ValueError("a fetch before join")
        if worker.displaced:
            return self._answer(worker, header, {"moved": True})
        ends = worker.finished and self.point is not None
        command = {"op": "fetch", "mailbox": worker.mailbox, "fetch": header["buffer"], "vector": 0}
        if ends and self.point is not None:
            command["vector"] = self.point.weights
        said = {"re": header["id"], "version": self.version, "serial": self.portions.serial}
        self.commands.issue(command, worker, said)
        return True

    def _on_snapshot(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """Hold commands back until the worker has read the point; where it waits for an evaluation, after that."""
        if self._waits_for(worker, int(header.get("after", -1))):
            return False
        return super()._on_snapshot(worker, header, payload)

    def _waits_for(self, worker: Worker, evaluation: int) -> bool:
        if self.stopped or self.failure or self.leader_lost or self._evaluation > evaluation:
            return False
        if self.portions.has_any(worker.key):
            return False  # it would wait for itself
        return self._is_thinking or any(
            other is not worker and other.in_loop and not (other.finished or other.is_leaving) for other in self.live
        )

    def _on_leave(self, worker: Worker, header: Header, payload: bytes) -> bool:
        """The end of a worker's loop: with what the last evaluation has led to."""
        if not worker.is_leaving:  # what it was dealt ahead it won't compute, and the leader may wait for it
            worker.is_leaving = True
            self.portions.revoke(worker.key)
        if worker.rank == LEADER and self._is_thinking and not self.failure:
            return False
        leader = self.workers.get(LEADER)
        if leader is None or (leader.alive and not leader.finished and leader is not worker):
            return False  # though it may not have come back yet to a coordinator that has taken a lost one's place
        return super()._on_leave(worker, header, payload)

    def report(self) -> Header:
        """What happened so far, in numbers."""
        point = None if self.point is None else self.point.header()
        return super().report() | {
            "point": point,
            "evaluation": self._evaluation,
            "num_again": self.portions.num_again,
            "num_operations": self.num_thinking,
            "num_scalar_bytes": self.num_scalar_bytes,
            "num_iterations": self.version - self._first_iteration,
        }
