"""What is cut off gradients: those of dead weights, until the optimizer wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def rescaled(cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """Scale what was cut off gradients as the rest was since: unscaled, or clipped.

    Where the rest is zero, which tells nothing, the other layers do.

    Args:
        cuts: Of layers of one optimizer, by name.

    Returns:
        The gradients of dead weights; infinite ones and NaN are 0.

    """
    if not cuts:
        return {}
    now = {name: cut.gradient.norm() for name, cut in cuts.items()}
    all_before, all_now = _norm([cut.norm for cut in cuts.values()]), _norm(list(now.values()))
    common = torch.where(all_before > 0, all_now / all_before, 1.0)
    off = {}
    for name, cut in cuts.items():
        scale = torch.where(cut.norm > 0, now[name] / cut.norm, common.to(cut.norm)).to(cut.off.dtype)
        off[name] = torch.nan_to_num(cut.off * scale, nan=0.0, posinf=0.0, neginf=0.0)
    return off


def _norm(norms: Sequence[Tensor]) -> Tensor:
    together: Tensor = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).norm()
    return together
