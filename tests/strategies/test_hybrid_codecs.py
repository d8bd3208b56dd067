"""Codes under HybridParallelStrategy: what its averaging of gradients sends, and what a checkpoint has of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import squall
from squall.consistency import get_codec
from squall.placement import ColumnParameter
from tests.ranks import run

from .test_hybrid_parallel import BATCH, Net, _loader, _trainer

STEPS = 4


class Sent(Callback):
    """Notes what the strategy says that averaging has sent, a step."""

    def __init__(self) -> None:
        self.bytes: list[float] = []
        self.num_replicated = 0

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        crossings = {c.name: c for c in trainer.strategy.crossings}  # type: ignore[attr-defined]
        self.bytes.append(crossings["data-parallel gradients"].bytes_per_image * BATCH)
        self.num_replicated = sum(p.numel() for p in module.parameters() if not isinstance(p, ColumnParameter))


def _fit(path: str, codec: str, num_ranks: int, **options: Any) -> dict[str, Any]:
    module, sent = Net(), Sent()
    strategy = squall.HybridParallelStrategy(zero_stage=None, codec=codec)
    trainer = _trainer(path, strategy, num_ranks, callbacks=[sent], **options)
    trainer.fit(module, _loader(STEPS * BATCH * num_ranks, BATCH, num_ranks))
    weights = torch.cat([value.flatten() for value in module.state_dict().values()])
    everybody = [torch.empty_like(weights) for _ in range(num_ranks)]
    dist.all_gather(everybody, weights)
    assert all(torch.equal(weights, other) for other in everybody)
    return {"weights": weights, "bytes": sent.bytes, "num_replicated": sent.num_replicated}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_agree_and_send_codes(tmp_path: Path, num_ranks: int) -> None:
    plain, *_ = run(num_ranks, _fit, str(tmp_path), "fp32", num_ranks, lightning=True)
    rate = {"bf16": 0.02, "int8": 0.05, "1bit": 1.0, "topk": 1.0}
    for codec, most in rate.items():
        coded, *_ = run(num_ranks, _fit, str(tmp_path), codec, num_ranks, lightning=True)
        error = (coded["weights"] - plain["weights"]).norm() / plain["weights"].norm()
        assert 0 < error < most, codec
        expected = (num_ranks - 1) * get_codec(codec).num_bytes(coded["num_replicated"])
        assert coded["bytes"] == pytest.approx([expected] * STEPS)
        assert coded["bytes"][0] < plain["bytes"][0]


def test_codes_are_those_of_exact_numbers_where_these_are_sent(tmp_path: Path) -> None:
    """The whole path with a codec that loses nothing: to the bit what the codes of DDP's gradients make."""
    plain, *_ = run(2, _fit, str(tmp_path), "fp32", 2, lightning=True)
    exact, *_ = run(2, _fit, str(tmp_path), "fp64", 2, lightning=True)
    torch.testing.assert_close(exact["weights"], plain["weights"], rtol=1e-12, atol=1e-14)


def _interrupted(path: str) -> tuple[list[Tensor], list[Tensor]]:
    module = Net()
    first = _trainer(path, squall.HybridParallelStrategy(zero_stage=None, codec="1bit"), 2)
    first.fit(module, _loader(STEPS * BATCH * 2, BATCH, 2))
    first.save_checkpoint(f"{path}/owed.ckpt")
    owed = torch.load(f"{path}/owed.ckpt", weights_only=True)["codec"]["residuals"]
    strategy = squall.HybridParallelStrategy(zero_stage=None, codec="1bit")
    again = _trainer(path, strategy, 2, max_epochs=1)
    again.fit(Net(), _loader(STEPS * BATCH * 2, BATCH, 2), ckpt_path=f"{path}/owed.ckpt", weights_only=False)
    assert strategy._codes is not None
    return owed, strategy._codes.state_dict()["residuals"]


def test_a_checkpoint_has_what_codes_have_lost(tmp_path: Path) -> None:
    for owed, loaded in run(2, _interrupted, str(tmp_path), lightning=True):
        assert len(owed) == 4
        assert all(residual.any() for residual in owed)
        for before, after in zip(owed, loaded, strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"codec": "gzip"}, "gzip"), ({"codec": "int8", "ddp_comm_hook": print}, "two ways to send gradients")],
)
def test_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=words):
        squall.HybridParallelStrategy(**options)


def _partitioned(path: str) -> str:
    trainer = _trainer(path, squall.HybridParallelStrategy(zero_stage=2, codec="int8"), 2)
    with pytest.raises(MisconfigurationException) as raised:
        trainer.fit(Net(), _loader(BATCH * 2, BATCH, 2))
    return str(raised.value)


def test_deepspeed_can_t(tmp_path: Path) -> None:
    for message in run(2, _partitioned, str(tmp_path), lightning=True):
        assert "zero_stage=2 is not possible: codec='int8' codes gradients" in message
