"""What a worker may ask of the coordinator: the form of each request, checked before anything is done about it.

A request may wait, and is then looked at again when others speak; one that is wrong in itself must have been refused
by then, with its sender, and must not have been carried out by half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .events import MAX_RANK

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _rank(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_RANK


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _floats(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is float for item in value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _tickets(value: Any) -> bool:
    if not isinstance(value, (list, tuple)):
        return False
    pairs = [tuple(pair) for pair in value if isinstance(pair, (list, tuple)) and len(pair) == 2]
    return (
        len(pairs) == len(value) and all(_number(n) for pair in pairs for n in pair) and len(set(pairs)) == len(pairs)
    )


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


# Of each operation: what it must have, and what it may have. Other fields are anything that JSON can say.
_FORMS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "hello": ({"rank": _rank, "run": _number}, {"column": _number, "rendezvous": _number}),
    "alive": ({}, {}),
    "meet": ({"key": _text, "kind": _text}, {}),
    "share": ({"key": _text}, {}),
    "gather": ({"key": _text, "ranks": _numbers}, {}),
    "places": ({}, {}),
    "join": ({}, {"mailbox": _text}),
    "epoch": ({"epoch": _number}, {}),
    "order": ({"epoch": _number, "num_batches": _number}, {}),
    "lease": ({"epoch": _number}, {"ahead": _flag}),
    "gate": ({}, {}),
    "await": ({"version": _number}, {}),
    "commit": (
        {"tickets": _tickets, "slot": _number, "base": _number},
        {"base_buffer": _or_none(_number), "fetch": _or_none(_number), "absent": _numbers, "losses": _floats},
    ),
    "fetch": ({"buffer": _number, "id": _number}, {}),
    "write": ({"buffer": _number, "id": _number}, {}),
    "claim": ({}, {}),
    "free": ({}, {}),
    "done": ({"tickets": _tickets}, {}),
    "return": ({"tickets": _tickets}, {"lost": _flag}),
    "stop": ({}, {}),
    "leave": ({}, {}),
    "snapshot": ({"id": _number}, {"queue": _flag, "after": _number}),
    "release": ({}, {}),
    "buffers": ({}, {}),
    "report": ({}, {}),
    "events": ({}, {}),
}


def check_request(header: Mapping[str, Any]) -> str:
    """Look at the form of a request.

    Args:
        header: As it came.

    Returns:
        Its operation.

    Raises:
        ValueError: If it makes no sense.

    """
    operation = header.get("op")
    if not isinstance(operation, str) or operation not in _FORMS:
        raise ValueError(f"there is no {str(operation)[:40]!r}")
    required, optional = _FORMS[operation]
    for name, check in required.items():
        if name not in header or not check(header[name]):
            raise ValueError(f"{operation!r} with {name}={str(header.get(name))[:40]!r} can't be understood")
    for name, check in optional.items():
        if name in header and not check(header[name]):
            raise ValueError(f"{operation!r} with {name}={str(header[name])[:40]!r} can't be understood")
    return operation
