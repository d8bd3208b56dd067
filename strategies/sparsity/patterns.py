"""Settings of single layers, by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

_Value = TypeVar("_Value")


def settings_of(layers: Iterable[str], settings: Mapping[str, _Value | None], argument: str) -> dict[str, _Value]:
    """Find out which setting each layer has.

    Args:
        layers: Names of layers.
        settings: Values by name or pattern (``*``, ``?``) of a layer, or of how its name ends after a dot: ``fc6`` and
            ``fc*`` are ``model.fc6``. Where several fit, the last one counts; None takes a setting away.
        argument: What is set, for messages.

    Returns:
        The value of each layer that has one.

    Raises:
        ValueError: A pattern fits no layer.

    Example:
        >>> settings_of(["net.conv1", "net.conv2", "net.fc"], {"*": 5, "conv?": 8, "net.conv1": None}, "bits")
        {'net.conv2': 8, 'net.fc': 5}

    """
    layers = list(layers)
    found: dict[str, _Value | None] = {}
    for pattern, value in settings.items():
        fitting = [layer for layer in layers if fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}")]
        if not fitting:
            raise ValueError(
                f"{argument}={dict(settings)}: no layer is called {pattern!r}. There are: {', '.join(layers)}."
            )
        found |= dict.fromkeys(fitting, value)
    return {layer: value for layer in layers if (value := found.get(layer)) is not None}
