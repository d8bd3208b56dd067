"""One cell: a feature's function on every rank of a strategy, and what it needs to be short."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from .table import FEATURES, STRATEGIES, Entry

NUM_CLASSES = 5
_OWN_METRICS = (
    "bytes/",
    "crossings/",
    "staleness/",
    "updates/",
    "queue/",
    "workers/",
    "lbfgs/",
    "portions/",
    "density/",
    "sparsity/",
)


@dataclass(frozen=True)
class Dealt:
    """Values of one sample a row, dealt out to the replicas in turn: replica r of R has rows r, r + R, ..."""

    rows: Tensor


@dataclass(frozen=True)
class Unlike:
    """In place of what can't be what one device has; the feature has checked what holds instead."""


@dataclass(frozen=True)
class Outcome:
    """What a rank has to say: what it observed, or the error that ended it.

    Args:
        observed: What must be equal under all strategies.
        kind: Class of the error, empty if there was none.
        message: Its text.
        num_batches: Training batches that were finished when it came.
        traceback: Where it came from.
    """

    observed: Mapping[str, Any]
    kind: str = ""
    message: str = ""
    num_batches: int = 0
    traceback: str = ""


class CountBatches(Callback):
    """How far training came."""

    num_batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        CountBatches.num_batches += 1


def network() -> nn.Sequential:
    """Convolutions with one group and two, odd channel counts, linear layers: 8 x 8 images to 5 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES),
    )  # fmt: skip


class Classifier(LightningModule):
    """A LightningModule that knows nothing of strategies."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = network() if net is None else net
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def samples(num: int, copies: int = 1) -> TensorDataset:
    """The first of an endless row of fixed samples, each ``copies`` times."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 3, 8, 8, generator=generator)[:num]
    y = torch.randint(NUM_CLASSES, (64,), generator=generator)[:num]
    return TensorDataset(x.repeat_interleave(copies, 0), y.repeat_interleave(copies, 0))


@dataclass
class Cell:
    """What a feature's function is given.

    Args:
        entry: The strategy.
        path: An empty folder, the same for all ranks.
    """

    entry: Entry
    path: Path
    last: Trainer | None = None

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    @property
    def num_replicas(self) -> int:
        return self.entry.num_replicas

    @property
    def replica(self) -> int:
        return self.rank * self.num_replicas // self.entry.num_ranks

    @property
    def has_queue(self) -> bool:
        """Whether samples are dealt out by a queue, which a checkpoint holds."""
        return self.entry.strategy in ("downpour", "hogwild", "sandblaster")

    @property
    def more_epochs(self) -> int:
        """What training takes longer where an epoch is an evaluation, and a step may take several."""
        return 4 if self.entry.strategy == "sandblaster" else 0

    @property
    def has_columns(self) -> bool:
        return self.entry.strategy == "column_parallel"

    @property
    def splits_weights(self) -> bool:
        """Whether a rank holds a part of some weights."""
        return self.entry.strategy in ("column_parallel", "hybrid_parallel")

    @property
    def shares_batches(self) -> bool:
        """Whether several ranks hold one replica of the module, and see the same batches."""
        return self.entry.strategy in ("column_parallel", "spatial_parallel")

    def strategy(self) -> Any:
        """What this column passes as ``Trainer(strategy=...)``."""
        return self.entry.strategy() if callable(self.entry.strategy) else self.entry.strategy

    def trainer(self, strategy: Any = None, **options: Any) -> Trainer:
        """A quiet Trainer of this strategy, two epochs in double precision unless ``options`` say otherwise."""
        defaults: dict[str, Any] = {
            "strategy": self.strategy() if strategy is None else strategy,
            "devices": self.entry.num_ranks,
            "accelerator": "cpu",
            "default_root_dir": str(self.path),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "max_epochs": 2 + self.more_epochs,
            "precision": "64-true",
        }
        self.scatter_seeds()
        options["callbacks"] = [CountBatches(), *options.get("callbacks", [])]
        self.last = Trainer(**{**defaults, **options})
        return self.last

    def scatter_seeds(self) -> None:
        """Start every rank's generators elsewhere, as in a script without seeds; the first rank's as one device's."""
        random.seed(3 + self.rank)
        np.random.seed(3 + self.rank)
        torch.manual_seed(3 + self.rank)

    def loader(
        self, num: int = 16, batch: int = 4, data: Dataset[Any] | None = None, **options: Any
    ) -> DataLoader[Any]:
        """Samples in order, in global batches of ``batch``, whatever the number of replicas."""
        assert batch % self.num_replicas == 0
        dataset = samples(num) if data is None else data
        if options.get("num_workers"):
            # As in a user's script; a pool's processes were spawned, and would spawn theirs.
            options["multiprocessing_context"] = "fork"
        if self.num_replicas > 1 and not options.get("shuffle"):
            # Lightning's own sampler for replicas shuffles whatever is trained on.
            options.setdefault("sampler", DistributedSampler(dataset, self.num_replicas, self.replica, shuffle=False))
        return DataLoader(dataset, batch_size=batch // self.num_replicas, **options)

    def fit(self, module: LightningModule, **options: Any) -> dict[str, Any]:
        """Train and validate; returns what must be equal everywhere."""
        trainer = self.trainer(**options)
        trainer.fit(module, self.loader(), self.loader(8))
        return self.after(trainer, module)

    def barrier(self) -> None:
        """Wait for all ranks, while their process group lives."""
        if self.has_queue:
            assert self.last is not None
            self.last.strategy.barrier()
        elif self.entry.num_ranks > 1:
            torch.distributed.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """The average over all ranks, while their process group lives."""
        if self.has_queue:
            assert self.last is not None
            return self.last.strategy.reduce(value, reduce_op="mean")
        if self.entry.num_ranks > 1:
            torch.distributed.all_reduce(value)
        return value / self.entry.num_ranks

    def after(self, trainer: Trainer, module: nn.Module) -> dict[str, Any]:
        """Weights, metrics and counters after a run."""
        state = weights(module)
        masks = getattr(trainer.strategy, "masks", {})
        assert not (masks and all(mask.all() for mask in masks.values())), "nothing is sparse"
        for name, mask in masks.items():
            if name in state:
                assert not state[name][~mask].any(), f"{name} has weights where none lives"
        return {
            "weights": state,
            "metrics": metrics(trainer),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
        }


def rest_of(
    cell: Cell, resumed: Mapping[str, Any], straight: Mapping[str, Any], rtol: float = 1e-9
) -> Mapping[str, Any]:
    """What a run resumed in mid-epoch must be: one device begins with that epoch's first samples again; a queue knows
    which are left, so the run ends as if it had not been interrupted."""
    if not cell.has_queue:
        return resumed
    if cell.entry.exact:
        for key, value in straight["weights"].items():
            torch.testing.assert_close(resumed["weights"][key], value, rtol=rtol, atol=1e-2 * rtol)
    assert resumed["steps"] == straight["steps"]
    return {"weights": Unlike(), "metrics": Unlike(), **{key: Unlike() for key in resumed}}


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, which must be whole and plain by now."""
    state = {}
    for key, value in module.state_dict().items():
        assert type(value) is Tensor, f"{key} is a {type(value).__name__}"
        state[key] = value.clone()
    return state


def metrics(trainer: Trainer) -> dict[str, float]:
    """What was logged, but for what a strategy logs about itself."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if not key.startswith(_OWN_METRICS)}


def warned(caught: list[warnings.WarningMessage], text: str) -> bool:
    """Whether a warning that contains ``text`` was given."""
    return any(text in str(warning.message) for warning in caught)


def execute(feature_name: str, strategy_name: str, path: str) -> Outcome:
    """Run one cell on this rank."""
    from . import features  # noqa: F401  (fills the table)

    entry = next(entry for entry in STRATEGIES if entry.name == strategy_name)
    # Data loaders start processes, which a pool's daemon may not do; it ends them by itself.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    CountBatches.num_batches = 0
    interrupt = signal.getsignal(signal.SIGINT)
    torch.manual_seed(1)  # what a cell draws before it builds a module must not hang on the cells before it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            observed = FEATURES[feature_name].run(Cell(entry, Path(path)))
    except AssertionError:
        raise
    except Exception as error:
        return Outcome({}, type(error).__name__, str(error), CountBatches.num_batches, traceback.format_exc())
    finally:
        signal.signal(signal.SIGINT, interrupt)
        torch.set_default_dtype(torch.float32)
    return Outcome(observed)
