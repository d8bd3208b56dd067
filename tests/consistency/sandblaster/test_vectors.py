"""Vectors on shards: what is combined and reduced, and what survives a kill at any moment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from squall.consistency.mailbox import NUM_SLOTS, LocalMailbox, lay_out_mailbox
from squall.consistency.memory import Segment
from squall.consistency.packing import Encoder
from squall.consistency.plan import ParameterInfo, make_plan
from squall.consistency.sandblaster.keeping import KeptPoint
from squall.consistency.sandblaster.lbfgs import LbfgsOptions, Pair, Point
from squall.consistency.sandblaster.operations import Combine, absolute_sum, dot, join_parts, largest
from squall.consistency.sandblaster.state import OptimizerState, fill
from squall.consistency.sandblaster.vectors import VectorShard, VectorSpec, vectors_of, with_vectors
from squall.consistency.updates import SliceMemory

from ..killed import Control, Countdown, KilledError

SHAPES = ((3, 5), (), (0,), (17,), (2, 2, 2))
OPTIONS = LbfgsOptions(history_size=2)


class Shards:
    """Shards in this process, on real shared memory.

    Args:
        num_shards: How many.
        dtype: Of the parameters.
    """

    def __init__(self, num_shards: int, dtype: torch.dtype = torch.float64) -> None:
        infos = [with_vectors(ParameterInfo(shape, dtype, 0, 0), OPTIONS.num_vectors) for shape in SHAPES]
        self.plan = make_plan(infos, [True], num_shards, lambda size, kind: size * kind.itemsize)
        self.spec = VectorSpec(self.plan, OPTIONS)
        self.name = f"squall-test-{os.getpid()}-{os.urandom(4).hex()}"
        self.segments = [Segment(f"{self.name}-s{n}", s.num_bytes) for n, s in enumerate(self.plan.slices)]
        layout = lay_out_mailbox(self.plan, 0, NUM_SLOTS, 2)
        self.mailbox = LocalMailbox(self.plan, layout, f"{self.name}-w0")
        self.parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
        self.count = 0
        fill(self.memories, self.parameters, None)
        self.begin()

    def begin(self) -> None:
        """As a process that finds the memory as it is."""
        self.shards = [VectorShard(n, segment, self.spec, lambda name: name) for n, segment in enumerate(self.segments)]

    @property
    def memories(self) -> list[SliceMemory]:
        return [SliceMemory(segment, slice_) for segment, slice_ in zip(self.segments, self.plan.slices, strict=True)]

    def vector(self, slot: int) -> Tensor:
        """All of a vector, parameter after parameter."""
        rows = [torch.empty(info.num_elements, dtype=info.dtype) for info in self.plan.parameters]
        for memory in self.memories:
            for unit in memory.slice.units:
                rows[unit.parameter][unit.start : unit.stop] = vectors_of(memory, unit)[slot]
        return torch.cat(rows)

    def send(self, command: dict[str, Any]) -> list[list[float]]:
        self.count += 1
        told: list[dict[str, Any]] = []
        for shard in self.shards:
            shard.carry_out({**command, "c": self.count}, told.append)
        return [reply["numbers"] for reply in told if "numbers" in reply]

    def ask(self, wanted: Combine) -> list[float]:
        header = wanted.header()
        return join_parts(header["reductions"], self.send(header))

    def push(self, gradients: list[Tensor | None], slot: int = 0) -> dict[str, Any]:
        Encoder("fp32", self.plan).encode(
            [None if g is None else g.reshape(-1) for g in gradients], self.mailbox.codes(slot)
        )
        absent = [index for index, gradient in enumerate(gradients) if gradient is None]
        return {"op": "add", "mailbox": f"{self.name}-w0", "slot": slot, "absent": absent, "into": 2}

    def close(self) -> None:
        for name in os.listdir("/dev/shm"):
            if name.startswith(self.name):
                Segment.unlink(name)


@pytest.fixture(params=[1, 2, 3])
def shards(request: pytest.FixtureRequest) -> Iterator[Shards]:
    torch.manual_seed(0)
    made = Shards(request.param)
    yield made
    made.close()


def randomise(shards: Shards) -> list[Tensor]:
    for memory in shards.memories:
        for unit in memory.slice.units:
            for vector in vectors_of(memory, unit):
                vector.copy_(torch.randn(len(vector)))
    return [shards.vector(slot) for slot in range(OPTIONS.num_vectors + 1)]


def test_weights_are_in_both_their_places(shards: Shards) -> None:
    whole = torch.cat([parameter.detach().reshape(-1) for parameter in shards.parameters])
    assert shards.vector(0).equal(whole)
    assert shards.vector(1).equal(whole)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    terms=st.lists(st.tuples(st.floats(-3, 3), st.sampled_from([0, 1, 2, 3])), max_size=4),
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=3),
)
def test_combinations_and_products_are_torchs(
    shards: Shards, terms: list[tuple[float, int]], pairs: list[tuple[int, int]]
) -> None:
    vectors = randomise(shards)
    expected = sum((factor * vectors[slot] for factor, slot in terms), torch.zeros_like(vectors[0]))
    vectors[5] = expected
    reductions = [*(dot(*pair) for pair in pairs), largest(5), absolute_sum(5)]
    numbers = shards.ask(Combine(5, tuple(terms), tuple(reductions)))
    torch.testing.assert_close(shards.vector(5), expected)
    wanted = [float(vectors[first] @ vectors[second]) for first, second in pairs]
    assert numbers == pytest.approx([*wanted, float(expected.abs().max()), float(expected.abs().sum())])
    assert all(shards.vector(slot).equal(vectors[slot]) for slot in range(len(vectors)) if slot != 5)


def test_gradients_are_added_up_and_the_absent_are_none(shards: Shards) -> None:
    shards.ask(Combine(2))
    gradients: list[Tensor | None] = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    shards.send(shards.push(gradients))
    other = [gradient if index % 2 else None for index, gradient in enumerate(gradients)]
    shards.send(shards.push(other, slot=1))
    expected = [g * (2 if index % 2 else 1) for index, g in enumerate(gradients) if g is not None]
    torch.testing.assert_close(shards.vector(2), torch.cat([row.reshape(-1) for row in expected]))


def test_any_vector_can_be_fetched(shards: Shards) -> None:
    vectors = randomise(shards)
    shards.send({"op": "fetch", "mailbox": f"{shards.name}-w0", "fetch": 1, "vector": 4})
    parts = shards.mailbox.weights(1)
    for shard, part in zip(shards.shards, parts, strict=True):
        for unit in shard.slice.units:
            offset = sum(info.num_elements for info in shards.plan.parameters[: unit.parameter])
            assert unit.weights_in(part).equal(vectors[4][offset + unit.start : offset + unit.stop])


@pytest.mark.parametrize("moment", range(24))
def test_killed_at_any_moment_of_an_addition_it_is_made_once(moment: int) -> None:
    torch.manual_seed(moment)
    shards = Shards(1)
    try:
        before = randomise(shards)[2]
        gradients: list[Tensor | None] = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        countdown = Countdown(moment)
        shard = shards.shards[0]
        decode = shard.decode

        def torn(unit: Any, code: Tensor, scratch: Tensor) -> Tensor:
            try:
                countdown()
            except KilledError:
                vectors_of(shards.memories[0], unit)[2].fill_(torch.nan)  # in the middle of it
                raise
            return decode(unit, code, scratch)

        shard.decode, shard._journal.control = torn, Control(shard._journal.control, countdown)
        command = {**shards.push(gradients), "c": 1}
        try:
            shard.carry_out(command, lambda told: None)
        except KilledError:
            shards.begin()
            shards.shards[0].carry_out(command, lambda told: None)
        added = torch.cat([torch.zeros(0, dtype=torch.float64), *(g.reshape(-1) for g in gradients if g is not None)])
        torch.testing.assert_close(shards.vector(2), before + added, rtol=0, atol=1e-15)
    finally:
        shards.close()


def test_numbers_that_nobody_has_heard_are_found_again(shards: Shards) -> None:
    """A shard that is killed between what it has done and saying so does it again."""
    vectors = randomise(shards)
    command = {**Combine(5, ((2.0, 1),), (dot(5, 3),)).header(), "c": 1}

    def killed(told: dict[str, Any]) -> None:
        raise KilledError

    for shard in shards.shards:
        with pytest.raises(KilledError):
            shard.carry_out(command, killed)
    shards.begin()
    told: list[dict[str, Any]] = []
    for shard in shards.shards:
        assert shard.last_command == 0
        shard.carry_out(command, told.append)
        shard.carry_out(command, told.append)  # it is known by now
    heard = [reply["numbers"] for reply in told if "numbers" in reply]
    assert len(heard) == len(shards.shards)
    assert join_parts(command["reductions"], heard) == pytest.approx([float(2 * vectors[1] @ vectors[3])])


def test_what_is_added_after_a_kill_is_not_lost(shards: Shards) -> None:
    """A shard is killed when it has told that an addition is done: the next one is another."""
    shards.ask(Combine(2))
    ones: list[Tensor | None] = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]

    def killed(told: dict[str, Any]) -> None:
        raise KilledError

    for shard in shards.shards:
        with pytest.raises(KilledError):
            shard.carry_out({**shards.push(ones), "c": shards.count + 1}, killed)
    shards.count += 1
    shards.begin()
    shards.send(shards.push([one * 10 for one in ones if one is not None], slot=1))
    assert shards.vector(2).eq(11).all()


def test_an_element_that_is_no_number_is_the_largest(shards: Shards) -> None:
    vectors = randomise(shards)
    assert shards.ask(Combine(reductions=(largest(3),))) == [float(vectors[3].abs().max())]
    for memory in shards.memories:
        for unit in memory.slice.units:
            if unit.parameter == 0:
                vectors_of(memory, unit)[3][0] = torch.nan
    assert math.isnan(shards.ask(Combine(reductions=(largest(3),)))[0])


def test_single_precision_is_summed_in_double() -> None:
    shards = Shards(2, torch.float32)
    try:
        vectors = randomise(shards)
        (found,) = shards.ask(Combine(reductions=(dot(3, 4),)))
        assert found == pytest.approx(float(vectors[3].double() @ vectors[4].double()), rel=1e-12)
    finally:
        shards.close()


# ------------------------------------------------------------------ points that are kept


def point(iteration: int) -> Point:
    return Point(3, 4, 0.1 * iteration, 0.5, iteration, 2 * iteration, 1.0, 0.25, (Pair(5, 6, 1e-3), Pair(7, 8, 2.0)))


def test_the_newest_whole_point_is_found() -> None:
    name = f"squall-test-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        kept = KeptPoint(name, 2)
        assert kept.find() is None
        for iteration in range(5):
            kept.keep(point(iteration))
            assert KeptPoint(name, 2).find() == point(iteration)
        newest = kept._place(5 % 2)
        newest[40] ^= 1  # the process was killed while it wrote
        assert KeptPoint(name, 2).find() == point(3)
        again = KeptPoint(name, 2)
        again.find()
        again.keep(point(9))
        assert KeptPoint(name, 2).find() == point(9)
    finally:
        Segment.unlink(f"{name}-point")


def test_a_state_goes_through_a_checkpoint_and_a_shorter_history(shards: Shards) -> None:
    state = OptimizerState(point(4).moved(), tuple(torch.randn(5, p.numel()).double() for p in shards.parameters))
    again = OptimizerState.of(state.dump("f"), "f", shards.parameters, OPTIONS)
    assert again is not None
    assert again.point == state.point
    fill(shards.memories, shards.parameters, again)
    for row, slot in enumerate(again.point.slots[1:]):
        assert shards.vector(slot).equal(torch.cat([rows[row] for rows in state.vectors]))
    shorter = OptimizerState.of(state.dump("f"), "f", shards.parameters, LbfgsOptions(history_size=1))
    assert shorter is not None
    assert [pair.rho for pair in shorter.point.pairs] == [2.0]
    assert all(rows.equal(all_[[0, 3, 4]]) for rows, all_ in zip(shorter.vectors, state.vectors, strict=True))


def test_another_modules_state_is_left_out_with_a_warning(shards: Shards) -> None:
    state = OptimizerState(point(4).moved(), tuple(torch.randn(5, 7).double() for _ in shards.parameters))
    with pytest.warns(UserWarning, match="not of this module's parameters"):
        assert OptimizerState.of(state.dump("f"), "f", shards.parameters, OPTIONS) is None
    with pytest.warns(UserWarning, match="of other data"):
        assert OptimizerState.of(state.dump("f"), "g", shards.parameters, OPTIONS) is None
    assert OptimizerState.of({}, "f", shards.parameters, OPTIONS) is None


def test_a_point_of_a_long_history_is_kept() -> None:
    """Of any length that a user may ask for, with the longest numbers."""
    name, num_pairs = f"squall-test-{os.getpid()}-{os.urandom(4).hex()}", 3000
    pairs = tuple(Pair(2 * n + 10_003, 2 * n + 10_004, 1 / 3 * 1e-200) for n in range(num_pairs))
    long = replace(point(123_456), loss=-1 / 3 * 1e-200, pairs=pairs)
    try:
        KeptPoint(name, num_pairs).keep(long)
        assert KeptPoint(name, num_pairs).find() == long
    finally:
        Segment.unlink(f"{name}-point")
