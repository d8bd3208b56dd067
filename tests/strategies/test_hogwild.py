"""Hogwild: exact on one rank, accounted for on several, and nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

import squall
from tests.memory import own_memory
from tests.ranks import run
from tests.strategies import hogwild_programs as programs
from tests.strategies.hogwild_programs import LR, Net, samples, trainer

_SILENT = pytest.mark.filterwarnings("ignore")
pytestmark = [_SILENT, pytest.mark.asynchronous]


def _same(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), where
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), (where, one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            _same(a, b, f"{where}/{index}")
    else:
        assert one == other, (where, one, other)


# ------------------------------------------------------------------ one rank: stock training, bit for bit


@pytest.mark.parametrize("kind", ["sgd", "adam", "adagrad", "nadam", "rprop", "asgd", "own", "two", "sparse adam"])
def test_one_rank_is_one_device(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    if kind in ("two", "sparse adam"):
        options = {}
    (stock,) = run(1, programs.fit_net, str(tmp_path), kind, "auto", lightning=True, **options)
    (ours,) = run(1, programs.fit_net, str(tmp_path), kind, lightning=True, **options)
    assert ours.pop("memory") == []
    stock.pop("memory")
    assert ours["steps"] > 0
    _same(ours, stock)


def test_the_memory_keeps_the_order_of_elements() -> None:
    from squall.consistency.plan import ParameterInfo, StateEntry
    from squall.consistency.shared import lay_out

    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    info = ParameterInfo((4, 3, 2, 2), torch.float32, 0, 0, (StateEntry("m", "like", (), torch.float32),))
    layout = lay_out([info], [weight])
    assert layout.strides == (weight.stride(),)
    assert layout.digest != lay_out([info], [weight.contiguous()]).digest
    expanded = lay_out([info], [torch.zeros(3, 2, 2).expand(4, 3, 2, 2)])
    assert expanded.strides == (torch.empty(4, 3, 2, 2).stride(),)


# ------------------------------------------------------------------ several ranks: closed forms


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("part", ["own", "rows"])
def test_disjoint_updates_are_all_there(tmp_path: Path, num_ranks: int, part: str) -> None:
    ends = run(num_ranks, programs.count, str(tmp_path), num_ranks, part, 60, lightning=True)
    assert sum(end["made"] for end in ends) == 60
    for end in ends:
        assert end["steps"] == end["report"]["version"] == end["report"]["num_samples"] == 60
        assert end["memory"] == []
        assert end["shared"] == []
        weights = end["weights"]
        for rank, other in enumerate(ends):
            moved = weights[f"own.{rank}"] if part == "own" else weights["rows.weight"][rank]
            assert torch.equal(moved, torch.full_like(moved, -LR * other["made"])), (rank, moved)
        _same(weights, ends[0]["weights"])
    metrics = ends[0]["metrics"]
    assert metrics["updates/applied"] == metrics["queue/samples"] == 60
    assert metrics["updates/lost"] == 0
    assert sum(number for _, number in ends[0]["report"]["staleness"]) == 60
    if num_ranks == 1:
        assert metrics["staleness/max"] == 0


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_dense_updates_are_lost_at_most(tmp_path: Path, num_ranks: int) -> None:
    ends = run(num_ranks, programs.count, str(tmp_path), num_ranks, "dense", 200, lightning=True)
    moved = -ends[0]["weights"]["dense"] / LR
    assert torch.equal(moved, moved.round())  # never torn: a whole number of updates
    assert moved.min() >= 1
    assert moved.max() <= 200
    if num_ranks == 1:
        assert moved.min() == 200
    for end in ends:
        assert end["report"]["version"] == 200
        _same(end["weights"], ends[0]["weights"])


def test_max_steps_counts_all_ranks_updates(tmp_path: Path) -> None:
    ends = run(2, programs.count, str(tmp_path), 2, "own", 60, lightning=True, max_steps=25, max_epochs=-1)
    weights = ends[0]["weights"]
    moved = sum(float(-weights[f"own.{rank}"][0] / LR) for rank in range(2))
    assert moved == 25
    assert [end["steps"] for end in ends] == [25, 25]


def _fit_seeded_apart(path: str) -> Any:
    torch.manual_seed(int(os.environ["RANK"]))
    module = Net("adam")
    with torch.no_grad():
        module.scale += module.global_rank + int(os.environ["RANK"])
    run = trainer(path, squall.HogwildStrategy(warm_start_steps=10), max_epochs=4)
    run.fit(module, DataLoader(samples(), batch_size=4, shuffle=True))
    return programs.state_of(run, module) | {"report": dict(run.strategy.report)}


def test_ranks_end_alike_with_the_states_of_all(tmp_path: Path) -> None:
    ends = run(2, _fit_seeded_apart, str(tmp_path), lightning=True)
    _same(ends[0]["weights"], ends[1]["weights"])
    for a, b in zip(ends[0]["optimizers"], ends[1]["optimizers"], strict=True):
        _same(a["state"], b["state"])
    assert ends[0]["steps"] == 24
    for state in ends[0]["optimizers"][0]["state"].values():  # one count for all ranks, some of it lost at most
        assert 1 <= state["step"] <= 24
        assert state["step"] == round(float(state["step"]))
    assert sum(number for value, number in ends[0]["report"]["staleness"] if value == 0) >= 10  # the warm start


# ------------------------------------------------------------------ checkpoints


def _fit_with_checkpoint(path: str, epochs: int, strategy: Any = "hogwild", resume: str | None = None) -> Any:
    module = Net("adam")
    kept = ModelCheckpoint(path, filename="{epoch}", monitor="val_loss", save_top_k=-1)
    run = trainer(path, strategy, max_epochs=epochs, callbacks=[kept], enable_checkpointing=True)
    run.fit(module, DataLoader(samples(), batch_size=4), DataLoader(samples(8), batch_size=4), ckpt_path=resume)
    return programs.state_of(run, module) | {"best": kept.best_model_path, "val_loss": run.callback_metrics["val_loss"]}


def test_a_checkpoint_of_one_rank_is_stocks(tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    run(1, _fit_with_checkpoint, str(tmp_path / "ours"), 2, lightning=True)
    run(1, _fit_with_checkpoint, str(tmp_path / "stock"), 2, "auto", lightning=True)  # in such a process too
    for name in ("epoch=0.ckpt", "epoch=1.ckpt"):
        ours, stock = (torch.load(tmp_path / who / name, weights_only=False) for who in ("ours", "stock"))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            _same(ours[key], stock[key], key)
    # Each goes on from the other's file as if it were its own.
    (whole,) = run(1, _fit_with_checkpoint, str(tmp_path / "whole"), 3, "auto", lightning=True)
    (ours,) = run(
        1, _fit_with_checkpoint, str(tmp_path / "a"), 3, "hogwild", str(tmp_path / "stock/epoch=1.ckpt"), lightning=True
    )
    (stock,) = run(
        1, _fit_with_checkpoint, str(tmp_path / "b"), 3, "auto", str(tmp_path / "ours/epoch=1.ckpt"), lightning=True
    )
    for end in (ours, stock):
        for key in ("weights", "optimizers", "steps", "val_loss"):
            _same(end[key], whole[key], key)


def _resume(path: str, file: str, strategy: str) -> Any:
    module = Net("adam")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    seen: dict[str, Any] = {}

    def look(run: Trainer, module: LightningModule) -> None:
        if strategy == "hogwild":
            for in_place in run.strategy._in_place.values():  # type: ignore[attr-defined]
                assert in_place.attach(in_place.members)
        seen["state_steps"] = [float(state["step"]) for state in run.optimizers[0].state.values()]

    run = trainer(path, strategy, max_epochs=2, callbacks=[programs.Hook(look, 1)])
    run.fit(module, DataLoader(samples(), batch_size=4), ckpt_path=file)
    return programs.state_of(run, module) | seen


@pytest.mark.parametrize(("num_ranks", "strategy"), [(1, "hogwild"), (4, "hogwild"), (2, "ddp"), (2, "downpour")])
def test_a_run_of_two_ranks_goes_on_elsewhere(tmp_path: Path, num_ranks: int, strategy: str) -> None:
    ends = run(2, _fit_with_checkpoint, str(tmp_path), 1, lightning=True)
    _same(ends[0]["weights"], ends[1]["weights"])
    saved = torch.load(ends[0]["best"], weights_only=True)
    assert saved["global_step"] == 6
    Net("adam").load_state_dict(saved["state_dict"])
    resumed = run(num_ranks, _resume, str(tmp_path), ends[0]["best"], strategy, lightning=True)
    if strategy != "downpour":
        known = [float(state["step"]) for state in saved["optimizer_states"][0]["state"].values()]
        assert len(known) == 7
        for steps in resumed[0].get("state_steps", []):  # the first batch is at hand: others may have stepped already
            assert min(known) <= steps <= max(known) + (6 if strategy == "hogwild" and num_ranks > 1 else 0)
    expected = 6 + (6 if strategy != "ddp" else 3)
    assert [end["steps"] for end in resumed] == [expected] * num_ranks
    for end in resumed:
        for key in ("scale", "net.0.weight") if strategy == "ddp" else resumed[0]["weights"]:  # DDP's statistics differ
            _same(end["weights"][key], resumed[0]["weights"][key], key)


def test_validation_sees_what_is_saved(tmp_path: Path) -> None:
    ends = run(2, _fit_with_checkpoint, str(tmp_path), 2, lightning=True)
    module = Net("adam").eval()
    module.load_state_dict(torch.load(ends[0]["best"], weights_only=True)["state_dict"])
    scores = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)["callbacks"]
    (kept,) = (state for key, state in scores.items() if key.startswith("ModelCheckpoint"))
    with torch.no_grad():
        loss = torch.stack([module.training_step(batch, 0) for batch in DataLoader(samples(8), batch_size=4)]).mean()
    torch.testing.assert_close(loss, kept["best_model_score"])


class _Edits(Net):
    """Writes into its own weights, where stock training lets it."""

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.net[3].weight.clamp_(-0.1, 0.1)
            self.net[0].weight.data = self.net[0].weight.data * 0.5

    def on_train_batch_end(self, *_: Any) -> None:
        self.scale.data = self.scale.data.clamp(0, 1)


def _fit_edits(path: str, strategy: str, num_ranks: int = 1) -> Any:
    module = _Edits("sgd")
    run = trainer(path, strategy, max_epochs=2, devices=num_ranks)
    run.fit(module, DataLoader(samples(), batch_size=4), DataLoader(samples(8), batch_size=4))
    return programs.state_of(run, module)


def test_edits_of_the_weights_are_the_runs(tmp_path: Path) -> None:
    (stock,) = run(1, _fit_edits, str(tmp_path), "auto", lightning=True)
    (ours,) = run(1, _fit_edits, str(tmp_path), "hogwild", lightning=True)
    _same(ours["weights"], stock["weights"])
    one, other = run(2, _fit_edits, str(tmp_path), "hogwild", 2, lightning=True)
    _same(one["weights"], other["weights"])
    assert one["weights"]["net.3.weight"].abs().max() <= 0.1


# ------------------------------------------------------------------ ranks that die, fail, or come late


def _memory_of(folder: Path) -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("squall-")}


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_rank_is_missed_by_nobody(tmp_path: Path, at: int) -> None:
    before = _memory_of(tmp_path)
    ends = programs.run_alone(4, programs.die, tmp_path, 3, at)
    assert ends[3] == ("exit", -signal.SIGKILL)
    assert [kind for kind, _ in ends] == ["ok", "ok", "ok", "exit"], ends
    results = [end for _, end in ends[:3]]
    for end in results:
        report = end["report"]
        assert report["num_samples"] == report["version"] == 200
        assert report["num_live"] <= 3
        _same(end["weights"], results[0]["weights"])
        made = [-end["weights"][f"own.{rank}"][0] / LR for rank in range(4)]
        assert sum(made) == 200  # it died between updates, and what it had been dealt was dealt out again
        assert made[:3] == [other["made"] for other in results]
        assert made[3] == at - 1
    assert results[0]["report"]["num_reissued"] >= 1
    _gone(before, tmp_path)


def test_a_lost_leader_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    before = _memory_of(tmp_path)
    ends = programs.run_alone(2, programs.die, tmp_path, 0, 6)
    assert ends[0] == ("exit", -signal.SIGKILL)
    kind, message = ends[1]
    assert kind == "error"
    assert "Rank 0 is gone" in message
    (file,) = tmp_path.glob("rank0-lost-step=*.ckpt")
    saved = torch.load(file, weights_only=True)
    moved = sum(float(-saved["state_dict"][f"own.{rank}"][0] / LR) for rank in range(2))
    assert moved == saved["global_step"] >= 5
    _gone(before, tmp_path)


def _gone(before: set[str], folder: Path) -> None:
    """The memory goes with the host process, which outlives the ranks by a moment."""
    import time

    deadline = time.monotonic() + 10
    while mine := {name for name in _memory_of(folder) - before if not _host_has_ranks(name)}:
        assert time.monotonic() < deadline, mine
        time.sleep(0.05)


def _host_has_ranks(name: str) -> bool:
    """Whether a segment is of a run that others of this machine have under way."""
    import psutil

    try:
        host = psutil.Process(int(name.split("-")[1]))
        return host.ppid() not in (1, os.getpid())
    except psutil.NoSuchProcess:
        return False


def test_a_late_rank_finds_the_present_weights(tmp_path: Path) -> None:
    ends = programs.run_alone(2, programs.come_late, tmp_path)
    assert [kind for kind, _ in ends] == ["ok", "ok"], ends
    first, late = (end for _, end in ends)
    _same(late["seen"]["weight"], first["seen"]["weight"])
    assert late["seen"]["step"] == 9
    assert not torch.equal(late["seen"]["weight"], Net("adam").net[0].weight)
    assert late["seen"]["lr"] == pytest.approx(_rate_after(8))  # what the leader's last update was made with
    assert first["report"]["num_samples"] == 200
    assert first["report"]["version"] == 50
    _same(first["weights"], late["weights"])


def _rate_after(num_steps: int) -> float:
    made = Net("adam").configure_optimizers()
    for _ in range(num_steps):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return float(made["optimizer"].param_groups[0]["lr"])


class _Fails(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise ZeroDivisionError("user's own")
        return super().training_step(batch, batch_idx)


def _fail(path: str) -> Any:
    module = _Fails("adam")
    before = dict(module.named_parameters())
    run = trainer(path)
    with pytest.raises(ZeroDivisionError):
        run.fit(module, DataLoader(samples(), batch_size=4))
    gc.collect()
    assert all(before[name] is parameter for name, parameter in module.named_parameters())
    maps = Path("/proc/self/maps").read_text()
    return own_memory(), "squall-" in maps, run.optimizers[0].state[module.scale]["step"]


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    ((names, mapped, step),) = run(1, _fail, str(tmp_path), lightning=True)
    assert names == []
    assert not mapped
    assert step == 2


def _fit_twice(path: str) -> Any:
    ends = []
    module = Net("sgd")
    for _ in range(2):
        run = trainer(path, devices=2)  # the first Trainer takes WORLD_SIZE with it
        run.fit(module, DataLoader(samples(), batch_size=4))
        ends.append(programs.state_of(run, module))
        gc.collect()
        assert "squall-" not in Path("/proc/self/maps").read_text()
    return ends


def test_a_module_can_be_fitted_again(tmp_path: Path) -> None:
    first, second = run(2, _fit_twice, str(tmp_path), lightning=True)
    for a, b in zip(first, second, strict=True):
        _same(a["weights"], b["weights"])
        assert a["memory"] == b["memory"] == []
    assert not torch.equal(first[0]["weights"]["scale"], first[1]["weights"]["scale"])


@pytest.mark.parametrize("ends", ["frees", "dies"])
def test_first_states_are_made_by_one_at_a_time(ends: str) -> None:
    from squall.consistency.coordinator import Coordinator, RunOptions

    said: list[tuple[Any, Any]] = []
    coordinator = Coordinator(RunOptions(2), lambda peer, header, _: said.append((peer, header.get("re"))), print)
    for rank, peer in enumerate("ab"):
        coordinator.handle(peer, {"op": "hello", "rank": rank, "run": 1, "id": 0})
    coordinator.handle("a", {"op": "claim", "id": 1})
    coordinator.handle("b", {"op": "claim", "id": 1})
    assert said[2:] == [("a", 1)]
    if ends == "frees":
        coordinator.handle("a", {"op": "free", "id": 2})
        assert said[3:] == [("a", 2), ("b", 1)]
    else:
        coordinator.lost("a")
        assert said[3:] == [("b", 1)]


# ------------------------------------------------------------------ what is refused


class _Refused(Net):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


class _NormSGD(torch.optim.SGD):
    """Layer-wise: what it does to an element hangs on the others."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad / p.grad.norm()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: torch.optim.LBFGS(p), r"LBFGS does not treat every element alone.*SGD, Adagrad, Adam"),
        (lambda p: _NormSGD(p, lr=0.1), r"_NormSGD does not treat every element alone"),
        (lambda p: [torch.optim.SGD(p, 0.1), torch.optim.SGD(p[:1], 0.1)], r"given to two optimizers"),
    ],
    ids=["lbfgs", "norm", "shared parameter"],
)
def test_optimizers_that_cant_share_are_refused(tmp_path: Path, make: Any, says: str) -> None:
    module = _Refused(make)
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=says):
        trainer(tmp_path, devices=1).fit(module, DataLoader(samples(), batch_size=4))
    assert own_memory() == []


def test_several_hosts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"num_nodes=2: hogwild's weights lie in one host's memory"):
        trainer(tmp_path, devices=1, num_nodes=2).fit(Net(), DataLoader(samples(), batch_size=4))


def test_other_devices_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, devices=1)
    run.strategy.parallel_devices = [torch.device("cuda", 0)]  # type: ignore[attr-defined]
    with pytest.raises(MisconfigurationException, match=r'cuda:0 can\'t step in place. Set accelerator="cpu"'):
        run.fit(Net(), DataLoader(samples(), batch_size=4))


class _Thaws(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.optimizers().add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})  # type: ignore[union-attr]


def test_parameters_that_come_later_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Adam was given more parameters during fit"):
        trainer(tmp_path, devices=1).fit(_Thaws(), DataLoader(samples(), batch_size=4))


@pytest.mark.parametrize(
    "options",
    [
        {"warm_start_steps": -1},
        {"warm_start_steps": 1.5},
        {"lease_timeout": 0},
        {"lease_timeout": "30"},
        {"join_timeout": "x"},
        {"join_timeout": -1},
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: Any) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(options))):
        squall.HogwildStrategy(**options)
