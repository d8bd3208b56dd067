"""Decoding and a step in one pass, against float64 and against Torch's decoding and then its fused optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from squall.consistency import get_codec
from squall.consistency.fused import Fused
from squall.kernels import native, shard_update
from squall.kernels.shard_update import Step
from tests.consistency.codes import same_bits

from .codes import LENGTHS

PATHS = native.isas()
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "SGD nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD up": (SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.01}),
    "Adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "Adam amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


class Problem:
    """Weights, whose optimizer has made some steps, and what the next one makes of a gradient.

    Args:
        name: Of the optimizer.
        length: Of the weights.
        dtype: In which Torch computes.

    """

    def __init__(self, name: str, length: int, dtype: torch.dtype = torch.float32) -> None:
        kind, options = OPTIMIZERS[name]
        generator = torch.Generator().manual_seed(length)
        self.parameter = nn.Parameter(torch.randn(length, generator=generator))
        self.optimizer = kind([self.parameter], **options, fused=True)
        for _ in range(2):
            self.parameter.grad = torch.randn(length, generator=generator)
            self.optimizer.step()
        self.gradient = torch.randn(length, generator=generator)
        self.state: dict[str, Tensor] = {k: v for k, v in self.optimizer.state[self.parameter].items() if v is not None}
        if dtype != torch.float32:
            kept = self.state
            self.parameter = nn.Parameter(self.parameter.detach().to(dtype))
            self.optimizer = kind([self.parameter], **options)
            self.state = {key: value.to(dtype) if key != "step" else value.clone() for key, value in kept.items()}
            self.optimizer.state[self.parameter] = self.state

    def step(self, gradient: Tensor) -> None:
        self.parameter.grad = gradient.to(self.parameter.dtype)
        self.optimizer.step()


def stepped(name: str, spec: str, length: int, path: str) -> tuple[Problem, Tensor]:
    """The kernel's step, and the gradient that it decoded."""
    problem, codec = Problem(name, length), get_codec(spec)
    code, decoded = torch.empty(codec.num_bytes(length), dtype=torch.uint8), torch.empty(length)
    codec.encode(problem.gradient, code)
    codec.decode(code, decoded)
    weights = problem.parameter.detach()
    memories = {key: value.view(-1) for key, value in problem.state.items()}
    with native.forced(path):
        steps = Fused(spec)
        plan = steps.plan(problem.optimizer, problem.optimizer.param_groups[0], weights, memories, False, 1.0)
        assert plan is not None
        steps.step(plan, code, weights, memories, False)
    return problem, decoded


def assert_rounded_alike(mine: Problem, theirs: Problem, before: Problem) -> None:
    """Alike but for two roundings of the largest number that took part."""
    size = max(float(before.parameter.detach().abs().max()), float(before.gradient.abs().max()), 1.0)
    torch.testing.assert_close(
        mine.parameter.detach().double(), theirs.parameter.detach().double(), rtol=0, atol=2.4e-7 * size
    )
    assert mine.state.keys() == theirs.state.keys()
    for key, value in mine.state.items():
        size = max(float(before.state[key].abs().max()), float(before.gradient.square().max()), 1.0)
        torch.testing.assert_close(value.double(), theirs.state[key].double(), rtol=0, atol=2.4e-7 * size)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spec", ["fp32", "bf16", "int8", "1bit", "topk:0.3"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_decoding_and_a_step_of_torchs(name: str, spec: str, path: str) -> None:
    for length in LENGTHS:
        mine, gradient = stepped(name, spec, length, path)
        for dtype in (torch.float32, torch.float64):
            theirs = Problem(name, length, dtype)
            theirs.step(gradient)
            assert_rounded_alike(mine, theirs, Problem(name, length))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threads_change_nothing(name: str) -> None:
    before, lone = torch.get_num_threads(), [stepped(name, "int8", 100_000, path)[0] for path in PATHS]
    try:
        torch.set_num_threads(3)
        for path, one in zip(PATHS, lone, strict=True):
            several = stepped(name, "int8", 100_000, path)[0]
            assert same_bits(several.parameter.detach(), one.parameter.detach())
            assert all(same_bits(several.state[key].view(-1), one.state[key].view(-1)) for key in one.state)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not PATHS, reason="there is no compiled kernel")
def test_nothing_is_nothing() -> None:
    shard_update("fp32", torch.empty(0, dtype=torch.uint8), torch.empty(0), [], Step("sgd", 0.1))


def test_refusals() -> None:
    weights, code, step = torch.ones(4), torch.zeros(16, dtype=torch.uint8), Step("sgd", 0.1)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("codec='fp16' must be one of", ("fp16", code, weights, [], step)),
        ("step.optimizer='lamb'", ("fp32", code, weights, [], Step("lamb", 0.1))),
        ("states are 1 tensors", ("fp32", code, weights, [weights], Step("adam", 0.1))),
        ("weights and states must be flat float32", ("fp32", code, weights.double(), [], step)),
        ("weights and states must be flat float32", ("fp32", code, weights.to("meta"), [], step)),
        ("weights and states must be flat float32", ("fp32", code, torch.ones(4, 2)[:, 0], [], step)),
        ("weights and states must be flat float32", ("fp32", code, weights, [torch.ones(3)], step)),
    ]
    if PATHS:
        wrong += [
            ("code must be 16 contiguous uint8", ("fp32", code[:15], weights, [], step)),
            ("code must be 16 contiguous uint8", ("fp32", code.view(torch.int8), weights, [], step)),
            ("code must begin", ("fp32", torch.zeros(17, dtype=torch.uint8)[1:], weights, [], step)),
            ("values must be the 256", ("int8", code[:8], weights, [], step)),
        ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            shard_update(*arguments)
    assert torch.equal(weights, torch.ones(4))
    with native.forced("torch"), pytest.raises(ValueError, match="and the kernels compiled"):
        shard_update("fp32", code, weights, [], step)
