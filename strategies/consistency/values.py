"""Values that travel between ranks without being pickled: numbers, text, tensors, and what is made of them."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


_MAX_DEPTH = 60  # of lists and dicts in each other: a header takes three levels for one


def encode(value: Any) -> tuple[Any, bytes]:
    """Say a value in JSON and bytes.

    Args:
        value: None, numbers, text, bytes, paths, tensors; tuples, lists, sets and dicts of them.

    Raises:
        TypeError: If there is anything else in it.
        ValueError: If it is nested too deep for a message.

    """
    blobs: list[bytes] = []
    return _encode(value, blobs), b"".join(blobs)


def _encode(value: Any, blobs: list[bytes], depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"A value with more than {_MAX_DEPTH} lists or dicts in each other can't be sent to other ranks, nor one"
            " that contains itself. Send it flatter."
        )
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, (bytes, bytearray)):
        blobs.append(bytes(value))
        return {"bytes": len(value)}
    if isinstance(value, Tensor):
        plain = value.detach().to("cpu").contiguous()
        name = str(plain.dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise TypeError(f"a tensor of {value.dtype} can't be sent to other ranks")
        blobs.append(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        return {"tensor": name, "shape": list(plain.shape)}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = "list" if isinstance(value, list) else "tuple" if isinstance(value, tuple) else "set"
        return {kind: [_encode(item, blobs, depth + 1) for item in value]}
    if isinstance(value, dict):
        return {
            "dict": [[_encode(key, blobs, depth + 1), _encode(item, blobs, depth + 1)] for key, item in value.items()]
        }
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy number
        return _encode(value.item(), blobs, depth)
    raise TypeError(
        f"A {type(value).__name__} can't be sent to other ranks: between the processes of an asynchronous run nothing"
        " is pickled. Send numbers, text, tensors, and lists or dicts of them."
    )


def decode(said: Any, blob: bytes | memoryview) -> Any:
    """The value that :func:`encode` said.

    Raises:
        ValueError: If that was not said by :func:`encode`.

    """
    try:
        value, used = _decode(said, memoryview(blob), 0)
    except (TypeError, KeyError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no value: {error}") from error
    if used != len(blob):
        raise ValueError("no value: bytes are left over")
    return value


def _decode(said: Any, blob: memoryview, at: int) -> tuple[Any, int]:
    if said is None or isinstance(said, (bool, int, str)):
        return said, at
    if not isinstance(said, dict) or not said:
        raise ValueError(f"no value: {json.dumps(said)[:80]}")
    kind, inner = next(iter(said.items()))
    if kind == "float":
        return float.fromhex(inner), at
    if kind == "path":
        from pathlib import Path

        return Path(inner), at
    if kind == "bytes":
        return bytes(_cut(blob, at, inner)), at + inner
    if kind == "tensor":
        dtype, shape = _DTYPES[inner], torch.Size(said["shape"])
        size = shape.numel() * dtype.itemsize
        data = bytearray(_cut(blob, at, size))
        flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if size else torch.empty(0, dtype=dtype)
        return flat.view(shape), at + size
    if kind in ("list", "tuple", "set"):
        items = []
        for item in inner:
            value, at = _decode(item, blob, at)
            items.append(value)
        return {"list": list, "tuple": tuple, "set": set}[kind](items), at
    if kind == "dict":
        pairs = {}
        for key, item in inner:
            decoded, at = _decode(key, blob, at)
            pairs[decoded], at = _decode(item, blob, at)
        return pairs, at
    raise ValueError(f"no value: {kind}")


def _cut(blob: memoryview, at: int, size: int) -> memoryview:
    if size < 0 or at + size > len(blob):
        raise ValueError("no value: bytes are missing")
    return blob[at : at + size]
