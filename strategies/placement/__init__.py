"""Where each layer lives: layouts as data, and a module placed by them.

``partition`` (intervals) and ``columns`` (ranks) are the ground; ``exchange`` moves channels between ranks with
gradients; ``tensor`` carries the layout through arbitrary code, by the rules in ``rules/``; ``layout`` derives the
table, ``choosing`` weighs its lines by measured ``speeds``, and ``module`` applies it. The same for images in tiles:
``tiles``, windows over them in ``reach`` and ``fringes``, and the table in ``tiling``.
"""

from .choosing import choose_whole, flops_per_example
from .columns import Columns, Crossing, DryColumns
from .layout import LayerPlacement, Layout, derive_layout, plan_layout, read_layout
from .module import place, unplace, whole_state_dict
from .partition import Partition
from .speeds import Speeds, measure_speeds
from .tensor import ColumnParameter, ColumnTensor, Spec
from .tiles import Grid, TileParameter, TileSpec, TileTensor, make_grid
from .tiling import derive_tiles, place_tiles, plan_tiles

__all__ = [
    "ColumnParameter",
    "ColumnTensor",
    "Columns",
    "Crossing",
    "DryColumns",
    "Grid",
    "LayerPlacement",
    "Layout",
    "Partition",
    "Spec",
    "Speeds",
    "TileParameter",
    "TileSpec",
    "TileTensor",
    "choose_whole",
    "derive_layout",
    "derive_tiles",
    "flops_per_example",
    "make_grid",
    "measure_speeds",
    "place",
    "place_tiles",
    "plan_layout",
    "plan_tiles",
    "read_layout",
    "unplace",
    "whole_state_dict",
]
