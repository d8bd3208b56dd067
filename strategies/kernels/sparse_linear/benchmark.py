"""How long sparse matrices take, beside what Torch offers for the same work, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .function import sparse_linear, sparse_weight_grad
from .op import sparse_linear_input_grad
from .packed import pack_codes, pack_live, pack_values
from .torch_path import csr

Work = Callable[[], object]


class Case(NamedTuple):
    """One piece of work, done in several ways.

    Args:
        work: What it is.
        alternative: The way that ours is compared with: dense, float32.
        ours: This package's.
        beside: Other ways, by name, that are shown.

    """

    work: str
    alternative: Work
    ours: Work
    beside: dict[str, Work]


class Row(NamedTuple):
    """What a case came to; times are medians in milliseconds.

    Args:
        work: What was done.
        alternative_ms: The dense way.
        ours_ms: This package's way.
        ratio: How many times as fast it is.
        beside_ms: Other ways, by name.

    """

    work: str
    alternative_ms: float
    ours_ms: float
    ratio: float
    beside_ms: dict[str, float]


def cases(
    num_rows: int = 4096, num_columns: int = 9216, density: float = 0.09, batches: tuple[int, ...] = (1, 32)
) -> Iterator[Case]:
    """Yield what is measured: AlexNet's largest layer, unless another one is asked for.

    Args:
        num_rows: Outputs.
        num_columns: Inputs.
        density: Live weights over all.
        batches: Samples at once; gradients are measured for the last one.

    Example:
        >>> [case.work for case in cases(4, 4, 0.5, (1,))][:2]
        ['4 -> 4 at 50 %, batch 1, 5-bit codebook', '4 -> 4 at 50 %, batch 1, float32 values']

    """
    generator = torch.Generator().manual_seed(0)
    shape = num_rows, num_columns
    mask = torch.rand(shape, generator=generator) < density
    weight = torch.randn(shape, generator=generator) * mask
    positions = mask.flatten().nonzero().squeeze(1)
    values = weight.flatten()[positions]
    codes = torch.randint(0, 32, (len(positions),), dtype=torch.uint8, generator=generator)
    coded = pack_codes(positions, codes, torch.randn(32, generator=generator), shape)
    packed, live = pack_live(positions, values, shape)
    half, rows = weight.bfloat16(), csr(pack_values(positions, values, shape))
    bias = torch.randn(num_rows, generator=generator)
    name = f"{num_columns} -> {num_rows} at {100 * density:g} %, batch"
    for batch in batches:
        x = torch.randn(batch, num_columns, generator=generator)
        x_half, bias_half, x_columns = x.bfloat16(), bias.bfloat16(), x.t().contiguous()
        beside: dict[str, Work] = {
            "bfloat16 dense": partial(F.linear, x_half, half, bias_half),
            "torch CSR": partial(torch.matmul, rows, x_columns),
        }
        for kind, matrix in (("5-bit codebook", coded), ("float32 values", packed)):
            dense, ours = partial(F.linear, x, weight, bias), partial(sparse_linear, x, matrix, bias)
            yield Case(f"{name} {batch}, {kind}", dense, ours, beside)
    grad = torch.randn(batch, num_rows, generator=generator)
    yield Case(
        f"{name} {batch}, gradient by inputs",
        lambda: grad @ weight,
        lambda: sparse_linear_input_grad(grad, *packed),
        {},
    )
    yield Case(
        f"{name} {batch}, gradient by weights",
        lambda: grad.t() @ x,
        lambda: sparse_weight_grad(x, grad, live.row_starts, live.columns),
        {},
    )


def measure(case: Case, rounds: int = 15, repeats: int = 3) -> Row:
    """Time the ways of a case in turns, so that what else the machine does meets all of them.

    Args:
        case: What to measure.
        rounds: How many turns.
        repeats: Calls that are timed a turn; one before them brings to the cache what fits.

    Example:
        >>> measure(next(cases(4, 4, 0.5, (1,))), rounds=1).ratio > 0
        True

    """
    ways: dict[str, Work] = {"": case.alternative, "ours": case.ours, **case.beside}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(rounds):
            for name, way in ways.items():
                way()
                for _ in range(repeats):
                    start = time.perf_counter()
                    way()
                    times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    alternative, ours = medians.pop(""), medians.pop("ours")
    return Row(case.work, alternative, ours, alternative / ours, medians)
