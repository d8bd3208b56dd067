"""What compressing came to, tensor by tensor: the table of Deep Compression (Han et al. 2016, tables 2 to 5)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layers import layer_name

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TensorStatistics:
    """What one tensor came to. Bits are those of a weight that isn't zero; a negative zero is none.

    Args:
        name: Its key in the state_dict.
        num_weights: Elements.
        num_nonzero: Elements that aren't zero.
        num_dense_bytes: Of the tensor as it is.
        num_bytes: Of what stands in the file for it, tables, codebook and all.
        num_uncoded_bytes: Of indices, fillers, codes and codebook before they are coded (the paper's P + Q).
        weight_bits: Of its code before coding.
        coded_weight_bits: Of its code after coding, the coder's table included.
        index_bits: Of an index before coding; 0 if that takes more than storing the zeros.
        coded_index_bits: Of its index after coding, fillers and the coder's table included.

    Example:
        >>> TensorStatistics("fc6.weight", 1000, 90, 4000, 120).density
        0.09

    """

    name: str
    num_weights: int
    num_nonzero: int
    num_dense_bytes: int
    num_bytes: int
    num_uncoded_bytes: float = 0.0
    weight_bits: int = 0
    coded_weight_bits: float = 0.0
    index_bits: int = 0
    coded_index_bits: float = 0.0

    @property
    def density(self) -> float:
        """Share of the weights that aren't zero."""
        return self.num_nonzero / self.num_weights if self.num_weights else 1.0


@dataclass(frozen=True)
class CompressionReport:
    """What a state_dict came to.

    Args:
        tensors: A record a tensor; one that is tied to another isn't listed.
        num_file_bytes: Of the whole file.

    """

    tensors: Sequence[TensorStatistics]
    num_file_bytes: int

    @property
    def num_dense_bytes(self) -> int:
        """Bytes of all tensors as they are."""
        return sum(tensor.num_dense_bytes for tensor in self.tensors)

    @property
    def rate(self) -> float:
        """How many times smaller the file is than its tensors."""
        return self.num_dense_bytes / self.num_file_bytes

    def sentence(self, path: str | os.PathLike[str]) -> str:
        """Say it in one line.

        Args:
            path: Of the file.

        """
        return f"{self.num_dense_bytes:,} bytes of weights are {self.num_file_bytes:,} in {path}: {self.rate:.1f} x"

    def rows(self) -> list[dict[str, Any]]:
        """Lay out the paper's table.

        Returns:
            A row a tensor and one for all: bits of a weight and of an index before and after coding (H), and the size
            in percent of the dense one before (P+Q) and after it (P+Q+H); the last row's is that of the file.

        """
        rows = [self._row(tensor) for tensor in self.tensors]
        nonzero = sum(t.num_nonzero for t in self.tensors)
        weights, dense = sum(t.num_weights for t in self.tensors), self.num_dense_bytes

        def mean(name: str) -> float:
            return float(sum(getattr(t, name) * t.num_nonzero for t in self.tensors) / max(nonzero, 1))

        total = {
            "layer": "total",
            "weights": weights,
            "dens. %": 100 * nonzero / max(weights, 1),
            "w bits": mean("weight_bits"),
            "w bits H": mean("coded_weight_bits"),
            "idx": mean("index_bits"),
            "idx H": mean("coded_index_bits"),
            "P+Q %": 100 * sum(t.num_uncoded_bytes for t in self.tensors) / max(dense, 1),
            "P+Q+H %": 100 * self.num_file_bytes / max(dense, 1),
            "rate": self.rate,
        }
        return [*rows, total]

    @staticmethod
    def _row(tensor: TensorStatistics) -> dict[str, Any]:
        dense = max(tensor.num_dense_bytes, 1)
        return {
            "layer": layer_name(tensor.name),
            "weights": tensor.num_weights,
            "dens. %": 100 * tensor.density,
            "w bits": tensor.weight_bits,
            "w bits H": tensor.coded_weight_bits,
            "idx": tensor.index_bits,
            "idx H": tensor.coded_index_bits,
            "P+Q %": 100 * tensor.num_uncoded_bytes / dense,
            "P+Q+H %": 100 * tensor.num_bytes / dense,
            "rate": tensor.num_dense_bytes / max(tensor.num_bytes, 1),
        }

    def table(self) -> Table:
        """Lay out the paper's table for a console.

        Returns:
            A table that rich prints, 80 columns wide. H is what coding makes of the figure before it.

        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        *rows, total = self.rows()
        table = Table(title="Deep Compression", title_style="bold", show_footer=True, box=SIMPLE_HEAD, padding=0)
        heads = ("layer", "weights", "dens.", "bits", "H", "idx", "H", "P+Q %", "+H %", "rate")
        for head, value in zip(heads, total.values(), strict=True):
            table.add_column(head, _text(value), justify="left" if head == "layer" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(_text, row.values()))
        return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:,.{value < 1000:d}f}"
    if isinstance(value, int) and value >= 10_000:
        return f"{value / 1e6:,.1f}M" if value >= 1e6 else f"{value / 1e3:.0f}K"
    return str(value)
