"""Layers that are better on every rank than split: by their arithmetic, what they send, and a link's speed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from squall import models
from squall._placing import batch_size_of
from squall.placement import (
    Columns,
    Grid,
    Speeds,
    choose_whole,
    derive_layout,
    derive_tiles,
    flops_per_example,
    measure_speeds,
)
from squall.placement.hybrid.layout import break_even, plan_hybrid, seconds_of
from tests.ranks import run

FAST, SLOW = (Speeds(flops=1e11, bytes=1e10, link=link, latency=1e-5) for link in (1e10, 1e6))


def test_flops_are_those_of_the_paper() -> None:
    flops = flops_per_example(models.AlexNet(), torch.zeros(2, 3, 224, 224))
    assert flops["conv1"] == 2 * 96 * 363 * 55 * 55
    assert flops["conv2"] == 2 * 256 * 48 * 25 * 27 * 27  # in two groups
    assert flops["fc6"] == 2 * 9216 * 4096


def _choose(speeds: Speeds, num_examples: int = 64) -> Any:
    net, example = models.AlexNet(), torch.zeros(1, 3, 224, 224)
    derive = partial(derive_layout, net, example, 2)
    return choose_whole(derive, flops_per_example(net, example), num_examples, speeds)


def test_all_stay_split_where_the_link_is_fast() -> None:
    layout = _choose(FAST)
    assert [row.split for row in layout] == ["columns"] * 7 + ["whole"]
    assert layout["conv3"].reason == "splitting saves 288.0 ms and sends for 1.1"  # of 299 MFLOP an image, thrice


def test_what_sends_more_than_it_saves_is_whole_where_the_link_is_slow() -> None:
    layout = _choose(SLOW)
    assert [row.name for row in layout if row.split == "whole"] == [
        "conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8",
    ]  # fmt: skip
    assert layout["conv3"].reason == layout["conv2"].reason.replace("conv2", "conv3")
    assert layout["conv1"].reason.startswith("whole with conv3: a step is ")
    assert layout["fc8"].reason == "last layer: the loss needs all of it"


def test_layers_are_weighed_with_what_others_then_send() -> None:
    """Whole by itself, the third would have to fetch as much as it does in columns."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 1, groups=2), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 2, 1))
    example = torch.zeros(1, 3, 20, 20)
    derived = []

    def derive(lines: dict[str, str]) -> Any:
        derived.append(lines)
        return derive_layout(net, example, 2, lines)

    layout = choose_whole(derive, flops_per_example(net, example), 8, SLOW)
    assert derived == [{}, *(dict.fromkeys(names, "whole") for names in (["2"], ["0", "1", "2"], ["2"]))]
    assert [row.split for row in layout] == ["whole"] * 4


def test_tiles_are_weighed_alike() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 9, padding=4), nn.Conv2d(4, 4, 9, padding=4))
    example = torch.zeros(1, 3, 16, 16)
    derive = partial(derive_tiles, net, example, Grid.dry(2, 1))
    flops = flops_per_example(net, example)
    assert [row.split for row in choose_whole(derive, flops, 64, FAST)] == ["tiles", "tiles"]
    assert "whole" in [row.split for row in choose_whole(derive, flops, 64, SLOW)]


# ------------------------------------------------------------------ one weird trick


def _hybrid(num_examples: int, speeds: Speeds, overrides: dict[str, str] | None = None) -> tuple[Any, int]:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(1024, 1024), nn.Linear(1024, 10))
    asked = []
    table = plan_hybrid(net, 2, overrides, num_examples, lambda: asked.append(1) or speeds)
    return {row.name: (row.split, row.reason) for row in table}, len(asked)


def test_up_to_the_break_even_nothing_is_measured() -> None:
    table, num_measured = _hybrid(19, SLOW)
    assert (table["2"][0], table["3"][0], num_measured) == ("columns", "columns", 0)
    assert table["3"][1] == "B(m + n) < 2mn up to 19 examples a step"


def test_beyond_it_the_faster_one_is_taken_and_told() -> None:
    table, num_measured = _hybrid(5000, SLOW)
    assert (table["2"][0], table["3"][0], num_measured) == ("whole", "whole", 1)
    assert table["2"][1] == (
        "B(m + n) > 2mn from 1,025 examples a step on; 5,000 examples: 30,721.0 ms in columns, 4,196.4 replicated"
    )
    table, _ = _hybrid(5000, SLOW, {"3": "columns"})
    assert (table["2"][0], table["3"][0]) == ("whole", "columns")


def test_no_difference_that_matters_changes_nothing() -> None:
    table, num_measured = _hybrid(1200, FAST)
    assert (table["2"][0], table["3"][0], num_measured) == ("columns", "columns", 1)


def test_the_break_even_is_where_bytes_are_equal() -> None:
    layer = nn.Linear(1000, 400, device="meta")
    link_only = Speeds(1e11, float("inf"), 1e9, 0.0)
    # A rank of two sends m inputs of half of the examples forward, half of their outputs, and as much backward.
    columns, replicas = seconds_of(layer, 2, 1000 * 400 // (1000 + 400 // 2), link_only)
    assert columns == pytest.approx(replicas, rel=0.01)
    assert break_even(layer) == 2 * 1000 * 400 // 1400  # the paper's rule


# ------------------------------------------------------------------ what is measured


def _measure() -> tuple[Speeds, float]:
    import torch.distributed as dist

    columns = Columns(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    before = torch.get_rng_state()
    speeds = measure_speeds(columns, torch.device("cpu"), torch.float64)
    assert before.equal(torch.get_rng_state()), "masks would be others than without a measurement"
    return speeds


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_measure_the_same(num_ranks: int) -> None:
    first, *others = run(num_ranks, _measure)
    assert all(other == first for other in others)
    assert 1e8 < first.flops < 1e14
    assert 1e6 < first.link < 1e12
    assert "Gbit/s" in str(first)


class Plain(LightningModule):
    def train_dataloader(self) -> DataLoader[Any]:
        raise AssertionError("a loader is made once, by Lightning")

    def training_step(self, batch: Any) -> None:
        return None


def _source(module: LightningModule, data: Any) -> int | None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.strategy._lightning_module = module
    module.trainer = trainer
    loader, data_module = (None, data) if isinstance(data, LightningDataModule) else (data, None)
    trainer._data_connector.attach_data(module, train_dataloaders=loader, datamodule=data_module)
    return batch_size_of(trainer)


def test_the_batch_size_is_found_where_it_is_told() -> None:
    dataset = TensorDataset(torch.zeros(6, 1))
    assert _source(Plain(), DataLoader(dataset, 3)) == 3
    sampler = torch.utils.data.BatchSampler(range(6), 2, False)
    assert _source(Plain(), DataLoader(dataset, batch_sampler=sampler)) == 2
    assert _source(Plain(), [DataLoader(dataset, 3)] * 2) is None
    assert _source(Plain(), None) is None
    module = Plain()
    module.save_hyperparameters({"batch_size": 7})
    assert _source(module, None) == 7
    data = LightningDataModule()
    data.batch_size = 5  # type: ignore[attr-defined]
    assert _source(Plain(), data) == 5
