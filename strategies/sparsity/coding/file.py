"""One safetensors file for tensors: any of them, bit for bit, in as few bytes as it takes.

A tensor that coding doesn't make smaller is an entry as any safetensors file has it. Every other one is an entry of
bytes (``U8``), of which :mod:`.tensors` says what they are. The file's only metadata, under ``squall``, is
``version=3 checksum=... tensors={...}``: after each key, in the state_dict's order, 0 for a tensor as it is, 1 for a
coded one, or the key of the tensor that it is tied to. The checksum is over every byte of the file, its own place
counted as zeros: so whatever was damaged is noticed before anything is decoded. Only whoever computes it again reaches
the decoders, and these check all that they are told. Versions 1 and 2 had other checksums, and version 1 no interleaved
codes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from squall.sparsity.arguments import is_whole
from squall.sparsity.report import CompressionReport

from . import positions, streams, tensors
from .errors import CompressedFileError
from .fields import FREE_SYMBOLS, MAX_SYMBOLS_PER_BYTE, Budget, Bytes, Reader

VERSION = 3
MAX_EXPANSION = 1024
"""A file has to be this share of what it decodes to, or a small one could fill the memory. A writer sees to it."""
FREE_BYTES = 16 << 20
"""So much a file may decode to however small it is."""

_NUM_HEAD, _NUM_PART = 1 << 10, 1 << 18
_METADATA = "squall"
_PADDING = "squall.padding"
RESERVED = (_PADDING, "__metadata__")
"""Names that no tensor can have."""
_PLAIN, _CODED = 0, 1
_CHECKSUM_BYTES = 16
_UNKNOWN = "0" * 2 * _CHECKSUM_BYTES
_CHECKSUM = re.compile(rb"checksum=([0-9a-f]{%d})" % (2 * _CHECKSUM_BYTES))
# By the version. Only accidents are to be noticed, and what holds against malice took as long as decoding does.
_CHECKSUMS: dict[int, Callable[[], Any]] = {
    1: partial(hashlib.blake2b, digest_size=_CHECKSUM_BYTES),
    2: hashlib.sha256,
    VERSION: xxhash.xxh3_128,
}
_BEGINNING = re.compile(rb'.{8}\{"__metadata__":\{"squall":"version=', re.DOTALL)
_NUM_BEGINNING = 8 + len('{"__metadata__":{"squall":"version=')
_HEADER = re.compile(r"version=(\d{1,9}) (?:checksum=[0-9a-f]+ tensors=(.*))?", re.DOTALL)


def write(
    entries: Mapping[str, Tensor], path: Path, coder: streams.Coder = "ans", gap_bits: int | None = None
) -> CompressionReport:
    """Write tensors as one compressed file.

    Args:
        entries: Tensors by name, as :func:`check` wants them.
        path: Where to write. A file that is there is replaced when the new one is whole.
        coder: "ans" or "huffman".
        gap_bits: Bits of a distance between weights before it is coded; None: those that take the fewest bytes.

    Returns:
        What each tensor came to.

    Raises:
        ValueError: If `coder` or `gap_bits` is out of range, or an entry can't be stored.

    """
    if coder not in streams.CODERS:
        raise ValueError(f"coder={coder!r} must be one of {', '.join(streams.CODERS)}.")
    if gap_bits is not None and not (is_whole(gap_bits) and 1 <= gap_bits <= positions.MAX_GAP_BITS):
        raise ValueError(f"gap_bits={gap_bits} must be a whole number from 1 to {positions.MAX_GAP_BITS}, or None.")
    check(entries)
    stored: dict[str, Tensor] = {}
    kinds: dict[str, int | str] = {}
    names: dict[tuple[Any, ...], str] = {}
    statistics, num_symbols = [], 0
    for name, tensor in entries.items():
        same = names.setdefault(tensors.memory_of(tensor) or (name,), name)
        if same != name:
            kinds[name] = same
            continue
        payload, figures, num_more = tensors.encode(name, tensor, coder, gap_bits)
        statistics.append(figures)
        num_symbols += num_more
        kinds[name] = _PLAIN if payload is None else _CODED
        stored[name] = (
            tensor.detach().cpu().contiguous().clone()
            if payload is None
            else torch.from_numpy(np.frombuffer(bytearray(payload), np.uint8))
        )
    num_dense_bytes = sum(figures.num_dense_bytes for figures in statistics)
    least = num_dense_bytes // MAX_EXPANSION if num_dense_bytes > FREE_BYTES else 0
    least = max(least, (num_symbols - FREE_SYMBOLS) // MAX_SYMBOLS_PER_BYTE)
    num_missing = least - sum(entry.nbytes for entry in stored.values())
    if num_missing > 0:
        stored[_PADDING] = torch.zeros(num_missing + 1, dtype=torch.uint8)
    return CompressionReport(statistics, _write(path, stored, kinds))


def check(entries: Mapping[str, Any]) -> None:
    """Make sure that all entries can be stored, and read again.

    Args:
        entries: Tensors by name.

    Raises:
        ValueError: One can't; the message names it.

    """
    for name, tensor in entries.items():
        where = f"state_dict[{name!r}]"
        if not isinstance(name, str):
            raise ValueError(f"{where}: a name must be a string, and this is a {type(name).__name__}: rename it.")
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"{where}: half of a surrogate pair can't be written as UTF-8: rename it.")
        if name in RESERVED:
            raise ValueError(f"{where}: a tensor can't be called {name!r}, which files keep for themselves: rename it.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in tensors.DTYPES:
            kind = "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            raise ValueError(f"{where} is a {kind} tensor, which can't be stored.")
        if tensor.dim() > tensors.MAX_DIMS:
            raise ValueError(f"{where} has {tensor.dim()} dimensions, and {tensors.MAX_DIMS} can be stored.")


def _write(path: Path, entries: dict[str, Tensor], kinds: Mapping[str, int | str]) -> int:
    """Write the file, and then its checksum into it; return its size."""
    table = json.dumps(kinds, separators=(",", ":"))
    metadata = {_METADATA: f"version={VERSION} checksum={_UNKNOWN} tensors={table}"}
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.close(handle)
        save_file(entries, draft, metadata)
        place, _ = _find_checksum(np.fromfile(draft, np.uint8, 8 + _NUM_HEAD))
        with open(draft, "r+b") as file:
            checksum = _checksum(_parts(Path(draft)), place)
            file.seek(place)
            file.write(checksum.encode())
            file.flush()
            os.fsync(file.fileno())  # or the file that is replaced could be lost together with this one
        num_bytes = os.path.getsize(draft)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    return num_bytes


def _find_checksum(data: Bytes) -> tuple[int, str]:
    """Where in a file the checksum is, and what it is; what the file begins with is enough."""
    num_header = int(data[:8].view("<u8")[0]) if len(data) >= 8 else 0
    # The metadata comes first, so there can be no other before it.
    found = _CHECKSUM.search(bytes(data[8 : 8 + min(num_header, _NUM_HEAD)]))
    if found is None:
        raise CompressedFileError("it has no checksum")
    return 8 + found.start(1), found[1].decode()


def _checksum(parts: Iterable[Bytes], place: int, version: int = VERSION) -> str:
    """The checksum of a file, given part by part, whose own is at a place."""
    digest, begin = _CHECKSUMS[version](), 0
    for part in parts:
        own = slice(max(0, place - begin), max(0, place + len(_UNKNOWN) - begin))
        if own.start < len(part) and own.stop:
            part = part.copy()
            part[own] = ord("0")
        digest.update(part.data)
        begin += len(part)
    return str(digest.hexdigest()[: len(_UNKNOWN)])


def _parts(path: Path) -> Iterator[Bytes]:
    """Read a file part by part: several times as fast as through a map of it, page by page."""
    buffer = np.empty(_NUM_PART, np.uint8)
    with open(path, "rb", buffering=0) as file:
        while num := file.readinto(buffer.data):
            yield buffer[:num]


def expect(path: str | os.PathLike[str]) -> None:
    """Have the system fetch a file meanwhile: else the disk is asked for a little at a time, and waited for each time.

    Args:
        path: The file.

    Raises:
        OSError: It can't be read.

    """
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def read(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write` has written.

    Args:
        path: The file.

    Returns:
        The tensors.

    Raises:
        CompressedFileError: If the file is damaged, of another version, or no such file.
        OSError: If it can't be read.

    """
    with naming(path):
        expect(path)
        entries = _load(path)
        streams.decode_together([stream for entry in entries.values() for stream in streams_of(entry)])
        return dense(entries)


def read_coded(path: Path) -> dict[str, Tensor | tensors.CodedTensor]:
    """Read what :func:`write` has written, and decode nothing; sooner if it has been told of (:func:`expect`).

    Args:
        path: The file.

    Returns:
        The tensors, those that are coded as they are; tied ones are one.

    Raises:
        CompressedFileError: As :func:`read`, as far as it can be known.
        OSError: If it can't be read.

    """
    with naming(path):
        return _load(path)


def dense(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Decode what is coded; entries that are one become one tensor."""
    whole: dict[int, Any] = {}
    for name, entry in entries.items():
        if id(entry) not in whole:  # else it is tied to one
            with naming(name):
                whole[id(entry)] = entry.dense() if isinstance(entry, tensors.CodedTensor) else entry
    return {name: whole[id(entry)] for name, entry in entries.items()}


def streams_of(entry: Any) -> list[streams.Coded]:
    """List what of an entry is to be decoded."""
    return entry.streams if isinstance(entry, tensors.CodedTensor) else []


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Say whether a file begins as those of :func:`write` do, whatever its name is.

    Args:
        path: Any file.

    """
    with open(path, "rb") as file:
        return _BEGINNING.fullmatch(file.read(_NUM_BEGINNING)) is not None


def _load(path: Path) -> dict[str, Tensor | tensors.CodedTensor]:
    if not path.stat().st_size:
        raise CompressedFileError("it is empty")
    try:
        with safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
            if metadata is None:
                raise CompressedFileError("it is a safetensors file, but save_compressed hasn't written it")
            version = _version(metadata)
            place, checksum = _find_checksum(np.fromfile(path, np.uint8, 8 + _NUM_HEAD))
            if _checksum(_parts(path), place, version) != checksum:
                raise CompressedFileError("its checksum is wrong: it was damaged, or not copied whole")
            return _read(file, _kinds(metadata, set(file.keys())), path.stat().st_size)
    except SafetensorError as error:
        raise CompressedFileError(f"it is no whole safetensors file ({error})") from None


def _version(metadata: str) -> int:
    header = _HEADER.match(metadata)
    if header is None:
        raise CompressedFileError("its metadata are not those of a compressed file")
    if int(header[1]) not in _CHECKSUMS:
        raise CompressedFileError(
            f"it has version {header[1]} of the format, and this Squall reads version {VERSION} and older ones"
        )
    return int(header[1])


def _kinds(metadata: str, stored: set[str]) -> dict[str, Any]:
    """The table of tensors, if it agrees with what is stored."""
    header = _HEADER.fullmatch(metadata)
    try:
        kinds = json.loads(header[2] if header and header[2] else "")
    except (ValueError, RecursionError):
        kinds = None
    if not isinstance(kinds, dict):
        raise CompressedFileError("its table of tensors can't be read")
    for name, kind in kinds.items():
        if isinstance(kind, str):
            if kinds.get(kind) not in (_PLAIN, _CODED):
                raise CompressedFileError(f"tensor {name!r} is tied to {kind!r}, which isn't stored")
        elif kind not in (_PLAIN, _CODED) or isinstance(kind, bool | float):
            raise CompressedFileError(f"tensor {name!r} is of a kind that there isn't: {kind!r:.40}")
    named = {name for name, kind in kinds.items() if not isinstance(kind, str)}
    for name in (named ^ stored) - {_PADDING}:
        raise CompressedFileError(f"tensor {name!r} is " + ("missing" if name in named else "in no table"))
    return kinds


def _read(file: Any, kinds: Mapping[str, Any], num_file_bytes: int) -> dict[str, Tensor | tensors.CodedTensor]:
    payloads = {name: _payload(name, file) for name, kind in kinds.items() if kind == _CODED}
    most, num_claimed = max(FREE_BYTES, MAX_EXPANSION * num_file_bytes), 0
    for name, payload in payloads.items():
        with naming(name):
            num_claimed += tensors.read_info(Reader(payload)).num_bytes
            if num_claimed > most:
                raise CompressedFileError(f"{num_file_bytes:,} bytes can't hold the {num_claimed:,} that are claimed")
    result: dict[str, Tensor | tensors.CodedTensor] = {}
    budget = Budget(num_file_bytes)
    for name, kind in kinds.items():
        with naming(name):
            if kind == _CODED:
                result[name] = tensors.read(payloads[name], budget)
            elif kind == _PLAIN:
                result[name] = _plain(name, file)
    return {name: result[kind if isinstance(kind, str) else name] for name, kind in kinds.items()}


def _payload(name: str, file: Any) -> Bytes:
    tensor = file.get_tensor(name)
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise CompressedFileError(f"tensor {name!r}: its code is no row of bytes")
    payload: Bytes = tensor.numpy()
    return payload


def _plain(name: str, file: Any) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
        copy = tensor.clone()  # of the mapped file, which may be replaced
    except (TypeError, RuntimeError) as error:  # what torch says to shapes that only safetensors takes
        raise CompressedFileError(f"torch has no such tensor ({str(error).splitlines()[0]})") from None
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise CompressedFileError("a truth value is neither 0 nor 1")
    return copy


@contextmanager
def naming(what: str | Path) -> Iterator[None]:
    """Say in an error which tensor, or which file, it is about.

    Args:
        what: The tensor's name, or the file's path.

    """
    try:
        yield
    except CompressedFileError as error:
        named = f"tensor {what!r}: {error}" if isinstance(what, str) else f"{what}: {error}."
        raise CompressedFileError(named) from None
