"""The order of an epoch as bytes and in checkpoints, and that of a million samples over a real wire."""

from __future__ import annotations

import io
import time
from array import array
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from squall.consistency import snapshot
from squall.consistency.client import Client
from squall.consistency.order import Order, pack_orders, unpack_orders

from .loops import LoopInAThread

NUM_SAMPLES = 1_200_000  # twice what a header could say
BATCHES = st.lists(st.lists(st.integers(0, 2**40), max_size=3), max_size=5)


def same(one: Order, other: Order) -> bool:
    return (one.sizes, one.samples, one.done) == (other.sizes, other.samples, other.done)


@given(BATCHES, st.data())
def test_orders_come_back_from_bytes_and_from_checkpoints(batches: list[list[int]], data: st.DataObject) -> None:
    done = data.draw(st.sets(st.integers(0, len(batches) - 1)) if batches else st.just(set()))
    order = Order.of(batches, done)
    assert [order.batch(position).tolist() for position in range(len(order))] == batches
    assert same(Order.unpack(len(order), order.pack()), order)
    file = io.BytesIO()
    torch.save(order.state(), file)
    file.seek(0)
    assert same(Order.from_state(torch.load(file, weights_only=True)), order)
    two = unpack_orders(*pack_orders({3: order, 7: Order.of([[1]])}))
    assert same(two[3], order)
    assert same(two[7], Order.of([[1]]))
    assert same(Order.from_state({"batches": batches, "done": sorted(done)}), order), "what checkpoints held once"


@given(st.integers(-1, 5) | st.integers(), st.binary(max_size=60))
def test_other_bytes_are_no_order(num_batches: int, data: bytes) -> None:
    try:
        order = Order.unpack(num_batches, data)
    except ValueError:
        return
    assert order.pack() == data


def test_a_million_samples_pass_the_wire(loop: LoopInAThread) -> None:
    """As one order of batches of one: proposed, in part trained on, and read back for a checkpoint."""
    indices = array("q", range(NUM_SAMPLES - 1, -1, -1))
    proposed = Order(array("q", [1]) * NUM_SAMPLES, indices, bytearray(NUM_SAMPLES))
    client = Client(loop.address, 3, loop.run["run"], 100.0)
    try:
        begin = time.monotonic()
        client.call({"op": "order", "epoch": 5, "num_batches": NUM_SAMPLES}, proposed.pack())
        for _ in range(5):  # three of another epoch come first, whose last one is the leader's
            reply, payload = client.call({"op": "lease", "epoch": 5})
            client.call({"op": "done", "tickets": [reply["ticket"]]})
        assert memoryview(payload).cast("q").tolist() == [NUM_SAMPLES - 2]
        report: dict[str, Any] = snapshot.ask(client, with_state=True)
        client.call({"op": "release"})
        assert time.monotonic() - begin < 10.0  # a tenth of a second, on a machine that does nothing else
        order = Order.from_state(report["queue"]["5"])
        assert (order.samples, sum(order.done), list(order.done[:3])) == (indices, 2, [1, 1, 0])
        assert snapshot.ask(client, with_state=False)["queue"] == {}, "validation has no use for it"
        client.call({"op": "release"})
    finally:
        client.close()
