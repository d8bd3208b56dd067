"""HybridParallelStrategy: steps equal to one device's, updates after every pass, checkpoints, figures, errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import squall
from squall.placement import ColumnParameter, ColumnTensor, Speeds
from tests.ranks import run

STEPS, BATCH = 3, 4  # of a rank


class Net(LightningModule):
    def __init__(self, kind: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.Flatten(), nn.Linear(96, 7), nn.Tanh(),
            nn.Linear(7, 5),
        )  # fmt: skip
        self.double()  # or a checkpoint would be rounded when it is loaded

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        # One group holds parameters of both kinds, and a schedule changes its rate.
        if self.kind == "adam":
            optimizer: Any = torch.optim.Adam(self.parameters(), lr=0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


def _samples(num: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num, 3, 8, 8, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(5, (num,), generator=generator))


def _loader(num: int, batch_size: int, num_ranks: int = 1) -> DataLoader[Any]:
    """Rank r of K has examples r, r + K, ..., in order: together, a step has the examples of one device's."""
    samples, rank = _samples(num), int(os.environ.get("RANK", 0)) % num_ranks
    return DataLoader(samples, batch_size, sampler=DistributedSampler(samples, num_ranks, rank, shuffle=False))


def _trainer(path: str, strategy: Any, num_ranks: int, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, "precision": "64-true"}
    defaults["use_distributed_sampler"] = False
    return Trainer(
        strategy=strategy, accelerator="cpu", devices=num_ranks, default_root_dir=path, **quiet,
        **{**defaults, **options},
    )  # fmt: skip


def _fit(
    path: str, num_ranks: int, options: dict[str, Any], kind: str = "sgd", num_steps: int = STEPS, **trainer: Any
) -> dict[str, Tensor]:
    module = Net(kind)
    strategy = squall.HybridParallelStrategy(zero_stage=None, **options)
    loader = _loader(num_steps * BATCH * num_ranks, BATCH, num_ranks)
    _trainer(path, strategy, num_ranks, **trainer).fit(module, loader)
    assert not any(isinstance(value, ColumnTensor) for value in [*module.parameters(), *module.buffers()])
    return module.state_dict()


def _alone(
    num_ranks: int, kind: str = "sgd", every_pass: bool = False, rates: tuple[float, float] = (1.0, 1.0)
) -> dict[str, Tensor]:
    """The same by hand on one device.

    Args:
        num_ranks: Number of ranks that it stands for.
        kind: Of the optimizer.
        every_pass: Whether linear layers are updated after each pass.
        rates: Factors of the learning rates of convolutions and of linear layers.
    """
    module = Net(kind)
    shared = [p for name, p in module.named_parameters() if int(name.split(".")[1]) < 3]
    split = [p for name, p in module.named_parameters() if int(name.split(".")[1]) > 3]
    optimizers = []
    for parameters, rate in ((shared, rates[0]), (split, rates[1])):
        module.parameters = lambda chosen=parameters: iter(chosen)  # type: ignore[assignment, misc]
        ((optimizer,), _) = module.configure_optimizers()
        optimizer.param_groups[0]["lr"] *= rate
        optimizers.append(optimizer)
    x, y = _samples(STEPS * BATCH * num_ranks).tensors
    for step in range(STEPS):
        examples = torch.arange(step * BATCH * num_ranks, (step + 1) * BATCH * num_ranks)
        passes = examples.chunk(num_ranks) if every_pass else [examples]  # row i of every rank stand together
        for parameter in shared:
            parameter.grad = None
        for chosen in passes:
            for parameter in split:
                parameter.grad = None
            (F.cross_entropy(module.net(x[chosen]), y[chosen])).backward()
            optimizers[1].step()
        for parameter in shared:
            assert parameter.grad is not None
            parameter.grad /= len(passes)
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.5
    return module.state_dict()


def _assert_equal(states: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for state in states:
        assert list(state) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["a", "b", "c"])
def test_steps_equal_one_device(scheme: str, num_ranks: int, tmp_path: Path) -> None:
    states = run(num_ranks, _fit, str(tmp_path), num_ranks, {"scheme": scheme}, lightning=True)
    _assert_equal(states, _alone(num_ranks))


def _fit_over_a_slow_link(path: str, seconds_per_byte: float) -> tuple[dict[str, str], dict[str, Tensor]]:
    speeds = Speeds(flops=1e11, bytes=1e10, link=1 / seconds_per_byte, latency=0.0)
    strategy = squall.HybridParallelStrategy(zero_stage=None)
    module = Net()
    with patch("squall.hybrid_parallel.measure_speeds", lambda *_: speeds):
        _trainer(path, strategy, 2).fit(module, _loader(3 * 20 * 2, 20, 2))
    assert strategy.layout is not None
    return strategy.layout.to_dict(), module.state_dict()


@pytest.mark.parametrize(("seconds_per_byte", "split"), [(1e-9, "columns"), (1e-4, "whole")])
def test_the_layout_is_by_the_batch_and_the_link(tmp_path: Path, seconds_per_byte: float, split: str) -> None:
    """40 examples a step are beyond both layers' break-even, 13 and 5. Wherever they live, the steps are the same."""
    (layout, state), (layout_of_other, other) = run(
        2, _fit_over_a_slow_link, str(tmp_path), seconds_per_byte, lightning=True
    )
    assert layout == layout_of_other == {"net.0": "whole", "net.2": "whole", "net.4": split, "net.6": split}
    with patch.multiple(__name__, BATCH=20):
        _assert_equal([state, other], _alone(2))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_update_after_every_pass(kind: str, num_ranks: int, tmp_path: Path) -> None:
    options = {"scheme": "c", "fc_update": "pass"}
    states = run(num_ranks, _fit, str(tmp_path), num_ranks, options, kind, lightning=True)
    _assert_equal(states, _alone(num_ranks, kind, every_pass=True))


@pytest.mark.parametrize(
    ("fc_update", "rule", "rates"),
    [
        ("step", "linear", (4.0, 4.0)),
        ("step", "sqrt", (2.0, 2.0)),
        ("pass", "linear", (4.0, 1.0)),
        ("pass", "sqrt", (2.0, 1.0)),
    ],
)
def test_learning_rates_grow_with_what_is_updated_by(
    fc_update: str, rule: str, rates: tuple[float, float], tmp_path: Path
) -> None:
    options = {"scheme": "c", "fc_update": fc_update, "lr_rule": rule}
    states = run(4, _fit, str(tmp_path), 4, options, lightning=True)
    _assert_equal(states, _alone(4, every_pass=fc_update == "pass", rates=rates))


def test_accumulated_and_clipped_gradients(tmp_path: Path) -> None:
    """The norm is that of all weights, wherever they are."""
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}
    states = run(2, _fit, str(tmp_path), 2, {}, lightning=True, **options)
    module = Net()
    x, y = _samples(STEPS * BATCH * 2).tensors
    F.cross_entropy(module.net(x), y).backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    (optimizer,), _schedule = module.configure_optimizers()
    optimizer.step()
    _assert_equal(states, module.state_dict())


# ------------------------------------------------------------------ checkpoints


def _fit_and_save(path: str, strategy: Any, num_ranks: int, batch_size: int, resume: str | None = None) -> None:
    module = Net("adam")
    loader = _loader(32, batch_size)
    trainer = _trainer(path, strategy, num_ranks, max_epochs=2 if resume else 1)
    trainer.fit(module, loader, ckpt_path=resume and f"{path}/{resume}")
    trainer.save_checkpoint(f"{path}/{type(trainer.strategy).__name__}{'-again' if resume else ''}.ckpt")


def _hybrid(path: str, num_ranks: int, batch_size: int, resume: str | None = None) -> dict[str, Any]:
    seen = {}

    class Looking(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.save_checkpoint(f"{path}/middle.ckpt")
            with torch._C.DisableTorchFunctionSubclass():
                seen.update({name: tuple(p.shape) for name, p in self.named_parameters()})
            seen["split"] = [name for name, p in self.named_parameters() if isinstance(p, ColumnParameter)]

    module = Looking("adam")
    loader = _loader(32, batch_size, num_ranks)
    trainer = _trainer(path, squall.HybridParallelStrategy(zero_stage=None), num_ranks, max_epochs=2 if resume else 1)
    trainer.fit(module, loader, ckpt_path=resume and f"{path}/{resume}")
    trainer.save_checkpoint(f"{path}/end.ckpt")
    return seen


def test_checkpoints_are_plain_and_go_on_anywhere(tmp_path: Path) -> None:
    """One device -> hybrid -> one device -> columns: the same as one device throughout."""
    path = str(tmp_path)
    single = _trainer(path, "auto", 1)
    module = Net("adam")
    single.fit(module, _loader(32, 8))
    single.save_checkpoint(f"{path}/one.ckpt")
    again = _trainer(path, "auto", 1, max_epochs=2)
    expected = Net("adam")
    again.fit(expected, _loader(32, 8), ckpt_path=f"{path}/one.ckpt")
    again.save_checkpoint(f"{path}/expected.ckpt")

    seen = run(2, _hybrid, path, 2, 4, "one.ckpt", lightning=True)
    assert seen[0]["split"] == ["net.4.weight", "net.4.bias", "net.6.weight", "net.6.bias"]
    assert [held["net.4.weight"] for held in seen] == [(4, 96), (3, 96)]
    ours = torch.load(f"{path}/end.ckpt", weights_only=True)
    stock = torch.load(f"{path}/expected.ckpt", weights_only=True)
    _assert_equal([ours["state_dict"]], stock["state_dict"])
    for key, entries in stock["optimizer_states"][0]["state"].items():
        for name, value in entries.items():
            found = ours["optimizer_states"][0]["state"][key][name]
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
    middle = torch.load(f"{path}/middle.ckpt", weights_only=True)
    assert all(middle["state_dict"][key].shape == value.shape for key, value in stock["state_dict"].items())
    run(2, _fit_and_save, path, squall.ColumnParallelStrategy(2), 2, 8, "middle.ckpt", lightning=True)
    later = torch.load(f"{path}/ColumnParallelStrategy-again.ckpt", weights_only=True)
    _assert_equal([later["state_dict"]], stock["state_dict"])


# ------------------------------------------------------------------ figures and errors


def _figures(path: str) -> dict[str, Any]:
    module = Net()
    strategy = squall.HybridParallelStrategy("c", None)
    trainer = _trainer(path, strategy, 2)
    data = _loader(STEPS * BATCH * 2, BATCH, 2)
    trainer.fit(module, data, data)
    counts = {crossing.name: crossing.floats_per_image_backward for crossing in strategy.crossings}
    return {**{key: value.item() for key, value in trainer.callback_metrics.items()}, "backward": counts}


def test_figures_of_a_step(tmp_path: Path) -> None:
    """Two ranks: an image's inputs go to the other column, the other column's outputs of it come back."""
    for rank, figures in enumerate(run(2, _figures, str(tmp_path), lightning=True)):
        # Sent: inputs of own images, and own outputs (4 of 7, 3 of 5; or 3 and 2) of the other's images.
        first, second = (96 + 4, 7 + 3) if rank == 0 else (96 + 3, 7 + 2)
        assert figures["crossings/net.4"] == pytest.approx((100 + 99) / 2)  # the mean over ranks
        assert figures["crossings/net.6"] == pytest.approx((10 + 9) / 2)
        # Backward: gradients of the other's outputs of own images, and partial ones of the other's inputs.
        shared = 5 * 27 + 5 + 6 * 45 + 6
        backward = {"net.4": 96 + 7 - (first - 96), "net.6": 7 + 5 - (second - 7)}
        assert figures["backward"] == {**backward, "data-parallel gradients": shared / BATCH}
        mean = (96 * 2 + 7 + 7 * 2 + 5) + shared / BATCH
        assert figures["crossings/bytes"] == pytest.approx(8 * mean)
        assert figures["crossings/step_bytes"] == pytest.approx(8 * mean * BATCH)
        assert figures["crossings/seconds_waiting"] > 0
        assert figures["loss"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "d"}, "scheme='d' must be 'a'"),
        ({"fc_update": "epoch"}, "fc_update='epoch' must be"),
        ({"fc_update": "pass", "scheme": "b"}, "Use scheme='c'"),
        ({"lr_rule": "cubic"}, "lr_rule='cubic' must be"),
        ({"layout": {"fc6": "rows"}}, "layout"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        squall.HybridParallelStrategy(**options)


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"fc_update": "pass"}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"fc_update": "pass"}, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        (
            {"fc_update": "pass"},
            {"callbacks": [GradientAccumulationScheduler({2: 2})]},
            "GradientAccumulationScheduler",
        ),
        ({"layout": {"net.9": "whole"}}, {}, "no layer of the module"),
    ],
)
def test_trainers_that_cannot_be(
    options: dict[str, Any], trainer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        _fit(str(tmp_path), 1, options, **trainer)


class Clips(Net):
    """By itself."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(args[0], gradient_clip_val=0.1, gradient_clip_algorithm="norm")


def test_gradients_that_are_not_there_at_once_cannot_be_clipped(tmp_path: Path) -> None:
    strategy = squall.HybridParallelStrategy(zero_stage=None, fc_update="pass")
    with pytest.raises(MisconfigurationException, match=r"Clips\.configure_gradient_clipping.*fc_update='step'"):
        _trainer(str(tmp_path), strategy, 1).fit(Clips(), _loader(4, 2))
