"""Which parameters can be sparse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from squall.sparsity import densities, find_layers, largest, smallest


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.plane = nn.LayerNorm((4, 4))
        self.lstm = nn.LSTM(4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2)
        self.tied.weight = self.fc.weight


def test_weights_of_two_dimensions_or_more_and_each_once() -> None:
    assert list(find_layers(Net())) == [
        "conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight",
        "attention.out_proj.weight", "fc.weight",
    ]  # fmt: skip


def test_what_is_no_connection_stays_whole() -> None:
    net = nn.ModuleDict({
        "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        "old": nn.utils.weight_norm(nn.Linear(4, 4)),  # type: ignore[no-untyped-call]
        "new": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "empty": nn.Linear(0, 5),
    })  # fmt: skip
    assert list(find_layers(net)) == [
        "attention.in_proj_weight", "attention.out_proj.weight", "old.weight_v",
        "new.parametrizations.weight.original1",
    ]  # fmt: skip


@pytest.mark.parametrize("embedding_first", [False, True])
def test_an_embedding_stays_whole_whatever_is_tied_to_it(embedding_first: bool) -> None:
    embedding, decoder = nn.Embedding(5, 4), nn.Linear(4, 5)
    decoder.weight = embedding.weight
    parts = {"embedding": embedding, "decoder": decoder} if embedding_first else {"decoder": decoder, "e": embedding}
    assert list(find_layers(nn.ModuleDict({**parts, "fc": nn.Linear(4, 4)}))) == ["fc.weight"]


@pytest.mark.parametrize("pattern", ["fc", "tied", "tied.weight", "t?ed"])
def test_a_layer_is_left_dense_by_any_of_its_names(pattern: str) -> None:
    assert "fc.weight" not in find_layers(Net(), dense=[pattern])
    assert "fc.weight" in find_layers(Net(), dense=None)


@pytest.mark.parametrize("pattern", ["fc", "fc.weight", "f*", "?c.weight"])
def test_layers_are_left_dense_by_name_and_by_pattern(pattern: str) -> None:
    found = find_layers(Net(), dense=[pattern, "lstm*"])
    assert list(found) == ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"]


@pytest.mark.parametrize("pattern", ["fc1", "norm", "conv.bias", ""])
def test_a_pattern_that_names_no_layer_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"no layer is called .* could be sparse: conv, lstm.weight_ih_l0"):
        find_layers(Net(), dense=[pattern])


def test_a_single_string_is_no_list() -> None:
    with pytest.raises(ValueError, match=r"dense=\['fc'\]"):
        find_layers(Net(), dense="fc")


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ValueError, match="No layer is left"):
        find_layers(Net(), dense=["*"])


def test_frozen_weights_stay_whole() -> None:
    net = Net()
    net.conv.requires_grad_(False)
    assert "conv.weight" not in find_layers(net)


def test_the_lengths_of_weight_norm_are_no_connections() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    assert list(find_layers(net)) == ["0.parametrizations.weight.original1"]


def test_a_compiled_part_has_its_own_name() -> None:
    net = Net()
    net.fc = torch.compile(net.fc, backend="eager")  # type: ignore[assignment]
    assert "fc.weight" in find_layers(net)


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="uninitialized"):
        find_layers(nn.LazyLinear(3))


def test_densities_as_metrics() -> None:
    masks = {"a.weight": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])}
    assert densities(masks) == {"density/a": 0.25, "density/b": 1.0, "density/total": 0.5}
    assert densities({}) == {"density/total": 1.0}


@given(
    st.lists(
        st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, math.inf, -math.inf, math.nan]), min_size=1, max_size=40
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_the_first_of_equals_are_chosen_as_an_order_of_all_would(scores: list[float], random: Any) -> None:
    """Whatever is no number is larger than any, and comes last, from above as from below."""
    score = torch.tensor(scores)
    among = torch.tensor([random.random() < 0.8 for _ in scores])
    places = among.nonzero().squeeze(1)
    num = random.randint(0, len(places))
    for choose, sign in ((smallest, 1), (largest, -1)):
        order = torch.sort(sign * score[places], stable=True).indices[:num]
        assert choose(score, among, num).nonzero().squeeze(1).tolist() == sorted(places[order].tolist())
