"""What is cut off gradients: those of dead weights, until the optimizer wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor


class Cut:
    """What was cut off a gradient.

    Args:
        gradient: What is left of it, on the parameter.
        off: The gradient of dead weights.

    """

    def __init__(self, gradient: Tensor, off: Tensor) -> None:
        self.gradient, self.off = gradient, off
        self.norm = gradient.norm()
        self.grows = False  # another backward pass has begun to add to the gradient
        self.is_fed = False  # the optimizer has been given it
        self._version = gradient._version

    def is_over(self, gradient: Tensor | None) -> bool:
        """Whether the parameter's gradient is another one now."""
        return gradient is not self.gradient

    def is_zeroed(self) -> bool:
        """Whether the gradient has been set to zero in its place."""
        return self.gradient._version != self._version and not bool(self.gradient.any())


def rescaled(
    cuts: Mapping[str, Cut | None], measure: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
) -> dict[str, Tensor]:
    """Scale what was cut off gradients as the rest was since: unscaled, or clipped.

    Where the rest is zero, which tells nothing, the other layers do.

    Args:
        cuts: Of layers of one optimizer, by name; None where nothing was cut off.
        measure: Makes norms of whole gradients of those of this rank's parts, as ``Parts.norms`` does.

    Returns:
        The gradients of dead weights, where there are any; infinite ones and NaN are 0.

    """
    found = {name: cut for name, cut in cuts.items() if cut is not None}
    known = [None if cut is None else cut.norm for cut in cuts.values()]
    norms = measure([*known, *(None if cut is None else cut.gradient.norm() for cut in cuts.values())])
    if not found:
        return {}
    before, now = dict(zip(cuts, norms, strict=False)), dict(zip(cuts, norms[len(cuts) :], strict=True))
    all_before, all_now = _norm(before.values()), _norm(now.values())
    common = torch.where(all_before > 0, all_now / all_before, 1.0)
    off = {}
    for name, cut in found.items():
        norm, norm_now = before[name], now[name]
        assert norm is not None
        assert norm_now is not None
        scale = torch.where(norm > 0, norm_now / norm, common.to(norm)).to(cut.off.dtype)
        off[name] = torch.nan_to_num(cut.off * scale, nan=0.0, posinf=0.0, neginf=0.0)
    return off


def _norm(norms: Iterable[Tensor | None]) -> Tensor:
    there = [norm for norm in norms if norm is not None]
    together: Tensor = torch.stack([norm.to(there[0].device, torch.float32) for norm in there]).norm()
    return together
