"""Decoding and stepping in one pass: when it is done, that Torch's numbers come out, and where state lies then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from squall.consistency import fused
from squall.consistency.staleness import StalenessRule
from squall.consistency.updates import Updater
from squall.kernels import native

from .slices import MakeOptimizers, make_parameters, make_pushes, sliced

pytestmark = pytest.mark.skipif(not native.isas(), reason="there is no compiled kernel")


class MySGD(SGD):
    """A user's own, which may do anything."""


def one(kind: type[Optimizer], **options: Any) -> MakeOptimizers:
    """One optimizer over two groups that differ in learning rate."""
    return lambda parameters: [kind([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03}], **options)]


FUSED: dict[str, MakeOptimizers] = {
    "SGD": one(SGD, lr=0.1),
    "SGD momentum": one(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": one(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD dampening, up": one(SGD, lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
    "Adagrad": one(Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2),
    "Adam": one(Adam, lr=0.01, weight_decay=0.01),
    "Adam amsgrad": one(Adam, lr=0.01, amsgrad=True, maximize=True),
    "Adam tensor lr": one(Adam, lr=torch.tensor(0.01)),
    "AdamW": one(AdamW, lr=0.01, weight_decay=0.1),
}
ABSENT = {0: [1], 3: [0, 1, 2, 3, 4], 4: [0, 3], 7: [4]}


@pytest.fixture
def num_fused() -> Iterator[Any]:
    """How many units were stepped in one pass."""
    with mock.patch.object(fused, "shard_update", wraps=fused.shard_update) as counted:
        yield lambda: counted.call_count


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", FUSED)
def test_ten_pushes_are_ten_stock_steps(name: str, num_shards: int, num_fused: Any) -> None:
    parameters = make_parameters(dtype=torch.float32)
    (stock,) = FUSED[name](parameters)
    with sliced(FUSED[name], num_shards=num_shards, fused=True) as slices:
        updaters = slices.updaters()
        for command, gradients in enumerate(make_pushes(10, ABSENT), start=1):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.float()
            stock.step()
            if command == 6:  # whoever comes after a kill goes on
                updaters = slices.updaters()
            slices.push(updaters, command, gradients)
        assert num_fused() > 20
        for mine, theirs in zip(slices.weights(), parameters, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)
        for memory in slices.memories():
            for unit in memory.slice.units:
                state, whole = memory.read_state(unit), stock.state[parameters[unit.parameter]]
                assert state is not None
                assert set(state) == {key for key, value in whole.items() if value is not None}
                for key, value in state.items():
                    there = whole[key].view(-1)
                    there = there[unit.start : unit.stop] if there.numel() == unit.info.num_elements else there
                    torch.testing.assert_close(value.view(-1), there, rtol=1e-5, atol=1e-6)


def test_either_goes_on_where_the_other_has_stopped() -> None:
    pushes, ends = make_pushes(6), []
    for order in (("torch",) * 6, ("torch", "avx", "avx", "torch", "avx", "torch"), ("avx", "torch") * 3):
        with sliced(FUSED["Adam"], fused=True) as slices:
            (updater,) = slices.updaters()
            for command, (path, gradients) in enumerate(zip(order, pushes, strict=True), start=1):
                with native.forced(path if path == "torch" else native.isas()[-1]):
                    slices.push([updater], command, gradients)
            ends.append(torch.cat([weight.view(-1) for weight in slices.weights()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-5, atol=1e-6)


def test_a_stale_gradient_has_a_smaller_rate(num_fused: Any) -> None:
    with sliced(lambda p: [SGD(p, lr=0.5)], rule=StalenessRule("inverse"), fused=True) as slices:
        before, (gradients,) = slices.weights(), make_pushes(1)
        slices.push(slices.updaters(), 1, gradients, 4)
        assert num_fused()
        for was, is_, gradient in zip(before, slices.weights(), gradients, strict=True):
            assert gradient is not None
            torch.testing.assert_close(is_, was - 0.125 * gradient.float())


def hooked(updater: Updater) -> None:
    for stepper in updater._steppers:
        stepper._optimizer.register_step_post_hook(lambda *_: None)


LEFT_TO_TORCH: dict[str, tuple[MakeOptimizers, Any]] = {
    "a user's own": (one(MySGD, lr=0.1), None),
    "another of Torch's": (one(torch.optim.RMSprop, lr=0.1), None),
    "foreach": (one(Adam, lr=0.01, foreach=True), None),
    "a hook": (one(SGD, lr=0.1), hooked),
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_torch_has_to_step(name: str, num_fused: Any) -> None:
    make, change = LEFT_TO_TORCH[name]
    with sliced(make, fused=True) as slices:
        (updater,) = slices.updaters()
        if change is not None:
            change(updater)
        before = slices.weights()
        slices.push([updater], 1, make_pushes(1)[0])
        assert not num_fused()
        assert not any(torch.equal(was, is_) for was, is_ in zip(before, slices.weights(), strict=True))


def test_torch_steps_other_types_and_rules_that_look_at_gradients(num_fused: Any) -> None:
    with sliced(FUSED["SGD"]) as slices:  # in float64
        (updater,) = slices.updaters()
        updater._fused = fused.Fused("fp32")
        slices.push([updater], 1, make_pushes(1)[0])
    with sliced(FUSED["SGD"], rule=StalenessRule("delay_compensated"), fused=True) as slices:
        (updater,) = slices.updaters()
        base = torch.zeros(slices.plan.slices[0].num_fetch_bytes, dtype=torch.uint8)
        slices.push([updater], 1, make_pushes(1)[0], 1, [base])
    assert not num_fused()


def test_momentum_that_was_set_later_is_torchs(num_fused: Any) -> None:
    with sliced(lambda p: [SGD(p, lr=0.5)], fused=True) as slices:
        (updater,) = slices.updaters()
        for group in updater._groups[0]:
            group["momentum"] = 0.9
        slices.push([updater], 1, make_pushes(1)[0])
        assert not num_fused()


def test_no_topk_code_changes_nothing() -> None:
    weights, before = torch.ones(20), torch.ones(20)
    steps = fused.Fused("topk:0.1")
    optimizer = SGD([nn.Parameter(weights)], lr=0.1, fused=True)
    plan = steps.plan(optimizer, optimizer.param_groups[0], weights, {}, True, 1.0)
    assert plan is not None
    code: Tensor = torch.cat(
        [torch.tensor([3, 20], dtype=torch.int32).view(torch.uint8), torch.ones(2).view(torch.uint8)]
    )
    with pytest.raises(ValueError, match="places must ascend"):
        steps.step(plan, code, weights, {}, True)
    assert torch.equal(weights, before)
