"""Whole checkpoints as one file: every kind of entry comes back as it was, and damaged or hostile ones are refused."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from squall.sparsity import CompressedCheckpointIO, CompressedFileError, load_compressed, save_compressed
from squall.sparsity.coding import file
from squall.sparsity.coding.trees import TREE, from_tensors, to_tensors


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal in types, order and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape
        return equal and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple) and not isinstance(one, torch.Size):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex() or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(allow_nan=False),
    st.sampled_from([torch.float32, torch.bool, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])]),
)  # fmt: skip
tensors = st.builds(
    lambda shape, dtype, seed: (
        torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype).masked_fill_(
            torch.rand(shape) < 0.3, 0
        )
    ),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8]),
    st.integers(0, 9),
)  # fmt: skip
keys = st.recursive(
    st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False)),
    lambda children: st.tuples(children, children),
    max_leaves=3,
)
trees = st.recursive(
    st.one_of(scalars, tensors),
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(keys, children, max_size=4),
        st.dictionaries(keys, children, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(tree=trees)
@settings(deadline=None, max_examples=150)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    assert same(from_tensors(to_tensors(tree)), tree)


@given(tree=st.dictionaries(keys, trees, max_size=5))
@settings(deadline=None, max_examples=40)
def test_any_checkpoint_comes_back_from_a_file(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("x") / "deep" / "x.ckpt"
    CompressedCheckpointIO().save_checkpoint(tree, path)
    assert same(CompressedCheckpointIO().load_checkpoint(path), tree)
    CompressedCheckpointIO().remove_checkpoint(path)
    assert not path.exists()


def test_keys_that_meet_are_kept_apart() -> None:
    tree = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2), 0: torch.tensor(3), "0": torch.tensor(4)}, TREE: [
        torch.tensor(5)], "__metadata__": torch.tensor(6)}  # fmt: skip
    assert same(from_tensors(to_tensors(tree)), tree)


def test_keys_that_files_keep_for_themselves_are_kept(tmp_path: Path) -> None:
    tree = {TREE: torch.ones(1), "__metadata__": torch.ones(2), "squall.padding": torch.ones(3)}
    CompressedCheckpointIO().save_checkpoint(tree, tmp_path / "x")
    assert same(CompressedCheckpointIO().load_checkpoint(tmp_path / "x"), tree)


def test_what_torch_saves_comes_back_so_too(tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    tied = net.weight.detach()
    tree = {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()], "again": tied,
            "lr_schedulers": [schedule.state_dict()]}  # fmt: skip
    CompressedCheckpointIO().save_checkpoint(tree, tmp_path / "x")
    loaded = CompressedCheckpointIO().load_checkpoint(tmp_path / "x")
    assert same(loaded["optimizer_states"], tree["optimizer_states"])
    assert loaded["again"].data_ptr() == loaded["state_dict"]["weight"].data_ptr(), "what is one stays one"


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o)], o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.MultiStepLR(o, [3])], [2]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}


@pytest.mark.parametrize("name", sorted({*lr_scheduler.__all__} - {"LRScheduler"}))
def test_every_schedule_of_torch_is_written(tmp_path: Path, name: str) -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    schedule = SCHEDULERS.get(name, getattr(lr_scheduler, name))(optimizer)
    for _ in range(3):
        optimizer.step()
        schedule.step(*[0.5] * (name == "ReduceLROnPlateau"))
    tree = {"lr_schedulers": [schedule.state_dict()]}
    CompressedCheckpointIO().save_checkpoint(tree, tmp_path / "x")
    assert same(CompressedCheckpointIO().load_checkpoint(tmp_path / "x"), tree)


class Odd(int):
    pass


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (print, "builtin"), (Odd(3), "Odd"), (np.float64(1.0), "float64"), (np.zeros(2), "ndarray"), ({1, 2}, "set"),
        (Path("x"), "Path"), (torch.nn.Linear(1, 1), "Linear"), (torch.Generator(), "Generator"),
    ],
)  # fmt: skip
def test_what_needs_pickle_is_named(tmp_path: Path, entry: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\['a/b/1'\] is a .*{name}.*without pickle"):
        CompressedCheckpointIO().save_checkpoint({"a": {"b": [0, entry]}}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a/0'.*sparse"):
        CompressedCheckpointIO().save_checkpoint({"a": [torch.eye(2).to_sparse()]}, tmp_path / "x")
    with pytest.raises(ValueError, match="tensor as a key"):
        CompressedCheckpointIO().save_checkpoint({"a": {torch.ones(1): 1}}, tmp_path / "x")


def test_names_that_are_no_utf_8_are_written(tmp_path: Path) -> None:
    tree = {"a\ud800": torch.ones(1), "a?": torch.zeros(1), "\udfff": "x"}
    CompressedCheckpointIO().save_checkpoint(tree, tmp_path / "x")
    assert same(CompressedCheckpointIO().load_checkpoint(tmp_path / "x"), tree)


def test_of_a_whole_checkpoint_the_state_dict_is_loaded(tmp_path: Path) -> None:
    state_dict = {"net.w": torch.ones(2), "net._extra_state": {"a": 1}}
    CompressedCheckpointIO().save_checkpoint({"state_dict": state_dict, "epoch": 1}, tmp_path / "x")
    assert same(load_compressed(tmp_path / "x"), state_dict)
    CompressedCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "x")
    with pytest.raises(CompressedFileError, match=r"x: it is a whole checkpoint without a state_dict: Compressed"):
        load_compressed(tmp_path / "x")


# ------------------------------------------------------------------ other files


def test_files_of_torch_and_of_weights_alone_are_read(tmp_path: Path) -> None:
    io = CompressedCheckpointIO()
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.ckpt")
    assert same(io.load_checkpoint(tmp_path / "x.ckpt"), {"state_dict": {"w": torch.ones(2)}, "epoch": 3})
    save_compressed({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    assert same(io.load_checkpoint(tmp_path / "x.safetensors")["state_dict"], {"w": torch.ones(2)})


def test_a_pickle_in_disguise_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run",))

    torch.save({"a": Hostile()}, tmp_path / "x.safetensors")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        CompressedCheckpointIO().load_checkpoint(tmp_path / "x.safetensors")
    assert not (tmp_path / "run").exists()


def test_paths_and_options(tmp_path: Path) -> None:
    io = CompressedCheckpointIO()
    with pytest.raises(FileNotFoundError, match="nope"):
        io.load_checkpoint(tmp_path / "nope")
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, tmp_path / "x", storage_options={})
    with pytest.raises(ValueError, match="files of this host"):
        io.save_checkpoint({}, "s3://bucket/x")
    io.save_checkpoint({"w": torch.ones(2)}, tmp_path / "x")
    save_compressed({"w": torch.ones(2), "m._extra_state": {"a": 1}}, tmp_path / "y")
    assert same(io.load_checkpoint(tmp_path / "y", "cpu")["state_dict"], load_compressed(tmp_path / "y"))
    for location in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, where: storage):
        assert io.load_checkpoint(tmp_path / "x", map_location=location)["w"].device.type == "cpu"


# ------------------------------------------------------------------ damaged and hostile ones


def written(path: Path, tree: Any) -> Path:
    """A file with a true checksum, whose tree is what it is told."""
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    file.write({"w": torch.ones(2), TREE: torch.from_numpy(np.frombuffer(bytearray(text), np.uint8))}, path)
    return path


@pytest.mark.parametrize(
    "tree",
    [
        b"", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, {"a": 1}, [], ["nope"], [["list"]], ["tensor"],
        ["tensor", "x"], ["tensor", 3], ["dict", [1]], ["dict", 1], ["dict", [["list"], 1]],
        ["dict", [["tensor", "w"], 1]],
        ["dtype", "nn"], ["dtype", 3], ["dtype", "load"], ["bytes", "zz"], ["bytes", 3], ["device", "nowhere"],
        ["Size", "a"],
        ["complex", "a", 1], ["complex", 1], ["list", 1], ["tuple"], 3, ["tensor", "w"], ["__class__"], ["Size", 1e400],
    ],
)  # fmt: skip
def test_hostile_trees_are_one_error(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(CompressedFileError, match=r"x\.safetensors"):
        CompressedCheckpointIO().load_checkpoint(written(tmp_path / "x.safetensors", tree))


def test_mutated_trees_are_an_error_or_a_tree(tmp_path: Path) -> None:
    tree = {"a": [1, 2.5, None, (True, b"x")], "b": OrderedDict(w=torch.ones(2)), "c": {1: torch.float32}}
    tensors = to_tensors(tree)
    text = tensors[TREE].numpy().tobytes()
    generator = np.random.default_rng(0)
    num_errors = 0
    for _ in range(5000):
        changed = bytearray(text)
        for place in generator.integers(len(text), size=generator.integers(1, 4)):
            changed[place] = generator.choice([*b'[]{}",:0123456789ew', generator.integers(256)])
        cut = changed[: generator.integers(len(changed))] if generator.random() < 0.2 else changed
        try:
            from_tensors(tensors | {TREE: torch.from_numpy(np.frombuffer(bytearray(cut) or bytearray(1), np.uint8))})
        except CompressedFileError:
            num_errors += 1
    assert num_errors > 2000


def test_mutated_files_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    mask = torch.rand(40, 50) < 0.1
    CompressedCheckpointIO().save_checkpoint({"state_dict": {"w": mask.float()}, "sparsity": {"masks": mask}}, path)
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        changed[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed if generator.random() < 0.8 else changed[: generator.integers(len(data))])
        with pytest.raises(CompressedFileError):
            CompressedCheckpointIO().load_checkpoint(path)
    path.write_bytes(data)
    assert load_compressed(path)
