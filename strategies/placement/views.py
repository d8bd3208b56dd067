"""Parts of a gathered tensor, which on one device would be views of it.

``weight[0:4].mul_(2)`` changes the weight on one device. Where the weight is split, the index has no rule, the weight
is gathered, and the change would be lost with the gathered copy. So such parts remember whose they are, and what is
written to them is cut and written to the split tensor too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .exchange import cut

_no_dispatch = torch._C.DisableTorchFunctionSubclass
_VIEWS = frozenset(
    "__getitem__ select narrow split chunk tensor_split unbind view view_as reshape flatten unflatten transpose "
    "permute squeeze unsqueeze t swapaxes movedim diagonal expand expand_as detach as_strided".split()
)


def writes_in_place(name: str) -> bool:
    """Whether a function of this name writes to its first argument, judged by torch's naming."""
    if name.startswith("__i"):
        return name not in ("__invert__", "__int__", "__index__")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


class GatheredView(Tensor):
    """A part of a gathered tensor; in every other respect an ordinary one."""

    _origin: tuple[Tensor, Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` as on an ordinary tensor; carry what it writes home."""
        if any(hasattr(kind, "_holds_columns") for kind in types):
            return NotImplemented  # split tensors know better
        name = getattr(func, "__name__", "")
        with _no_dispatch():
            result = func(*args, **(kwargs or {}))
            first = args[0] if args else None
            if isinstance(first, GatheredView):
                if writes_in_place(name):
                    carry_home(*first._origin)
                elif name in _VIEWS:
                    remember(result, name, *first._origin)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with _no_dispatch():
            return self.detach().clone().as_subclass(Tensor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _no_dispatch():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


def remember(result: Any, name: str, target: Tensor, full: Tensor) -> None:
    """Note that ``result`` of the function ``name`` is part of ``full``, which was gathered from ``target``."""
    if name not in _VIEWS:
        return
    for part in result if isinstance(result, (tuple, list)) else (result,):
        plain = isinstance(part, Tensor) and type(part) in (Tensor, GatheredView) and part is not full
        if plain and part.untyped_storage().data_ptr() == full.untyped_storage().data_ptr():
            part.__class__ = GatheredView
            part._origin = (target, full)


def carry_home(target: Tensor, full: Tensor) -> None:
    """Write this rank's part of ``full`` to the split tensor that it was gathered from."""
    spec = target._spec  # type: ignore[attr-defined]
    target.copy_(cut(full, spec.axes, spec.name))
