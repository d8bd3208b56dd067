"""Weights that user code edits between steps: a critic that is clipped, as in WGAN, under one rank and several."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

import squall
from tests.ranks import run

from .test_downpour import LR, START, Constant, fit, rows

pytestmark = pytest.mark.asynchronous
CLIP = 0.25


class Wasserstein(LightningModule):
    """A critic that its updates drive out of its bounds, clipped after each, and a generator that follows it."""

    def __init__(self, how: str = "data") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.how = how
        self.critic = nn.Parameter(torch.linspace(-0.2, 0.2, 12).view(3, 4))
        self.generator = nn.Parameter(torch.ones(4))
        self.largest = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.largest = max(self.largest, self.critic.abs().max().item())
        critic, generator = self.optimizers()  # type: ignore[misc]
        critic.zero_grad()
        self.manual_backward(-(self.critic @ (self.generator.detach() * torch.tensor([1.0, -1.0, 0.5, 2.0]))).sum())
        critic.step()
        if self.how == "data":
            self.critic.data.clamp_(-CLIP, CLIP)
        elif self.how == "no_grad":
            with torch.no_grad():
                self.critic.clamp_(-CLIP, CLIP)
        else:
            self.critic.data = self.critic.data.clamp(-CLIP, CLIP)
        generator.zero_grad()
        self.manual_backward((self.critic @ self.generator).sum())
        generator.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop([self.critic], lr=LR), torch.optim.SGD([self.generator], lr=LR / 8)


def _wasserstein(how: str, options: dict[str, Any] | None) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    module = Wasserstein(how)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = fit(module, "auto" if options is None else squall.DownpourStrategy(**options), max_epochs=2)
    return {
        "critic": module.critic.detach().clone(),
        "generator": module.generator.detach().clone(),
        "largest": module.largest,
        "steps": made.global_step,
        "said": [str(warning.message) for warning in seen if "edited" in str(warning.message)],
    }


@pytest.mark.parametrize("how", ["data", "no_grad", "new data"])
@pytest.mark.parametrize("options", [{}, {"num_shards": 2, "staleness_rule": "delay_compensated"}], ids=str)
def test_a_clipped_critic_is_one_devices(how: str, options: dict[str, Any]) -> None:
    ((ours),) = run(1, _wasserstein, how, options, lightning=True)
    ((stock),) = run(1, _wasserstein, how, None, lightning=True)
    torch.testing.assert_close(ours["critic"], stock["critic"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours["generator"], stock["generator"], rtol=1e-6, atol=1e-7)
    assert stock["critic"].abs().max() == CLIP
    assert ours["said"] == []


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"num_shards": 3}], ids=str)
def test_a_critic_of_several_ranks_stays_in_its_bounds(options: dict[str, Any]) -> None:
    ends = run(2, _wasserstein, "data", options, lightning=True)
    # Beyond them is at most what each rank's last update made: LR, or 10 LR while RMSprop begins.
    for end in ends:
        assert end["steps"] == 96
        assert torch.equal(end["critic"], ends[0]["critic"])
        assert end["critic"].abs().max() <= CLIP + 2 * 2 * LR
        assert end["largest"] <= CLIP + 2 * 10 * LR
    assert any("edited between two steps" in text for end in ends for text in end["said"])
    assert all(sum("two steps, by a callback" in text for text in end["said"]) <= 1 for end in ends)


class _Clips(Callback):
    """Clips one vector after each batch, on some ranks; the other one is left alone."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_rank in self.ranks:
            module.down.data.clamp_(max=START)


def _clipped(ranks: list[int], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    module = Constant()
    strategy = squall.DownpourStrategy(**options)
    fit(module, strategy, rows(48), callbacks=[_Clips(ranks)])
    return module.up.detach().clone(), module.down.detach().clone()


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
@pytest.mark.parametrize("options", [{"max_staleness": 0}, {"max_staleness": 0, "overlap": True}], ids=str)
def test_what_is_edited_replaces_nothing_else(ranks: list[int], options: dict[str, Any]) -> None:
    """Each update adds 2 LR to what is clipped; the other weights have every update of every rank."""
    for up, down in run(2, _clipped, ranks, options, lightning=True):
        assert torch.equal(up, torch.full((7, 3), START - 48 * LR))
        assert down.max() <= START + 12 * 2 * LR
        assert down.min() >= START


@pytest.mark.parametrize("options", [{"fetch_every": 4}, {"overlap": True}, {"num_shards": 2}], ids=str)
def test_one_ranks_edits_are_kept_however_it_fetches(options: dict[str, Any]) -> None:
    ((up, down),) = run(1, _clipped, [0], options, lightning=True)
    assert torch.equal(up, torch.full((7, 3), START - 48 * LR))
    assert torch.equal(down, torch.full((5,), START)), "the last batch's, too"


class _Rewinds(Callback):
    """Edits between two epochs, which all ranks make but one counts."""

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.down.data.mul_(0.5 if trainer.global_rank == 0 else 0.0)


def _rewound() -> tuple[Tensor, Tensor, list[str]]:
    module = Constant()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(module, squall.DownpourStrategy(max_staleness=0), max_epochs=2, callbacks=[_Rewinds()])
    said = [str(warning.message) for warning in seen if "two epochs" in str(warning.message)]
    return module.up.detach().clone(), module.down.detach().clone(), said


def test_edits_between_epochs_are_rank_0s() -> None:
    ends = run(2, _rewound, lightning=True)
    for up, down, _ in ends:
        assert torch.equal(up, torch.full((7, 3), START - 48 * LR))
        assert (START + 20 * 2 * LR) / 2 + 20 * 2 * LR <= down.min() <= START / 2 + 48 * 2 * LR
    assert len(ends[1][2]) == 1
