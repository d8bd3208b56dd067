"""What ``import squall`` costs a user who has Lightning already: names, and little time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Says what the import adds to a process that has Lightning. Its time is the processor's, so that others' work on this
# machine doesn't count, and leaves out translating source to byte code, which happens once an installation.
PROGRAM = """
import importlib.machinery, json, os, sys, threading, time

begun = time.process_time()
import lightning.pytorch, psutil, torch
lightning_seconds = time.process_time() - begun

translating = 0.0
translate = importlib.machinery.SourceFileLoader.source_to_code

def timed(self, *args, **kwargs):
    global translating
    begun = time.process_time()
    try:
        return translate(self, *args, **kwargs)
    finally:
        translating += time.process_time() - begun

importlib.machinery.SourceFileLoader.source_to_code = timed

def refuse(*args, **kwargs):
    raise AssertionError("CUDA is initialised")

torch.cuda._lazy_init = refuse

def owned():
    process = psutil.Process()
    names = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    return {
        "threads": process.num_threads(),
        "Python's threads": threading.active_count(),
        "processes": [child.cmdline() for child in process.children(recursive=True)],
        "sockets": sorted(name for name in names if name.startswith(("socket:", "anon_inode:"))),
    }

before, modules, begun = owned(), set(sys.modules), time.process_time()
import squall
seconds = time.process_time() - begun - translating
packages = sorted({name.partition(".")[0] for name in set(sys.modules) - modules})
times = {"seconds": seconds, "lightning_seconds": lightning_seconds}
print(json.dumps({"before": before, "after": owned(), "packages": packages, **times}))
"""


@pytest.fixture(scope="module")
def said() -> dict:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_nothing_is_started(said: dict) -> None:
    assert said["after"] == said["before"], "threads, processes, sockets; CUDA would have been an error"


def test_it_takes_little_time(said: dict) -> None:
    """0.3 s, where Lightning's import takes its usual 4 to 5; both take longer on a slow or busy machine."""
    assert said["seconds"] < max(0.3, 0.06 * said["lightning_seconds"])


def test_what_only_commands_need_is_left_alone(said: dict) -> None:
    heavy = {"hydra", "omegaconf", "matplotlib", "pandas", "sklearn", "deepspeed", "triton", "tensorboard", "PIL"}
    assert not heavy & set(said["packages"])
