"""Average the gradients of replicas: a few large messages, all under way at once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .columns import Ledger
from .tensor import local_view

_BUCKET_BYTES = 25 * 1024 * 1024


def average_gradients(module: nn.Module, group: dist.ProcessGroup, ledger: Ledger) -> None:
    """Average every gradient of ``module`` over the ranks of ``group``, in place.

    A parameter that got no gradient on some replica counts there as zero; one that got none anywhere is left alone.
    Averaging what is already equal changes nothing, so accumulated gradients may pass through more than once.
    """
    with local_view(), torch.no_grad():
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not trained:
            return
        used = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
        used = used.to(trained[0].device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
        grads = []
        for parameter, wanted in zip(trained, used.tolist(), strict=True):
            if wanted:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        buckets = [(bucket, _flatten_dense_tensors(bucket)) for bucket in _buckets(grads)]
        works = [dist.all_reduce(flat, group=group, async_op=True) for _, flat in buckets]
        num_replicas = dist.get_world_size(group)
        for (bucket, flat), work in zip(buckets, works, strict=True):
            assert work is not None
            work.wait()
            ledger.record("data-parallel gradients", flat.numel(), flat.element_size(), backward=True)
            flat /= num_replicas
            for grad, part in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                grad.copy_(part)


def _buckets(grads: list[Tensor]) -> list[list[Tensor]]:
    """Gradients of one type in order, cut where a bucket is full."""
    buckets: list[list[Tensor]] = []
    size = 0
    for grad in grads:
        if not buckets or size > _BUCKET_BYTES or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(grad)
        size += grad.numel() * grad.element_size()
    return buckets
