"""Operations are called again with values of their own, as a step has them."""

from __future__ import annotations

import json

import pytest
import torch

from squall.conf.planner.operators import Call
from squall.conf.planner.ranks import quickest

CPU = torch.device("cpu")


def _key(name: str, *shapes: list[int]) -> str:
    tensors = [{"tensor": [shape, list(torch.empty(shape).stride()), "float32"]} for shape in shapes]
    return json.dumps([name, tensors, {}])


def test_what_a_call_makes_counts_for_how_soon_values_come_again() -> None:
    reads_and_writes_a_megabyte = _key("aten.relu.default", [1 << 17])
    assert Call(reads_and_writes_a_megabyte, CPU).num_turns == 1
    assert Call(reads_and_writes_a_megabyte, CPU, num_bytes=3 << 20).num_turns == 3
    assert Call(_key("aten.relu.default", [4]), CPU, num_bytes=3 << 20).num_turns == 8  # there is an end to it


def test_results_are_kept_as_long_as_values() -> None:
    call = Call(_key("aten.relu.default", [1 << 10]), CPU, num_bytes=16 << 10)
    assert call.num_turns == 2
    results = [call() for _ in range(5)]
    assert results[0].equal(results[2])
    assert results[0].equal(results[4])
    assert not results[0].equal(results[1])


def test_only_the_first_tensor_was_just_written() -> None:
    call = Call(_key("aten.add.Tensor", [1 << 8], [1 << 8]), CPU)
    first, second = call._turns[0][0]
    before = first._version, second._version
    call.prepare()
    assert (first._version > before[0], second._version == before[1]) == (True, True)
    integers = json.dumps(["aten.bitwise_not.default", [{"tensor": [[4], [1], "int64"]}], {}])
    Call(integers, CPU).prepare()  # nothing to write


def test_values_are_drawn_once_and_repeated() -> None:
    ((values,), _, _) = Call(_key("aten.relu.default", [1 << 18]), CPU)._turns[0]
    assert values[: 1 << 16].equal(values[1 << 16 : 1 << 17])
    assert values[: 1 << 16].std().item() == pytest.approx(0.1, rel=0.1)


def test_the_quickest_of_several_runs_counts_and_what_prepares_does_not() -> None:
    calls: list[str] = []
    quickest(lambda: calls.append("run"), lambda: calls.append("prepare"), num_runs=5)
    assert calls == ["prepare", "run"] * 9  # no more of them, though they take nearly nothing
