"""Whole updates: worked out by hand, exact in number for any layers, and clear where something is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squall.sparsity import SET, DynamicSparsity, Layer, RigL, SparseMomentum, Static, largest, reads
from squall.sparsity.registry import Registry

from .handmade import layer, places


def test_an_update_of_sparse_momentum_by_hand() -> None:
    # Each layer has four live weights of ten, and loses ceil(0.5 * 4) = 2 at the beginning. Mean live momenta are
    # 0.3 and 0.1: of the four that were lost, the first layer gets three and the second one.
    first = layer(
        [5.0, -0.1, 4.0, 0.2, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        momentum=[0.3, -0.3, 0.3, 0.3, 0.0, 0.7, -0.9, 0.1, 0.0, 0.2],
    )  # fmt: skip
    second = layer(
        [0.0, 0, 0, 0, 0, 0, 1.0, -2.0, 0.5, 3.0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        momentum=[0.0, 0.4, 0.2, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1],
    )  # fmt: skip
    update = SparseMomentum(density=0.4).update([first, second], num_steps=10, progress=0.0)
    # The first keeps 0 and 2; of the others, 6, 5 and then 1, which was lost just now and was never gone, move most
    # (places 1 and 3 are equal, and the first comes).
    assert places(first.mask) == [0, 1, 2, 5, 6]
    assert places(second.mask) == [1, 7, 9]
    assert (update.prune_rate, update.num_pruned, update.num_grown) == (0.5, 4, 3)


def test_a_crowded_layer_that_is_to_grow_is_pruned_by_its_sparsity() -> None:
    crowded = layer([1.0] * 9 + [0.0], [1] * 9 + [0], momentum=[1.0] * 10)
    sparse = layer([1.0] * 2 + [0.0] * 8, [1] * 2 + [0] * 8, momentum=[0.1] * 10)
    algorithm = SparseMomentum(density=0.5)
    assert algorithm.num_to_prune([crowded, sparse], 0.5) == [1, 1]  # ceil(0.1 * 9), not ceil(0.5 * 9)
    # With less than its share of the momentum, it is pruned as the others are.
    sparse.signals = {"momentum": torch.full((10,), 2.0)}
    assert algorithm.num_to_prune([crowded, sparse], 0.5) == [5, 1]


def test_a_layer_never_loses_its_last_weight() -> None:
    assert SET(density=0.1, prune_rate=1.0).num_to_prune([layer([1.0, 0.0], [1, 0])], 1.0) == [0]


def test_rigl_by_hand() -> None:
    given_layer = layer(
        [1.0, 0.1, 2.0, 0.0, 0.0], [1, 1, 1, 0, 0], gradient=[0.0, 0.1, 0.0, -0.2, 0.3]
    )  # loses ceil(0.3 * 3) = 1
    update = RigL(density=0.5).update([given_layer], num_steps=100, progress=0.0)
    assert places(given_layer.mask) == [0, 2, 4]
    assert update.prune_rate == 0.3


def test_rigl_s_rate_falls_to_0_at_the_stop() -> None:
    algorithm = RigL(density=0.1, stop=0.75)
    assert algorithm.rate(0, 0.375) == pytest.approx(0.15)
    assert algorithm.rate(0, 0.75) == pytest.approx(0.0)
    assert algorithm.is_due(100, False, 0.74)
    assert not algorithm.is_due(100, False, 0.75)
    assert not algorithm.is_due(150, False, 0.1)
    assert not algorithm.is_due(100, True, 0.1)


def test_epochs_and_steps() -> None:
    assert SparseMomentum().is_due(7, True, 0.5)
    assert not SparseMomentum().is_due(100, False, 0.5)
    assert not Static().is_due(100, True, 0.5)


@st.composite
def many_layers(draw: Any) -> list[Layer]:
    layers = []
    for index in range(draw(st.integers(1, 5))):
        size = draw(st.integers(2, 200))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
        mask = torch.rand(size, generator=generator) < draw(st.sampled_from([0.02, 0.3, 0.9, 1.0]))
        mask[0] = True
        weight, momentum = torch.randn(2, size, generator=generator)
        signals = {"momentum": momentum, "gradient": momentum}
        layers.append(Layer(str(index), weight * mask, mask, signals, generator))
    return layers


@given(many_layers(), st.sampled_from([SparseMomentum, RigL, SET]), st.floats(0, 0.7))
@settings(max_examples=200, deadline=None)
def test_the_number_of_live_weights_never_changes(layers: list[Layer], kind: Any, progress: float) -> None:
    before = [given_layer.num_live for given_layer in layers]
    update = kind(density=0.5).update(layers, num_steps=100, progress=progress)
    after = [given_layer.num_live for given_layer in layers]
    assert sum(before) == sum(after)
    assert kind is SparseMomentum or before == after
    assert update.num_grown <= update.num_pruned


# ------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.01, 5, float("nan"), "0.05", True, None])
@pytest.mark.parametrize("kind", [SparseMomentum, RigL, SET, Static])
def test_densities_outside_are_refused(kind: Any, density: Any) -> None:
    with pytest.raises(ValueError, match=r"density=.* must be above 0 and at most 1"):
        kind(density=density)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prune_rate": 1.5}, "prune_rate=1.5"),
        ({"prune_rate_end": -1}, "prune_rate_end=-1"),
        ({"stop": 2}, "stop=2"),
        ({"schedule": "sine"}, "cosine"),
        ({"init": "zeros"}, "uniform, erk"),
        ({"update_every": 0}, "update_every=0"),
        ({"update_every": "step"}, "'epoch' or a number"),
        ({"prune": "nope"}, "magnitude, sign_magnitude"),
        ({"redistribute": "os.path.nope"}, "os.path.nope"),
        ({"grow": "nowhere.at.all"}, "nowhere.at.all"),
        ({"grow": "gradient"}, "between epochs is no gradient"),
    ],
)
def test_arguments_that_are_wrong_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DynamicSparsity(**arguments)


def _drops_too_many(given_layer: Layer, num: int) -> Tensor:
    return torch.zeros_like(given_layer.mask)


def _moves_others(given_layer: Layer, num: int) -> Tensor:
    mask = given_layer.mask.roll(1)
    mask[:] = False
    mask[-num - 3 :] = True
    return mask


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prune": _drops_too_many}, "prune=_drops_too_many was to prune 1"),
        ({"grow": _drops_too_many}, "grow=_drops_too_many was to grow 1"),
        ({"redistribute": lambda layers, nums: [0]}, "deal out 1 weights"),
        ({"redistribute": lambda layers, nums: [1, 0]}, "to 1 layers"),
        ({"grow": lambda given_layer, num: given_layer.mask.float()}, "was to grow"),
        ({"grow": lambda given_layer, num: ~given_layer.mask}, "was to grow|has done more"),
    ],
)
def test_a_function_that_does_something_else_is_named(arguments: dict[str, Any], words: str) -> None:
    algorithm = DynamicSparsity(0.5, update_every=1, prune_rate=0.5, schedule="constant", **arguments)
    with pytest.raises(ValueError, match=words):
        algorithm.update([layer([1.0, 2.0, 0.0, 0.0, 0.0], [1, 1, 0, 0, 0])], 1, 0.0)


def test_functions_are_found_by_name_by_place_or_as_they_are() -> None:
    algorithm = DynamicSparsity(0.5, prune="squall.sparsity.functions.prune_sign_magnitude", grow=_moves_others)
    assert algorithm.prune.__name__ == "prune_sign_magnitude"
    assert algorithm.grow is _moves_others


def test_a_name_belongs_to_one_function() -> None:
    registry: Registry[Any] = Registry("prune")
    registry.register("mine")(test_epochs_and_steps)
    with pytest.raises(ValueError, match="already"):
        registry.register("mine")(_moves_others)
    with pytest.raises(ValueError, match="momentum, gradient"):
        reads("weather")


def test_what_is_not_announced_can_t_be_read() -> None:
    def grow(given_layer: Layer, num: int) -> Tensor:
        return given_layer.mask | largest(given_layer.momentum, ~given_layer.mask, num)

    with pytest.raises(ValueError, match=r"layer.momentum.* @reads\('momentum'\)"):
        DynamicSparsity(0.5, grow=grow).update([layer([1.0, 0.0], [1, 0])], 1, 0.0)


def test_what_is_read_is_what_the_functions_say() -> None:
    assert SparseMomentum().reads == {"momentum"}
    assert RigL().reads == {"gradient"}
    assert SET().reads == Static().reads == frozenset()
