"""What is cut off gradients is scaled as the whole gradient was; a rank may have a part of it without live weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from squall.sparsity.cuts import Cut, rescaled


def _cut(live: list[float], factor: float) -> Cut:
    gradient = torch.tensor(live, dtype=torch.float64)
    cut = Cut(gradient, torch.tensor([8.0, -4.0], dtype=torch.float64))
    gradient.mul_(factor)  # as clipping does
    return cut


def _alone(norms: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    return norms


def test_it_is_scaled_as_the_rest() -> None:
    off = rescaled({"a": _cut([3.0, 4.0], 0.25), "b": None}, _alone)
    assert off["a"].tolist() == [2.0, -1.0]
    assert "b" not in off


def test_a_layer_without_live_gradients_goes_by_the_others() -> None:
    off = rescaled({"a": _cut([3.0, 4.0], 0.25), "b": _cut([0.0, 0.0], 0.25)}, _alone)
    assert off["b"].tolist() == [2.0, -1.0]


def test_a_part_without_live_gradients_goes_by_the_whole() -> None:
    """Of the same layer another rank has a part, whose norm went from 4 to 1."""

    def measure(norms: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        assert [float(norm) for norm in norms if norm is not None] == [0.0, 0.0]
        return [torch.tensor(4.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)]

    assert rescaled({"a": _cut([0.0, 0.0], 0.25)}, measure)["a"].tolist() == [2.0, -1.0]


def test_all_ranks_measure_though_one_has_cut_nothing() -> None:
    asked: list[int] = []

    def measure(norms: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        asked.append(len(norms))
        return norms

    assert rescaled({"a": None, "b": None}, measure) == {}
    assert asked == [4]
