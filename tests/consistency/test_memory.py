"""Shared memory by name: who finds it, what is left of it, and what a host with too little of it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from squall.consistency.memory import ALIGNMENT, Segment, aligned, make_or_attach

SHM = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="names of shared memory are looked up in /dev/shm")


@pytest.fixture
def name() -> str:
    unique = f"squall-{os.getpid()}-test-{os.urandom(4).hex()}"
    yield unique
    Segment.unlink(unique)


def test_what_one_writes_another_reads(name: str) -> None:
    segment = Segment(name, 256)
    assert (segment.num_bytes, Segment(name).num_bytes) == (256, 256)
    segment.tensor(torch.float32, 64, 4).copy_(torch.arange(4.0))
    assert Segment(name).tensor(torch.float32, 64, 4).tolist() == [0, 1, 2, 3]
    assert segment.tensor(torch.float32, 0, 16).count_nonzero() == 0  # it begins empty
    assert segment.tensor(torch.int64, 256, 0).numel() == 0


def test_others_of_this_host_can_not_read_it(name: str) -> None:
    Segment(name, 64)
    assert (SHM / name).stat().st_mode & 0o777 == 0o600


def test_a_name_is_gone_after_unlink_and_the_memory_is_not(name: str) -> None:
    tensor = Segment(name, 64).tensor(torch.uint8, 0, 64)
    Segment.unlink(name)
    assert not (SHM / name).exists()
    with pytest.raises(FileNotFoundError):
        Segment(name)
    tensor.fill_(7)  # its mapping lives as long as it does
    assert tensor.sum() == 7 * 64
    Segment.unlink(name)  # once more does no harm
    Segment(name, 64)


def test_a_name_is_nobody_elses(name: str) -> None:
    Segment(name, 64).tensor(torch.uint8, 0, 64).fill_(1)
    with pytest.raises(FileExistsError):
        Segment(name, 64)
    assert Segment(name).tensor(torch.uint8, 0, 64).sum() == 64


def test_who_tries_again_finds_what_he_has_made(name: str) -> None:
    make_or_attach(name, 64).tensor(torch.uint8, 0, 64).fill_(1)
    assert make_or_attach(name, 64).tensor(torch.uint8, 0, 64).sum() == 64


def test_too_little_of_it_is_a_clear_error_and_leaves_no_name(name: str) -> None:
    status = os.statvfs(SHM)
    too_much = (status.f_blocks + 1) * status.f_frsize
    with pytest.raises(MisconfigurationException, match=rf"need {too_much / 2**20:.0f} MiB .*--shm-size"):
        Segment(name, too_much)
    assert not (SHM / name).exists()
    descriptors = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(MisconfigurationException):
            Segment(name, too_much)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


@pytest.mark.parametrize("size", [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1])
def test_alignment_rounds_up_by_less_than_itself(size: int) -> None:
    assert aligned(size) % ALIGNMENT == 0
    assert 0 <= aligned(size) - size < ALIGNMENT
