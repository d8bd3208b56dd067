"""Codecs by name."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from .codec import Codec
from .dynamic import DynamicCodec
from .floats import FloatCodec
from .sign import SignCodec
from .top_k import TopKCodec

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        FloatCodec("fp32", torch.float32),
        FloatCodec("fp64", torch.float64),
        FloatCodec("bf16", torch.bfloat16),
        DynamicCodec(),
        SignCodec(),
        TopKCodec(),
    )
}


def get_codec(spec: str | Codec) -> Codec:
    """Find a codec.

    Args:
        spec: ``"fp32"``, ``"fp64"``, ``"bf16"``, ``"int8"``, ``"1bit"``, ``"topk"``, or ``"topk:0.001"`` for a density
            other than 0.01. A codec is returned as it is.

    Raises:
        MisconfigurationException: There is no such codec, or the density isn't above 0 and at most 1.

    Example:
        >>> get_codec("int8").num_bytes(4096)
        4104

    """
    if isinstance(spec, Codec):
        return spec
    name, separator, option = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if name not in CODECS or (separator and name != "topk"):
        choices = ", ".join(repr(choice) for choice in CODECS)
        raise MisconfigurationException(
            f"codec={spec!r} must be one of {choices}, or 'topk:<density>' such as 'topk:0.001'."
        )
    if not separator:
        return CODECS[name]
    try:
        density = float(option)
    except ValueError:
        density = 0.0
    if not 0.0 < density <= 1.0:
        raise MisconfigurationException(
            f"codec={spec!r}: the density after 'topk:' must be a number above 0 and at most 1, such as 'topk:0.001'."
        )
    return TopKCodec(density)
