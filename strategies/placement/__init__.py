"""Where each layer lives: layouts as data, and a module placed by them.

``partition`` (intervals) and ``columns`` (ranks) are the ground; ``exchange`` moves channels between ranks with
gradients; ``tensor`` carries the layout through arbitrary code, by the rules in ``rules/``; ``layout`` derives the
table and ``module`` applies it.
"""

from .columns import Columns, Crossing, DryColumns
from .layout import LayerPlacement, Layout, derive_layout, plan_layout, read_layout
from .module import place, unplace, whole_state_dict
from .partition import Partition
from .tensor import ColumnParameter, ColumnTensor, Spec

__all__ = [
    "ColumnParameter",
    "ColumnTensor",
    "Columns",
    "Crossing",
    "DryColumns",
    "LayerPlacement",
    "Layout",
    "Partition",
    "Spec",
    "derive_layout",
    "place",
    "plan_layout",
    "read_layout",
    "unplace",
    "whole_state_dict",
]
