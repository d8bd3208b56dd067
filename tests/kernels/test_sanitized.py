"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over the problems of their own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = [
    "add_and_step", "ans", "block_codes", "local_response_norm", "max_pool", "shard_update", "sparse_conv",
    "sparse_linear", "top_k",
]  # fmt: skip
FLAGS = (
    "-O1 -g -std=gnu11 -shared -fPIC -pthread -fno-math-errno -fno-trapping-math -Wno-psabi"
    " -fsanitize=address,undefined -fno-sanitize-recover=all"
).split()


def library(name: str) -> str | None:
    """Where gcc has a library."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def build(folder: Path) -> Path:
    """Build all kernels for the sanitizers, or skip and say why not."""
    include = sysconfig.get_path("include")
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("there is no gcc, or no Linux to preload its libasan")
    if library("libasan.so") is None:
        pytest.skip("gcc is here without its libasan")
    if not os.path.exists(f"{include}/Python.h"):
        pytest.skip("Python's headers aren't here")
    sources = [str(source) for source in sorted((ROOT / "strategies/kernels").glob("*/*.c"))]
    path = folder / "kernels.so"
    subprocess.run(["gcc", *FLAGS, f"-I{include}", *sources, "-o", str(path)], check=True)
    return path


@pytest.mark.timeout(1200)  # two minutes, if nothing else is going on
def test_kernels_stay_within_their_memory(tmp_path: Path) -> None:
    path = build(tmp_path)
    # Exceptions of C++ pass through libasan, so it has to find their library when it begins.
    preloaded = filter(None, (library("libasan.so"), library("libstdc++.so.6")))
    environment = {
        "SQUALL_SANITIZED": str(path),
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # What is left out runs Torch's own checks of ops for minutes, on shapes that other tests have.
    # Reports go straight to stderr, of which pytest would take the descriptor, and be gone with it.
    options = "-q -x --capture=sys -p tests.kernels.sanitized -p no:cacheprovider".split()
    tests = [f"tests/kernels/test_{name}.py" for name in TESTS]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", "not rules", *tests],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    said = result.stdout + result.stderr
    place = max(said.find("ERROR: AddressSanitizer"), said.find("runtime error"))
    assert result.returncode == 0, said[place:][:6000] if place >= 0 else said[-6000:]
