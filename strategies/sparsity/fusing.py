"""A ReLU behind a sparse layer made part of it, behind a dense one made to work in place: both save memory's time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .sparse_layers import SparseConv2d, SparseLinear

_RELUS = (torch.relu, F.relu)
# In evaluation mode these return what they are given.
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stay out of whatever has no parts: what it computes is its own business."""
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


def fuse_relu(module: nn.Module) -> nn.Module:
    """Fuse, as far as torch.fx can follow the module.

    Args:
        module: In evaluation mode; its sparse layers may be changed.

    Returns:
        A module of the same results: the traced one if anything was fused, else the one that was given.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> fused = fuse_relu(nn.Sequential(SparseLinear.from_dense(layer), nn.Dropout(), nn.ReLU()).eval())
        >>> fused(torch.ones(1, 4)).min() >= 0, [type(part).__name__ for part in fused.children()]
        (tensor(True), ['SparseLinear'])

    """
    try:
        graph = _Tracer().trace(module)
    except Exception:  # of any kind: a forward that depends on what it is given can't be followed
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
    return fx.GraphModule(module, graph, type(module).__name__)


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    target: Any = node.target
    return node.op == "call_function" and target in _RELUS
