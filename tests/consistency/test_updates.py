"""The update of a slice: what stock torch would have done, and what a kill at any point does not change."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from squall.consistency.staleness import MEAN_SQUARE, StalenessRule, StalenessStatistics
from squall.consistency.updates import SliceMemory

from .killed import Control, Countdown, KilledError
from .slices import SHAPES, MakeOptimizers, Slices, as_it_is, make_parameters, make_pushes, sliced


class Sign(Optimizer):
    """A user's own: per-parameter numbers, a flag and a tensor that is not of the parameter's shape."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.5)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, last=0.0, odd=False, mean=torch.zeros_like(parameter), unused=None)
                state["step"] += 1
                state["odd"] = not state["odd"]
                state["last"] = state["last"] * 0.5 + group["lr"]
                state["mean"] = state["mean"] * group["betas"][0] + parameter.grad * (1 - group["betas"][0])
                factor = state["last"] / state["step"] * (2.0 if state["odd"] else 1.0)
                parameter.sub_(state["mean"].sign() * factor + parameter.grad * group["betas"][1])


class Normalized(Sign):
    """A user's own that looks at a whole parameter, and so can't be cut."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["norms"] = state.get("norms", torch.zeros(2)) + parameter.grad.norm()
                    parameter.sub_(parameter.grad, alpha=group["lr"] / float(state["norms"].sum()))


def one(kind: type[Optimizer], **options: Any) -> MakeOptimizers:
    """One optimizer over two groups that differ in learning rate."""
    return lambda parameters: [kind([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03}], **options)]


def several(parameters: list[nn.Parameter]) -> list[Optimizer]:
    return [
        torch.optim.Adam(parameters[:2], lr=0.01),
        Normalized(parameters[2:3], lr=0.1),
        torch.optim.SGD(parameters[3:], lr=0.1, momentum=0.9),
    ]


OPTIMIZERS: dict[str, tuple[MakeOptimizers, tuple[bool, ...]]] = {
    "SGD": (one(torch.optim.SGD, lr=0.1), (True,)),
    "SGD momentum": (one(torch.optim.SGD, lr=0.1, momentum=0.9), (True,)),
    "SGD dampening": (one(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01), (True,)),
    "SGD nesterov": (one(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), (True,)),
    "SGD maximize": (one(torch.optim.SGD, lr=0.1, maximize=True), (True,)),
    "Adam": (one(torch.optim.Adam, lr=0.01, weight_decay=0.01), (True,)),
    "Adam amsgrad": (one(torch.optim.Adam, lr=0.01, amsgrad=True), (True,)),
    "Adam tensor lr": (
        lambda ps: [torch.optim.Adam(ps, lr=torch.tensor(0.01, dtype=torch.float64))], (True,)
    ),
    "AdamW": (one(torch.optim.AdamW, lr=0.01), (True,)),
    "Adagrad": (one(torch.optim.Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2), (True,)),
    "RMSprop": (one(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True), (True,)),
    "NAdam": (one(torch.optim.NAdam, lr=0.01), (True,)),
    "RAdam": (one(torch.optim.RAdam, lr=0.01), (True,)),
    "Adadelta": (one(torch.optim.Adadelta, lr=0.5), (True,)),
    "Adamax": (one(torch.optim.Adamax, lr=0.01), (True,)),
    "ASGD": (one(torch.optim.ASGD, lr=0.1, t0=3), (True,)),
    "Rprop": (one(torch.optim.Rprop, lr=0.1), (True,)),
    "Adam foreach": (one(torch.optim.Adam, lr=0.01, foreach=True), (True,)),
    "a user's own": (one(Sign, lr=0.1), (True,)),
    "a user's own, whole": (one(Normalized, lr=0.1), (False,)),
    "several": (several, (True, False, True)),
}  # fmt: skip
ABSENT = {0: [1], 3: [0, 1, 2, 3, 4], 4: [0, 3], 7: [4]}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_pushes_are_ten_stock_steps(name: str, num_shards: int) -> None:
    make, elementwise = OPTIMIZERS[name]
    parameters = make_parameters()
    stock = make(parameters)
    with sliced(make, elementwise, num_shards) as slices:
        if name != "a user's own, whole":
            assert num_shards == 3 or len(slices.plan.slices[0].batches) > 3
        updaters = slices.updaters()
        fetched: list[Tensor] = []
        for command, gradients in enumerate(make_pushes(10, ABSENT), start=1):
            if command == 6:
                for optimizer in (*stock, *slices.optimizers):
                    for group in optimizer.param_groups:
                        if isinstance(group["lr"], Tensor):
                            group["lr"].mul_(0.5)
                        else:
                            group["lr"] *= 0.5
                slices.adopt(updaters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for optimizer in stock:
                optimizer.step()
            fetched = slices.push(updaters, command, gradients)
            assert [updater.last_command for updater in updaters] == [command] * num_shards
        for mine, handed_out, theirs in zip(slices.weights(), slices.fetched_weights(fetched), parameters, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-12)
            assert torch.equal(mine, handed_out)


def test_a_resumed_optimizer_goes_on_with_the_state_it_brings() -> None:
    def make(parameters: list[nn.Parameter]) -> list[Optimizer]:
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for gradients in make_pushes(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        return [optimizer]

    parameters = make_parameters()
    (stock,) = make(parameters)
    with sliced(make, num_shards=2) as slices:
        for parameter, gradient in zip(parameters, make_pushes(1)[0], strict=True):
            parameter.grad = gradient
        stock.step()
        slices.push(slices.updaters(), 1, make_pushes(1)[0])
        for mine, theirs in zip(slices.weights(), parameters, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- staleness rules


@pytest.mark.parametrize(("staleness", "divisor"), [(0, 1), (1, 1), (2, 2), (7, 7)])
def test_inverse_divides_the_learning_rate_by_staleness(staleness: int, divisor: int) -> None:
    with sliced(lambda p: [torch.optim.SGD(p, lr=0.5)], rule=StalenessRule("inverse")) as slices:
        before, (gradients,) = slices.weights(), make_pushes(1)
        updaters = slices.updaters()
        slices.push(updaters, 1, gradients, staleness)
        for was, is_, gradient in zip(before, slices.weights(), gradients, strict=True):
            torch.testing.assert_close(is_, was - 0.5 / divisor * gradient, rtol=1e-14, atol=1e-14)
        after = slices.weights()
        slices.push(updaters, 2, gradients, 0)  # the next one's rate is whole again
        for was, is_, gradient in zip(after, slices.weights(), gradients, strict=True):
            torch.testing.assert_close(is_, was - 0.5 * gradient, rtol=1e-14, atol=1e-14)


def test_delay_compensation_in_closed_form() -> None:
    strength, decay, rate = 2.0, 0.95, 0.1
    rule = StalenessRule("delay_compensated", strength, decay)
    with sliced(lambda p: [torch.optim.SGD(p, lr=rate)], num_shards=2, rule=rule) as slices:
        updaters = slices.updaters()
        bases = [torch.empty(slice_.num_fetch_bytes, dtype=torch.uint8) for slice_ in slices.plan.slices]
        for updater, base in zip(updaters, bases, strict=True):
            updater.hand_out(base)
        then = slices.weights()
        now = [weight.clone() for weight in then]
        square = [torch.zeros_like(weight) for weight in then]
        for command, gradients in enumerate(make_pushes(4, {2: [1, 3]}), start=1):  # all from the first weights
            slices.push(updaters, command, gradients, command - 1, bases)
            for index, g in enumerate(gradients):
                if g is not None:
                    square[index] = decay * square[index] + (1 - decay) * g * g
                    correction = strength / (square[index] + 1e-7).sqrt() * g * g * (now[index] - then[index])
                    now[index] = now[index] - rate * (g + correction)
        for mine, formula in zip(slices.weights(), now, strict=True):
            torch.testing.assert_close(mine, formula, rtol=1e-12, atol=1e-12)


def test_statistics_of_staleness() -> None:
    statistics = StalenessStatistics()
    assert (statistics.mean, statistics.maximum, statistics.values().tolist()) == (0.0, 0, [])
    for value in (0, 3, 1, 3):
        statistics.add(value)
    assert (statistics.total, statistics.mean, statistics.maximum) == (4, 1.75, 3)
    assert statistics.values().tolist() == [0, 1, 3, 3]


def test_edits_replace_what_was_edited() -> None:
    with sliced(lambda p: [torch.optim.SGD(p, lr=0.5)], num_shards=2) as slices:
        before = slices.weights()
        for updater, slice_ in zip(slices.updaters(), slices.plan.slices, strict=True):
            edits = torch.full((slice_.num_fetch_bytes // 8,), torch.nan, dtype=torch.float64)
            edits[::3] = 7.0
            updater.take_in(edits.view(torch.uint8))
        now = torch.cat([weight.flatten() for weight in slices.weights()])
        then = torch.cat([weight.flatten() for weight in before])
        assert torch.equal(now[now != 7.0], then[now != 7.0])
        assert len(now) / 4 < (now == 7.0).sum() < len(now) / 2


# ---------------------------------------------------------------------- killed


def interruptible(slices: Slices, shard: int, countdown: Countdown) -> Any:
    """An updater that can be ended before, in and after everything that it does to memory."""

    def decode(unit: Any, code: Tensor, scratch: Tensor) -> Tensor:
        countdown()
        return as_it_is(unit, code, scratch)

    updater = slices.updater(shard, decode)
    updater._journal.control = Control(updater._journal.control, countdown)
    if slices.fused:
        updater._fused.step = torn_apart(updater._fused.step, countdown)
        return updater
    for stepper in updater._steppers:
        stepper._optimizer = torn(stepper._optimizer, countdown)
        keep = stepper._keep

        def kept(index: int, state: Any, keep: Any = keep) -> None:
            countdown()
            keep(index, state)
            countdown()

        stepper._keep = kept
    return updater


def torn(optimizer: Optimizer, countdown: Countdown) -> Optimizer:
    """An optimizer that may be ended between its parameters, with one of them half written."""
    kind = type(optimizer)

    def step(self: Any) -> None:
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"]:
                self.param_groups = [{**group, "params": [parameter]}]
                kind.step(self)
                half = parameter.data.view(-1)[: parameter.numel() // 2]
                whole = half.clone()
                half.fill_(torch.nan)
                countdown()
                half.copy_(whole)
        self.param_groups = groups

    optimizer.__class__ = type(kind.__name__, (kind,), {"step": step})
    return optimizer


def torn_apart(step: Any, countdown: Countdown) -> Any:
    """A fused step that may be ended between units, with one of them half written."""

    def torn(plan: Any, code: Tensor, weights: Tensor, memories: dict[str, Tensor], begins: bool) -> None:
        countdown()
        step(plan, code, weights, memories, begins)
        halves = [tensor[: -(-len(tensor) // 2)] for tensor in (weights, *memories.values())]
        wholes = [half.clone() for half in halves]
        for half in halves:
            half.fill_(torch.nan)
        countdown()
        for half, whole in zip(halves, wholes, strict=True):
            half.copy_(whole)

    return torn


PUSHES = make_pushes(3, {1: [0, 2]})


def uninterrupted(slices: Slices, shard: int) -> tuple[list[bytes], Tensor]:
    images, fetch = [], torch.zeros(slices.plan.slices[shard].num_fetch_bytes, dtype=torch.uint8)
    updater = slices.updater(shard)
    for command, gradients in enumerate(PUSHES, start=1):
        absent = {index for index, gradient in enumerate(gradients) if gradient is None}
        updater.apply(command, slices.code(shard, gradients), absent, 1, fetch, fetch)
        images.append(slices.image(shard))
    return images, fetch


KILLED: dict[str, tuple[MakeOptimizers, tuple[bool, ...], str]] = {
    "Adam": (*OPTIMIZERS["Adam"], "none"),
    "Adagrad": (*OPTIMIZERS["Adagrad"], "inverse"),
    "SGD dampening": (*OPTIMIZERS["SGD dampening"], "delay_compensated"),  # whose first step is not as the others
    "a user's own": (*OPTIMIZERS["a user's own"], "none"),
    "several": (*OPTIMIZERS["several"], "delay_compensated"),
    "fused Adam": (*OPTIMIZERS["Adam"], "none"),
    "fused SGD dampening": (*OPTIMIZERS["SGD dampening"], "inverse"),
    "fused Adagrad": (*OPTIMIZERS["Adagrad"], "none"),
}


@pytest.mark.parametrize("name", KILLED)
@given(kills=st.lists(st.integers(0, 60), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_killed_at_any_point_and_carried_on_is_bit_identical(name: str, kills: list[int]) -> None:
    make, elementwise, rule = KILLED[name]
    fused = name.startswith("fused")
    with sliced(make, elementwise, rule=StalenessRule(rule), fused=fused) as slices:
        images, wanted = uninterrupted(slices, 0)
    with sliced(make, elementwise, rule=StalenessRule(rule), fused=fused) as slices:
        fetch = torch.zeros(slices.plan.slices[0].num_fetch_bytes, dtype=torch.uint8)
        base = fetch.clone()
        for command, gradients in enumerate(PUSHES, start=1):
            absent = {index for index, gradient in enumerate(gradients) if gradient is None}
            while True:
                countdown = Countdown(kills[0] if kills else 10**9)
                updater = interruptible(slices, 0, countdown)
                if updater.last_command >= command:
                    break
                try:
                    updater.apply(command, slices.code(0, gradients), absent, 1, base, fetch)
                except KilledError:
                    kills = kills[1:]
            assert slices.image(0) == images[command - 1]
            base = fetch.clone()
        assert torch.equal(fetch, wanted)


def child(slices: Slices, ready: int) -> None:
    """The life of a shard's process, until it is killed or has carried everything out."""
    updater = slices.updater(0)
    os.write(ready, b"!")
    for command, gradients in enumerate(PUSHES * 20, start=1):
        if command > updater.last_command:
            absent = {index for index, gradient in enumerate(gradients) if gradient is None}
            updater.apply(command, slices.code(0, gradients), absent, 0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="shards are forked")
@pytest.mark.parametrize("fused", [False, True])
def test_kill_9_at_random_moments_is_bit_identical(fused: bool) -> None:
    make, elementwise = OPTIMIZERS["Adam"]
    torch.set_num_threads(1)
    with sliced(make, elementwise, fused=fused) as slices:
        begin = time.perf_counter()
        reader, writer = os.pipe()
        child(slices, writer)
        took = time.perf_counter() - begin
        wanted = slices.image(0)
        os.close(reader), os.close(writer)
    dice, num_kills = random.Random(0), 0
    with sliced(make, elementwise, fused=fused) as slices:
        while True:
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    child(slices, writer)
                    os._exit(0)
                finally:
                    os._exit(1)
            os.close(writer)
            assert os.read(reader, 1) == b"!"
            if num_kills < 25:
                time.sleep(dice.random() * took / 8)  # where it is by then is what is random
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            os.close(reader)
            if os.WIFSIGNALED(status):
                num_kills += 1
                continue
            assert os.WEXITSTATUS(status) == 0
            break
        assert slices.image(0) == wanted
        assert slices.updater(0).last_command == 60
    assert num_kills >= 5


def test_a_command_is_carried_out_by_whoever_finds_it_half_done_and_by_nobody_twice() -> None:
    make, elementwise = OPTIMIZERS["Adam"]
    with sliced(make, elementwise) as slices:
        slices.push(slices.updaters(), 1, PUSHES[0])
        (found,) = slices.updaters()
        assert found.last_command == 1
        before = slices.image(0)
        slices.updaters()  # finding memory changes nothing in it
        assert slices.image(0) == before


def test_a_unit_without_an_update_has_no_state() -> None:
    make, elementwise = OPTIMIZERS["Adam"]
    with sliced(make, elementwise) as slices:
        slices.push(slices.updaters(), 1, make_pushes(1, {0: [0]})[0])
        memory: SliceMemory = slices.memories()[0]
        for unit in memory.slice.units:
            state = memory.read_state(unit)
            assert (state is None) == (unit.parameter == 0)
            if state is not None:
                assert set(state) == {"step", "exp_avg", "exp_avg_sq"} - {MEAN_SQUARE}
                assert float(state["step"]) == 1
        assert len(SHAPES) == len(slices.plan.parameters)
