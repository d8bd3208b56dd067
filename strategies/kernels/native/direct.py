"""When a custom op's function can be called without Torch's dispatcher.

The dispatcher brings a custom op to whoever has a say: autograd, ``torch.compile``, function transforms, modes,
subclasses, the profiler. Where none of them has, it calls the op's function; but on its way there it reads more lines
of memory than the function does, and where weights have just come through the caches that takes longer than many a
layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler

_TYPES = (Tensor, nn.Parameter)
_is_compiling, _has_grad = torch.compiler.is_compiling, torch.is_grad_enabled


def _sets(*names: str) -> list[int]:
    """Sets of the dispatcher's keys, as numbers: of the first one, and then of one more each time."""
    sets: list[Any] = []
    for name in names:
        one = getattr(torch._C.DispatchKey, name)
        sets.append(sets[-1].add(one) if sets else torch._C.DispatchKeySet(one))
    return [keys.raw_repr() for keys in sets]


try:  # none of it is public
    _keys_of: Any = torch._C._dispatch_keys
    _keys_here: Any = torch._C._dispatch_tls_local_include_set
    _has_mode, _ = torch._C._is_torch_function_mode_enabled, profiler._is_profiler_enabled
    # Of tensors of the CPU, in and out of inference mode, and of a thread in which nothing is special.
    _PLAIN = frozenset(_sets("CPU", "AutocastCPU", "ADInplaceOrView", "AutogradCPU")[1::2])
    _PLAIN_HERE = frozenset(_sets("BackendSelect", "ADInplaceOrView"))
    _can_tell = True
except (AttributeError, TypeError):
    _can_tell = False


def is_direct(*tensors: Tensor | None) -> bool:
    """Tell whether an op on some tensors would come to its function for the CPU, and nowhere else.

    What others have registered for the op is left out, as is who watches the dispatcher without being a mode or Torch's
    profiler. The op would turn numbers into those that its function takes; whoever calls that has to.

    Args:
        tensors: All that it is given; None for what there isn't.

    Returns:
        False, too, where this Torch can't tell.

    """
    if not _can_tell or _is_compiling() or profiler._is_profiler_enabled or _has_mode():
        return False
    if _keys_here().raw_repr() not in _PLAIN_HERE:
        return False
    has_grad = _has_grad()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _TYPES or (has_grad and tensor.requires_grad):
            return False
        if _keys_of(tensor).raw_repr() not in _PLAIN:
            return False
    return True
