"""Inference straight from a compressed file: the decoded net's answers, and never its dense weights."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from squall.kernels import native
from squall.sparsity import (
    CompressedCheckpointIO,
    CompressedFileError,
    assembling,
    load_compressed,
    save_compressed,
    to_inference,
)
from squall.sparsity.coding import streams
from squall.sparsity.coding.state import read_coded
from squall.sparsity.coding.ways import COLUMNS
from squall.sparsity.fusing import follow_without_tensors
from squall.sparsity.sparse_layers import SparseConv2d, SparseLinear
from tests.sparsity.test_inference import NETS


def pruned(module: nn.Module, density: float = 0.1, bits: int | None = None, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            if bits is not None:
                shared = torch.randn(2**bits, generator=generator).to(parameter.dtype)
                parameter.data = shared[torch.randint(2**bits, parameter.shape, generator=generator)]
            parameter.data[torch.rand(parameter.shape, generator=generator) >= density] = 0
    return module.eval()


def save(module: nn.Module, folder: Path, **options: Any) -> Path:
    path = folder / "net.safetensors"
    save_compressed(module.state_dict(), path, **options)
    return path


def kinds(module: nn.Module) -> dict[str, bool]:
    return {row.name: row.is_sparse for row in module.inference_report}  # type: ignore[union-attr]


SIZES = st.integers(1, 9)


class Net(nn.Module):
    def __init__(self, groups: int, inputs: int, outputs: int, hidden: int, kernel: int, stride: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv2d(
            groups * inputs, groups * outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias
        )
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.wide = nn.LazyLinear(20 * hidden, bias=bias)
        self.last = nn.Linear(20 * hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(self.pool(self.conv(x).relu()).flatten(1)).relu())


@pytest.mark.parametrize("isa", dict.fromkeys([native.isa(), "torch"]))
@given(
    st.tuples(st.integers(1, 3), SIZES, SIZES, SIZES, st.integers(1, 4), st.integers(1, 2), st.booleans()),
    st.sampled_from([0.0, 0.02, 0.1, 0.4, 0.65, 0.9, 1.0]),
    st.sampled_from([None, 0, 1, 5, 8]),
    st.sampled_from(["ans", "huffman"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 1 << 20),
)
@settings(max_examples=60, deadline=None)
def test_the_decoded_nets_answers(tmp_path_factory, isa, sizes, density, bits, coder, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, sizes[0] * sizes[1], 7, 6, dtype=dtype)
    dense = Net(*sizes).to(dtype)
    dense(x)
    dense = pruned(dense, density, bits, seed)
    path = save(dense, tmp_path_factory.mktemp("net"), coder=coder)
    with torch.device("meta"):
        empty = Net(*sizes).to(dtype)
        empty(x.to("meta"))
    with native.forced(isa):
        fast = to_inference(empty, path=path, show=False)
        torch.testing.assert_close(fast(x), dense(x), rtol=1e-4, atol=1e-5)
    assert not any(part.is_meta for part in (*fast.parameters(), *fast.buffers()))
    live = {name: bool(layer.weight.count_nonzero() <= 0.7 * layer.weight.numel()) for name, layer in
            (("conv", dense.conv), ("wide", dense.wide), ("last", dense.last))}  # fmt: skip
    # A tensor that no code makes smaller is in the file as it is.
    assert all(live[name] == is_sparse for name, is_sparse in kinds(fast).items())


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        *NETS,
        (lambda: nn.Linear(700, 30), (4, 5, 700)),
        (lambda: nn.Conv2d(70, 30, 3), (4, 70, 5, 5)),
    ],
)
def test_any_module(net: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = pruned(net())
    other, x = net(), torch.randn(shape)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    fast = to_inference(other, x, path=save(dense, tmp_path), show=False)
    torch.testing.assert_close(fast(x), dense(x), rtol=1e-4, atol=1e-5)
    assert any(isinstance(part, SparseConv2d | SparseLinear) for part in fast.modules())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items()), "it stays as it is"
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert "sparse" in str(fast.inference_report)


def _in_vain(net: Any, x: Tensor) -> Tensor:
    try:
        return x * net.scale
    except LookupError:
        return x


def _keeps(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "kept"):
        net.kept = list(net.buffers(recurse=False))
    return x + net.kept[0]


WAYS = {
    "doesn't": lambda net, x: x,
    "asks for what isn't there": lambda net, x: x + 2 if hasattr(net, "offsets") else x,
    "uses": lambda net, x: x * net.scale + net.offset,
    "computes": lambda net, x: x * (net.scale + 1),
    "tries": _in_vain,
    "keeps": _keeps,
    "asks": lambda net, x: x if net.offset is None else x + 2,
    "asks for one": lambda net, x: x if getattr(net, "offset", None) is None else x + 2,
    "counts": lambda net, x: x + len(list(net.parameters(recurse=False))),
    "goes to it": lambda net, x: x.to(next(net.parameters()).device) + 2,
    "asks where it is": lambda net, x: x + 2 if next(net.parameters()).device.type == "cpu" else x,
    "asks what it is": lambda net, x: x + 2 if all(isinstance(own, Tensor) for own in net.parameters()) else x,
    "asks how large": lambda net, x: x + sum(bool(own.sum() > 2) for own in net.buffers(recurse=False)),
    "looks behind": lambda net, x: x + 2 if net._buffers["offset"].sum() > 2 else x,
    "looks for any": lambda net, x: x + 2 if net._buffers else x,
    "has them all": lambda net, x: x + len({**net._buffers, **net._parameters}),
    "looks into the state": lambda net, x: x + 2 if "offset" in net.state_dict() else x,
    "branches": lambda net, x: x + 2 if net.offset.sum() > 2 else x,
}
QUIET = {"doesn't", "asks for what isn't there"}
"""Those that look at nothing."""


class Looking(nn.Module):
    """A net whose forward looks at tensors of its own, which may not be there yet when it is followed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.fc1, self.fc2 = nn.Linear(700, 60), nn.Linear(60, 30)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("offset", torch.ones(60))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(WAYS[self.way](self, F.relu(self.fc1(x))))


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_looks_at_tensors_finds_them(way: str, tmp_path: Path) -> None:
    dense = pruned(Looking(way))
    with torch.device("meta"):
        empty = Looking(way)
    own = {**dict(empty.named_parameters()), **dict(empty.named_buffers())}
    graph = follow_without_tensors(empty)
    assert (graph is None) == (way not in QUIET)
    assert all(value is own[name] for name, value in (*empty.named_parameters(), *empty.named_buffers())), "put back"
    fast, x = to_inference(empty, path=save(dense, tmp_path), show=False), torch.randn(2, 700)
    torch.testing.assert_close(fast(x), dense(x), rtol=1e-4, atol=1e-5)
    assert fast.fc1.relu, "and its ReLU is fused all the same"


@pytest.mark.parametrize("from_file", [False, True])
def test_its_memory_goes_with_it(from_file: bool, tmp_path: Path) -> None:
    """Not when garbage is collected: torch.fx ties modules into knots."""
    dense = pruned(Looking("doesn't"))
    path = save(dense, tmp_path) if from_file else None
    collects = gc.isenabled()
    gc.disable()
    try:
        fast: Any = to_inference(dense, torch.ones(2, 700), path=path, show=False)
        parts = [weakref.ref(part) for part in fast.modules()]
        is_owner = fast.graph.owning_module.get_submodule("fc1") is fast.fc1
        del fast
        assert is_owner
        assert [type(part()).__name__ for part in parts if part() is not None] == []
    finally:
        if collects:
            gc.enable()


@pytest.mark.parametrize("bits", [None, 4, 9])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("isa", dict.fromkeys([native.isa(), "torch"]))
def test_positions_along_columns(bits: int | None, num_threads: int, isa: str, tmp_path: Path) -> None:
    """As they lie in the file where most inputs are dead, in layers of both kinds; long codes, and on threads."""
    dense = nn.Sequential(nn.Conv2d(40, 30, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30 * 9, 600), nn.Linear(600, 900))
    pruned(dense.double(), 0.6, bits)
    for layer in (dense[0], dense[3], dense[4]):
        layer.weight.data[:, torch.rand(layer.weight.shape[1], generator=torch.Generator().manual_seed(0)) < 0.7] = 0
    path, x = save(dense, tmp_path), torch.randn(2, 40, 5, 5).double()
    assert all(entry.layout & COLUMNS for key, entry in read_coded(path).items() if key in ("3.weight", "4.weight"))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with native.forced(isa):
            fast = to_inference(dense, path=path, show=False)
            torch.testing.assert_close(fast(x), dense(x), rtol=1e-9, atol=1e-9)
    finally:
        torch.set_num_threads(before)
    assert kinds(fast) == {"0": True, "3": True, "4": True}
    assert all(torch.equal(loaded, dense.state_dict()[key]) for key, loaded in load_compressed(path).items())


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("isa", dict.fromkeys([native.isa(), "torch"]))
def test_gaps_that_lead_elsewhere(num_threads: int, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(pruned(nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 50)), 0.1), tmp_path)
    entries = read_coded(path)
    coded = entries["1.weight"]
    assert not coded.layout & COLUMNS
    gaps = coded.places.stream.symbols()
    for change, message in ((1, r"tensor '1.weight': its gaps run past the end, 4,000"), (-1, "don't lead to")):
        wrong = np.append(gaps[:-1], 255).astype(np.uint16) if change > 0 else gaps[:-1].astype(np.uint16)
        again = read_coded(path)
        places = again["1.weight"].places._replace(stream=streams.Coded(lambda wrong=wrong: wrong))
        again["1.weight"] = again["1.weight"]._replace(places=places)
        monkeypatch.setattr(assembling, "read_coded", lambda path, again=again: again)
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
        with native.forced(isa), pytest.raises(CompressedFileError, match=message):
            to_inference(nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 50)), path=path, show=False)


def test_shared_hooked_and_odd_layers_stay_dense(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(60, 40)
            self.seen: list[Tensor] = []
            self.hooked = nn.Linear(40, 40)
            self.plain = nn.Linear(40, 40)
            self.twice = self.again = nn.Linear(40, 40)
            self.last = nn.Linear(40, 60)
            self.last.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.twice(self.again(self.plain(self.hooked(self.embedding(x))))))

    dense, empty, x = pruned(Tied()), Tied(), torch.arange(8)
    empty.hooked.register_forward_hook(lambda layer, given, result: result * 2)
    fast = to_inference(empty, path=save(dense, tmp_path), show=False)
    assert kinds(fast) == {"plain": True}
    dense.hooked.register_forward_hook(lambda layer, given, result: result * 2)
    torch.testing.assert_close(fast(x), dense(x), rtol=1e-4, atol=1e-5)
    assert fast.embedding.weight.data_ptr() == fast.last.weight.data_ptr()
    assert fast.twice is fast.again


def test_numbers_are_the_modules(tmp_path: Path) -> None:
    path = save(pruned(nn.Linear(200, 100)).half(), tmp_path)
    x = torch.randn(3, 200)
    decoded = nn.Linear(200, 100)
    decoded.load_state_dict(load_compressed(path))
    fast = to_inference(nn.Linear(200, 100), path=path, show=False)
    assert isinstance(fast, SparseLinear)
    torch.testing.assert_close(fast(x), decoded(x))
    half = to_inference(nn.Linear(200, 100).bfloat16(), path=path, show=False)
    assert type(half) is nn.Linear
    assert half.weight.dtype == torch.bfloat16


def test_extra_state_and_checkpoints(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    dense = pruned(nn.Sequential(nn.Linear(90, 80), Counting(80, 5)))
    dense[1].count = 3
    x = torch.randn(2, 90)
    CompressedCheckpointIO().save_checkpoint({"state_dict": dense.state_dict(), "epoch": 2}, tmp_path / "whole.ckpt")
    for path in (save(dense, tmp_path), tmp_path / "whole.ckpt"):
        fast = to_inference(nn.Sequential(nn.Linear(90, 80), Counting(80, 5)), path=path, show=False)
        torch.testing.assert_close(fast(x), dense(x))
        assert kinds(fast) == {"0": True}
        assert fast[1].count == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 5), nn.Linear(5, 5)), r"has no '2.weight', which Seq"),
        (lambda: nn.Sequential(nn.Linear(90, 80)), r"has '1.weight', which Sequential hasn't"),
        (
            lambda: nn.Sequential(nn.Linear(90, 81), nn.Linear(81, 5)),
            r"'0.weight' is \(80, 90\), and that of Sequential",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(80), nn.Linear(80, 5)), r"0.weight has no shape yet: run the module once"),
    ],
)
def test_a_file_of_another_module(other: Any, message: str, tmp_path: Path) -> None:
    path = save(pruned(nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 5))), tmp_path)
    module = other()
    with pytest.raises(ValueError, match=message):
        to_inference(module, path=path, show=False)


def test_what_is_nowhere(tmp_path: Path) -> None:
    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(90, 80)
            self.register_buffer("shift", torch.ones(80), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.shift

    path, x = save(pruned(Shifting()), tmp_path), torch.randn(1, 90)
    with torch.device("meta"):
        empty = Shifting()
    with pytest.raises(ValueError, match=r"shift is on the meta device.*build Shifting on the CPU"):
        to_inference(empty, path=path)
    fast = to_inference(Shifting(), path=path, show=False)
    torch.testing.assert_close(fast(x), F.linear(x, *load_compressed(path).values()) + 1)
    with pytest.raises(ValueError, match="needs an example_input"):
        to_inference(empty)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = save(pruned(nn.Linear(90, 80)), tmp_path)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(CompressedFileError, match="checksum"):
        to_inference(nn.Linear(90, 80), path=path)


MEMORY = """
import re, sys, torch
from torch import nn
from squall.sparsity import save_compressed, to_inference
torch.set_num_threads(1)

def net(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Conv1d(1, 1, 1), nn.Linear(width, width))

def most():
    # Not getrusage's, which a process has from the one that started it.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

def answer(width, path):
    with torch.device("meta"):
        empty = net(width)
    with torch.inference_mode():
        return to_inference(empty, path=path, show=False)(torch.ones(1, 1, width)).norm()

save_compressed(net(8).state_dict(), sys.argv[1] + ".small")
answer(8, sys.argv[1] + ".small")
before = most()
answer(5000, sys.argv[1])
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process has had at most")
def test_dense_weights_are_never_held(tmp_path: Path) -> None:
    """Not even those of one layer at a time, in a process of its own."""
    width = 5000
    zeros = {f"{part}.weight": torch.zeros(width, width) for part in (0, 3)}
    for number, weight in enumerate(zeros.values()):
        weight.flatten()[number::20] = 1.0 + torch.arange(len(weight.flatten()[number::20])) % 16
    state_dict = {**zeros, "0.bias": torch.zeros(width), "3.bias": torch.zeros(width)}
    state_dict |= {"2.weight": torch.ones(1, 1, 1), "2.bias": torch.zeros(1)}
    save_compressed(state_dict, tmp_path / "x")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 0.5 * 4 * width * width
