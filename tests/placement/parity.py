"""Compare a placed network with the same network on one device: outputs, every gradient, buffers, optimizer steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squall.placement import Columns, make_grid, place, place_tiles, plan_layout, plan_tiles, whole_state_dict
from squall.placement.module import gather_part
from squall.placement.rules.norms import synchronize_buffers
from squall.placement.tensor import SplitParameter, no_dispatch, whole

TOLERANCE = 1e-10


def world_columns() -> Columns:
    return Columns(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual - expected).norm().item() / max(expected.norm().item(), 1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.3g}"


def whole_grad(parameter: nn.Parameter) -> Tensor | None:
    if not isinstance(parameter, SplitParameter):
        return parameter.grad
    grad = parameter.grad
    return None if grad is None else gather_part(grad, parameter._spec)


def check(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    overrides: dict[str, str] | None = None,
    num_steps: int = 0,
    loss_of: Callable[[Any], Tensor] | None = None,
    tolerance: float = TOLERANCE,
    tiles: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Run on every rank, in columns unless there are ``tiles``, which are (rows, columns).

    Returns the floats per image that crossed in the forward pass, by layer.
    """
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(7)
        alone = build()
        torch.manual_seed(11)
        inputs = torch.randn(shape)
        placed = copy.deepcopy(alone)
        columns = world_columns()
        if tiles is None:
            place(placed, plan_layout(placed, columns.num_columns, overrides), columns)
        else:
            grid = make_grid(columns, *tiles, 1, "cpu")
            place_tiles(placed, plan_tiles(placed, grid, overrides), grid)
        loss_of = loss_of or _default_loss
        floats = _compare_one_pass(alone, placed, inputs, columns, loss_of, tolerance)
        if num_steps:
            _compare_steps(alone, placed, inputs, num_steps, loss_of)
        return floats
    finally:
        torch.set_default_dtype(torch.float32)


def _default_loss(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(output.shape, generator=generator)
    return (output * weights).sum() + output.square().mean()


def _compare_one_pass(
    alone: nn.Module,
    placed: nn.Module,
    inputs: Tensor,
    columns: Columns,
    loss_of: Callable[[Any], Tensor],
    tolerance: float,
) -> dict[str, float]:
    columns.ledger.start_step(inputs.shape[0])
    results = []
    for module in (alone, placed):
        x = inputs.clone().requires_grad_()
        torch.manual_seed(5)  # equal dropout masks
        output = module(x)
        loss = loss_of(output)
        synchronize_buffers()
        loss.backward()
        results.append((output, loss, x.grad))
    floats = {c.name: c.floats_per_image_forward for c in columns.ledger.crossings if c.floats_per_image_forward}
    (output, loss, grad), (placed_output, placed_loss, placed_grad) = results
    if isinstance(output, Tensor):
        assert placed_output.shape == output.shape
        assert_close(_plain(placed_output), output.detach(), "output")
    assert_close(placed_loss.detach(), loss.detach(), "loss")
    assert_close(placed_grad, grad, "gradient of the input", tolerance)
    compare_parameters(alone, placed, tolerance)
    return floats


def _plain(value: Tensor) -> Tensor:
    with no_dispatch():
        return whole(value, "").detach()


def compare_parameters(alone: nn.Module, placed: nn.Module, tolerance: float = TOLERANCE) -> None:
    expected = alone.state_dict()
    actual = whole_state_dict(placed)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert type(actual[key]) in (Tensor, nn.Parameter)
        assert_close(actual[key].double(), value.double(), key, tolerance)
    grads = dict(placed.named_parameters())
    for name, parameter in alone.named_parameters():
        grad = whole_grad(grads[name])
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None and parameter.grad is not None:
            assert_close(grad, parameter.grad, f"gradient of {name}", tolerance)


def _compare_steps(
    alone: nn.Module, placed: nn.Module, inputs: Tensor, num_steps: int, loss_of: Callable[[Any], Tensor]
) -> None:
    from squall.placement.optimizers import wrap_step

    for module in (alone, placed):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        wrap_step(optimizer)
        torch.manual_seed(13)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss_of(module(inputs)).backward()
            synchronize_buffers()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    compare_parameters(alone, placed, 1e-9)
