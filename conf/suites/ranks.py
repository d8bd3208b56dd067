"""Time real Trainers on ranks of one thread each, interleaved.

Run as a program, this is one rank, which fits with the strategies that it is told, and answers with the seconds of
each step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from squall.conf.suites.links import Link
from squall.conf.suites.programs import Order, Programs, free_port, programs, serve

_DEALING = ("ddp", "zero1", "hybrid_parallel", "downpour")  # each rank has a part of the batch


class Ranks:
    """Processes that wait to be told what to time.

    Args:
        processes: One a rank.
        link: How they reach each other.
        net: Arguments of :class:`squall.models.AlexNet`, or of the network of ``squall.models`` that ``name`` names.

    """

    def __init__(self, processes: Programs, link: Link, net: Mapping[str, Any]) -> None:
        self.processes = processes
        self.link = link
        self._net = dict(net)

    def time(self, strategy: str, batch_size: int, num_steps: int) -> list[float]:
        """Fit for a few steps; returns the seconds of each on rank 0, the first left out.

        Args:
            strategy: As of :meth:`measure`.
            batch_size: Images of one step, all ranks together.
            num_steps: Steps that count.

        Raises:
            RuntimeError: If a rank ends.

        """
        return self.measure(strategy, batch_size, num_steps)[0]

    def measure(
        self, strategy: str, batch_size: int, num_steps: int, options: Mapping[str, Any] | None = None
    ) -> tuple[list[float], float]:
        """Fit for a few steps.

        Args:
            strategy: "single", "ddp", "zero1" (DDP with torch's ``ZeroRedundancyOptimizer``), or a name that Squall has
                registered.
            batch_size: Images of one step, all ranks together.
            num_steps: Steps that count, after one that doesn't.
            options: Arguments of a strategy of Squall's.

        Returns:
            The seconds of each step on rank 0, and the bytes that a rank's host sends in one, all protocols included.

        Raises:
            RuntimeError: If a rank ends.

        """
        num_ranks = 1 if strategy == "single" else len(self.link.prefixes)
        order = {
            "net": self._net, "strategy": strategy, "batch_size": batch_size, "num_steps": num_steps,
            "num_ranks": num_ranks, "port": free_port(), "link": self.link.main_address,
            "options": dict(options or {}),
            # Shards of one host are reached through its memory, so hosts have to be told apart.
            "num_hosts": num_ranks if strategy == "downpour" and self.link.name != "loopback" else 1,
        }  # fmt: skip
        answers = self.processes.ask({rank: order for rank in range(num_ranks)})
        # All ranks' traffic is on one interface if they are on one host.
        shared = num_ranks if self.link.name == "loopback" else 1
        sent = sum(answer["sent"] for answer in answers.values()) / num_ranks / shared
        seconds: list[float] = answers[0]["seconds"]
        return seconds, sent / num_steps


@contextmanager
def ranks_on(link: Link, net: Mapping[str, Any]) -> Iterator[Ranks]:
    """Ranks that are gone afterwards."""
    with programs("squall.conf.suites.ranks", link) as processes:
        yield Ranks(processes, link, net)


class Rank:
    """One rank, which fits as it is told.

    Args:
        rank: Its number.

    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._net: Mapping[str, Any] = {}
        self._module: Any = None

    def loader(self, images: Any, labels: Any, num_steps: int) -> tuple[Any, int]:
        """What is trained on, and in how many epochs: one batch again and again.

        Args:
            images: Of this rank's batch.
            labels: Likewise.
            num_steps: Steps of this rank.

        """
        from torch.utils.data import DataLoader, TensorDataset

        return DataLoader(TensorDataset(images, labels), batch_size=len(images)), num_steps

    def carry_out(self, order: Order) -> dict[str, Any]:
        """Fit once; returns the seconds of each step but the first, and the bytes that left the host meanwhile."""
        import torch
        from lightning.pytorch import Callback, Trainer
        from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

        import squall

        class Clock(Callback):
            def __init__(self) -> None:
                self.ticks: list[float] = []
                self.sent: list[int] = []

            def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
                self.ticks.append(time.perf_counter())
                self.sent.append(_sent())

        torch.set_num_threads(1)
        if self._module is None or self._net != order["net"]:
            self._net, self._module = order["net"], _make_module(order["net"])
        module, num_ranks = self._module, order["num_ranks"]
        node, local = (self.rank, 0) if order["num_hosts"] > 1 else (0, self.rank)
        os.environ.update(
            LOCAL_RANK=str(local), NODE_RANK=str(node), WORLD_SIZE=str(num_ranks), MASTER_ADDR=order["link"],
            MASTER_PORT=str(order["port"]), SQUALL_SECRET="of two hosts that are one",
        )  # fmt: skip
        share = order["batch_size"] // (num_ranks if order["strategy"] in _DEALING else 1)
        torch.manual_seed(1)
        images = torch.randn(share, module.net.in_channels, module.net.image_size, module.net.image_size)
        labels = torch.randint(module.net.num_classes, (share,))
        name, options = order["strategy"], order["options"]
        # Downpour's batches are dealt out to all ranks.
        num_steps = (order["num_steps"] + 1) * (num_ranks if name == "downpour" else 1)
        loader, num_epochs = self.loader(images, labels, num_steps)
        module.partitions_state = name == "zero1"
        strategy: Any = "auto"
        if name in ("ddp", "zero1") and num_ranks > 1:
            # Ours to tune for DDP too: no second pass over the graph, and gradients reduced where they lie.
            strategy = DDPStrategy(gradient_as_bucket_view=True)
        elif name == "column_parallel":
            strategy = squall.ColumnParallelStrategy(num_columns=num_ranks, **options)
        elif name not in ("single", "ddp", "zero1"):
            strategy = StrategyRegistry[name]["strategy"](**options)
        clock = Clock()
        Trainer(
            strategy=strategy, accelerator="cpu", devices=num_ranks // order["num_hosts"],
            num_nodes=order["num_hosts"], max_epochs=num_epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[clock],
        ).fit(module, loader)  # fmt: skip
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        seconds = [b - a for a, b in zip(clock.ticks, clock.ticks[1:], strict=False)]
        return {"seconds": seconds, "sent": clock.sent[-1] - clock.sent[0]}


def _sent() -> int:
    """Bytes that have left this host by the interface that the ranks talk over."""
    return int(Path(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes").read_text())


def _make_module(net_arguments: Mapping[str, Any]) -> Any:
    import torch
    from lightning.pytorch import LightningModule
    from torch.distributed.optim import ZeroRedundancyOptimizer

    import squall.models

    class Classifier(LightningModule):
        partitions_state = False

        def __init__(self) -> None:
            super().__init__()
            arguments = dict(net_arguments)
            self.net = getattr(squall.models, arguments.pop("name", "AlexNet"))(**arguments)

        def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
            if self.partitions_state:
                return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, **options)
            return torch.optim.SGD(self.parameters(), **options)

    torch.manual_seed(0)
    return Classifier()


if __name__ == "__main__":
    serve(Rank(int(sys.argv[1])).carry_out)
