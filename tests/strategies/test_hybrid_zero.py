"""HybridParallelStrategy on DeepSpeed: every stage of ZeRO trains as DDP does, on CPUs too."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LambdaCallback, ModelSummary
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import squall
from squall import _zero
from tests.ranks import run

from .test_hybrid_parallel import Clips, Net, _loader, _trainer

needs_deepspeed = pytest.mark.skipif(not _zero.is_available(), reason="DeepSpeed is not installed")
NUM_STEPS = 10


class Single(Net):
    """In single precision, with statistics that ranks don't share until somebody asks, and a frozen layer."""

    def __init__(self, kind: str = "sgd") -> None:
        super().__init__(kind)
        # No kinks, and not right behind a bias, whose gradient would be nothing but rounding, which Adam magnifies.
        self.net[1] = nn.Tanh()
        self.net.insert(2, nn.BatchNorm2d(5))
        self.net[3].bias.requires_grad_(False)
        self.float()


def _forget_process_group() -> None:
    """DeepSpeed keeps the process group of the first training of a process, and every test has its own."""
    if "deepspeed" in sys.modules:
        from deepspeed import comm
        from deepspeed.utils import groups

        comm.comm.cdb = None
        for name, value in list(vars(groups).items()):
            if name.startswith("_") and isinstance(value, torch.distributed.ProcessGroup):
                setattr(groups, name, None)


def _single(num: int) -> DataLoader[Any]:
    loader = _loader(num, 4, 2)
    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    loader.dataset.tensors = (images.float(), labels)  # type: ignore[attr-defined]
    return loader


def _fit(
    path: str, strategy: Any, kind: str, max_epochs: int = 1, resume: str | None = None, save: str | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    _forget_process_group()
    module = Single(kind)
    trainer = _trainer(path, strategy, 2, precision="32-true", max_epochs=max_epochs)
    loader = _single(NUM_STEPS * 8)
    trainer.fit(module, loader, loader, ckpt_path=resume and f"{path}/{resume}")
    if save:
        trainer.save_checkpoint(f"{path}/{save}")
    assert all(type(value) is nn.Parameter for value in module.parameters())
    assert not any(name.startswith(("ds_", "_hp", "_z")) for p in module.parameters() for name in vars(p))
    return module.state_dict(), {key: value.item() for key, value in trainer.callback_metrics.items()}


def _assert_close(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=2e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


@needs_deepspeed
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ten_steps_equal_ddp(stage: Any, kind: str, tmp_path: Path) -> None:
    """Against Lightning's DDP, which has never heard of columns."""
    ours = run(2, _fit, str(tmp_path), squall.HybridParallelStrategy("c", stage), kind, lightning=True)
    theirs = run(2, _fit, str(tmp_path), "ddp", kind, lightning=True)
    for (state, metrics), (expected, others) in zip(ours, theirs, strict=True):
        _assert_close(state, expected)
        assert metrics["loss"] == pytest.approx(others["loss"], rel=1e-4)
        assert metrics["crossings/data-parallel gradients"] == 0
        assert metrics["crossings/bytes"] > 0


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoints_are_plain_and_go_on_under_any_stage(stage: Any, tmp_path: Path) -> None:
    """DDP -> ZeRO, and ZeRO -> DDP: the same as DDP throughout, optimizer state included."""
    path = str(tmp_path)
    run(2, _fit, path, "ddp", "adam", 1, None, "ddp1.ckpt", lightning=True)
    expected = run(2, _fit, path, "ddp", "adam", 2, "ddp1.ckpt", "ddp2.ckpt", lightning=True)
    strategy = squall.HybridParallelStrategy("c", stage)
    later = run(2, _fit, path, strategy, "adam", 2, "ddp1.ckpt", "hybrid2.ckpt", lightning=True)
    run(2, _fit, path, strategy, "adam", 1, None, "hybrid1.ckpt", lightning=True)
    back = run(2, _fit, path, "ddp", "adam", 2, "hybrid1.ckpt", lightning=True)
    for (state, _), (other, _), (reference, _) in zip(later, back, expected, strict=True):
        _assert_close(state, reference)
        _assert_close(other, reference)
    ours = torch.load(f"{path}/hybrid2.ckpt", weights_only=True)["optimizer_states"][0]
    stock = torch.load(f"{path}/ddp2.ckpt", weights_only=True)["optimizer_states"][0]
    assert ours["param_groups"] == stock["param_groups"]
    assert ours["state"].keys() == stock["state"].keys()
    for key, entries in stock["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(ours["state"][key][name], value, rtol=1e-3, atol=1e-5)


@needs_deepspeed
def test_configuration_passes_through(tmp_path: Path) -> None:
    config = {"zero_optimization": {"reduce_bucket_size": 1000}, "steps_per_print": 7}
    strategy = squall.HybridParallelStrategy("c", 2, deepspeed_config=config)
    assert run(2, _look_at_config, str(tmp_path), strategy, lightning=True) == [(2, 1000, 7)] * 2


def _look_at_config(path: str, strategy: squall.HybridParallelStrategy) -> tuple[int, int, int]:
    seen: list[Any] = []

    class Looking(Single):
        def on_train_start(self) -> None:
            engine = self.trainer.strategy.model
            seen.append((engine.zero_optimization_stage(), engine.zero_reduce_bucket_size(), engine.steps_per_print()))

    _forget_process_group()
    module = Looking()
    _trainer(path, strategy, 2, precision="32-true").fit(module, _single(8))
    result: tuple[int, int, int] = seen[0]
    return result


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        (4, None, "zero_stage=4 must be"),
        (1, {"zero_optimization": {"stage": 2}}, "says stage 2, and zero_stage=1"),
        (1, {"gradient_clipping": 1.0}, "has 'gradient_clipping'"),
        (1, "nowhere.json", "is no file"),
        (1, ["stage"], "must be a dict"),
        (None, {"steps_per_print": 7}, "needs DeepSpeed"),
    ],
)
def test_configurations_that_cannot_be(stage: Any, config: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        squall.HybridParallelStrategy("c", stage, deepspeed_config=config)


def _without(path: str, stage: int, **options: Any) -> str:
    """The error or the warning of a training that DeepSpeed can't do."""
    module = Net()
    trainer = _trainer(path, squall.HybridParallelStrategy("c", stage), 2, **options)
    with pytest.warns(match="zero_stage") if stage < 2 else pytest.raises(MisconfigurationException) as caught:  # type: ignore[var-annotated, attr-defined]
        trainer.fit(module, _loader(16, 4, 2))
    if stage < 2:
        return next(str(w.message) for w in caught if "zero_stage" in str(w.message))  # type: ignore[attr-defined]
    return str(caught.value)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", [1, 3])
def test_where_it_cannot_be_used_it_is_ddp_or_an_error(stage: int, tmp_path: Path) -> None:
    """Rank 0 warns; stages that were asked for the memory's sake are an error everywhere."""
    reason = "single precision" if _zero.is_available() else "not installed"
    if stage == 1:
        messages = run(2, _rank_zero_warns, str(tmp_path), lightning=True)[:1]
    else:
        messages = run(2, _without, str(tmp_path), 3, lightning=True)
    assert all(reason in message and "zero_stage=None" in message for message in messages)


def _rank_zero_warns(path: str) -> str:
    if os.environ["RANK"] == "0":
        return _without(path, 1)
    Trainer(**{"logger": False, "enable_checkpointing": False})  # what rank 0 does beside
    module = Net()
    _trainer(path, squall.HybridParallelStrategy("c", 1), 2).fit(module, _loader(16, 4, 2))
    return ""


class Looks(Callback):
    """At gradients, which DeepSpeed has taken by then."""

    def on_before_optimizer_step(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("module", "callback", "reason"),
    [
        (Single, Looks(), "Looks.on_before_optimizer_step"),
        (Single, LambdaCallback(on_after_backward=lambda *args: None), "LambdaCallback.on_after_backward"),
        (Clips, None, "Clips.configure_gradient_clipping"),
        (Single, GradientAccumulationScheduler({3: 2}), "GradientAccumulationScheduler"),
        (Single, ModelSummary(), ""),
    ],
)
def test_code_that_needs_gradients_has_them(module: Any, callback: Any, reason: str, tmp_path: Path) -> None:
    trainer = _trainer(str(tmp_path), "auto", 1, callbacks=callback)
    with patch.object(_zero, "is_available", lambda: True):
        found = _zero.reason_against(module().float(), trainer, [Mock()], "step", None)
    assert reason in found
    assert bool(reason) == bool(found)
