"""Kernels are called without the dispatcher where nobody else has a say, and through it where anybody has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from squall.kernels import local_response_norm, max_pool2d, native, sparse_conv2d, sparse_linear
from squall.kernels.native import direct
from squall.kernels.native.direct import is_direct
from squall.kernels.sparse_linear import pack_dense
from squall.sparsity.sparse_layers import SparseLinear

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


@pytest.mark.parametrize("all_threads", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_profilers_see_ops(name: str, all_threads: bool) -> None:
    how = torch._C._profiler._ExperimentalConfig(profile_all_threads=all_threads)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=how) as profiler:
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


class _Watching(Tensor):
    """A subclass that counts the project's ops."""

    num: ClassVar[int] = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _Watching.num += "squall" in str(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["columns", "values", "rows", "starts", "tiles"])
def test_each_part_of_a_matrix_has_a_say(name: str) -> None:
    x, before = images(), _Watching.num
    packed = PACKED._replace(**{name: getattr(PACKED, name).as_subclass(_Watching)})
    torch.testing.assert_close(sparse_linear(x, packed).as_subclass(Tensor), sparse_linear(x, PACKED))
    assert _Watching.num > before


YES: tuple[Any, ...] = (True, 1, 1 << 32, np.bool_(True))


@pytest.mark.parametrize("is_direct", [True, False])
def test_numbers_of_other_types(is_direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the dispatcher takes them: whether a gradient is wanted can't decide that."""
    if not is_direct:
        monkeypatch.setattr(direct, "_can_tell", False)
    x = images()
    for yes in YES:
        for result in (
            local_response_norm(x, np.int64(3), relu=yes, groups=np.int64(2)),
            sparse_conv2d(x, VALUES, POSITIONS, WEIGHT.shape, padding=1, groups=np.int64(1), relu=yes),
            sparse_linear(x, PACKED, relu=yes),
        ):
            assert result.min() == 0
        assert max_pool2d(x, 2, ceil_mode=yes).shape[-1] == 3
    assert max_pool2d(x, True).shape == x.shape
    with pytest.raises(TypeError, match=r"size must be a whole number, got 3\.0"):
        local_response_norm(x, 3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"groups must be a whole number, got 1\.0"):
        sparse_conv2d(x, VALUES, POSITIONS, WEIGHT.shape, groups=1.0)  # type: ignore[arg-type]


def test_a_layer_s_parts_may_be_parameters() -> None:
    layer, x = SparseLinear(PACKED), images()
    expected, state_dict = layer(x), layer.state_dict()
    state_dict["values"] = nn.Parameter(state_dict["values"], requires_grad=False)
    layer.load_state_dict(state_dict, assign=True)
    assert torch.equal(layer(x), expected)


def test_what_is_negative_by_a_bit_alone() -> None:
    parts = torch.complex(torch.zeros(2, 4, 5, 5), images()).conj().imag
    assert parts.is_neg()
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(parts), kernel(-images()))


@pytest.mark.parametrize("name", KERNELS)
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
