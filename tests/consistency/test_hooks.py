"""The hook: what DDP gets from it, what it keeps when buckets and processes change, and that training goes on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from squall.consistency import CodecHookState, codec_hook, get_codec
from squall.consistency.residuals import Residuals
from tests.ranks import run

from .codes import all_of

SPECS = ("fp32", "fp64", "bf16", "int8", "1bit", "topk:0.25")
SMALL_BUCKETS = 0.0002  # MiB: 210 bytes


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same on all ranks; its later layers' gradients come first."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def backward(ddp: nn.Module, step: int) -> None:
    """One step's gradients, from other data on each rank."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    dtype = next(ddp.parameters()).dtype
    ddp.zero_grad()
    ddp(torch.randn(4, 5, generator=generator).to(dtype)).square().mean().backward()


class Recorder:
    """Between DDP and the hook: what each bucket had before."""

    def __init__(self, state: CodecHookState) -> None:
        self.num_buckets: list[int] = []
        self.buckets: list[tuple[list[Tensor], Tensor]] = []

        def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP wants no annotations, or its own
            if bucket.index() == 0:
                self.buckets = []
            self.buckets.append((bucket.parameters(), bucket.buffer().clone()))
            if bucket.is_last():
                self.num_buckets.append(len(self.buckets))
            return codec_hook(state, bucket)

        self.hook = hook


def check_means(spec: str, dtype: torch.dtype, unused: bool) -> list[int]:
    """Compare three steps with codes made by hand, parameter by parameter where they have a residual."""
    codec, num_ranks = get_codec(spec), dist.get_world_size()
    state = CodecHookState(spec)
    module = network(dtype)
    ddp = DistributedDataParallel(module, bucket_cap_mb=SMALL_BUCKETS, find_unused_parameters=unused)
    recorder = Recorder(state)
    ddp.register_comm_hook(None, recorder.hook)
    # What each rank still owes, by parameter.
    owed = [{p: torch.zeros(p.numel()) for p in module.parameters()} for _ in range(num_ranks)]
    for step in range(3):
        backward(ddp, step)
        num_bytes = 0
        for parameters, own in recorder.buckets:
            sizes = [p.numel() for p in parameters]
            total = torch.zeros(own.numel(), dtype=torch.promote_types(dtype, torch.float32))
            for rank, gradients in enumerate(all_of(own)):
                residual = torch.cat([owed[rank][p] for p in parameters]) if codec.has_residual else None
                code = torch.empty(codec.num_bytes(own.numel()), dtype=torch.uint8)
                codec.encode(gradients, code, residual)
                one = torch.empty_like(total)
                codec.decode(code, one)
                total += one
                if residual is not None:
                    owed[rank].update(zip(parameters, residual.split(sizes), strict=True))
            num_bytes += code.numel() * (num_ranks - 1)
            expected = (total / num_ranks).to(dtype)
            for parameter, gradient in zip(parameters, expected.split(sizes), strict=True):
                assert parameter.grad is not None
                assert torch.equal(parameter.grad.view(-1), gradient)
        assert state.bytes_per_step == num_bytes
        for parameter in module.parameters():
            assert all(torch.equal(other, parameter.grad) for other in all_of(parameter.grad))
        if codec.has_residual:
            kept = state.state_dict()["residuals"]
            assert len(kept) == len(list(module.parameters()))
            for parameter, residual in zip(reversed(list(module.parameters())), kept, strict=True):
                assert torch.equal(owed[dist.get_rank()][parameter], residual)
    return recorder.num_buckets


def check_all_means() -> None:
    for spec in SPECS:
        num_buckets = check_means(spec, torch.float32, unused=False)
        assert num_buckets[0] == 1
        assert num_buckets[1] == num_buckets[2] > 1  # so buckets were laid out anew
    for spec in ("int8", "topk:0.25"):
        assert len(set(check_means(spec, torch.float64, unused=True))) == 1
        check_means(spec, torch.bfloat16, unused=False)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_gradients_are_the_mean_of_the_decoded_codes(num_ranks: int) -> None:
    run(num_ranks, check_all_means)


# Training.


def least_squares(spec: str | None, feedback: bool = True) -> Tensor:
    """The weights after 60 steps."""
    generator = torch.Generator().manual_seed(5)
    x, solution = torch.randn(64, 20, generator=generator), torch.randn(20, 1, generator=generator)
    y = x @ solution
    rows = slice(dist.get_rank(), None, dist.get_world_size())
    module = nn.Linear(20, 1, bias=False)
    nn.init.zeros_(module.weight)
    ddp = DistributedDataParallel(module)
    if spec is not None:
        state = CodecHookState(spec)
        ddp.register_comm_hook(state, codec_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (ddp(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        if not feedback:
            state.load_state_dict({"residuals": []})
    weight = module.weight.detach()[0] / solution.norm()
    assert all(torch.equal(other, weight) for other in all_of(weight))
    return torch.cat([weight, (weight - solution[:, 0] / solution.norm()).norm()[None]])


def train_least_squares() -> dict[str, list[float]]:
    """How far each codec ends from where training without a hook ends, and from the solution."""
    plain = least_squares(None)
    ends = {"no hook": [0.0, float(plain[-1])]}
    for name, (spec, feedback) in ({spec: (spec, True) for spec in SPECS} | {"forgetful": ("1bit", False)}).items():
        end = least_squares(spec, feedback)
        ends[name] = [float((end - plain)[:-1].norm()), float(end[-1])]
    return ends


AWAY = {"no hook": 0.0, "fp32": 1e-6, "fp64": 1e-6, "bf16": 1e-4, "int8": 1e-3, "1bit": 0.03, "topk:0.25": 0.02}
"""How far training may end from where it ends without a hook, as a share of the solution's length."""


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_least_squares_is_solved_with_every_codec(num_ranks: int) -> None:
    for ends in run(num_ranks, train_least_squares):
        forgetful, _ = ends.pop("forgetful")
        assert forgetful > 0.1
        assert ends.keys() == AWAY.keys()
        for spec, (away, error) in ends.items():
            assert away <= AWAY[spec]
            assert 0.09 < error < 0.11  # there are steps to go, or all would be at the solution by now


# Non-finite gradients.


def one_bad_step(spec: str) -> tuple[bool, bool]:
    ddp = DistributedDataParallel(network())
    state = CodecHookState(spec)
    ddp.register_comm_hook(state, codec_hook)
    backward(ddp, 0)
    ddp.zero_grad()
    x = torch.full((4, 5), math.nan if dist.get_rank() else 1.0)
    ddp(x).square().mean().backward()
    bad = any(not parameter.grad.isfinite().all() for parameter in ddp.parameters())
    backward(ddp, 1)
    return bad, all(bool(parameter.grad.isfinite().all()) for parameter in ddp.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_one_rank_s_nan_reaches_all_and_is_gone_with_the_next_step(spec: str) -> None:
    assert run(2, one_bad_step, spec) == [(True, True)] * 2


# Checkpoints.


def resume() -> None:
    """Stop after three of six steps, and go on with new objects."""

    def train(state: CodecHookState, weights: dict[str, Tensor], steps: range) -> dict[str, Tensor]:
        module = network()
        module.load_state_dict(weights)
        # One bucket, of which DDP changes the order after its first step, but not what is largest in it.
        ddp = DistributedDataParallel(module)
        ddp.register_comm_hook(state, codec_hook)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in steps:
            backward(ddp, step)
            optimizer.step()
        return copy.deepcopy(module.state_dict())

    def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
        return all(torch.equal(first[key], second[key]) for key in first)

    def state(residuals: dict[str, Any] | None = None) -> CodecHookState:
        new = CodecHookState("topk:0.25")
        if residuals is not None:
            new.load_state_dict(residuals)
        return new

    start = copy.deepcopy(network().state_dict())
    whole = train(state(), start, range(6))
    first_half = state()
    middle = train(first_half, start, range(3))
    saved, mean = copy.deepcopy(first_half.state_dict()), first_half.mean_state_dict()
    assert same(train(state(saved), middle, range(3, 6)), whole)
    assert not same(train(state(), middle, range(3, 6)), whole)
    # The same state goes on with another DistributedDataParallel of the same values, which is another module.
    assert same(train(first_half, middle, range(3, 6)), train(state(), middle, range(3, 6)))
    assert len(first_half.state_dict()["residuals"]) == len(start)

    assert any(not torch.equal(*all_of(own)) for own in saved["residuals"])
    for own, residual in zip(saved["residuals"], mean["residuals"], strict=True):
        others = all_of(own)
        torch.testing.assert_close(residual, torch.stack(others).mean(0))
        assert torch.equal(*all_of(residual))
    from_mean = state(mean)
    for own, residual in zip(from_mean.mean_state_dict()["residuals"], mean["residuals"], strict=True):
        assert torch.equal(own, residual)
    assert not same(train(from_mean, middle, range(3, 6)), train(state(), middle, range(3, 6)))


def test_residuals_survive_a_checkpoint() -> None:
    run(2, resume)


def test_a_residual_of_another_module_is_left_out_with_a_warning() -> None:
    residuals = Residuals()
    first, second = torch.zeros(3), torch.zeros(2, 2)
    residuals.from_list([torch.ones(4), torch.ones(5)])
    with pytest.warns(UserWarning, match="parameter 1, .* has 5 elements where the parameter has 3"):
        flat = residuals.of_bucket(0, [first, second], torch.device("cpu"))
    assert flat.tolist() == [0.0] * 3 + [1.0] * 4


def test_buckets_that_are_cut_and_joined_keep_what_each_parameter_owes() -> None:
    residuals, device = Residuals(), torch.device("cpu")
    a, b, c = (torch.zeros(size) for size in (2, 3, 4))
    residuals.of_bucket(0, [b, c], device).copy_(torch.arange(7.0))
    residuals.of_bucket(1, [a], device).fill_(9.0)
    assert residuals.of_bucket(0, [c, a], device).tolist() == [3, 4, 5, 6, 9, 9]
    assert residuals.of_bucket(1, [b], device).tolist() == [0, 1, 2]
    residuals.of_bucket(0, [c, a], device).zero_()
    assert [piece.tolist() for piece in residuals.to_list()] == [[0] * 4, [0, 1, 2], [0, 0]]
