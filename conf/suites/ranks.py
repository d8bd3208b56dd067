"""Time real Trainers on ranks of one thread each, interleaved.

Run as a program, this is one rank: it reads one line of JSON a measurement from standard input, fits with the named
strategy, and answers with the seconds of each step. All ranks stay alive between measurements, so alternatives take
turns within seconds of each other and the machine's moods hit them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from squall.conf.suites.links import Link


class Ranks:
    """Processes that wait to be told what to time.

    Args:
        link: How they reach each other.
        net: Arguments of :class:`squall.models.AlexNet`.

    """

    def __init__(self, link: Link, net: Mapping[str, Any]) -> None:
        self._processes = []
        for rank, (prefix, extra) in enumerate(zip(link.prefixes, link.environment, strict=True)):
            environment = {
                **os.environ, **extra, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank), "NODE_RANK": "0",
                "WORLD_SIZE": str(len(link.prefixes)), "MASTER_ADDR": link.main_address, "PYTHONWARNINGS": "ignore",
            }  # fmt: skip
            command = [*prefix, sys.executable, "-m", "squall.conf.suites.ranks", json.dumps(dict(net))]
            self._processes.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        self._port = 20000 + os.getpid() % 20000

    def time(self, strategy: str, batch_size: int, num_steps: int) -> list[float]:
        """Fit for a few steps; returns the seconds of each on rank 0, the first left out.

        Args:
            strategy: "single", "ddp" or "column_parallel".
            batch_size: Images of one step, all ranks together.
            num_steps: Steps that count.

        Raises:
            RuntimeError: If a rank ends.

        """
        self._port += 1
        order = {"strategy": strategy, "batch_size": batch_size, "num_steps": num_steps, "port": self._port}
        active = self._processes[:1] if strategy == "single" else self._processes
        for process in active:
            stdin = cast(IO[str], process.stdin)
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
        answers = [cast(IO[str], process.stdout).readline() for process in active]
        if not all(answers):
            raise RuntimeError(f"a rank ended while timing {order}")
        seconds: list[float] = json.loads(answers[0])
        return seconds

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            cast(IO[str], process.stdin).close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def ranks_on(link: Link, net: Mapping[str, Any]) -> Iterator[Ranks]:
    """Ranks that are gone afterwards."""
    ranks = Ranks(link, net)
    try:
        yield ranks
    finally:
        ranks.stop()


def _serve(net_arguments: Mapping[str, Any]) -> None:
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, TensorDataset

    import squall
    from squall.models import AlexNet

    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not end up among the answers

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = AlexNet(**net_arguments)

        def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    class Clock(Callback):
        def __init__(self) -> None:
            self.ticks: list[float] = []

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            self.ticks.append(time.perf_counter())

    torch.manual_seed(0)
    module = Classifier()
    world_size = int(os.environ["WORLD_SIZE"])
    side, colours = module.net.image_size, module.net.in_channels
    for line in sys.stdin:
        order = json.loads(line)
        # Lightning takes the world size away when a Trainer ends.
        os.environ.update(MASTER_PORT=str(order["port"]), WORLD_SIZE=str(world_size))
        num_ranks = 1 if order["strategy"] == "single" else world_size
        share = order["batch_size"] // (num_ranks if order["strategy"] == "ddp" else 1)
        torch.manual_seed(1)
        images = torch.randn(share, colours, side, side)
        labels = torch.randint(module.net.num_classes, (share,))
        num_steps = order["num_steps"] + 1
        loader = DataLoader(TensorDataset(images, labels), batch_size=share)
        strategy: Any = {
            "single": "auto",
            # Ours to tune for DDP too: no second pass over the graph, and gradients reduced where they lie.
            "ddp": DDPStrategy(gradient_as_bucket_view=True) if num_ranks > 1 else "auto",
            "column_parallel": squall.ColumnParallelStrategy(num_columns=num_ranks),
        }[order["strategy"]]
        clock = Clock()
        Trainer(
            strategy=strategy, accelerator="cpu", devices=num_ranks, max_epochs=num_steps, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=[clock],
        ).fit(module, loader)  # fmt: skip
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        answer.write(json.dumps([b - a for a, b in zip(clock.ticks, clock.ticks[1:], strict=False)]) + "\n")
        answer.flush()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
