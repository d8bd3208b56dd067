"""Where pieces of parameters lie in what is pushed and fetched, and the coding of pushes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squall.kernels import add_and_step

from .codecs import get_codec
from .codecs.codec import Codec
from .memory import Segment
from .plan import Plan, Unit


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements of a parameter that are neighbours in the mailbox, too."""

    parameter: int
    start: int
    stop: int
    shard: int
    offset: int

    def of(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """The piece, in what its shard is sent or has sent, as bytes."""
        end = self.offset + (self.stop - self.start) * dtype.itemsize
        return data[self.offset : end].view(dtype)


def find_pieces(plan: Plan, offset_of: Callable[[Unit], int]) -> list[Piece]:
    """Join units that are neighbours both in a parameter and where ``offset_of`` says."""
    pieces: list[Piece] = []
    for shard, slice_ in enumerate(plan.slices):
        for unit in slice_.units:
            offset = offset_of(unit)
            last = pieces[-1] if pieces else None
            size = unit.info.dtype.itemsize
            if (
                last is not None
                and (last.parameter, last.shard, last.stop) == (unit.parameter, shard, unit.start)
                and last.offset + (last.stop - last.start) * size == offset
            ):
                pieces[-1] = Piece(last.parameter, last.start, unit.stop, shard, last.offset)
            else:
                pieces.append(Piece(unit.parameter, unit.start, unit.stop, shard, offset))
    return pieces


Runs = Sequence[tuple[int, int, int]]
"""Of a parameter that a rank holds a part of: where neighbouring elements begin in the whole, where they end there, and
where they begin in the part; in order."""


@dataclass(frozen=True)
class Part:
    """What one of several ranks, which hold a replica between them, has to do with each parameter.

    Args:
        held: What it holds, and so fetches; None for all of it.
        pushed: What it pushes: what it holds, unless others hold the same.

    """

    held: tuple[Runs | None, ...]
    pushed: tuple[Runs | None, ...]


def cut_pieces(plan: Plan, pieces: Sequence[Piece], runs_of: Sequence[Runs | None] | None) -> list[Piece]:
    """The pieces of a part. Where they begin and stop is counted in the part, where they lie stays what it was.

    Args:
        plan: All slices.
        pieces: Of whole parameters.
        runs_of: Of each parameter, what belongs to the part; None for all of it, or all of them.

    """
    if runs_of is None:
        return list(pieces)
    cut: list[Piece] = []
    for piece in pieces:
        runs = runs_of[piece.parameter]
        if runs is None:
            cut.append(piece)
            continue
        size = plan.parameters[piece.parameter].dtype.itemsize
        for start, stop, local in runs:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                begin = local + first - start
                offset = piece.offset + (first - piece.start) * size
                cut.append(Piece(piece.parameter, begin, begin + last - first, piece.shard, offset))
    return cut


def flat(gradient: Tensor) -> Tensor:
    """A gradient as a row of numbers."""
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return dense.detach().reshape(-1)


def num_residuals(plan: Plan) -> int:
    """Numbers that one worker's codes may owe."""
    return sum(info.num_elements for info in plan.parameters)


def residuals_in(plan: Plan, memory: Tensor) -> Iterator[tuple[Unit, Tensor]]:
    """Where each unit's residual lies: parameter after parameter, however these are cut."""
    starts = [0]
    for info in plan.parameters:
        starts.append(starts[-1] + info.num_elements)
    for slice_ in plan.slices:
        for unit in slice_.units:
            yield unit, memory[starts[unit.parameter] + unit.start : starts[unit.parameter] + unit.stop]


class Sums:
    """Sums of gradients, in memory that is kept: fresh pages cost as much as the sum itself.

    Args:
        num_parameters: How many there are.

    Example:
        >>> sums = Sums(2)
        >>> sums.add([torch.ones(2), None])
        >>> sums.add([torch.ones(2), None])
        >>> sums.take()
        [tensor([2., 2.]), None]

    """

    def __init__(self, num_parameters: int) -> None:
        self._memory: list[Tensor | None] = [None] * num_parameters
        self._begun = [False] * num_parameters

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients; None where there is none."""
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self._add(index, gradient)

    @torch.no_grad()
    def add_and_step(
        self,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        rates: Sequence[float],
        copies: Sequence[Tensor],
    ) -> None:
        """Add gradients, step weights by them, and copy these, in one pass over memory where that is possible.

        Args:
            gradients: None where there is none.
            weights: Changed in place.
            rates: Each one's learning rate.
            copies: Flat; become what the weights have become.

        """
        for index, (gradient, weight, rate, copy) in enumerate(zip(gradients, weights, rates, copies, strict=True)):
            if gradient is None:
                copy.copy_(weight.reshape(-1))
                continue
            sum_ = self._memory[index]
            alike = sum_ is not None and sum_.layout == gradient.layout and sum_.dtype == gradient.dtype == weight.dtype
            if sum_ is None or not alike:
                self._add(index, gradient)
                weight.add_(gradient.to(weight.dtype), alpha=-rate)
                copy.copy_(weight.reshape(-1))
            else:
                add_and_step(sum_, gradient, weight, rate, begins=not self._begun[index], copy=copy)
                self._begun[index] = True

    def _add(self, index: int, gradient: Tensor) -> None:
        sum_ = self._memory[index]
        if sum_ is None or sum_.layout != gradient.layout:  # a sparse gradient may be followed by a dense one
            begun = sum_ if self._begun[index] else None
            self._memory[index] = gradient.clone() if begun is None else begun + gradient
        elif self._begun[index]:
            sum_.add_(gradient)
        else:
            sum_.copy_(gradient)
        self._begun[index] = True

    def take(self) -> list[Tensor | None]:
        """The sums since the last time. They are good until more is added."""
        taken = [sum_ if begun else None for sum_, begun in zip(self._memory, self._begun, strict=True)]
        self._begun = [False] * len(self._begun)
        return taken


RESIDUALS = ".r"


def sum_residuals(prefix: str, plan: Plan) -> Tensor:
    """Add up what the codes of all workers of this host owe.

    Args:
        prefix: What names of the run's shared memory begin with on this host.
        plan: All slices.

    Returns:
        Shape (``num_residuals(plan)``,), float32.

    """
    total = torch.zeros(num_residuals(plan))
    for name in os.listdir("/dev/shm"):
        if name.startswith(f"{prefix}-w") and name.endswith(RESIDUALS):
            with contextlib.suppress(FileNotFoundError):  # of a worker that has just been let go
                total += Segment(name).tensor(torch.float32, 0, len(total))
    return total


class Encoder:
    """Writes the codes of pushes.

    Args:
        codec: How they are coded; with error feedback where the codec is meant for it.
        plan: All slices.
        runs_of: What is pushed of each parameter, as :func:`cut_pieces` takes it. Only ``"fp32"`` can be cut.

    """

    def __init__(self, codec: str, plan: Plan, runs_of: Sequence[Runs | None] | None = None) -> None:
        self._plan = plan
        self._codec = None if codec == "fp32" else get_codec(codec)
        self._residuals: dict[tuple[int, int], Tensor] = {}  # of each unit: what its codes have lost
        self._pieces: dict[int, list[Piece]] = {}
        if self._codec is None:
            for piece in cut_pieces(plan, find_pieces(plan, lambda unit: unit.code_offset), runs_of):
                self._pieces.setdefault(piece.shard, []).append(piece)

    def encode(self, rows: Sequence[Tensor | None], codes: Sequence[Tensor]) -> None:
        """Write the codes of one push.

        Args:
            rows: Each parameter's gradient, flat; None where there is none.
            codes: For each shard, where its code goes.

        """
        for shard, code in enumerate(codes):
            self.encode_for(shard, rows, code)

    def encode_for(self, shard: int, rows: Sequence[Tensor | None], code: Tensor) -> None:
        """Write the code of one shard's part of a push."""
        if self._codec is None:
            self._copy(rows, code, shard)
        else:
            self._code(self._codec, rows, code, shard)

    def _copy(self, rows: Sequence[Tensor | None], code: Tensor, shard: int) -> None:
        for piece in self._pieces.get(shard, ()):
            gradient = rows[piece.parameter]
            if gradient is not None:
                there = piece.of(code, self._plan.parameters[piece.parameter].dtype)
                there.copy_(gradient[piece.start : piece.stop])

    def _code(self, codec: Codec, rows: Sequence[Tensor | None], code: Tensor, shard: int) -> None:
        for unit in self._plan.slices[shard].units:
            gradient = rows[unit.parameter]
            if gradient is not None and unit.num_elements:
                codec.encode(gradient[unit.start : unit.stop].cpu(), unit.code_in(code), self._residual(unit))

    def _residual(self, unit: Unit) -> Tensor | None:
        if not self.has_residuals:
            return None
        if not self._residuals:
            self.keep_in(torch.zeros(num_residuals(self._plan)))
        return self._residuals[unit.parameter, unit.start]

    @property
    def has_residuals(self) -> bool:
        """Whether codes lose something that later ones make up for."""
        return self._codec is not None and self._codec.has_residual

    def keep_in(self, memory: Tensor) -> None:
        """Keep what codes have lost, and will lose, in certain memory.

        Args:
            memory: Shape (``num_residuals(plan)``,), float32, zeros.

        """
        for unit, there in residuals_in(self._plan, memory):
            known = self._residuals.get((unit.parameter, unit.start))
            if known is not None:
                there.copy_(known)
            self._residuals[unit.parameter, unit.start] = there

    def owe(self, rows: Sequence[Tensor]) -> None:
        """Add what an earlier run has lost.

        Args:
            rows: Of each parameter, flat.

        """
        if self.has_residuals:
            for slice_ in self._plan.slices:
                for unit in slice_.units:
                    residual = self._residual(unit)
                    if residual is not None:
                        residual.add_(rows[unit.parameter][unit.start : unit.stop])

    def take_back(self, rows: Sequence[Tensor | None], codes: Sequence[Tensor]) -> None:
        """Have lost nothing by codes that were written, but never applied. Arguments as of :meth:`encode`."""
        if self._codec is None or not self._codec.has_residual:
            return
        for slice_, code in zip(self._plan.slices, codes, strict=True):
            for unit in slice_.units:
                gradient, residual = rows[unit.parameter], self._residual(unit)
                if gradient is not None and residual is not None and unit.num_elements:
                    decoded = torch.empty_like(residual)
                    self._codec.decode(unit.code_in(code), decoded)
                    residual.add_(decoded).sub_(gradient[unit.start : unit.stop].cpu())
