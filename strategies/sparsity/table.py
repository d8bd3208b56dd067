"""The table of layers that a sparse run prints when it begins."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from torch import Tensor, nn

from .layers import layer_name


def layer_table(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], title: str = "") -> Table:
    """Lay out which layers are sparse, and how.

    Args:
        parameters: All trainable parameters of a module, by name.
        masks: Of those that are sparse.
        title: Above the table.

    Returns:
        A line for each weight of two dimensions or more, one for all other parameters, and a sum.

    """
    table = Table(title=title, title_style="bold", show_footer=True)
    num_all, num_live, rest = 0, 0, 0
    lines = []
    for name, parameter in parameters.items():
        mask = masks.get(name)
        live = parameter.numel() if mask is None else int(mask.sum())
        num_all, num_live = num_all + parameter.numel(), num_live + live
        if mask is None and parameter.ndim < 2:
            rest += live
            continue
        density = f"{live / parameter.numel():.2%}" if mask is not None else "dense"
        shape = " x ".join(map(str, parameter.shape))
        lines.append((layer_name(name), shape, f"{parameter.numel():,}", f"{live:,}", density))
    if rest:
        lines.append(("biases, norms", "", f"{rest:,}", f"{rest:,}", "dense"))
    share = f"{num_live / num_all:.2%}" if num_all else "-"
    heads = ("layer", "shape", "weights", "live", "density")
    for head, foot in zip(heads, ("together", "", f"{num_all:,}", f"{num_live:,}", share), strict=True):
        table.add_column(head, footer=foot, justify="left" if head in ("layer", "shape") else "right")
    for line in lines:
        table.add_row(*line)
    return table
