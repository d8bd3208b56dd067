"""What coding a tensor came to, in the figures of Deep Compression's tables."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from squall.sparsity.report import TensorStatistics

from . import positions
from .ways import SHARED, SPARSE, Counted, Words


def statistics_of(
    name: str,
    words: Words,
    places: positions.Positions,
    counted: Counted | None,
    layout: int,
    parts: tuple[bytes, bytes, bytes],
    num_bytes: int,
    gap_bits: int | None,
) -> TensorStatistics:
    """Work out the figures of a coded tensor.

    Args:
        name: Its key.
        words: Its elements.
        places: Where they aren't zero.
        counted: The values there are, and how often each, if these are few.
        layout: How it is coded.
        parts: The bytes of its positions, of its codebook, and of its codes or values.
        num_bytes: All its bytes.
        gap_bits: Bits of an index before it is coded; None: those that take the fewest.

    Returns:
        The figures.

    """
    index_bits_coded, weight_bits_coded = _split(len(parts[0]), len(parts[2]), layout, words.size, counted)
    num_nonzero = max(len(places), 1)
    weight_bits = dense_bits = 8 * words.itemsize
    num_codebook_bytes = 0
    if layout & SHARED and counted is not None:
        num_values, num_codebook_bytes = len(counted[0]), counted[0].nbytes
        weight_bits = max(num_values - 1, 0).bit_length()
        dense_bits = max(num_values - (len(places) == words.size), 0).bit_length()
    index_bits, uncoded_bits = positions.uncoded(places, words.size, weight_bits, dense_bits, gap_bits)
    return TensorStatistics(
        name,
        words.size,
        len(places),
        words.nbytes,
        num_bytes,
        uncoded_bits / 8 + num_codebook_bytes,
        weight_bits if len(places) else 0,
        weight_bits_coded / num_nonzero if len(places) else 0.0,
        index_bits if len(places) else 0,
        index_bits_coded / num_nonzero if len(places) else 0.0,
    )


def _split(
    num_index_bytes: int, num_value_bytes: int, layout: int, num_weights: int, counted: Counted | None
) -> tuple[float, float]:
    """Bits of positions and of values. Where one code holds both, each has its share of the entropy."""
    bits = 8.0 * num_index_bytes, 8.0 * num_value_bytes
    if layout & SPARSE or counted is None:
        return bits
    counts = counted[1]
    num_nonzero = int(counts.sum())
    of_places = _entropy(np.array([num_nonzero, num_weights - num_nonzero]))
    of_all = of_places + _entropy(counts)
    share = of_places / of_all if of_all else 0.0
    return share * bits[1], (1 - share) * bits[1]


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())
