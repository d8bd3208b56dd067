"""Interval arithmetic: what ranks hold, need and send is each element once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from squall.placement.partition import Partition, merge, overlaps, union
from squall.placement.rules.layers import input_partition, segments


def elements(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [index for start, stop in ranges for index in range(start, stop)]


@st.composite
def partitions(draw: st.DrawFn, num_ranks: int | None = None) -> Partition:
    """Every element on one rank, in pieces of any order."""
    ranks = num_ranks or draw(st.integers(1, 4))
    size = draw(st.integers(0, 20))
    cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=6))})
    pieces = draw(st.permutations(list(pairwise(cuts))))
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for piece in pieces:
        held[draw(st.integers(0, ranks - 1))].append(piece)
    return Partition(size, tuple(tuple(merge(ranges)) for ranges in held))


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 5))
def test_even_deals_out_each_element_once(num_granules: int, num_ranks: int, granule: int) -> None:
    partition = Partition.even(num_granules * granule, num_ranks, granule)
    assert [e for held in partition.ranges for e in elements(held)] == list(range(partition.size))
    assert max(partition.sizes) - min(partition.sizes) <= granule
    assert all(size % granule == 0 for size in partition.sizes)


@given(partitions(), st.integers(1, 4))
def test_scale_then_divide_is_where_it_was(partition: Partition, factor: int) -> None:
    scaled = partition.scale(factor)
    assert scaled.divide(factor) == partition
    assert [elements(held) for held in scaled.ranges] == [
        [e * factor + i for e in elements(held) for i in range(factor)] for held in partition.ranges
    ]


@given(st.integers(1, 4).flatmap(lambda n: st.tuples(partitions(n), partitions(n))))
def test_concatenation_keeps_the_order_of_storage(pair: tuple[Partition, Partition]) -> None:
    first, second = pair
    joined = Partition.concatenate([first, second])
    for rank, held in enumerate(joined.ranges):
        behind = [e + first.size for e in elements(second.ranges[rank])]
        assert elements(held) == elements(first.ranges[rank]) + behind


@given(partitions(), partitions())
def test_overlaps_pair_the_same_elements(have: Partition, need: Partition) -> None:
    for source in have.ranges:
        for target in need.ranges:
            stored, wanted = elements(source), elements(target)
            pairs = [
                (stored[from_ + i], wanted[to + i])
                for from_, to, length in overlaps(source, target)
                for i in range(length)
            ]
            assert all(a == b for a, b in pairs)
            assert sorted(a for a, _ in pairs) == sorted(set(stored) & set(wanted))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6))
def test_union_covers_the_same_elements(ranges: list[tuple[int, int]]) -> None:
    covered = union(ranges)
    assert elements(covered) == sorted({e for start, stop in ranges for e in range(start, stop)})


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_segments_compute_each_output_from_its_group(
    groups: int, group_in: int, group_out: int, num_ranks: int
) -> None:
    """The calls of a split grouped convolution, taken together, are the whole one."""
    outputs = Partition.even(groups * group_out, num_ranks)
    need = input_partition(outputs, groups * group_in, groups)
    for rank, held in enumerate(outputs.ranges):
        mine, inputs = elements(held), elements(need.ranges[rank])
        done = []
        for cut in segments(outputs, groups * group_in, groups, rank):
            offset, length = cut.outputs
            first_in, num_in = cut.inputs
            for position, output in enumerate(mine[offset : offset + length]):
                call_in = num_in // cut.groups
                call_group = position // (length // cut.groups)
                read = inputs[first_in + call_group * call_in : first_in + (call_group + 1) * call_in]
                group = output // group_out
                assert read == list(range(group * group_in, (group + 1) * group_in))
                done.append(output)
        assert done == mine
