"""Where, when and which: every answer with every other, and every codec, as a user asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import squall
from squall.consistency import CodecHook
from squall.sparsity import SET, DeepCompression, RigL, SparseMomentum, Static

from .table import Table

NUM_RANKS = 2
CLEAR = (MisconfigurationException, ValueError, TypeError)
WHERE: dict[str, dict[str, Any]] = {
    "whole": {}, "columns": {"num_columns": 2}, "tiles": {"num_tiles": 2}, "hybrid": {"scheme": "c"},
}  # fmt: skip
WHEN = ("every step", "Downpour", "Hogwild", "Sandblaster")
WHICH: dict[str, Callable[[], Any] | None] = {
    "all weights": None,
    "SparseMomentum": lambda: SparseMomentum(density=0.5),
    "RigL": lambda: RigL(density=0.5, update_every=1, stop=1.0),
    "SET": lambda: SET(density=0.5),
    "Static": lambda: Static(density=0.5),
    "DeepCompression": lambda: DeepCompression(
        density=0.5, bits=3, train=1, retrain=1, share=1, num_rounds=1, filename=None
    ),
}
CODECS = ("fp32", "bf16", "int8", "1bit", "topk")
MASKED_CODECS = ("fp32", "int8", "topk")  # under masks: one codec that loses for good, one that makes up for it
PAIRS = Table("pairs", "where, when", tuple(f"{where}, {when}" for where in WHERE for when in WHEN), tuple(WHICH))

# What the cells of this session said: {(row, column): verdict}
seen_pairs: dict[tuple[str, str], str] = {}


def ask(where: str, when: str, which: str, codec: str) -> tuple[Any, list[Callback]]:
    """What a user passes to the Trainer as ``strategy`` and ``callbacks``."""
    make = WHICH[which]
    options = {} if make is None else {"sparsity": make()}
    if when != "every step":
        strategy: Any = {
            "Downpour": squall.DownpourStrategy,
            "Hogwild": squall.HogwildStrategy,
            "Sandblaster": squall.SandblasterStrategy,
        }[when]
        return strategy(**WHERE[where], **options, **({} if codec == "fp32" else {"codec": codec})), []
    if where == "hybrid":
        return squall.HybridParallelStrategy(**WHERE[where], zero_stage=None, codec=codec, **options), []
    callbacks: list[Callback] = [] if codec == "fp32" else [CodecHook(codec)]
    if where == "whole":
        return (squall.SparseStrategy(inner="ddp", **options) if options else "ddp"), callbacks
    placed: Any = {"columns": squall.ColumnParallelStrategy, "tiles": squall.SpatialParallelStrategy}[where]
    return placed(**WHERE[where], **options), callbacks


class Small(LightningModule):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)
        )
        self.num_dead = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy: Any = self.trainer.strategy
        with torch.no_grad():
            for name, mask in getattr(strategy, "masks", {}).items():
                self.num_dead += int((~mask).sum())
                assert not (self.get_parameter(name) * ~mask).any(), f"{name} has weights where none lives"
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(where: str, when: str, which: str, codec: str, path: str) -> str | dict[str, Any]:
    """Train for three epochs of a batch, or two; returns the clear error that came before, or what it came to."""
    generator = torch.Generator().manual_seed(5)
    samples = TensorDataset(torch.randn(8, 1, 4, 4, generator=generator), torch.arange(8) % 3)
    module = Small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    try:
        strategy, callbacks = ask(where, when, which, codec)
        trainer = Trainer(
            strategy=strategy, callbacks=callbacks, accelerator="cpu", devices=NUM_RANKS, max_epochs=3, logger=False,
            default_root_dir=path, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(samples, batch_size=4))
    except CLEAR as error:
        assert module._trainer is None or module.trainer.global_step == 0, "the error came after a step"
        return str(error)
    assert trainer.global_step >= (1 if when == "Sandblaster" else 2)  # there an epoch is an evaluation
    after = module.state_dict()
    assert all(type(value) is Tensor and value.shape == before[name].shape for name, value in after.items())
    assert any(not torch.equal(value, before[name]) for name, value in after.items()), "nothing was trained"
    masks = getattr(trainer.strategy, "masks", {})
    assert bool(masks and (module.num_dead or which == "DeepCompression")) == (which != "all weights")
    for name, mask in masks.items():
        assert not after[name][~mask].any(), f"{name} has weights where none lives"
    if codec != "fp32":
        assert _codec_of(trainer) == codec
    return {"weights": {name: value.clone() for name, value in after.items()}, "masks": dict(masks)}


def _codec_of(trainer: Trainer) -> str:
    """The codec that has coded something."""
    strategy: Any = trainer.strategy
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, CodecHook):
            assert callback.state.bytes_per_step
            return callback.state.codec.name
    if isinstance(strategy, squall.HybridParallelStrategy):
        assert strategy._codes is not None
        assert strategy._codes.bytes_per_step
        return strategy._codes.codec.name
    return str(strategy.codec)
