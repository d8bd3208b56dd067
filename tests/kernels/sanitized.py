"""A pytest plugin: the kernels are those of a library that sanitizers watch, whose path is in the environment."""

import os
import sys
from types import ModuleType

# Before anything imports Squall.
library = sys.modules["squall.kernels.native._library"] = ModuleType("squall.kernels.native._library")
library.__file__ = os.environ["SQUALL_SANITIZED"]

import torch  # noqa: E402

from squall.kernels.native import memory  # noqa: E402

# One that is kept would be larger than what is asked for, and nothing behind that would be watched.
memory.workspace = lambda num, name: torch.empty(num, dtype=torch.float32, device="cpu")
memory.result = lambda shape, dtype=torch.float32: torch.empty(tuple(shape), dtype=dtype, device="cpu")
