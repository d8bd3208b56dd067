"""Downpour on several hosts, each with shards of its own: on loopback, where every host is a folder of shared memory.

What a wire does to it (a link that is shaped, taken down, or gone with its host) is in ``test_downpour_links``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import squall
from squall.consistency.hosting import get_host
from tests.ranks import free_port, run

from .test_downpour import START, Constant, rows

pytestmark = pytest.mark.asynchronous

SECRET = "nobody will ever guess this"


def _be_host(num_nodes: int, per_node: int) -> None:
    rank = int(os.environ["RANK"])
    os.environ.update(
        NODE_RANK=str(rank // per_node), LOCAL_RANK=str(rank % per_node), SQUALL_SECRET=SECRET,
        WORLD_SIZE=str(num_nodes * per_node),
    )  # fmt: skip


def _fit(num_nodes: int, per_node: int, port: int, strategy: dict[str, Any], module: dict[str, Any]) -> dict[str, Any]:
    _be_host(num_nodes, per_node)
    os.environ["SQUALL_PORT"] = str(port)
    made = squall.DownpourStrategy(**strategy)
    constant = Constant(**module)
    trainer = Trainer(
        strategy=made, accelerator="cpu", devices=per_node, num_nodes=num_nodes, max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(constant, rows())
    return {
        "up": constant.up.detach().clone(),
        "down": constant.down.detach().clone(),
        "steps": trainer.global_step,
        "report": dict(made.report),
        "state": [dict(s) for s in trainer.optimizers[0].state.values()] if trainer.is_global_zero else None,
    }


def fit_on_hosts(num_nodes: int, per_node: int, strategy: dict[str, Any], **module: Any) -> list[dict[str, Any]]:
    ends: list[dict[str, Any]] = run(
        num_nodes * per_node, _fit, num_nodes, per_node, free_port(), strategy, module, lightning=True
    )
    return ends


@pytest.mark.parametrize(("num_nodes", "per_node"), [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_shards": 2},
        {"overlap": True},
        {"push_every": 3, "fetch_every": 3, "overlap": True},
        {"fetch_every": 2},
        {"codec": "bf16"},
        {"codec": "int8", "overlap": True},
        {"codec": "1bit"},
        {"staleness_rule": "delay_compensated", "codec": "bf16"},
        {"max_staleness": 1},
        {"warm_start_steps": 5},
    ],
    ids=str,
)
def test_every_push_is_applied_once(num_nodes: int, per_node: int, options: dict[str, Any]) -> None:
    ends = fit_on_hosts(num_nodes, per_node, options)
    for end in ends:
        assert end["report"]["num_samples"] == 48
        assert end["report"]["num_lost"] == end["report"]["num_rolled_back"] == 0
        assert end["steps"] == end["report"]["version"]
        assert torch.equal(end["up"], ends[0]["up"])
        assert torch.equal(end["down"], ends[0]["down"])
        if "staleness_rule" not in options:  # which makes another gradient of it
            assert torch.equal(end["up"], torch.full((7, 3), START - 0.125 * 48))
            assert torch.equal(end["down"], torch.full((5,), START + 0.25 * 48))
    if options.get("push_every", 1) == 1:
        assert ends[0]["steps"] == 48


def _fit_and_lose_a_host(
    port: int, callbacks: list[Any], num_rows: int, options: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    _be_host(2, 1)
    os.environ["SQUALL_PORT"] = str(port)
    strategy = squall.DownpourStrategy(lease_timeout=2.0, **options)
    module = Validated() if "val_check_interval" in arguments else Constant()
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=1, num_nodes=2, max_epochs=1, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **arguments,
    )  # fmt: skip
    trainer.fit(module, rows(num_rows), rows(1) if isinstance(module, Validated) else None)
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"{strategy._run_name}.n1-")]
    return {
        "up": module.up.detach().clone(),
        "down": module.down.detach().clone(),
        "report": dict(strategy.report),
        "left": left if trainer.global_rank == 1 else [],
    }


class Validated(Constant):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def lose_a_host(
    *callbacks: Callback, num_rows: int = 200, strategy: dict[str, Any] | None = None, **arguments: Any
) -> list[dict[str, Any]]:
    """Fit on two hosts; the process beside rank 1 is killed, and with it its shards and all that they had learned."""
    ends: list[dict[str, Any]] = run(
        2, _fit_and_lose_a_host, free_port(), list(callbacks), num_rows, strategy or {}, arguments, lightning=True
    )
    assert ends[1]["left"] == []  # of the host that was killed
    assert ends[0]["report"]["num_samples"] == num_rows
    assert ends[0]["report"]["num_live"] == 2
    for end in ends:
        assert torch.equal(end["up"], ends[0]["up"])
        assert torch.equal(end["down"], ends[0]["down"])
    return ends


class KillAt(Callback):
    """Rank 1 kills the process beside it after some steps.

    Args:
        step: How many.
        key: Under which rank 0 waits for this, if it does.

    """

    def __init__(self, step: int, key: str = "") -> None:
        self.step = step
        self.key = key

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.strategy._num_steps == self.step:
            if self.key:
                trainer.strategy.wait_for_ranks(f"{self.key} is reached", [0, 1])
            host = get_host().process
            host.kill()
            host.wait()
            if self.key:
                trainer.strategy.wait_for_ranks(self.key, [0, 1])


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"codec": "1bit"}], ids=str)
def test_a_lost_hosts_shards_go_on_elsewhere(options: dict[str, Any]) -> None:
    ends = lose_a_host(KillAt(5), strategy=options)
    report = ends[0]["report"]
    assert report["version"] == 200
    in_vain = report["num_rolled_back"]
    assert in_vain >= 5
    weights = torch.cat([ends[0]["up"].flatten(), (ends[0]["down"] - START) / -2 + START])
    moved = (START - weights) / 0.125
    assert set(moved.tolist()) == {200.0, 200.0 - in_vain}  # the first half was on the host that is there
    assert torch.equal(moved[:13], torch.full((13,), 200.0))


class EditAfter(Callback):
    """Rank 0 writes into its weights when the other host has just been lost."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_rank == 0 and trainer.strategy._num_steps == 5:
            trainer.strategy.wait_for_ranks("edit is reached", [0, 1])
            trainer.strategy.wait_for_ranks("edit", [0, 1])
            with torch.no_grad():
                module.up += 1024.0
                module.down += 1024.0


def test_what_a_callback_writes_outlives_a_lost_host() -> None:
    ends = lose_a_host(KillAt(5, "edit"), EditAfter())
    assert ends[0]["up"].min() > 512.0
    assert ends[0]["down"].min() > 512.0


class ValidationWaits(Callback):
    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 0 and trainer.strategy._in_loop:
            trainer.strategy.wait_for_ranks("validated is reached", [0, 1])
            trainer.strategy.wait_for_ranks("validated", [0, 1])


def test_what_validation_has_seen_of_a_host_is_what_is_left_of_it() -> None:
    """Without a checkpoint, too. Rank 0 has made 20 updates before it validates, and rank 1 five when it is killed."""
    options = {"val_check_interval": 20, "num_sanity_val_steps": 0}
    ends = lose_a_host(KillAt(5, "validated"), ValidationWaits(), num_rows=60, **options)
    assert ends[0]["report"]["num_rolled_back"] < 20
