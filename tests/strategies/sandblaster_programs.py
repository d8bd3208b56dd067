"""Modules and functions that the tests of Sandblaster run on real ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import squall
from squall.consistency.hosting import get_host
from squall.models import LeNet300

NUM = 60


def rosenbrock_like(width: int = 6) -> nn.Module:
    """Its loss is a curved valley, whose samples share the terms out."""

    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1.2, 1.0, width))

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            terms = 100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2
            return (x * terms.sum()).mean()

    return Valley()


def with_nothing() -> nn.Module:
    """One of its parameters has no elements."""
    net = nn.Linear(12, 3)
    net.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Linear(12, 3),
    "mlp": lambda: nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)),
    "lenet300": LeNet300,
    "valley": rosenbrock_like,
    "nothing": with_nothing,
    "dropout": lambda: nn.Sequential(nn.Linear(12, 9), nn.Dropout(0.5), nn.Linear(9, 3)),
    "batchnorm": lambda: nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)),
}


class Module(LightningModule):
    """A net in double precision; it knows nothing of strategies."""

    def __init__(self, net: str = "mlp", weight_decay: float = 0.0, optimizer: str = "SGD") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.kind, self.weight_decay, self.optimizer = net, weight_decay, optimizer
        self.net = NETS[net]().double()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        if self.kind == "valley":
            loss: Tensor = self.net(x.new_ones(len(x)))
            return loss
        if self.kind == "lenet300":
            x = x.repeat(1, 66)[:, :784].reshape(-1, 1, 28, 28)
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, self.optimizer)
        options = {"weight_decay": self.weight_decay} if self.weight_decay else {}
        return kind(self.parameters(), lr=0.1, **options)


def samples(num: int = NUM) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num, 12, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (num,), generator=generator))


def trainer(path: str | Path, strategy: Any = "sandblaster", **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "strategy": strategy,
        "accelerator": "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", "1")) if strategy != "auto" else 1,
        "default_root_dir": str(path),
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})


def loader(batch_size: int = 7, num: int = NUM, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(num), **{"batch_size": batch_size, "shuffle": True, **options})


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def torch_weights(num_iterations: int, net: str = "mlp", weight_decay: float = 0.0, num: int = NUM, m: int = 10) -> Any:
    """Where torch's L-BFGS comes to on one device, and after how many evaluations."""
    module = Module(net)
    batch = samples()[:num]
    optimizer = torch.optim.LBFGS(
        module.parameters(), lr=1, max_iter=num_iterations, max_eval=10**6, history_size=m,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    num_evaluations = 0

    def closure() -> Tensor:
        nonlocal num_evaluations
        num_evaluations += 1
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss = loss + sum(0.5 * weight_decay * p.square().sum() for p in module.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return flat(module), num_evaluations


class Losses(Callback):
    """The loss at each iteration's weights."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "lbfgs/loss" in found:
            self.found[int(found["lbfgs/iterations"])] = found["lbfgs/loss"]


def fit(
    path: str,
    net: str = "mlp",
    num_iterations: int = 8,
    module: Module | None = None,
    batch_size: int = 7,
    sample: int | None = None,
    **strategy: Any,
) -> dict[str, Any]:
    """Optimize; say where it came to."""
    strategy["batch_size"] = sample
    module = module or Module(net)
    fitter = trainer(path, squall.SandblasterStrategy(**strategy), max_steps=num_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitter.fit(module, loader(batch_size))
    return result(fitter, module)


def result(fitter: Trainer, module: nn.Module) -> dict[str, Any]:
    return {
        "weights": flat(module),
        "step": fitter.global_step,
        "report": dict(fitter.strategy.report),
        "metrics": {name: float(value) for name, value in fitter.callback_metrics.items()},
    }


# ------------------------------------------------------------------ validation, checkpoints


class Looks(Callback):
    """Notes what validation has looked at."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            with torch.no_grad():
                loss = float(module.loss(samples()[:]))  # type: ignore[operator]
            self.seen.append((trainer.current_epoch, trainer.global_step, loss))


def fit_with_validation(path: str, num_epochs: int = 6, **options: Any) -> dict[str, Any]:
    module, looks = Module(), Looks()
    callbacks = [looks, ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)]
    fitter = trainer(
        path, max_epochs=num_epochs, callbacks=callbacks, num_sanity_val_steps=0, enable_checkpointing=True, **options
    )
    fitter.fit(module, loader(), DataLoader(samples(), batch_size=NUM))
    report = fitter.strategy.report
    return {**result(fitter, module), "seen": looks.seen, "loss": (report["point"] or {}).get("loss")}


def fit_in_two(
    path: str, first: int, last: int, num_shards: int = 1, num_workers: int = 0, **options: Any
) -> dict[str, Any]:
    """Interrupted after some evaluations, and gone on with as another run."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  (it may have children)
    module = Module()
    options["devices"] = int(os.environ["WORLD_SIZE"])  # which a first run takes out
    strategy = squall.SandblasterStrategy(num_shards=1)
    begun = trainer(path, strategy, max_epochs=first, callbacks=[ModelCheckpoint(path, save_last=True)],
                    enable_checkpointing=True)  # fmt: skip
    begun.fit(module, loader(num_workers=num_workers))
    begun.save_checkpoint(f"{path}/stop.ckpt")
    other = Module()
    again = trainer(path, squall.SandblasterStrategy(num_shards=num_shards), max_steps=last, **options)
    again.fit(other, loader(num_workers=num_workers), ckpt_path=f"{path}/stop.ckpt", weights_only=False)
    return {**result(again, other), "interrupted": begun.global_step}


# ------------------------------------------------------------------ faults


class Fault(Callback):
    """Does something once, when a rank comes to its portion of a number, of those after some iterations."""

    def __init__(self, at: int, do: Callable[[Trainer], None], rank: int = 0, num_iterations: int = 0) -> None:
        self.at, self.do, self.rank, self.num_iterations, self.num = at, do, rank, num_iterations, 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.num += trainer.global_step >= self.num_iterations
        if trainer.global_rank != self.rank:
            time.sleep(0.01)  # else others may have done all there is to do before a rank that begins late comes to it
        elif self.num == self.at:
            self.do(trainer)


def kill_a_shard(trainer: Trainer) -> None:
    os.kill(get_host().request({"op": "shards"})["pids"][-1], signal.SIGKILL)


def kill_the_coordinator(trainer: Trainer) -> None:
    process = get_host().process
    process.kill()
    process.wait()


FAULTS = {"shard": kill_a_shard, "coordinator": kill_the_coordinator}


def fit_with_fault(
    path: str, fault: str, at: int, num_iterations: int = 10, log_every_n_steps: int = 50, **strategy: Any
) -> dict[str, Any]:
    module = Module()
    fitter = trainer(
        path, squall.SandblasterStrategy(**strategy), max_steps=num_iterations, callbacks=[Fault(at, FAULTS[fault])],
        log_every_n_steps=log_every_n_steps,
    )  # fmt: skip
    fitter.fit(module, loader())
    return result(fitter, module)


class Slow(Module):
    """A rank that takes its time over a portion, whatever it is."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


def fit_slowly(path: str, seconds: dict[int, float], num_iterations: int, **strategy: Any) -> dict[str, Any]:
    module = Slow(seconds.get(int(os.environ["RANK"]), 0.0))
    return fit(path, num_iterations=num_iterations, module=module, batch_size=3, **strategy)


# ------------------------------------------------------------------ bad input


class Wrong(Module):
    """Something that can't be optimized so."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.automatic_optimization = what != "manual"

    def configure_optimizers(self) -> Any:
        if self.what == "no optimizer":
            return None
        if self.what == "half":
            self.half()
        if self.what == "maximize":
            return torch.optim.SGD(self.parameters(), lr=0.1, maximize=True)
        return super().configure_optimizers()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.what == "edits":
            with torch.no_grad():
                next(self.parameters()).clamp_(-0.01, 0.01)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([samples()[0]] * 8)


def error_of(function: Callable[..., Any], *args: Any) -> str:
    """What a program says that has to fail; the process, which took seconds to start, lives on."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the test looks at the message)
        function(*args)
    return str(caught.value)


def fit_wrong(path: str, what: str) -> None:
    options: dict[str, Any] = {}
    data: Any = loader()
    if what == "clip":
        options["gradient_clip_val"] = 1.0
    elif what == "accumulate":
        options["accumulate_grad_batches"] = 2
    elif what == "reload":
        options["reload_dataloaders_every_n_epochs"] = 1
    elif what == "stream":
        data = DataLoader(Stream(), batch_size=2)
    elif what == "two loaders":
        data = [loader(), loader()]
    trainer(path, max_epochs=3, **options).fit(Wrong(what), data)


def nan_at_first(path: str) -> None:
    module = Module()
    with torch.no_grad():
        next(module.parameters()).fill_(torch.nan)
    trainer(path, max_epochs=3).fit(module, loader())


def fit_sample(path: str, batch_size: int) -> dict[str, Any]:
    """Three portions of seven samples."""
    return fit(path, num_iterations=4, sample=batch_size)


def fit_with_data_workers(path: str) -> dict[str, Any]:
    module = Module()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  (it may have children)
    fitter = trainer(path, squall.SandblasterStrategy(), max_steps=3)
    fitter.fit(module, loader(num_workers=1))
    return result(fitter, module)


class Shifted(Dataset[Any]):
    """Augmented samples."""

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        x, y = samples()[index]
        return x + torch.randn(()), y


def warnings_of(path: str, net: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = DataLoader(Shifted(), batch_size=7) if net == "shifted" else loader()
        optimizer = "LBFGS" if net == "torch's own" else "SGD"
        trainer(path, max_epochs=1).fit(Module(net if net in NETS else "mlp", optimizer=optimizer), data)
    return [str(warning.message) for warning in caught]


def fit_with_a_killed_rank(path: str, rank: int, backup_portions: bool = True) -> None:
    """As a user's script: three ranks, of which one is killed when it has heard of two iterations."""

    def kill(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    module = Module()
    fitter = trainer(
        path,
        squall.SandblasterStrategy(num_shards=2, backup_portions=backup_portions),
        devices=3,
        max_steps=20,
        callbacks=[Fault(1, kill, rank, num_iterations=2)],
    )
    fitter.fit(module, loader(4))
    if fitter.global_rank == 0:
        torch.save(result(fitter, module), f"{path}/result.pt")
