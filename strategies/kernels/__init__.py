"""The hot loops, a folder each, behind functions that look like Torch's.

A kernel's function has its folder's name, and the function is what this package exports:
``squall.kernels.local_response_norm`` is callable. ``from squall.kernels.local_response_norm import ...`` still reaches
into the folder.
"""

from . import native
from .add_and_step.function import add_and_step as add_and_step
from .block_codes.function import decode_int8 as decode_int8
from .block_codes.function import decode_signs as decode_signs
from .block_codes.function import encode_int8 as encode_int8
from .block_codes.function import encode_signs as encode_signs
from .local_response_norm.function import local_response_norm as local_response_norm
from .locally_connected.function import locally_connected2d as locally_connected2d
from .locally_connected.function import locally_connected_transpose2d as locally_connected_transpose2d
from .max_pool.function import max_pool2d as max_pool2d
from .shard_update.function import shard_update as shard_update
from .sparse_conv.function import sparse_conv2d as sparse_conv2d
from .sparse_linear.function import sparse_linear as sparse_linear
from .sparse_linear.function import sparse_linear_live as sparse_linear_live
from .top_k.function import encode_top_k as encode_top_k

__all__ = [
    "add_and_step",
    "available",
    "decode_int8",
    "decode_signs",
    "encode_int8",
    "encode_signs",
    "encode_top_k",
    "local_response_norm",
    "locally_connected2d",
    "locally_connected_transpose2d",
    "max_pool2d",
    "shard_update",
    "sparse_conv2d",
    "sparse_linear",
    "sparse_linear_live",
]


def available() -> dict[str, str]:
    """Tell which path serves each kernel in this installation.

    Returns:
        A kernel's name to its path: ``"avx512"``, ``"avx2"`` or ``"plain"`` for the compiled one with these
        instructions, ``"torch"`` for Torch operations, which run wherever Torch does.

    Example:
        >>> available()["local_response_norm"] in ("avx512", "avx2", "plain", "torch")
        True

    """
    names = (name for name in __all__ if name != "available")
    return {name: "torch" if name.startswith("locally_connected") else native.isa() for name in names}
