"""The codecs in synchronous training: a communication hook for DistributedDataParallel.

Each rank sends the code of its own gradients to all others, and all decode the same codes and average them in the same
order, so that all ranks end with the same bits. An all-gather of codes grows with the number of ranks where an
all-reduce doesn't, so a codec pays where links are slow and ranks are few, or codes are small.
"""

# Not ``from __future__ import annotations``: DDP compares a hook's annotations with classes, and refuses strings.
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .codecs import Codec, get_codec
from .residuals import Residuals

# Torch 2.13 has a new name for it and warns of the old one.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class CodecHookState:
    """What :func:`codec_hook` keeps between steps.

    Args:
        codec: A codec or its name, as :func:`squall.consistency.get_codec` takes them.
        process_group: The ranks that average; all by default. It must be that of the DistributedDataParallel.

    Attributes:
        codec: The codec.
        bytes_per_step: Bytes that this rank sent in the last complete step: its codes, to each of the other ranks.

    """

    def __init__(self, codec: str | Codec = "int8", process_group: dist.ProcessGroup | None = None) -> None:
        self.codec = get_codec(codec)
        self.process_group = process_group
        self.bytes_per_step = 0
        self._num_bytes = 0
        self._residuals = Residuals()

    def _residual(self, bucket: dist.GradBucket) -> Tensor | None:
        if not self.codec.has_residual:
            return None
        return self._residuals.of_bucket(bucket.index(), bucket.parameters(), bucket.buffer().device)

    def _count(self, num_bytes: int, is_last: bool) -> None:
        self._num_bytes += num_bytes
        if is_last:
            self.bytes_per_step, self._num_bytes = self._num_bytes, 0

    def state_dict(self) -> dict[str, Any]:
        """What this rank's codes have lost so far. Ranks differ; for one checkpoint of all see `mean_state_dict`."""
        return {"codec": self.codec.spec, "residuals": self._residuals.to_list()}

    def mean_state_dict(self) -> dict[str, Any]:
        """The mean of all ranks' `state_dict`, for a checkpoint that one rank writes; all ranks must call it.

        What matters to the averaged gradients is the mean of what the ranks owe them, so nothing is lost when each
        continues with the mean, and any number of ranks can. Their codes are others than without the interruption.
        """
        residuals = self._residuals.to_list()
        if residuals:
            flat = torch.cat(residuals)
            if dist.get_backend(self.process_group) == "nccl":
                flat = flat.cuda()  # what was loaded and not used yet is where the checkpoint was read to
            dist.all_reduce(flat, group=self.process_group)
            flat.div_(dist.get_world_size(self.process_group))
            residuals = [piece.clone() for piece in flat.split([piece.numel() for piece in residuals])]
        return {"codec": self.codec.spec, "residuals": residuals}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` or a `mean_state_dict`, of this codec or another.

        Call it before the first step of a DistributedDataParallel, as when training is resumed.
        """
        self._residuals.from_list(state_dict["residuals"])


def _mean_of_codes(codec: Codec, codes: Tensor, out: Tensor) -> None:
    """Decode each rank's code and average them in the order of the ranks.

    Args:
        codec: What they were encoded with.
        codes: Shape (ranks, bytes).
        out: Flat; overwritten.

    """
    # Half precision is summed in float32, or the mean would be rounded once for each rank.
    total = out if out.dtype in (torch.float32, torch.float64) else torch.empty_like(out, dtype=torch.float32)
    codec.decode(codes[0], total)
    if len(codes) > 1:
        one = torch.empty_like(total)
        for code in codes[1:]:
            codec.decode(code, one)
            total.add_(one)
        total.div_(len(codes))
    if total is not out:
        out.copy_(total)


def codec_hook(state: CodecHookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients by exchanging their codes.

    With Torch, on gloo, NCCL or any other backend that gathers bytes::

        ddp.register_comm_hook(CodecHookState("int8"), codec_hook)

    With Lightning on GPUs::

        Trainer(strategy=DDPStrategy(ddp_comm_hook=codec_hook, ddp_comm_state=CodecHookState("int8")))

    On CPUs Lightning's DDPStrategy takes these two arguments and doesn't use them, without a word. The callback
    :class:`squall.consistency.CodecHook` works on both.

    Args:
        state: The codec, and what it keeps.
        bucket: Gradients of this rank, which become their mean over all ranks.

    """
    gradients, codec = bucket.buffer(), state.codec
    group = dist.group.WORLD if state.process_group is None else state.process_group
    num_ranks = dist.get_world_size(group)
    code = torch.empty(codec.num_bytes(gradients.numel()), dtype=torch.uint8, device=gradients.device)
    codec.encode(gradients, code, state._residual(bucket))
    state._count(code.numel() * (num_ranks - 1), bucket.is_last())
    codes = code.new_empty(num_ranks * code.numel())
    work = _all_gather(codes, code, group=group, async_op=True)

    def decode(gathered: torch.futures.Future[Any]) -> Tensor:
        gathered.value()  # raises what the exchange raised
        with torch.no_grad():  # which the thread that calls this isn't in
            _mean_of_codes(codec, codes.view(num_ranks, -1), gradients)
        return gradients

    future: torch.futures.Future[torch.Tensor] = work.get_future().then(decode)
    return future
