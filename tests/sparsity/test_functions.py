"""Prune, redistribute and grow, each step worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squall.sparsity import apportion, grows, largest, prunes, redistributions, smallest

from .handmade import layer, places


def test_magnitude_drops_the_smallest_of_the_living() -> None:
    given_layer = layer([0.0, -3.0, 0.1, 2.0, -0.2, 0.0], [0, 1, 1, 1, 1, 0])
    assert places(prunes.find("magnitude")(given_layer, 2)) == [1, 3]
    assert places(given_layer.mask) == [1, 2, 3, 4], "a function must not change what it is given"


def test_of_equal_weights_the_first_go() -> None:
    assert places(prunes.find("magnitude")(layer([1.0, -1.0, 1.0, 1.0], [1, 1, 1, 1]), 2)) == [2, 3]


def test_sign_magnitude_takes_from_each_sign_in_proportion() -> None:
    # 6 positive and 2 negative ones live: of 4 to go, 3 are the smallest positive, 1 is the largest negative.
    given_layer = layer([0.3, 0.1, 0.2, 0.9, 0.7, 0.8, -0.05, -0.5, 0.0], [1, 1, 1, 1, 1, 1, 1, 1, 0])
    assert places(prunes.find("sign_magnitude")(given_layer, 4)) == [3, 4, 5, 7]


def test_momentum_grows_where_it_is_largest_among_the_dead() -> None:
    given_layer = layer([1.0, 0, 0, 0, 0], [1, 0, 0, 0, 0], momentum=[9.0, 0.1, -0.5, 0.3, -0.2])
    assert places(grows.find("momentum")(given_layer, 2)) == [0, 2, 3]


def test_gradient_grows_where_it_is_largest_among_the_dead() -> None:
    given_layer = layer([1.0, 0, 0, 0, 0], [1, 0, 0, 0, 0], gradient=[9.0, 0.1, 0.4, -0.6, -0.2])
    assert places(grows.find("gradient")(given_layer, 2)) == [0, 2, 3]


def test_random_growth_is_the_generator_s() -> None:
    def grown(seed: int) -> list[int]:
        given_layer = layer([0.0] * 50, [1] * 10 + [0] * 40)
        given_layer.generator.manual_seed(seed)
        mask = grows.find("random")(given_layer, 7)
        assert int(mask.sum()) == 17
        return places(mask)

    assert grown(1) == grown(1) != grown(2)


def test_redistribution_by_momentum_is_by_the_mean_over_the_living() -> None:
    # Means of the live |momentum| are 3 and 1: three quarters and one quarter of 4. Dead weights don't count.
    first = layer([1.0, 1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], momentum=[2.0, -4.0, 90.0, 0, 0, 0])
    second = layer([1.0, 1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], momentum=[1.0, 1.0, 90.0, 0, 0, 0])
    assert list(redistributions.find("momentum")([first, second], [2, 2])) == [3, 1]


def test_redistribution_by_magnitude_and_by_number() -> None:
    first = layer([4.0, 2.0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0])
    second = layer([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1, 1, 1])
    assert list(redistributions.find("magnitude")([first, second], [1, 3])) == [3, 1]
    assert list(redistributions.find("nonzeros")([first, second], [1, 3])) == [1, 3]
    assert list(redistributions.find("none")([first, second], [1, 3])) == [1, 3]


def test_where_nothing_moves_all_get_the_same() -> None:
    still = [layer([1.0, 0, 0, 0], [1, 0, 0, 0], momentum=[0.0] * 4) for _ in range(2)]
    assert list(redistributions.find("momentum")(still, [1, 1])) == [1, 1]


@pytest.mark.parametrize(
    ("total", "shares", "capacities", "expected"),
    [
        (10, [0.5, 0.5], [100, 100], [5, 5]),
        (10, [0.75, 0.25], [100, 100], [8, 2]),  # 7.5 and 2.5: the first misses as much, and comes first
        (100, [0.9, 0.1], [50, 1000], [50, 50]),  # 99 % of 50 and the rest, rounded up where most is missing
        (100, [0.8, 0.15, 0.05], [20, 1000, 1000], [20, 45, 35]),  # 60.2 overflow, and are spread evenly
        (12, [1.0, 0.0], [4, 8], [4, 8]),  # all full: beyond 99 % at last
        (0, [0.5, 0.5], [3, 3], [0, 0]),
    ],
)
def test_apportion_by_hand(total: int, shares: list[float], capacities: list[int], expected: list[int]) -> None:
    assert apportion(total, shares, capacities) == expected


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_apportion_deals_out_exactly_all(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 12))
    capacities = data.draw(st.lists(st.integers(0, 500), min_size=number, max_size=number))
    raw = data.draw(st.lists(st.floats(0, 1), min_size=number, max_size=number))
    total = data.draw(st.integers(0, sum(capacities)))
    shares = [value / sum(raw) for value in raw] if sum(raw) > 1e-6 else [1 / number] * number
    numbers = apportion(total, shares, capacities)
    assert sum(numbers) == total
    assert all(0 <= got <= room for got, room in zip(numbers, capacities, strict=True))
    # Where nothing overflows, each gets its share, to a whole number.
    if all(share * total < 0.99 * room for share, room in zip(shares, capacities, strict=True)):
        assert all(abs(got - share * total) <= 1 for got, share in zip(numbers, shares, strict=True))


def test_more_than_there_is_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="room for 3"):
        apportion(4, [1.0], [3])


@pytest.mark.parametrize("choose", [smallest, largest])
def test_choosing_more_than_there_are_is_refused(choose: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        choose(torch.zeros(4), torch.tensor([True, True, False, False]), 3)
