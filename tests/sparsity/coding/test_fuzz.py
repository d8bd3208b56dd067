"""22,000 damaged files: one clear error, or weights that a file may hold; never a crash, and never slow."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest
import torch

from squall.sparsity import CompressedFileError, load_compressed, save_compressed
from squall.sparsity.coding import file, streams, tensors
from squall.sparsity.coding.fields import Reader
from tests.sparsity.tensors import make, same

NUM_FILES, NUM_SEALED, NUM_TENSORS = 1500, 1500, 2000
"""Of each coder: files as they are, files with a right checksum, and tensors of each of four kinds."""
SLOWEST = 1.0
MOST_KIB = 600 << 10


def mutate(data, generator):
    """Flip bits, write bytes, cut, repeat or zero a stretch: one thing or several."""
    data = data.copy()
    for _ in range(int(generator.choice([1, 1, 1, 2, 5]))):
        kind, place = generator.integers(6), int(generator.integers(max(len(data), 1)))
        length = int(generator.integers(1, 9))
        if kind == 0 and len(data):
            data[place] ^= 1 << generator.integers(8)
        elif kind == 1 and len(data):
            data[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            data = data[:place]
        elif kind == 3:
            data[place : place + length] = generator.integers(256)
        elif kind == 4:
            data = np.concatenate((data[:place], data[place + length :]))
        else:
            data = np.concatenate((data[: place + length], data[place:]))
    return data


def state_dict():
    return {
        "codes": make("shared", torch.float32, (8, 9), 0.4, 1),
        "dense": make("shared", torch.bfloat16, (40,), 0.9, 2),
        "plain": make("random", torch.float32, (60,), 0.1, 3),
        "bools": make("shared", torch.bool, (90,), 0.3, 4),
        "stored": torch.randn(3),
        "tied": None,
    }


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """All of it together takes no more memory than a reader may take for one."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB


@pytest.fixture(params=streams.CODERS)
def whole(request, tmp_path):
    """A file of every kind of entry, its bytes, and what is in it."""
    contents = state_dict()
    contents["tied"] = contents["codes"]
    path = tmp_path / "x.safetensors"
    save_compressed(contents, path, coder=request.param)
    return path, np.fromfile(path, np.uint8), contents


def load(path, data):
    """What a file of these bytes is read as; None for an error that says so."""
    path.write_bytes(data.tobytes())
    begin = time.perf_counter()
    try:
        return load_compressed(path)
    except CompressedFileError as error:
        if not str(error).startswith(f"{path}: "):
            raise
        return None
    finally:
        assert time.perf_counter() - begin < SLOWEST


def test_no_damage_goes_unnoticed(whole):
    path, data, contents = whole
    generator = np.random.default_rng(0)
    for _ in range(NUM_FILES):
        damaged = mutate(data, generator)
        loaded = load(path, damaged)
        if loaded is not None:  # only where nothing has changed
            assert np.array_equal(damaged, data)
            assert all(same(loaded[name], contents[name]) for name in contents)


def test_every_cut_is_noticed(whole):
    path, data, _ = whole
    for length in range(1, len(data)):
        assert load(path, data[:length]) is None


def test_a_checksum_made_to_fit_opens_no_door(whole):
    """The bodies of coded tensors are damaged, or the header: what passes is a file that could have been written."""
    path, data, _ = whole
    generator = np.random.default_rng(1)
    num_header = int(data[:8].view("<u8")[0])
    num_read = 0
    for number in range(NUM_SEALED):
        body = data[8 + num_header :]
        head = data[: 8 + num_header]
        if number % 4:
            damaged = np.concatenate((head, np.resize(mutate(body, generator), len(body))))
        else:
            damaged = np.concatenate((head[:8], np.resize(mutate(head[8:], generator), num_header), body))
        try:
            place, _ = file._find_checksum(damaged)
        except CompressedFileError:
            place = None
        if place is not None:
            damaged[place : place + 32] = np.frombuffer(file._checksum([damaged], place).encode(), np.uint8)
        loaded = load(path, damaged)
        if loaded is not None:
            num_read += 1
            assert sum(tensor.nbytes for tensor in loaded.values()) <= 2 * file.FREE_BYTES
    assert 0 < num_read < NUM_SEALED


@pytest.mark.parametrize("name", ["codes", "dense", "plain", "bools"])
@pytest.mark.parametrize("coder", streams.CODERS)
def test_a_tensor_decodes_or_says_why_not(name, coder):
    tensor = state_dict()[name]
    payload = tensors.encode(name, tensor, coder).payload
    assert payload is not None
    generator = np.random.default_rng(2)
    errors = set()
    for _ in range(NUM_TENSORS):
        damaged = mutate(np.frombuffer(payload, np.uint8), generator)
        begin = time.perf_counter()
        try:
            info = tensors.read_info(Reader(damaged))
            if info.num_bytes > file.FREE_BYTES:
                continue
            decoded = tensors.read(damaged).dense()
        except CompressedFileError as error:
            errors.add("".join(letter for letter in str(error) if not letter.isdigit()))
        else:
            assert (decoded.dtype, tuple(decoded.shape)) == info
            assert decoded.numel() == info.num_elements
        assert time.perf_counter() - begin < SLOWEST
    assert len(errors) > 5  # the deeper checks are reached, too
