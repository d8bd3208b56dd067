"""A rule, applied to each rank's part, gives each rank's part of the result; without one, everything is gathered.

All ranks are played by one process: columns that aren't there receive zeros, so a rule that communicates where it
says that it doesn't comes out wrong.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squall.placement import ColumnTensor, DryColumns, Partition, Spec
from squall.placement.tensor import local_view, no_dispatch, wrap

from .test_partition import elements

Operation = Callable[[Tensor], Any]


def parts_of(full: Tensor, dim: int, partition: Partition) -> list[Tensor]:
    parts = []
    for rank, held in enumerate(partition.ranges):
        local = full.index_select(dim, torch.tensor(elements(held), dtype=torch.long)).clone()
        parts.append(wrap(local, Spec(dim, partition, DryColumns(partition.num_ranks, rank))))
    return parts


def assert_local(full: Tensor, dim: int, partition: Partition, operation: Operation, must_split: bool = False) -> None:
    """Where the result is split, its parts are the parts of what one device computes."""
    expected = operation(full.clone())
    results = [operation(part) for part in parts_of(full, dim, partition)]
    if not isinstance(results[0], ColumnTensor):
        assert not must_split, "was gathered"
        return
    for rank, result in enumerate(results):
        spec = result._spec
        assert result.shape == expected.shape
        with no_dispatch():
            local = result.as_subclass(Tensor)
        index = torch.tensor(elements(spec.partition.ranges[rank]), dtype=torch.long)
        torch.testing.assert_close(local, expected.index_select(spec.dim, index), rtol=1e-12, atol=1e-12)


STAYS_SPLIT: dict[str, Operation] = {
    "relu": F.relu,
    "relu_": lambda x: F.relu(x, inplace=True),
    "gelu": F.gelu,
    "arithmetic": lambda x: 1 - (x * 2 + 3) / 4,
    "power": lambda x: (x.abs() + 1) ** 0.5,
    "in_place": lambda x: x.add_(1).mul_(x),
    "augmented": lambda x: x.__iadd__(2.0),
    "per_channel": lambda x: x * torch.arange(12.0, dtype=torch.float64).view(12, 1, 1),
    "per_pixel": lambda x: x + torch.arange(6.0, dtype=torch.float64),
    "with_itself": lambda x: torch.maximum(x, -x) + torch.where(x > 0, x, 2 * x),
    "clamp": lambda x: torch.clamp(x, min=-0.5, max=0.5),
    "pool": lambda x: F.max_pool2d(x, 2),
    "pool_average": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "pool_adaptive": lambda x: F.adaptive_avg_pool2d(x, (1, 2)),
    "pool_norm": lambda x: F.lp_pool2d(x, 2.0, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "mean": lambda x: x.mean((2, 3)),
    "mean_keep": lambda x: x.mean(dim=[-1, -2], keepdim=True),
    "amax": lambda x: torch.amax(x, dim=0),
    "max_values": lambda x: x.max(dim=-1).values,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "cumsum": lambda x: x.cumsum(2),
    "flatten": lambda x: x.flatten(1),
    "flatten_images": lambda x: x.flatten(2).mean(-1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3]),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :, :1].squeeze(2),
    "index_rows": lambda x: x[:, :, ::2, 1:],
    "index_one": lambda x: x[0, :, ..., 2],
    "index_none": lambda x: x[:, None],
    "cat_channels": lambda x: torch.cat([x, 2 * x], 1),
    "cat_rows": lambda x: torch.cat([x, x], dim=2),
    "stack": lambda x: torch.stack([x, -x], 1),
    "split_rows": lambda x: x.split(2, dim=2)[1],
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand_as(x),
    "zeros_like": torch.zeros_like,
    "clone": lambda x: x.clone().detach().contiguous(),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: F.instance_norm(x),
    "layer_norm": lambda x: F.layer_norm(x, (4, 6)),
    "half": lambda x: x.float().double(),
}


@pytest.mark.parametrize("name", STAYS_SPLIT)
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_stays_split(name: str, num_ranks: int) -> None:
    torch.manual_seed(0)
    full = torch.randn(3, 12, 4, 6, dtype=torch.float64)
    assert_local(full, 1, Partition.even(12, num_ranks), STAYS_SPLIT[name], must_split=True)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_reshape_follows_channels(data: st.DataObject) -> None:
    """Any reshape of any shape: the split dimension is followed, or everything is gathered."""
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    dim = data.draw(st.integers(0, len(shape) - 1))
    num_ranks = data.draw(st.integers(1, 3))
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    rest, target = full.numel(), []
    for _ in range(data.draw(st.integers(0, 3))):
        factor = data.draw(st.sampled_from([f for f in range(1, rest + 1) if rest % f == 0]))
        target.append(factor)
        rest //= factor
    target.append(rest)
    assert_local(full, dim, Partition.even(shape[dim], num_ranks), lambda x: x.reshape(target))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_grouped_norms_within_columns(data: st.DataObject) -> None:
    groups, width, num_ranks = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))
    torch.manual_seed(0)
    full = torch.randn(2, groups * width, 3, dtype=torch.float64)
    partition = Partition.even(groups * width, num_ranks, width)
    assert_local(full, 1, partition, lambda x: F.group_norm(x, groups))


def test_what_a_split_tensor_says_of_itself() -> None:
    full = torch.randn(2, 7, 3)
    (part, _) = parts_of(full, 1, Partition.even(7, 2))
    assert (part.shape, part.size(), part.size(1)) == (full.shape, full.size(), 7)
    assert (part.numel(), len(part), part.dim(), part.ndim) == (full.numel(), 2, 3, 3)
    assert "split dim=1" in repr(part)
    with local_view():
        assert part.shape == (2, 4, 3)


def test_pickling_says_what_to_do_instead() -> None:
    part = parts_of(torch.randn(2, 4), 1, Partition.even(4, 2))[0]
    with pytest.raises(RuntimeError, match=r"trainer\.save_checkpoint"):
        torch.save(part, io.BytesIO())


def test_errors_speak_of_global_shapes() -> None:
    part = parts_of(torch.randn(2, 4, 5), 1, Partition.even(4, 2))[0]
    with pytest.raises(RuntimeError, match=r"4.*3|3.*4"):
        part + torch.randn(2, 3, 5)
