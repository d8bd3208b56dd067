"""Who owns which elements and where they lie: each once, evenly, nothing on top of anything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.consistency import plan as plans
from squall.consistency.memory import ALIGNMENT, aligned
from squall.consistency.plan import CONTROL_BYTES, ParameterInfo, Plan, StateEntry, make_plan

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
SHAPES = st.lists(st.integers(1, 9), max_size=3).map(tuple) | st.just((0, 3)) | st.just((300,))
ENTRIES = st.builds(
    StateEntry,
    st.sampled_from(["exp_avg", "exp_avg_sq", "step"]),
    st.sampled_from(["like", "tensor", "int", "float", "bool", "none"]),
    st.lists(st.integers(1, 3), max_size=2).map(tuple),
    DTYPES,
)


@dataclass
class Problem:
    parameters: list[ParameterInfo]
    elementwise: list[bool]
    num_shards: int
    unit: int

    def plan(self) -> Plan:
        return make_plan(self.parameters, self.elementwise, self.num_shards, code_size)


def code_size(num_elements: int, dtype: torch.dtype) -> int:
    return num_elements + 4  # of a codec with a byte an element and a scale


@st.composite
def problems(draw: Any, elementwise: Any = None) -> Problem:
    kinds = draw(st.lists(st.booleans() if elementwise is None else st.just(elementwise), min_size=1, max_size=3))
    parameters = []
    for optimizer in range(len(kinds)):
        state = tuple(draw(st.lists(ENTRIES, max_size=3)))
        for shape in draw(st.lists(SHAPES, max_size=5)):
            parameters.append(ParameterInfo(shape, draw(DTYPES), optimizer, draw(st.integers(0, 1)), state))
    return Problem(parameters, kinds, draw(st.integers(1, 6)), draw(st.sampled_from([1, 7, 64, 1 << 17])))


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "UNIT_ELEMENTS", plans.UNIT_ELEMENTS)  # each example sets its own; this puts it back


def planned(problem: Problem) -> Plan:
    plans.UNIT_ELEMENTS = problem.unit
    return problem.plan()


examples = settings(max_examples=120, deadline=None)


@given(problems())
@examples
def test_every_element_is_owned_exactly_once(problem: Problem) -> None:
    owned: dict[int, list[tuple[int, int]]] = {}
    for slice_ in planned(problem).slices:
        for unit in slice_.units:
            assert unit.info is problem.parameters[unit.parameter]
            owned.setdefault(unit.parameter, []).append((unit.start, unit.stop))
    for index, parameter in enumerate(problem.parameters):
        at = 0
        for start, stop in sorted(owned.get(index, [])):
            assert start == at
            at = stop
        assert at == parameter.num_elements


@given(problems(elementwise=True))
@examples
def test_elementwise_optimizers_are_cut_evenly(problem: Problem) -> None:
    loads = [sum(unit.num_elements for unit in slice_.units) for slice_ in planned(problem).slices]
    assert len(loads) == problem.num_shards
    assert max(loads) - min(loads) <= 1


@given(problems())
@examples
def test_what_can_be_cut_fills_the_shards_up_around_what_can_not(problem: Problem) -> None:
    whole, free = [0] * problem.num_shards, [0] * problem.num_shards
    for shard, slice_ in enumerate(planned(problem).slices):
        for unit in slice_.units:
            (free if problem.elementwise[unit.info.optimizer] else whole)[shard] += unit.num_elements
    loads = [a + b for a, b in zip(whole, free, strict=True)]
    for load, cut in zip(loads, free, strict=True):
        assert cut == 0 or load <= min(loads) + 1


@given(problems())
@examples
def test_other_optimizers_stay_whole(problem: Problem) -> None:
    places: dict[int, set[tuple[int, int]]] = {}
    for shard, slice_ in enumerate(planned(problem).slices):
        for number, batch in enumerate(slice_.batches):
            assert {unit.info.optimizer for unit in batch.units} == {batch.optimizer}
            if problem.elementwise[batch.optimizer]:
                assert sum(unit.num_elements for unit in batch.units) <= problem.unit
            else:
                places.setdefault(batch.optimizer, set()).add((shard, number))
                for unit in batch.units:
                    assert (unit.start, unit.stop) == (0, unit.info.num_elements)
    for optimizer, where in places.items():
        assert len(where) == 1, f"optimizer {optimizer} is stepped in {len(where)} calls"


def disjoint(pieces: list[tuple[int, int]], begin: int, end: int) -> None:
    at = begin
    for start, size in sorted(piece for piece in pieces if piece[1]):
        assert start >= at
        assert start % ALIGNMENT == 0
        at = start + size
    assert at <= end


@given(problems())
@examples
def test_nothing_lies_on_top_of_anything_else(problem: Problem) -> None:
    for slice_ in planned(problem).slices:
        units = slice_.units
        assert [unit.index for unit in units] == list(range(len(units)))
        memory = [(slice_.flags_offset, len(units))]
        longest = 0
        for batch in slice_.batches:
            inside = []
            for unit in batch.units:
                weights = (unit.weight_offset, unit.num_elements * unit.info.dtype.itemsize)
                states = [
                    (offset, entry.num_elements(unit.num_elements) * entry.dtype.itemsize)
                    for entry, offset in zip(unit.info.state, unit.state_offsets, strict=True)
                ]
                inside += [weights, *states]
                disjoint([weights], batch.offset, batch.offset + batch.num_weight_bytes)
                disjoint(states, batch.offset + batch.num_weight_bytes, batch.offset + batch.num_bytes)
                # What a worker fetches is a batch's weights, copied in one piece.
                assert unit.fetch_offset - batch.fetch_offset == unit.weight_offset - batch.offset
            disjoint(inside, batch.offset, batch.offset + batch.num_bytes)
            memory += inside
            longest = max(longest, batch.num_bytes)
        disjoint(memory, CONTROL_BYTES, slice_.journal_offset)
        flags = max((len(batch.units) for batch in slice_.batches), default=0)
        journal = slice_.journal_offset
        end = slice_.num_bytes - CONTROL_BYTES
        disjoint([(journal, longest), (journal + aligned(longest), flags)], journal, end)
        fetched = [(unit.fetch_offset, unit.num_elements * unit.info.dtype.itemsize) for unit in units]
        disjoint(fetched, 0, slice_.num_fetch_bytes)
        assert all(unit.num_code_bytes == code_size(unit.num_elements, unit.info.dtype) for unit in units)
        disjoint([(unit.code_offset, unit.num_code_bytes) for unit in units], 0, slice_.num_code_bytes)


@given(problems(), problems())
@examples
def test_ranks_that_built_the_same_agree_and_others_do_not(one: Problem, other: Problem) -> None:
    assert planned(one).digest == planned(one).digest
    if planned(one) != planned(other):
        assert planned(one).digest != planned(other).digest


def test_fewer_elements_than_shards_leave_some_empty() -> None:
    slices = make_plan([ParameterInfo((2,), torch.float32, 0, 0)], [True], 4, code_size).slices
    assert sorted(len(slice_.units) for slice_ in slices) == [0, 0, 1, 1]
    assert all(slice_.num_bytes > 0 for slice_ in slices)
