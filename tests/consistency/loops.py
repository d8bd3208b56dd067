"""A host's event loop in the process of the test."""

from __future__ import annotations

import socket
import threading
from typing import Any

from squall.consistency.host import Host
from squall.consistency.jobs import Address
from squall.consistency.memory import Segment
from squall.consistency.order import Order
from squall.consistency.wire import Blocking, Buffered, connect

OPTIONS = {"world_size": 1, "lease_timeout": 600.0}


class LoopInAThread:
    """The host's event loop, without shards, in this process: a fuzzer's thousand messages take seconds."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.parent = Blocking(ours)
        self.host = Host(Buffered(theirs))
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        opened = self.request(op="open", address="127.0.0.1")
        self.address = Address("127.0.0.1", opened["port"], bytes.fromhex(opened["token"]))
        self.begin()

    def _serve(self) -> None:
        try:
            self.host.serve()
        except BaseException as error:
            self.error = error

    def request(self, **header: Any) -> Any:
        self.parent.send({"id": 1, **header})
        self.parent.sock.settimeout(20.0)
        return self.parent.receive()[0]

    def begin(self) -> None:
        """A run with an epoch of data, and a worker in it."""
        self.run = self.request(op="run", options=OPTIONS)
        self.request(op="go", version=0)
        self.witness = connect((self.address.host, self.address.port), self.address.token)
        self.witness.sock.settimeout(20.0)
        self.ask(self.witness, "hello", rank=0, run=self.run["run"])
        self.ask(self.witness, "order", Order.of([[n] for n in range(4)]).pack(), epoch=0, num_batches=4)
        Segment(f"{self.run['name']}-w0.0", 64)
        self.ask(self.witness, "join", mailbox=f"{self.run['name']}-w0.0")

    def ask(self, connection: Blocking, operation: str, payload: bytes = b"", **fields: Any) -> Any:
        connection.send({"op": operation, "id": 7, **fields}, payload)
        return connection.receive()[0]

    def raw(self) -> socket.socket:
        """A connection that has shown nothing yet."""
        sock = socket.create_connection((self.address.host, self.address.port))
        sock.settimeout(20.0)
        return sock

    def still_serves(self) -> dict[str, Any]:
        """What the witness hears; it is here that a crash of the loop is seen."""
        try:
            report = self.ask(self.witness, "report")
        except OSError as error:
            raise AssertionError(f"the loop has ended: {self.error!r}") from error
        assert self.error is None
        return dict(report)

    def end(self) -> None:
        self.witness.close()
        self.parent.close()
        self.thread.join(10.0)
        assert not self.thread.is_alive()
