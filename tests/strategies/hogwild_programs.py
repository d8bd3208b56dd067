"""Modules and functions that the tests of Hogwild run on real ranks."""

from __future__ import annotations

import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import squall
from tests.memory import own_memory
from tests.ranks import free_port

LR = 2.0**-6  # so that sums of steps are exact


def trainer(path: str | Path, strategy: Any = "hogwild", **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "strategy": strategy,
        "accelerator": "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", "1")) if strategy != "auto" else 1,
        "default_root_dir": str(path),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})


# ------------------------------------------------------------------ stock modules


def samples(num: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(num, 6, generator=generator), torch.randn(num, 3, generator=generator))


class Net(LightningModule):
    """Two layers and BatchNorm; which optimizer, the test says."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.kind = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return ((self.net(x) * self.scale - y) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        weights = list(self.net.parameters())
        groups = [{"params": weights[:2], "lr": 0.05}, {"params": [*weights[2:], self.scale]}]
        optim = torch.optim
        made = {
            "sgd": lambda: optim.SGD(groups, lr=0.02, momentum=0.9, dampening=0.1, weight_decay=0.01),
            "adam": lambda: optim.Adam(groups, lr=0.02, amsgrad=True),
            "adagrad": lambda: optim.Adagrad(groups, lr=0.02, initial_accumulator_value=0.1),
            "nadam": lambda: optim.NAdam(groups, lr=0.02),
            "rprop": lambda: optim.Rprop(groups, lr=0.02),
            "asgd": lambda: optim.ASGD(groups, lr=0.02),
            "own": lambda: OwnMomentum(groups, lr=0.02),
        }[self.kind]()
        schedule = optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=200, cycle_momentum=False)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OwnMomentum(torch.optim.Optimizer):
    """As users write them: a number and a tensor that is made anew as state, and ``p.data`` set, not changed."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["mean"] = 0.9 * state["mean"] + p.grad if "mean" in state else p.grad.clone()
                p.data = p.data - group["lr"] / state["count"] * state["mean"]
        return loss


class Two(Net):
    """Two optimizers that take turns, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.optimizers()  # type: ignore[misc]
        loss = super().training_step(batch, batch_idx)
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        return loss

    def configure_optimizers(self) -> Any:
        a = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9, nesterov=True)
        b = torch.optim.RMSprop([*self.net[1].parameters(), *self.net[3].parameters(), self.scale], lr=0.01)
        schedules = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (a, b)]
        return [a, b], schedules


class Rare(LightningModule):
    """A table of which a step sees few rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(50, 3, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return ((self.table((batch[0][:, 0].abs() * 10).long()) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(list(self.parameters()), lr=0.1)


def state_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """All that a run leaves behind."""
    return {
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "steps": trainer.global_step,
        "shared": [name for name, p in module.named_parameters() if type(p) is not nn.Parameter],
        "memory": own_memory(),
    }


def fit_net(path: str, kind: str, strategy: str = "hogwild", resume: str | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    module = Two() if kind == "two" else Rare() if kind == "sparse adam" else Net(kind)
    before = dict(module.named_parameters())
    run = trainer(path, strategy, **{"max_epochs": 3, **options})
    run.fit(module, DataLoader(samples(), batch_size=4), ckpt_path=resume)
    assert all(before[name] is parameter for name, parameter in module.named_parameters())
    return state_of(run, module)


# ------------------------------------------------------------------ closed forms


class Counter(LightningModule):
    """Constant gradients: one weight for each rank alone, a table of rows, and a vector for all."""

    def __init__(self, num_ranks: int, part: str) -> None:
        super().__init__()
        self.own = nn.ParameterList([nn.Parameter(torch.zeros(5)) for _ in range(num_ranks)])
        self.rows = nn.Embedding(num_ranks, 3, sparse=True)
        nn.init.zeros_(self.rows.weight)
        self.dense = nn.Parameter(torch.zeros(1000))
        self.part = part
        self.num_made = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_made += 1
        if self.part == "own":
            return self.own[self.global_rank].sum()
        if self.part == "rows":
            return self.rows(torch.tensor([self.global_rank])).sum()
        return self.dense.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def count(path: str, num_ranks: int, part: str, num: int, **options: Any) -> dict[str, Any]:
    module = Counter(num_ranks, part)
    run = trainer(path, **options)
    run.fit(module, DataLoader(torch.zeros(num, 1), batch_size=1))
    return state_of(run, module) | {
        "made": module.num_made,
        "report": dict(run.strategy.report),  # type: ignore[attr-defined]
        "metrics": {key: float(value) for key, value in run.callback_metrics.items()},
    }


# ------------------------------------------------------------------ ranks that die, and ranks that come late


class Hook(Callback):
    """Does something at a rank's so-manieth batch."""

    def __init__(self, action: Any, at: int) -> None:
        self.action, self.at, self.num = action, at, 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.num += 1
        if self.num == self.at:
            self.action(trainer, module)


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody wrote {path.name}"
        time.sleep(0.01)


def kill_me(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _start(function: Any, rank: int, environment: dict[str, str], folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", OMP_NUM_THREADS="1")
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    try:
        result = ("ok", function(folder, *args))
    except BaseException as error:
        result = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    torch.save(result, f"{folder}/result-{rank}.part")
    os.replace(f"{folder}/result-{rank}.part", f"{folder}/result-{rank}")


def run_alone(num_ranks: int, function: Any, folder: Path, *args: Any, timeout: float = 100) -> list[Any]:
    """Run ``function(folder, *args)`` on ranks of which some may die.

    Returns:
        ``("ok", result)``, ``("error", message)`` or ``("exit", code)`` of each.

    """
    context = mp.get_context("spawn")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    started = [
        context.Process(target=_start, args=(function, rank, environment, str(folder), args))
        for rank in range(num_ranks)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0.1, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(started) if process.exitcode is None]
    for process in started:
        process.kill()
        process.join()
    assert not hung, f"ranks {hung} did not end"
    results = []
    for rank, process in enumerate(started):
        file = folder / f"result-{rank}"
        results.append(torch.load(file, weights_only=False) if file.exists() else ("exit", process.exitcode))
    return results


def die(folder: str, rank: int, at: int) -> dict[str, Any]:
    """Train with one rank that is killed at its so-manieth batch."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    hooks = [Hook(lambda trainer, _: _until_live(trainer, num_ranks - 1), 5)]  # the run must not be over before
    if int(os.environ["RANK"]) == rank:
        hooks = [Hook(kill_me, at)]
    return count(folder, num_ranks, "own", 200, callbacks=hooks)


def _until_live(trainer: Trainer, num: int) -> None:
    deadline = time.monotonic() + 60
    client = trainer.strategy.client  # type: ignore[attr-defined]
    while client.call({"op": "report"})[0]["num_live"] > num:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def come_late(folder: str) -> dict[str, Any]:
    """Rank 1 begins when rank 0 has trained alone; rank 0 goes on when rank 1 has seen what it found."""
    began, found = Path(folder) / "began", Path(folder) / "found"
    seen: dict[str, Any] = {}
    if os.environ["RANK"] == "0":

        def wait(trainer: Trainer, module: Any) -> None:
            seen["weight"] = module.net[0].weight.detach().clone()
            began.touch()
            wait_for(found)

        hook = Hook(wait, 10)
    else:
        wait_for(began)

        def look(trainer: Trainer, module: Any) -> None:
            seen["weight"] = module.net[0].weight.detach().clone()
            optimizer = trainer.optimizers[0]
            trainer.strategy._in_place[optimizer].attach([(0, module.net[0].weight)])  # type: ignore[attr-defined]
            seen["step"] = float(optimizer.state[module.net[0].weight]["step"])
            seen["lr"] = optimizer.param_groups[0]["lr"]
            found.touch()

        hook = Hook(look, 1)
    module = Net("adam")
    with torch.no_grad():
        module.scale += int(os.environ["RANK"])  # another start on each rank
    strategy = squall.HogwildStrategy(join_timeout=1.0)
    run = trainer(folder, strategy, callbacks=[hook])
    run.fit(module, DataLoader(samples(200), batch_size=4))
    return state_of(run, module) | {"seen": seen, "report": dict(strategy.report)}
