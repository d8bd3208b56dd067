"""Memory that is kept: another result has it when nobody needs it any more, and not before."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from squall.kernels import local_response_norm, max_pool2d, sparse_conv2d, sparse_linear
from squall.kernels.native import memory
from squall.kernels.sparse_linear import pack_live

LARGE = memory.LEAST_BYTES // 4  # numbers in single precision


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> list:
    kept: list = []
    monkeypatch.setattr(memory, "_kept", kept)
    return kept


def test_memory_is_found_again(nothing_kept: list) -> None:
    first = memory.result((LARGE,))
    place = first.data_ptr()
    assert not nothing_kept
    del first
    assert [kept.array.ctypes.data for kept in nothing_kept] == [place]
    again = memory.result((2, LARGE // 2))
    assert (again.data_ptr(), again.shape, again.is_contiguous()) == (place, (2, LARGE // 2), True)
    assert memory.result((LARGE,)).data_ptr() != place, "it is in use"


USES: dict[str, Callable[[torch.Tensor], object]] = {
    "view": lambda result: result.view(2, -1)[1],
    "array": lambda result: result.numpy()[5:],
    "storage": lambda result: result.untyped_storage(),
    "autograd": lambda result: torch.ones(1, requires_grad=True) * result,  # whose gradient needs it
}


@pytest.mark.parametrize("use", USES)
def test_not_while_anybody_needs_it(use: str, nothing_kept: list) -> None:
    used = USES[use](memory.result((LARGE,)).fill_(1.0))
    gc.collect()
    assert not nothing_kept
    others = [memory.result((LARGE,)).fill_(2.0) for _ in range(2)]
    assert use in ("autograd", "storage") or float(torch.as_tensor(used).max()) == 1.0
    del others
    assert len(nothing_kept) == 2
    del used
    gc.collect()
    assert len(nothing_kept) == 3


def test_what_fits_best(nothing_kept: list) -> None:
    blocks = {}
    for times in (8, 2, 3):
        memory.result((times * LARGE,))
        blocks[times] = nothing_kept.pop()
    places = {times: block.array.ctypes.data for times, block in blocks.items()}
    nothing_kept.extend(blocks.values())
    assert memory.result((2 * LARGE,)).data_ptr() == places[2]
    assert memory.result((2 * LARGE + 1,)).data_ptr() == places[3]
    nothing_kept[:] = [blocks[8]]
    assert memory.result((LARGE,)).data_ptr() != places[8], "much too large"


def test_so_much_is_kept_and_no_more(nothing_kept: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST_KEPT", 8 * memory.LEAST_BYTES)
    monkeypatch.setattr(memory, "_LONG_AGO", 10)
    results = [memory.result((times * LARGE,)) for times in (2, 1, 6)]
    while results:
        results.pop(0)
    assert sizes(nothing_kept) == [2, 6], "the smallest one goes first"
    memory.result((9 * LARGE,))
    assert sizes(nothing_kept) == [2, 6], "one that is too large takes nothing's place"


def test_what_has_not_been_needed_for_long_is_not_kept(nothing_kept: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST_KEPT", 8 * memory.LEAST_BYTES)
    monkeypatch.setattr(memory, "_LONG_AGO", 10)
    for times in (2, 6):
        memory.result((times * LARGE,))
    for _ in range(12):
        memory.result((LARGE,))  # in the smaller block; the other one is too large
    both = [memory.result((LARGE,)) for _ in range(2)]
    both.clear()
    assert sorted(sizes(nothing_kept)) == [1, 2]


def sizes(kept: list) -> list[int]:
    return [block.array.nbytes // memory.LEAST_BYTES for block in kept]


def test_a_network_finds_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST_KEPT", 18 * memory.LEAST_BYTES)
    of_another = [memory.result((5 * LARGE,)) for _ in range(2)]
    del of_another
    made: list[int] = []
    monkeypatch.setattr(memory, "in_large_pages", lambda tensor: made.append(tensor.nbytes) or tensor)
    for _ in range(3):
        before, result = len(made), None
        for times in (7, 7, 2, 4, 4):  # layers' results, each until the next one is there
            result = memory.result((times * LARGE,))
        del result
    assert len(made) == before


def test_small_results_are_not_kept(nothing_kept: list) -> None:
    memory.result((LARGE - 1,))
    memory.result((0, 5))
    assert not nothing_kept
    assert memory.result((LARGE // 2,), torch.float64).dtype == torch.float64
    assert len(nothing_kept) == 1


@pytest.mark.parametrize("shape", [(4, 33, 100, 90), (1, 96, 130, 90), (5, 1, 1100, 200)])
def test_memory_formats(shape: tuple[int, ...]) -> None:
    for x in (torch.randn(shape), torch.randn(shape).to(memory_format=torch.channels_last)):
        like = memory.result_like(x)
        assert (like.shape, like.stride(), like.dtype) == (x.shape, torch.empty_like(x).stride(), x.dtype)


def test_threads_get_memory_of_their_own() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            mine = memory.result((LARGE,))
            mine[:: LARGE // 16] = number
            other = memory.result((LARGE,))
            other[:: LARGE // 16] = -1.0
            if not bool((mine[:: LARGE // 16] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_of_kernels_stay_as_they_are() -> None:
    x = torch.randn(2, 64, 128, 128, requires_grad=True)
    first = local_response_norm(x, 5)
    kept = first.detach().clone()
    for _ in range(3):
        second = local_response_norm(torch.randn_like(x), 5)
        max_pool2d(second.detach(), 3, 1, 1)
    assert torch.equal(first, kept)
    first.backward(torch.ones_like(first))
    gradient, x.grad = x.grad, None
    local_response_norm(x, 5).backward(torch.ones_like(first))
    assert torch.equal(gradient, x.grad)


def test_whatever_the_default_device() -> None:
    x, weight = torch.randn(2, 3, 300, 300, requires_grad=True), torch.randn(16, 3, 3, 3)
    positions = torch.arange(0, weight.numel(), 5)
    values = weight.flatten()[positions].requires_grad_()
    places = torch.arange(0, 60, 7)
    with torch.device("meta"):
        y = sparse_conv2d(x, values, positions, weight.shape)
        result = max_pool2d(local_response_norm(y, 5), 2)
        result.backward(torch.ones_like(result, device="cpu"))
        linear = sparse_linear(x[0, :2, 0, :6], pack_live(places, torch.ones_like(places).float(), (10, 6))[0])
    assert {tensor.device.type for tensor in (y, result, x.grad, values.grad, linear)} == {"cpu"}
    dense = torch.zeros(weight.numel()).index_put((positions,), values.detach()).view(weight.shape)
    torch.testing.assert_close(y.detach(), torch.nn.functional.conv2d(x.detach(), dense), rtol=1e-4, atol=1e-4)


def test_a_block_that_comes_back_meanwhile(nothing_kept: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may run while a block is looked for."""

    def collecting(*arguments: object, **keywords: object) -> object:
        gc.collect()
        return min(*arguments, **keywords)  # type: ignore[call-overload]

    monkeypatch.setattr(memory, "min", collecting, raising=False)
    first = memory.result((LARGE,))
    cycle: list = [memory.result((LARGE,)), memory.result((LARGE,))]
    cycle.append(cycle)
    places = [first.data_ptr(), *(part.data_ptr() for part in cycle[:2])]
    del first, cycle
    memory.result((LARGE,))
    assert sorted(places) == sorted(kept.array.ctypes.data for kept in nothing_kept)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_blocks_stay() -> None:
    script = """
import resource, torch
from squall.kernels.native import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [torch.empty(num << 20, dtype=torch.uint8).fill_(1) for num in (18, 18, 9)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

memory.let_freed_blocks_stay()
faults()
print(faults())
"""
    num_faults = int(subprocess.check_output([sys.executable, "-c", script], text=True))
    assert num_faults < 1000, "and 45,952 if they don't"


def test_intermediate_results_are_as_wide_as_kernels_write_them() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = memory.workspace(1000, "of another width")
            large = memory.result((2000, 1000))
    finally:
        torch.set_default_dtype(before)
    assert (found.dtype, found.device.type, len(found)) == (torch.float32, "cpu", 1000)
    assert (large.dtype, large.device.type) == (torch.float32, "cpu")
