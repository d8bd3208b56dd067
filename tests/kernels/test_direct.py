"""Kernels are called without the dispatcher where nobody else has a say, and through it where anybody has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from squall.kernels import local_response_norm, max_pool2d, native, sparse_conv2d, sparse_linear
from squall.kernels.native import direct
from squall.kernels.native.direct import is_direct
from squall.kernels.sparse_linear import pack_dense

WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(0, WEIGHT.numel(), 5)
VALUES = WEIGHT.flatten()[POSITIONS]
PACKED = pack_dense(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "local_response_norm": lambda x: local_response_norm(x, 3),
    "max_pool2d": lambda x: max_pool2d(x, 2),
    "sparse_conv2d": lambda x: sparse_conv2d(x, VALUES, POSITIONS, WEIGHT.shape, padding=1),
    "sparse_linear": lambda x: sparse_linear(x, PACKED),
}


def images() -> Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))


class _Counting(TorchDispatchMode):
    """Count the project's ops that the dispatcher sees."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += "squall" in str(func)
        return func(*args, **(kwargs or {}))


class _FunctionMode(TorchFunctionMode):
    num = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += "squall" in str(func) or func is local_response_norm
        return func(*args, **(kwargs or {}))


class _Named(Tensor):
    """A subclass without behaviour of its own."""


@contextmanager
def _nothing() -> Iterator[None]:
    yield


PLAIN = {"as it is": _nothing, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.skipif(not native.serves(), reason="there are no compiled kernels")
@pytest.mark.parametrize("context", PLAIN)
@pytest.mark.parametrize("name", KERNELS)
def test_nobody_else_has_a_say(name: str, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    with PLAIN[context]():
        assert is_direct(x, None, nn.Parameter(x, requires_grad=False))
        direct_one = KERNELS[name](x)
        monkeypatch.setattr(direct, "_can_tell", False)
        assert not is_direct(x)
        assert torch.equal(direct_one, KERNELS[name](x))
        assert direct_one.is_inference() == (context == "inference")


@pytest.mark.parametrize("name", KERNELS)
def test_modes_see_ops(name: str) -> None:
    x = images()
    with _Counting() as dispatch:
        KERNELS[name](x)
    with _FunctionMode() as function:
        KERNELS[name](x)
    assert dispatch.num > 0
    assert function.num > 0


@pytest.mark.parametrize("name", KERNELS)
def test_profilers_see_ops(name: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        KERNELS[name](images())
    assert any(f"squall::{name}" in event.key for event in profiler.key_averages())


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_there(name: str) -> None:
    x = images().requires_grad_()
    assert not is_direct(x)
    with torch.no_grad():
        assert is_direct(x)
        assert not KERNELS[name](x).requires_grad
    KERNELS[name](x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), pytest.raises(RuntimeError, match="functorch transforms"):  # and no zeros
        torch.func.grad(lambda x: KERNELS[name](x).sum())(images())


def test_each_tensor_has_a_say() -> None:
    x, weight = images(), nn.Parameter(torch.ones(3))
    assert not is_direct(x, weight)
    assert not is_direct(x, None, x.as_subclass(_Named))
    assert not is_direct(x.to("meta"))
    assert not is_direct(x.to_sparse())
    assert not is_direct(torch.complex(x, x).conj().imag)
    assert is_direct(x.double(), POSITIONS, x.transpose(1, 2))
    bias = nn.Parameter(torch.ones(6))
    sparse_conv2d(x, VALUES, POSITIONS, WEIGHT.shape, bias, padding=1).sum().backward()
    assert bias.grad is not None


def test_what_is_negative_by_a_bit_alone() -> None:
    parts = torch.complex(torch.zeros(2, 4, 5, 5), images()).conj().imag
    assert parts.is_neg()
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(parts), kernel(-images()))


@pytest.mark.parametrize("name", ["sparse_conv2d", "sparse_linear"])
def test_it_traces_and_compiles(name: str) -> None:
    x = images()
    expected = KERNELS[name](x)
    exported = torch.export.export(_Layer(name), (x,), strict=False)
    assert any("squall" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)
    graph = torch.jit.trace(KERNELS[name], x, check_trace=False).graph
    assert f"squall::{name}" in str(graph)
    compiled = torch.compile(KERNELS[name], fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), expected)


class _Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return KERNELS[self.name](x)


def test_torch_that_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_direct(images())
    monkeypatch.setattr(direct, "_can_tell", False)
    assert not is_direct(images())
