"""Anything that a checkpoint is made of, as tensors and one text; and back, without pickle.

The text is JSON. What JSON has no word for is a list of a word of ours and what it takes: ``["tuple", ...]``,
``["tensor", key]``. A list is one as well: ``["list", ...]``.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CompressedFileError
from .file import RESERVED

TREE, STATE = "squall.tree", "squall.state"
"""The tensor that is the text of a whole checkpoint; and of a state_dict."""
_RESERVED = (TREE, STATE, *RESERVED)


def to_tensors(tree: Any, text: str = TREE, root: str = "checkpoint") -> dict[str, Tensor]:
    """Take a tree of containers apart.

    Args:
        tree: Dicts, lists, tuples, tensors, strings, bytes, numbers, None, data types and devices, one in another.
        text: What the text is called.
        root: What the tree is called, in messages.

    Returns:
        Its tensors by where they are in it, and its text as one more.

    Raises:
        ValueError: An entry is something else; the message names it.

    Example:
        >>> sorted(to_tensors({"a": [1, torch.zeros(2)]}))
        ['a/1', 'squall.tree']

    """
    tensors: dict[str, Tensor] = {}
    try:
        packed = json.dumps(_pack(tree, "", tensors), separators=(",", ":"))
    except _UnwritableError as error:
        raise ValueError(f"{root}{error}") from None
    tensors[text] = torch.from_numpy(np.frombuffer(bytearray(packed.encode("utf-8", "surrogatepass")), np.uint8))
    return tensors


class _UnwritableError(ValueError):
    """An entry can't be written; the message begins with where it is in the tree."""


def from_tensors(tensors: Mapping[str, Tensor], text: str = TREE) -> Any:
    """Put a tree together again.

    Args:
        tensors: What :func:`to_tensors` returned.
        text: What their text is called.

    Returns:
        The tree: equal types, keys in their order, and equal bits.

    Raises:
        CompressedFileError: They are no such tensors.

    """
    packed = tensors.get(text)
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise CompressedFileError("it has tensors, and is no checkpoint")
    try:
        return _unpack(json.loads(packed.numpy().tobytes().decode("utf-8", "surrogatepass")), tensors)
    except CompressedFileError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, RuntimeError) as error:
        raise CompressedFileError(f"its tree can't be read ({type(error).__name__})") from None


def _pack(node: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    kind = type(node)
    if node is None or kind in (bool, int, float, str):
        return node
    if isinstance(node, Tensor):
        key = where.removeprefix("/").encode("utf-8", "replace").decode() or "tensor"
        while key in tensors or key in _RESERVED:
            key += "'"  # keys with strokes in them can meet
        tensors[key] = node.detach()
        return ["tensor", key]
    if kind in (list, tuple):
        return [kind.__name__, *(_pack(child, f"{where}/{index}", tensors) for index, child in enumerate(node))]
    if kind is torch.Size:
        return ["Size", *node]
    if kind is defaultdict:  # its factory is a function, and says nothing about what there is
        kind = dict
    if kind in (dict, OrderedDict, Counter):
        pairs = [[_pack_key(key, where), _pack(child, f"{where}/{key}", tensors)] for key, child in node.items()]
        return [kind.__name__, *pairs]
    if kind is bytes:
        return ["bytes", node.hex()]
    if kind is complex:
        return ["complex", node.real, node.imag]
    if kind in (torch.dtype, torch.device):
        return [kind.__name__, str(node).removeprefix("torch.")]
    raise _UnwritableError(
        f"[{where.removeprefix('/')!r}] is a {kind.__module__}.{kind.__qualname__}, which can't be written"
        " without pickle: leave it out (a hyper-parameter by save_hyperparameters(ignore=[...])), or make it numbers,"
        " strings, tensors, and lists, tuples and dicts of them."
    )


def _pack_key(key: Any, where: str) -> Any:
    """Keys are hashable, so no tensors and no lists."""
    if isinstance(key, Tensor):
        raise _UnwritableError(f"[{where.removeprefix('/')!r}] has a tensor as a key, which can't be written.")
    return _pack(key, f"{where}/(key)", {})


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, list):
        if isinstance(node, dict):
            raise CompressedFileError("its tree has what no tree is made of")
        return node
    word, *rest = node
    return _WORDS[word](rest, tensors)


def _children(rest: list[Any], tensors: Mapping[str, Tensor]) -> list[Any]:
    return [_unpack(child, tensors) for child in rest]


def _pairs(rest: list[Any], tensors: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
    pairs = [(_unpack(key, tensors), _unpack(value, tensors)) for key, value in rest]
    if any(isinstance(key, Tensor) for key, _ in pairs):
        raise CompressedFileError("its tree has a tensor as a key")
    return pairs


def _dtype(rest: list[Any], tensors: Mapping[str, Tensor]) -> torch.dtype:
    (name,) = rest
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CompressedFileError("its tree has a data type that there isn't")
    return found


def _tensor(rest: list[Any], tensors: Mapping[str, Tensor]) -> Tensor:
    (key,) = rest
    return tensors[key]


def _bytes(rest: list[Any], tensors: Mapping[str, Tensor]) -> bytes:
    (text,) = rest
    return bytes.fromhex(text)


def _device(rest: list[Any], tensors: Mapping[str, Tensor]) -> torch.device:
    (name,) = rest
    return torch.device(name)


_WORDS: dict[str, Callable[[list[Any], Mapping[str, Tensor]], Any]] = {
    "list": _children,
    "tuple": lambda rest, tensors: tuple(_children(rest, tensors)),
    "dict": lambda rest, tensors: dict(_pairs(rest, tensors)),
    "OrderedDict": lambda rest, tensors: OrderedDict(_pairs(rest, tensors)),
    "Counter": lambda rest, tensors: Counter(dict(_pairs(rest, tensors))),
    "Size": lambda rest, tensors: torch.Size(rest),
    "bytes": _bytes,
    "complex": lambda rest, tensors: complex(*map(float, rest)),
    "dtype": _dtype,
    "device": _device,
    "tensor": _tensor,
}
