"""``topk``: the few numbers of largest magnitude, each with its place.

The sparse exchange of Deep Gradient Compression (Lin et al. 2018) without its corrections of momentum, which belong to
the optimizer: what isn't sent stays in the residual until it is large enough. On a CPU a compiled kernel finds them in
one pass over memory (:mod:`squall.kernels.top_k`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from squall.kernels.top_k import encode_top_k

from .codec import Codec, check_length, keep_loss, load, store

STRIDE = 37
"""One number in so many is looked at for a threshold; a prime, so that it isn't a row's or a kernel's length."""


def threshold_rank(num_elements: int, k: int) -> int:
    """Which of the numbers looked at, the largest being 1, is one that a bit more than ``k`` of all should reach.

    Returns:
        The rank; 0 where so few are looked at, or so many wanted, that all had better be searched.

    """
    share = k / STRIDE
    rank = math.ceil(1.1 * share + 4 * math.sqrt(share)) + 1
    return rank if rank <= -(-num_elements // STRIDE) // 2 else 0


def largest(magnitudes: Tensor, k: int) -> Tensor:
    """The places of the ``k`` largest magnitudes, ascending; of equal ones the first, as the kernel takes them.

    On a CPU ``torch.topk`` is slow for more than a few hundred of many. So, as in Deep Gradient Compression, a sample
    tells a threshold that a bit more than ``k`` should reach, and those alone are searched. Where fewer reach it, all
    are searched; the result is exact either way.

    Args:
        magnitudes: Shape (n,), not negative, no NaN.
        k: How many, 1 to n.

    """
    rank = threshold_rank(magnitudes.numel(), k)
    candidates = None
    if magnitudes.device.type == "cpu" and rank:
        sample = magnitudes[::STRIDE]
        threshold = sample.kthvalue(sample.numel() + 1 - rank).values
        reaching = (magnitudes >= threshold).nonzero().view(-1)
        candidates = reaching if reaching.numel() >= k else None
    searched = magnitudes if candidates is None else magnitudes[candidates]
    least = searched.topk(k, sorted=False).values.amin()
    # In order without a sort, which would take longer than all of the above for a tenth of the numbers.
    larger, equal = searched > least, searched == least
    places = (larger | (equal & (equal.cumsum(0) <= k - larger.sum()))).nonzero().view(-1)
    return places if candidates is None else candidates[places]


@dataclass(frozen=True)
class TopKCodec(Codec):
    """Places, int32 and ascending, then numbers, float32: 8 bytes for each of the numbers that are sent.

    NaN and infinities count as the largest. Where there are more of them than numbers sent, the rest is dropped, not
    kept; the receiver has been told by the others.

    Args:
        density: Which part of the numbers is sent, rounded up.

    """

    density: float = 0.01
    name = "topk"
    has_residual = True

    @property
    def spec(self) -> str:
        """What :func:`get_codec` makes an equal codec from."""
        return f"topk:{self.density!r}"

    def num_kept(self, num_elements: int) -> int:
        """How many of ``num_elements`` are sent."""
        if check_length(num_elements) > torch.iinfo(torch.int32).max:
            raise ValueError(f"num_elements={num_elements} has places that int32 can't hold; encode it in parts")
        # A product a hair above a whole number by rounding (0.07 * 100) still means that number.
        return max(1, math.ceil(self.density * num_elements * (1 - 1e-12)))

    def num_bytes(self, num_elements: int) -> int:
        """Say how many bytes the code takes: 8 for each number sent."""
        return 8 * self.num_kept(num_elements)

    def _encode(self, values: Tensor, out: Tensor, residual: Tensor | None) -> None:
        k = self.num_kept(values.numel())
        if encode_top_k(values, out, residual, k, STRIDE, threshold_rank(values.numel(), k)):
            return
        wanted = values.float() if residual is None else residual.add_(values)
        index = largest(wanted.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf), k)
        store(index.to(torch.int32), out[: 4 * k])
        store(wanted[index], out[4 * k :])
        if residual is not None:
            residual.index_fill_(0, index, 0.0)
            keep_loss(residual)

    def check(self, data: Tensor, num_elements: int) -> Tensor:
        """Read the places of a code, which must be inside of what is written by them: bytes may come from anywhere.

        Raises:
            ValueError: If they aren't.

        """
        index = load(data[: 4 * self.num_kept(num_elements)], torch.int32)
        valid = (index[0] >= 0) & (index[-1] < num_elements) & (index[1:] > index[:-1]).all()
        if not valid.item():
            raise ValueError(
                f"data is not a {self.spec} code of {num_elements} numbers: its places must ascend from 0 or more to "
                f"{num_elements - 1} or less"
            )
        return index

    def _decode(self, data: Tensor, out: Tensor) -> None:
        index = self.check(data, out.numel())
        out.zero_()
        out.index_copy_(0, index.long(), load(data[4 * len(index) :], torch.float32).to(out.dtype))
