"""A state_dict as one compressed file: its tensors, and what modules have beside them.

A file of tensors alone is just these. What isn't a tensor (``get_extra_state`` of a module) makes the state_dict a
tree, of which :mod:`.trees` makes tensors and a text; so does a whole checkpoint, whose text has another name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from squall.sparsity.report import CompressionReport

from . import file, streams
from .errors import CompressedFileError
from .tensors import CodedTensor
from .trees import STATE, TREE, from_tensors, to_tensors


def save_compressed(
    state_dict: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    coder: streams.Coder = "ans",
    gap_bits: int | None = None,
) -> CompressionReport:
    """Write a state_dict as one compressed file. Nothing is lost, whatever is in it.

    Pruned and shared weights become small: a tensor with few values gets a codebook and codes, one with many zeros the
    positions of the others, each as entropy coding makes them smallest; all else is stored as it is. A negative zero is
    no zero: prune with ``masked_fill`` or ``where`` rather than by multiplication.

    Args:
        state_dict: Tensors by name. Those that are one and the same are stored once, and are one again when loaded.
            What a module's ``get_extra_state`` says can be stored as well if it is made of dicts, lists, tuples,
            tensors, strings, bytes and numbers.
        path: Where to write. A file that is there is replaced when the new one is whole.
        coder: "ans" (asymmetric numeral systems, the smaller) or "huffman" (as in Deep Compression).
        gap_bits: Bits of a distance between weights before it is coded, from 1 to 12, as in the paper's 4 or 5. None:
            for each tensor those that take the fewest bytes.

    Returns:
        What each tensor came to.

    Raises:
        ValueError: If `coder` or `gap_bits` is none of those, or an entry can't be stored; the message names it.

    Example:
        >>> import tempfile, torch
        >>> state_dict = {"weight": torch.zeros(300, 784), "bias": torch.rand(300)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save_compressed(state_dict, f"{folder}/x.safetensors")
        ...     loaded = load_compressed(f"{folder}/x.safetensors")
        >>> all(torch.equal(loaded[name], state_dict[name]) for name in state_dict), report.rate > 500
        (True, True)

    """
    return file.write(_entries(state_dict), Path(path), coder, gap_bits)


def check_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Find out before a training whether its state_dict can be written after it.

    Args:
        state_dict: As of :func:`save_compressed`.

    Raises:
        ValueError: An entry can't be stored; the message names it.

    """
    file.check(_entries(state_dict))


def _entries(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state_dict.items():
        if name in (TREE, STATE):
            raise ValueError(f"state_dict[{name!r}]: files keep this name for themselves: rename it.")
        if isinstance(value, Tensor):
            file.check({name: value})
    if all(isinstance(value, Tensor) for value in state_dict.values()):
        return dict(state_dict)
    return to_tensors(dict(state_dict), STATE, "state_dict")


def load_compressed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save_compressed` has written; of a whole checkpoint, the module's state_dict.

    Nothing in the file is believed: a damaged or hostile one is an error, after no more time and memory than its size
    justifies.

    Args:
        path: The file, or a checkpoint that :class:`~squall.sparsity.CompressedCheckpointIO` has written; that reads
            all of it.

    Returns:
        The state_dict: the same keys in the same order, shapes, data types and bits, on the CPU.

    Raises:
        CompressedFileError: If the file is damaged, of another version, or no such file.
        OSError: If it can't be read.

    """
    return _state_dict(path, *read_any(path))


def _state_dict(path: str | os.PathLike[str], whole: bool, content: dict[str, Any]) -> dict[str, Any]:
    if not whole:
        return content
    state_dict = content.get("state_dict")
    if not isinstance(state_dict, dict):
        raise CompressedFileError(
            f"{path}: it is a whole checkpoint without a state_dict: CompressedCheckpointIO().load_checkpoint(path)"
            " reads it."
        )
    return state_dict


def read_coded(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the state_dict of a file of either kind, and decode none of its tensors.

    Args:
        path: The file.

    Returns:
        The state_dict, with a :class:`~squall.sparsity.coding.tensors.CodedTensor` where a tensor is coded.

    Raises:
        CompressedFileError: If there is none, or it is damaged.
        OSError: If it can't be read.

    """
    return _state_dict(path, *_together(path, file.read_coded(Path(path))))


def read_any(path: str | os.PathLike[str]) -> tuple[bool, dict[str, Any]]:
    """Read a file of either kind.

    Args:
        path: The file.

    Returns:
        Whether it is a whole checkpoint; and that, or a state_dict.

    Raises:
        CompressedFileError: If it is neither.
        OSError: If it can't be read.

    """
    return _together(path, file.read(Path(path)))


def _together(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Put what a file has together; whether it is a whole checkpoint, and that, or a state_dict."""
    text = next((name for name in (TREE, STATE) if name in tensors), None)
    if text is None:
        return False, dict(tensors)
    with file.naming(Path(path)):
        if isinstance(tensors[text], CodedTensor):
            tensors = {**tensors, text: tensors[text].dense()}
        content = from_tensors(tensors, text)
    if not isinstance(content, dict):
        raise CompressedFileError(f"{path}: it is neither a checkpoint nor a state_dict.")
    return text == TREE, content
