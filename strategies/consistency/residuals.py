"""Error feedback under DistributedDataParallel: what belongs to a parameter, laid out as its bucket is.

A codec wants one flat residual for a flat bucket, but buckets don't last: DDP lays them out in the order of the
module's parameters, watches in which order gradients arrive in the first step, and lays them out anew for all later
ones. So what is kept belongs to parameters. A bucket's residual is their pieces in its order; when a bucket comes with
other parameters than last time, its residual is put together again from the pieces, wherever they were. Nothing is
dropped.

In a checkpoint parameters need names that another process would give them, and a hook sees no names. They are numbered
as the first step shows them, from the module's last parameter backwards: DDP's first layout has buckets from the
module's end to its start, and parameters from start to end within each. Where one bucket ends plays no part in that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor


class Residuals:
    """What codes have lost, by parameter, in float32."""

    def __init__(self) -> None:
        self._numbers: dict[Tensor, int] = {}
        self._pieces: dict[int, Tensor] = {}
        self._buckets: dict[int, tuple[list[int], Tensor]] = {}

    def of_bucket(self, index: int, parameters: Sequence[Tensor], device: torch.device) -> Tensor:
        """The flat residual of a bucket, which keeps what is written to it.

        Args:
            index: Which bucket; in the first step they must come in order.
            parameters: Those in it, in its order.
            device: Where it is.

        """
        unseen = [parameter for parameter in parameters if parameter not in self._numbers]
        if unseen and index == 0 and self._numbers:  # another module: the first one has been seen as a whole by now
            self.clear()
            unseen = list(parameters)
        for parameter in reversed(unseen):
            self._numbers[parameter] = len(self._numbers)
        numbers = [self._numbers[parameter] for parameter in parameters]
        before, flat = self._buckets.get(index, ([], torch.empty(0)))
        if before != numbers or flat.device != device:
            sizes = [parameter.numel() for parameter in parameters]
            flat = torch.zeros(sum(sizes), device=device)
            for number, piece in zip(numbers, flat.split(sizes), strict=True):
                self._move(number, piece)
            self._buckets[index] = (numbers, flat)
        return flat

    def _move(self, number: int, piece: Tensor) -> None:
        """Make ``piece`` the home of a parameter's residual."""
        before = self._pieces.get(number)
        if before is not None and before.numel() == piece.numel():
            piece.copy_(before)
        elif before is not None:
            rank_zero_warn(
                f"The loaded residual of parameter {number}, counted from the module's last, has {before.numel()} "
                f"elements where the parameter has {piece.numel()}. It is of another module, and is left out."
            )
        self._pieces[number] = piece

    def clear(self) -> None:
        """Forget everything."""
        self._numbers.clear()
        self._pieces.clear()
        self._buckets.clear()

    def to_list(self) -> list[Tensor]:
        """Copies of the residuals, the module's last parameter first; flat."""
        return [self._pieces[number].clone() for number in sorted(self._pieces)]

    def from_list(self, residuals: Sequence[Tensor]) -> None:
        """Start from such a list, as the first step of a new DistributedDataParallel finds out what is whose."""
        self.clear()
        self._pieces.update(enumerate(residuals))
