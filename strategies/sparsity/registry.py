"""The tables that name the functions a sparse algorithm is made of."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

SIGNALS = ("momentum", "gradient")


class Registry(Generic[_Function]):
    """Functions by name.

    Args:
        kind: What they do, for messages.

    Example:
        >>> registry = Registry("prune")
        >>> @registry.register("nothing")
        ... def nothing(layer, num):
        ...     return layer.mask
        >>> registry.find("nothing") is nothing
        True

    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._functions: dict[str, _Function] = {}

    def register(self, name: str) -> Callable[[_Function], _Function]:
        """Make the decorated function known by a name.

        Args:
            name: The name, as configurations spell it.

        Raises:
            ValueError: Another function has it.

        """

        def enter(function: _Function) -> _Function:
            if self._functions.setdefault(name, function) is not function:
                raise ValueError(f"There is a {self._kind} function called {name!r} already.")
            return function

        return enter

    def find(self, function: str | _Function) -> _Function:
        """Look a function up.

        Args:
            function: Its name here, its place (``"package.module.function"``), or the function itself.

        Raises:
            ValueError: There is no such function.

        """
        if callable(function):
            return function
        if function in self._functions:
            return self._functions[function]
        module, _, name = str(function).rpartition(".")
        try:
            found: _Function = getattr(import_module(module), name) if module else self._functions[function]
        except (ImportError, AttributeError, KeyError):
            names = ", ".join(sorted(self._functions))
            raise ValueError(
                f"{self._kind}={function!r} is none of {names}, nor a function package.module.function that exists."
            ) from None
        return found


def reads(*signals: str) -> Callable[[_Function], _Function]:
    """Say that the decorated function reads a layer's ``momentum`` or ``gradient``, which are kept only if it does.

    Args:
        signals: ``"momentum"``, ``"gradient"``.

    Raises:
        ValueError: There is no such signal.

    Example:
        >>> @reads("gradient")
        ... def grow(layer, num):
        ...     return layer.mask | largest(layer.gradient.abs(), ~layer.mask, num)

    """
    for signal in signals:
        if signal not in SIGNALS:
            raise ValueError(f"{signal!r} is none of what can be read of a layer: {', '.join(SIGNALS)}")

    def mark(function: _Function) -> _Function:
        function.reads = frozenset(signals)  # type: ignore[attr-defined]
        return function

    return mark


def signals_of(*functions: Callable[..., Any]) -> frozenset[str]:
    """What several functions read, together.

    Args:
        functions: Marked by :func:`reads`, or not.

    """
    return frozenset().union(*(getattr(function, "reads", frozenset()) for function in functions))
