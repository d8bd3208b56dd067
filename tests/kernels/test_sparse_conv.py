"""Sparse convolution against a dense one in double precision: results and every gradient, for sizes of all kinds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from squall.kernels import native, sparse_conv2d
from squall.kernels.sparse_conv import native_path, op, plan
from squall.kernels.sparse_conv.lanes import Lanes, choose_lanes, lanes_for
from squall.kernels.sparse_conv.sizes import Sizes

PATHS = [*native.isas(), "torch"]

# Odd ones first: strides above kernels, padding above kernels, images below registers, batches beside a block's size.
PROBLEMS: list[dict[str, Any]] = [
    {"samples": 17, "inputs": 3, "outputs": 5, "kernel": (2, 3), "stride": (3, 4), "padding": (1, 4), "size": (7, 9)},
    {"samples": 1, "inputs": 1, "outputs": 1, "kernel": (1, 1), "size": (1, 1)},
    {"samples": 1, "inputs": 2, "outputs": 3, "kernel": (1, 1), "padding": (3, 2), "size": (2, 5)},
    {"samples": 5, "inputs": 4, "outputs": 6, "kernel": (5, 1), "dilation": (2, 1), "padding": (4, 0), "size": (11, 3)},
    {"samples": 16, "inputs": 9, "outputs": 7, "kernel": (3, 3), "padding": (1, 1), "size": (14, 14)},
    {"samples": 3, "inputs": 2, "outputs": 4, "kernel": (11, 9), "stride": (4, 4), "padding": (2, 2), "size": (31, 9)},
    {"samples": 9, "inputs": 5, "outputs": 2, "kernel": (3, 3), "padding": (1, 1), "groups": 2, "size": (13, 13)},
    {"samples": 2, "inputs": 1, "outputs": 1, "kernel": (3, 3), "padding": (1, 1), "groups": 6, "size": (8, 33)},
    {"samples": 33, "inputs": 40, "outputs": 3, "kernel": (3, 3), "padding": (1, 1), "size": (4, 4)},
]  # fmt: skip


def random_problem(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    kernel = draw.randint(1, 5), draw.randint(1, 5)
    dilation, padding = [(draw.randint(low, high), draw.randint(low, high)) for low, high in ((1, 2), (0, 4))]
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return {
        "samples": draw.choice([1, 2, 3, 5, 8, 16, 18]), "inputs": draw.randint(1, 9), "outputs": draw.randint(1, 7),
        "kernel": kernel, "groups": draw.choice([1, 1, 2, 3]), "dilation": dilation, "padding": padding,
        "stride": draw.choice([(1, 1), (draw.randint(1, 4), draw.randint(1, 4))]),
        "size": (draw.randint(least[0], 20), draw.randint(least[1], 20)),
        "density": draw.choice([0.0, 0.05, 0.3, 1.0]),
    }  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("problem", [*PROBLEMS, *map(random_problem, range(16))], ids=str)
def test_equals_a_dense_convolution(path: str, problem: dict[str, Any]) -> None:
    groups, options = problem.get("groups", 1), {}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        options[name] = problem.get(name, (default, default))
    generator = torch.Generator().manual_seed(1)
    shape = (problem["outputs"] * groups, problem["inputs"], *problem["kernel"])
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < problem.get("density", 0.4)
    x = torch.randn(problem["samples"], problem["inputs"] * groups, *problem["size"], generator=generator)
    bias = torch.randn(shape[0], generator=generator)
    positions = weight.flatten().nonzero().squeeze(1)
    for relu in (False, True):
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        expected = F.conv2d(*exact, **options, groups=groups)
        expected = expected.relu() if relu else expected
        grad = torch.randn(expected.shape, generator=generator)
        expected.backward(grad.double())
        ours = [t.clone().requires_grad_() for t in (x, weight.flatten()[positions], bias)]
        with native.forced(path):
            result = sparse_conv2d(ours[0], ours[1], positions, shape, ours[2], **options, groups=groups, relu=relu)
            result.backward(grad)
        close(result, expected)
        for mine, theirs in zip(ours, exact, strict=True):
            wanted = theirs.grad.flatten()[positions] if theirs.ndim == 4 and mine.ndim == 1 else theirs.grad
            close(mine.grad, wanted)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        assert actual.isfinite().all()
        assert (actual.double() - expected).abs().max() <= 3e-6 * max(1.0, float(expected.detach().abs().max()))


def sparse(shape: tuple[int, ...], density: float = 0.3) -> tuple[Tensor, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    positions = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density).flatten().nonzero().squeeze(1)
    return weight.flatten()[positions], positions


@pytest.mark.parametrize("images", [0, 4])
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_nothing(num_threads: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "choose_lanes", lambda sizes, num_live: list(lanes_for(sizes))[images])
    values, positions = sparse((12, 7, 3, 3))
    x = torch.randn(19, 7, 9, 9)
    before, results = torch.get_num_threads(), []
    for threads in (1, num_threads):
        torch.set_num_threads(threads)
        try:
            mine, weights = x.clone().requires_grad_(), values.clone().requires_grad_()
            result = sparse_conv2d(mine, weights, positions, (12, 7, 3, 3), padding=1)
            result.sum().backward()
        finally:
            torch.set_num_threads(before)
        results.append((result, mine.grad, weights.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_memory_format_and_expanded_gradients() -> None:
    values, positions = sparse((4, 3, 3, 3))
    x = torch.randn(2, 3, 6, 5)
    expected = sparse_conv2d(x, values, positions, (4, 3, 3, 3), padding=1)
    for given in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        given = given.requires_grad_()
        result = sparse_conv2d(given, values, positions, (4, 3, 3, 3), padding=1)
        assert torch.equal(result, expected)
        result.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_default_dtype_and_device(dtype: torch.dtype) -> None:
    """Numbers on the way are as wide as those of the weight, whatever is made by default."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(0, 40 * 30 * 9, 4)
    x, values = (torch.randn(shape, generator=generator) for shape in ((2, 30, 9, 9), (len(positions),)))

    def gradients() -> list[Tensor]:
        leaves = x.clone().requires_grad_(), values.clone().requires_grad_()
        y = sparse_conv2d(leaves[0], leaves[1], positions, (40, 30, 3, 3))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    expected, before = gradients(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = gradients()
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_op_refuses_fewer_values_than_positions() -> None:
    """Whoever calls it directly has no other check."""
    with pytest.raises(ValueError, match="values must be as many as positions, 576, got 3"):
        torch.ops.squall.sparse_conv2d(
            torch.ones(1, 8, 5, 5), torch.ones(3), torch.arange(576), None, [8, 8, 3, 3], [1, 1], [0, 0], [1, 1], 1,
            False,
        )  # fmt: skip


def test_no_samples_and_no_weights() -> None:
    values, positions = sparse((4, 3, 3, 3))
    assert sparse_conv2d(torch.empty(0, 3, 5, 5), values, positions, (4, 3, 3, 3)).shape == (0, 4, 3, 3)
    bias = torch.arange(4.0)
    result = sparse_conv2d(torch.ones(1, 3, 5, 5), values[:0], positions[:0], (4, 3, 3, 3), bias)
    assert torch.equal(result, bias.view(1, 4, 1, 1).expand(1, 4, 3, 3))


def test_a_plan_is_that_of_the_positions_it_was_made_for() -> None:
    x, values = torch.randn(1, 1, 4, 4), torch.ones(1)
    positions = torch.zeros(1, dtype=torch.int64)
    first = sparse_conv2d(x, values, positions, (1, 1, 2, 2))
    assert torch.equal(first, x[:, :, :3, :3])
    positions.fill_(3)
    assert torch.equal(sparse_conv2d(x, values, positions, (1, 1, 2, 2)), x[:, :, 1:, 1:])
    values.mul_(2)
    assert torch.equal(sparse_conv2d(x, values, positions, (1, 1, 2, 2)), 2 * x[:, :, 1:, 1:])
    number = len(op._kept)
    del positions
    assert len(op._kept) < number


@pytest.mark.parametrize("tile", [(2, 1), (1, 2), None], ids=["wide", "high", "running on"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("images", [0, 1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("isa", native.isas())
def test_whatever_lies_side_by_side(
    isa: str, images: int, stride: tuple[int, int], tile: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(sizes: Sizes, packing: plan.Packing, *_: Any) -> tuple[tuple[int, int], int, int]:
        of_row = tile if packing.lanes.num > 1 else None  # else it may be part of the next row
        return (of_row, -(-sizes.out_width // of_row[0]), 2) if of_row else ((3, 1), 0, 2)

    def choose(sizes: Sizes, num_live: int) -> Lanes:
        return list(lanes_for(sizes))[images]

    monkeypatch.setattr(plan, "choose_lanes", choose)
    monkeypatch.setattr(plan, "_tile", cut)
    monkeypatch.setattr(native_path, "_PART", 1)  # a block at a time, whose memory is used again
    values, positions = sparse((10, 3, 3, 2))
    weight = torch.zeros(10 * 3 * 3 * 2).index_put_((positions,), values).view(10, 3, 3, 2).double().requires_grad_()
    bias, given = torch.randn(10), {"stride": stride, "padding": (2, 1), "dilation": (2, 1), "groups": 2}
    x = torch.randn(11, 6, 7, 18)
    exact, mine = x.double().requires_grad_(), x.clone().requires_grad_()
    expected = F.conv2d(exact, weight, bias.double(), **given).relu()
    values.requires_grad_()
    with native.forced(isa):
        result = sparse_conv2d(mine, values, positions, tuple(weight.shape), bias, **given, relu=True)
        close(result, expected)
        grad = torch.randn(result.shape)
        result.backward(grad)
    expected.backward(grad.double())
    assert exact.grad is not None
    assert weight.grad is not None
    close(mine.grad, exact.grad)
    close(values.grad, weight.grad.flatten()[positions])


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [
        (16, 13, Lanes(16, 16, 1, 13)),  # as many images as lanes
        (8, 28, Lanes(16, 4, 4, 7)),  # half of them, each in strips: they stay nearer
        (1, 3, Lanes(1, 1, 1, 3)),  # three strips would leave thirteen lanes over
    ],
)
def test_lanes_are_images_or_strips_of_them(samples: int, size: int, expected: Lanes) -> None:
    sizes = op.sizes_of((samples, 512, size, size), (512, 512, 3, 3), [1, 1], [1, 1], [1, 1], 1)
    assert choose_lanes(sizes, 512 * 512 * 9 // 10) == expected


def test_the_ops_keep_torchs_rules() -> None:
    values, positions = sparse((4, 3, 3, 3))
    x, bias = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    sizes = ([4, 3, 3, 3], [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(op.sparse_conv2d, (x, values.requires_grad_(), positions, bias, *sizes, False))
    torch.library.opcheck(op.sparse_conv2d, (x, values, positions, None, *sizes, True))
    grad = torch.randn(2, 4, 5, 5)
    arguments = grad, x.detach(), values.detach(), positions, *sizes, True, False
    torch.library.opcheck(op.sparse_conv2d_backward, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 5, 5)}, "x must be images"),
        ({"x": torch.ones(1, 3, 5, 5, dtype=torch.int64)}, "x must be images"),
        ({"weight_shape": (4, 2, 3, 3)}, "weight_shape=.4, 2, 3, 3. with groups=1"),
        ({"groups": 3}, "groups=3"),
        ({"values": torch.ones(2)}, "equally long"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "torch.float64 on cpu"),
        ({"positions": torch.zeros(3)}, "positions int64"),
        ({"positions": torch.tensor([0, 2, 1])}, "positions must ascend"),
        ({"positions": torch.tensor([0, 2, 2])}, "positions must ascend"),
        ({"positions": torch.tensor([-1, 0, 2])}, "positions must ascend"),
        ({"positions": torch.tensor([2**62, 1 - 2**63, -5])}, "positions must ascend"),
        ({"positions": torch.tensor([0, 1, 108])}, "positions must ascend"),
        ({"bias": torch.ones(3)}, "bias must be 4 numbers"),
        ({"stride": 0}, "stride"),
        ({"padding": (1, 2, 3)}, "padding must be one number or two"),
        ({"dilation": 3}, "larger than x"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(1, 3, 5, 5), "values": torch.ones(3), "positions": torch.arange(3), "weight_shape": (4, 3, 3, 3)
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_conv2d(**{**arguments, **change})
