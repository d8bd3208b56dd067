"""The compiled library: instruction sets, and what there is without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from squall import kernels
from squall.kernels import native


def test_the_best_instruction_set_is_in_use():
    assert native.isa() == native.isas()[-1]


@pytest.mark.parametrize("isa", [*native.isas(), "torch"])
def test_an_instruction_set_can_be_forced(isa):
    before = native.isa()
    with native.forced(isa):
        assert kernels.available()["local_response_norm"] == isa
        assert native.serves(torch.ones(1)) == (isa != "torch")
    assert native.isa() == before


def test_there_is_no_other():
    with (
        pytest.raises(ValueError, match="SQUALL_ISA='sse9' must be one of plain, avx2, avx512, torch"),
        native.forced("sse9"),
    ):
        pass


def test_only_plain_memory_is_served():
    assert not native.serves(torch.ones(1, dtype=torch.bfloat16))
    assert not native.serves(torch.ones(1, device="meta"))
    assert not native.serves(torch.ones(1), torch.ones(1, dtype=torch.float64), dtypes=native.SINGLE)


def run(program, **environment):

    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_environment_chooses():
    program = "import squall; print(squall.kernels.available())"
    assert "'local_response_norm': 'plain'" in run(program, SQUALL_ISA="plain").stdout
    assert "'local_response_norm': 'torch'" in run(program, SQUALL_ISA="torch").stdout


def test_without_the_library_torch_serves_and_one_warning_says_so():
    program = """
import sys
sys.modules["squall.kernels.native._library"] = None
import squall, torch
assert set(squall.kernels.available().values()) == {"torch"}
x = torch.randn(2, 6, 3, 3, requires_grad=True)
squall.kernels.local_response_norm(x, 5).sum().backward()
assert squall.kernels.native.isas() == []
"""
    assert run(program).stderr.count("Squall's compiled kernels are missing") == 1


def test_it_runs_on_torchs_threads():
    if sys.platform != "linux":
        pytest.skip("found by the libraries that Linux lists")
    region = native._parallel_region()
    assert region is not None
    assert region.value
