"""The hook under Lightning: fits, checkpoints, and where it can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from squall.consistency import CodecHook, CodecHookState, codec_hook, get_codec
from tests.ranks import run

from .codes import all_of


class Regression(LightningModule):
    """Least squares that knows nothing of codecs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.network(x) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer(
    path: str,
    max_epochs: int,
    *callbacks: Callback,
    strategy: Any = "ddp",
    num_ranks: int = 2,
    accelerator: str = "cpu",
) -> Trainer:
    return Trainer(
        strategy=strategy, devices=num_ranks, accelerator=accelerator, max_epochs=max_epochs, callbacks=list(callbacks),
        default_root_dir=path, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 20, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=16)


def fit(path: str) -> dict[str, Any]:
    """With and without codes; then stopped and resumed; then what can't be."""
    weights = {}
    for spec in (None, "bf16", "int8", "topk:0.25"):
        module, hooks = Regression(), [] if spec is None else [CodecHook(spec)]
        run_ = trainer(path, 6, *hooks)
        run_.fit(module, loader())
        weights[spec] = torch.cat([p.detach().view(-1) for p in module.parameters()])
        assert torch.equal(*all_of(weights[spec]))
        if spec is not None:
            num_bytes = get_codec(spec).num_bytes(weights[spec].numel())
            assert run_.callback_metrics["codec/bytes_per_step"] == num_bytes == hooks[0].state.bytes_per_step
    assert not torch.equal(weights[None], weights["int8"])

    hook = CodecHook("topk:0.25")
    first = trainer(path, 3, hook)
    first.fit(Regression(), loader())
    checkpoint = f"{path}/three.ckpt"
    first.save_checkpoint(checkpoint)
    mean = hook.state.mean_state_dict()["residuals"]
    assert any(residual.any() for residual in mean)

    class LoadedResiduals(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for loaded, residual in zip(hook.state.state_dict()["residuals"], mean, strict=True):
                assert torch.equal(loaded, residual)

    module, hook = Regression(), CodecHook("topk:0.25")
    trainer(path, 6, hook, LoadedResiduals()).fit(module, loader(), ckpt_path=checkpoint)
    resumed = torch.cat([p.detach().view(-1) for p in module.parameters()])
    # The rest of the checkpoint needs no Squall.
    plain = Regression()
    trainer(path, 4).fit(plain, loader(), ckpt_path=checkpoint)

    class OtherHook(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.strategy.model.register_comm_hook(None, allreduce_hook)

    with pytest.raises(MisconfigurationException, match="another communication hook"):
        trainer(path, 1, OtherHook(), CodecHook()).fit(Regression(), loader())
    reference = weights[None].norm()
    return {
        "resumed": float((resumed - weights[None]).norm() / reference),
        **{spec: float((w - weights[None]).norm() / reference) for spec, w in weights.items() if spec is not None},
    }


def test_a_stock_trainer_fits(tmp_path: Path) -> None:
    for away in run(2, fit, str(tmp_path), lightning=True):
        assert 0 < away["bf16"] < 1e-3
        assert 1e-3 < away["int8"] < 1e-2
        assert 1e-2 < away["topk:0.25"] < 0.05
        assert away["resumed"] < 0.05


def fit_by_arguments(path: str, accelerator: str) -> bool:
    """Whether Lightning registered the hook that DDPStrategy was given."""
    registered = []

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            registered.append(bool(trainer.strategy.model._comm_hooks))

    strategy = DDPStrategy(ddp_comm_hook=codec_hook, ddp_comm_state=CodecHookState("int8"))
    trainer(path, 1, Look(), strategy=strategy, num_ranks=1, accelerator=accelerator).fit(Regression(), loader())
    return registered[0]


def test_on_cpus_lightning_s_own_arguments_do_nothing(tmp_path: Path) -> None:
    (registered,) = run(1, fit_by_arguments, str(tmp_path), "cpu", lightning=True)
    assert not registered  # if it is one day, the docstrings of the hook and the callback have something to unsay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpus_lightning_s_own_arguments_do(tmp_path: Path) -> None:
    (registered,) = run(1, fit_by_arguments, str(tmp_path), "gpu", lightning=True)
    assert registered


def test_without_ddp_the_callback_says_what_to_do(tmp_path: Path) -> None:
    hook = CodecHook("int8")
    with pytest.raises(MisconfigurationException, match=r"SingleDeviceStrategy has none\. Use Trainer\(strategy='ddp'"):
        trainer(str(tmp_path), 1, hook, strategy="auto", num_ranks=1).fit(Regression(), loader())
