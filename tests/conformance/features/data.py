"""Data: what every column and replica sees; and what is logged of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from ..cell import NUM_CLASSES, Cell, Classifier, Unlike, metrics, samples, warned, weights
from ..table import SANDBLASTER, feature


@feature("sync_dist: mean and sum count every sample once")
def sync_dist(cell: Cell) -> dict[str, Any]:
    class Logging(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            right = (self(x).argmax(1) == y).double()
            self.log("accuracy", right.mean(), sync_dist=True)
            self.log("right", right.sum(), sync_dist=True, reduce_fx="sum")
            self.log("seen", torch.tensor(len(y)), sync_dist=True, reduce_fx="sum")
            self.log("largest", x.max(), sync_dist=True, reduce_fx="max")
            self.log("smallest", x.min(), sync_dist=True, reduce_fx="min")

    trainer = cell.trainer()
    (result,) = trainer.validate(Logging(), cell.loader(12), verbose=False)
    assert result["seen"] == 12
    return dict(result)


@feature("sync_dist in training, a step and an epoch")
def sync_dist_training(cell: Cell) -> dict[str, Any]:
    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
            self.log("seen", float(len(batch[1])), on_step=True, on_epoch=True, sync_dist=True, reduce_fx="sum")
            return loss

    observed = cell.fit(Logging())
    assert observed["metrics"]["seen_epoch"] == 16
    return observed


@feature("torchmetrics: counts are exact")
def torchmetrics(cell: Cell) -> dict[str, Any]:
    class Measured(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
            self.seen, self.mean = SumMetric(), MeanMetric()
            self.totals: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            scores = self(x)
            self.accuracy(scores, y)
            self.seen.update(torch.ones(len(y)))
            self.mean.update(x.square().mean(), len(y))
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            return F.cross_entropy(scores, y)

        def on_train_epoch_end(self) -> None:
            self.totals += [float(self.seen.compute()), float(self.mean.compute())]
            self.seen.reset()
            self.mean.reset()

    module = Measured()
    observed = cell.fit(module)
    # Without a process group, a metric of the training loop counts what its own rank has seen.
    assert module.totals[0] == 16 or not cell.entry.exact
    observed["metrics"].pop("accuracy_step")  # of each replica's own batch
    observed["metrics"].pop("accuracy")
    return {**observed, "totals": module.totals}


@feature("self.all_gather")
def all_gather(cell: Cell) -> dict[str, Any]:
    class Gathering(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            gathered = self.all_gather(batch[1])
            if self.trainer.world_size > 1:
                assert gathered.shape == (self.trainer.world_size, len(batch[1]))
                columns = self.trainer.world_size // cell.num_replicas
                gathered = gathered[::columns]  # one of each replica
            self.gathered = sorted(gathered.flatten().tolist())

    module = Gathering()
    cell.trainer().validate(module, cell.loader(4), verbose=False)
    return {"gathered": module.gathered}


@feature("shuffle=True: every sample once an epoch")
def shuffled(cell: Cell) -> dict[str, Any]:
    class Counting(Classifier):
        def on_train_epoch_start(self) -> None:
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch[0].sum((1, 2, 3)))
            return self.loss(batch)

        def on_train_epoch_end(self) -> None:
            if not cell.entry.exact:  # nobody has as many as another
                return
            gathered = self.all_gather(torch.cat(self.seen))
            columns = self.trainer.world_size // cell.num_replicas
            if self.trainer.world_size > 1:
                gathered = gathered[::columns]
            self.sums = gathered.flatten().sort().values

    module = Counting()
    trainer = cell.trainer()
    trainer.fit(module, cell.loader(16, shuffle=True))
    if not cell.entry.exact:
        epochs, done = divmod(trainer.strategy.report["num_samples"], 16)
        assert (epochs, done) == (2, 0) or cell.more_epochs, "the last evaluation may have begun"
        return {"sums": Unlike(), "steps": trainer.global_step}
    assert module.sums.unique().numel() == 16
    return {"sums": module.sums, "steps": trainer.global_step}


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Samples of one replica in order, without a length."""

    def __init__(self, replica: int, num_replicas: int) -> None:
        self.replica, self.num_replicas = replica, num_replicas

    def __iter__(self) -> Iterator[Any]:
        data = samples(16)
        worker = torch.utils.data.get_worker_info()
        assert worker is None
        yield from (data[index] for index in range(self.replica, 16, self.num_replicas))


_NO_PORTIONS = dict.fromkeys(SANDBLASTER, "has no samples that could be dealt out as portions")


@feature("IterableDataset", errors=_NO_PORTIONS)
def iterable(cell: Cell) -> dict[str, Any]:
    data = Stream(cell.replica, cell.num_replicas)
    trainer, module = cell.trainer(), Classifier()
    trainer.fit(module, DataLoader(data, batch_size=4 // cell.num_replicas))
    return cell.after(trainer, module)


@feature("an iterable that is no DataLoader", errors=_NO_PORTIONS)
def plain_iterable(cell: Cell) -> dict[str, Any]:
    class Batches:
        def __iter__(self) -> Iterator[Any]:
            return iter(cell.loader())

    trainer, module = cell.trainer(), Classifier()
    trainer.fit(module, Batches())
    return cell.after(trainer, module)


@feature("DataLoader with worker processes")
def workers(cell: Cell) -> dict[str, Any]:
    trainer, module = cell.trainer(), Classifier()
    trainer.fit(module, cell.loader(num_workers=2, persistent_workers=True))
    return cell.after(trainer, module)


class Augmented(Dataset):  # type: ignore[type-arg]
    """Random flips, shifts and noise, by torch's, NumPy's and Python's generators."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import random

        import numpy as np

        x, y = samples(8)[index]
        x = x.flip(-1) if random.random() < 0.5 else x
        x = x.roll(int(np.random.randint(4)), -2)
        return x + 0.1 * torch.randn(x.shape), y


class Seeing(Classifier):
    """Remembers a number of each batch."""

    def on_train_start(self) -> None:
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[0].sum())
        return self.loss(batch)


@feature("random augmentation, in workers and without: columns see equal batches")
def augmentation(cell: Cell) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for num_workers, seeded in ((0, False), (2, False), (2, True)):
            module, trainer = Seeing(), cell.trainer()
            if seeded:  # Lightning then seeds workers by their rank
                seed_everything(3, workers=True, verbose=False)
            trainer.fit(module, cell.loader(data=Augmented(), num_workers=num_workers))
            seen = torch.stack(module.seen)
            assert seen.unique().numel() == len(seen), "augmentation repeats itself"
            if cell.shares_batches:
                across = _gathered(seen)
                columns = cell.entry.num_ranks // cell.num_replicas
                first = cell.rank // columns * columns
                for other in range(first, first + columns):
                    assert torch.equal(across[other], seen), "ranks of a replica saw different batches"
                if cell.num_replicas > 1:
                    assert not torch.equal(across[0], across[-1]), "replicas saw the same batches"
    assert not warned(caught, "loaded different batches"), "fell back to sending"
    return {}


def _gathered(value: Tensor) -> list[Tensor]:
    across = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(across, value)
    return across


class Unseeded(Dataset):  # type: ignore[type-arg]
    """Noise that no generator of the run governs."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(time.perf_counter_ns() % 2**31)
        x, y = samples(8)[index]
        return x + torch.randn(x.shape, generator=generator), y


@feature("data that seeds don't govern: sent, with a warning")
def unseeded(cell: Cell) -> dict[str, Any]:
    module = Seeing()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cell.trainer().fit(module, cell.loader(data=Unseeded()))
    if cell.shares_batches:
        assert warned(caught, "loaded different batches") or cell.rank
        across = _gathered(torch.stack(module.seen))
        assert torch.equal(across[0], across[1]), "ranks of a replica saw different batches"
    if cell.entry.num_ranks > 1:
        mine = torch.cat([value.flatten() for value in weights(module).values()])
        assert torch.allclose(mine, cell.mean(mine.clone()), rtol=1e-15), "ranks parted"
    return {}


@feature("LightningDataModule")
def data_module(cell: Cell) -> dict[str, Any]:
    class Data(LightningDataModule):
        calls: tuple[str, ...] = ()

        def setup(self, stage: str) -> None:
            self.calls = (*self.calls, stage)

        def train_dataloader(self) -> Any:
            return cell.loader()

        def val_dataloader(self) -> Any:
            return cell.loader(8)

    data = Data()
    trainer, module = cell.trainer(), Classifier()
    trainer.fit(module, datamodule=data)
    return {"calls": data.calls, **cell.after(trainer, module)}


@feature("CombinedLoader, nested batches", errors=_NO_PORTIONS)
def combined(cell: Cell) -> dict[str, Any]:
    class Nested(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["first"]) + 0.5 * self.loss(batch["second"])

    loader = CombinedLoader({"first": cell.loader(16), "second": cell.loader(8)}, "max_size_cycle")
    trainer, module = cell.trainer(), Nested()
    trainer.fit(module, loader)
    return cell.after(trainer, module)


@feature("batch_sampler, collate_fn")
def batch_sampler(cell: Cell) -> dict[str, Any]:
    data = samples(16)
    dealt = torch.utils.data.Subset(data, range(cell.replica, 16, cell.num_replicas))
    sampler = BatchSampler(SequentialSampler(dealt), 4 // cell.num_replicas, drop_last=False)
    loader = DataLoader(dealt, batch_sampler=sampler, collate_fn=_collate)

    class Named(Classifier):
        def loss(self, batch: Any) -> Tensor:
            return super().loss((batch["x"], batch["y"]))

    trainer, module = cell.trainer(use_distributed_sampler=False), Named()
    trainer.fit(module, loader)
    return cell.after(trainer, module)


def _collate(rows: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows]), "note": "a string"}


@feature("truncated back-propagation, batch hooks")
def batch_hooks(cell: Cell) -> dict[str, Any]:
    class Hooked(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 0.5, batch[1]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    module = Hooked()
    trainer = cell.trainer()
    trainer.fit(module, cell.loader())
    return {"metrics": metrics(trainer), "weights": weights(module)}
