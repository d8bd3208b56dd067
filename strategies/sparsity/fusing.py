"""A ReLU behind a sparse layer made part of it, behind a dense one made to work in place: both save memory's time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .sparse_layers import SparseConv2d, SparseLinear

_RELUS = (torch.relu, F.relu)
# In evaluation mode these return what they are given.
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _Hidden(dict[str, Any]):
    """A module's tensors while they are still to be read: whoever asks for one, or whether there are any, is noticed.

    Example:
        >>> "bias" in _Hidden(weight=None)
        False
        >>> "weight" in _Hidden(weight=None)
        Traceback (most recent call last):
        LookupError: tensors that are still to be read

    """

    asked = False

    def _refuse(self, *_: Any, **__: Any) -> Any:
        self.asked = True
        raise LookupError("tensors that are still to be read")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) and bool(self._refuse())  # modules look for what is no tensor here, too

    __getitem__ = __setitem__ = __delitem__ = __iter__ = __reversed__ = __len__ = __eq__ = __ne__ = _refuse
    __or__ = __ror__ = __ior__ = __repr__ = _refuse
    get = items = keys = values = copy = pop = popitem = setdefault = update = clear = _refuse  # type: ignore[assignment]


class _Tracer(fx.Tracer):
    def forget(self) -> None:
        """Let go of the module, which functions that torch.fx leaves behind would keep until garbage is collected."""
        vars(self).clear()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stay out of whatever has no parts: what it computes is its own business."""
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


def follow(module: nn.Module) -> fx.Graph | None:
    """Follow a module by torch.fx.

    Args:
        module: Any.

    Returns:
        None if its forward can't be followed, as it depends on what it is given.

    """
    tracer = _Tracer()
    try:
        return tracer.trace(module)
    except Exception:  # of any kind: it is the user's code that runs
        return None
    finally:
        tracer.forget()


def follow_without_tensors(module: nn.Module) -> fx.Graph | None:
    """Follow a module whose parameters and buffers are still to be read, so that the disk can be waited for meanwhile.

    Args:
        module: Any; its tensors may be anything.

    Returns:
        None as of :func:`follow`, or if its forward looks at one of them, layers without parts apart: then it could be
        followed when they are there.

    """
    hidden: list[tuple[nn.Module, str, _Hidden, Any]] = []
    try:
        for part in module.modules():
            for name in ("_parameters", "_buffers"):
                if own := vars(part)[name]:
                    hidden.append((part, name, _Hidden(own), own))
                    vars(part)[name] = hidden[-1][2]
        graph = follow(module)
    except Exception:  # one that keeps its tensors elsewhere
        return None
    finally:
        for part, name, _, own in hidden:
            vars(part)[name] = own
    return None if any(instead.asked for _, _, instead, _ in hidden) else graph


def fuse_relu(module: nn.Module, graph: fx.Graph | None = None) -> nn.Module:
    """Fuse, as far as torch.fx can follow the module.

    Args:
        module: In evaluation mode; its sparse layers may be changed.
        graph: What it does, if that is known; it is changed.

    Returns:
        A module of the same results: the traced one if anything was fused, else the one that was given.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> fused = fuse_relu(nn.Sequential(SparseLinear.from_dense(layer), nn.Dropout(), nn.ReLU()).eval())
        >>> fused(torch.ones(1, 4)).min() >= 0, [type(part).__name__ for part in fused.children()]
        (tensor(True), ['SparseLinear'])

    """
    graph = graph or follow(module)
    if graph is None:
        return module
    modules = dict(module.named_modules())
    nodes = list(graph.nodes)
    called = [node.target for node in nodes if node.op == "call_module"]
    num_fused = 0
    for node in nodes:
        if node.op == "call_module" and isinstance(modules[node.target], _NOTHING):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or len(node.users) != 1 or not _is_relu(after := next(iter(node.users)), modules):
            continue
        if isinstance(layer, SparseConv2d | SparseLinear):
            if called.count(node.target) > 1:
                continue
            layer.relu = True
            after.replace_all_uses_with(node)
            graph.erase_node(after)
        elif type(layer) in (nn.Conv2d, nn.Linear) and not layer._forward_hooks:  # a hook may keep what it is shown
            after.op, after.target, after.args, after.kwargs = "call_function", torch.relu_, (node,), {}
        else:
            continue
        num_fused += 1
    if not num_fused:
        return module
    graph.lint()
    fused = fx.GraphModule(module, graph, type(module).__name__)
    owner: Any = weakref.proxy(fused)
    fused.graph.owning_module = owner  # or its memory, too, would wait until garbage is collected
    return fused


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    target: Any = node.target
    return node.op == "call_function" and target in _RELUS
