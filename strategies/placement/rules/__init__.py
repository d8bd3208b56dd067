"""What each torch function does to split tensors, a file for each kind of function.

Most rules are for columns, some for all that is split; those in ``windows``, ``untied`` and ``tile_*`` are for tiles.

A handler that returns ``NotImplemented`` has the arguments gathered, so a rule only ever makes things faster.
"""

from . import (
    attributes,
    channelwise,
    elementwise,
    foreach,
    layers,
    norms,
    random,
    shapes,
    tile_norms,
    tile_shapes,
    untied,
    windows,
)

__all__ = [
    "attributes",
    "channelwise",
    "elementwise",
    "foreach",
    "layers",
    "norms",
    "random",
    "shapes",
    "tile_norms",
    "tile_shapes",
    "untied",
    "windows",
]
