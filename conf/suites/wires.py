"""Suite ``links``: training over a slow wire, in step and out of step, with gradients as they are and as codes.

Run as a program, this is one rank, alone on its host. Two hosts are network namespaces whose wire is shaped.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from squall.conf.bench import SuiteResult
from squall.conf.suites.links import shaped_hosts, why_not
from squall.conf.suites.programs import Order, programs, serve
from squall.conf.suites.stragglers import steps_per_second
from squall.conf.suites.training import make_classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Alternative = Mapping[str, Any]
Turn = dict[str, float]  # images/s, and MB of a step over the wire

_BEST = "downpour int8"
_UNTIMED = 2  # steps at the beginning: PowerSGD's are not its own yet


def measure(
    net: Mapping[str, Any],
    rate: str,
    batch_sizes: Sequence[int],
    alternatives: Mapping[str, Alternative],
    claims: Mapping[str, Mapping[int, float]],
    num_rounds: int,
    num_steps: int,
) -> SuiteResult:
    """Let all alternatives take turns over the wire.

    Args:
        net: Arguments of :class:`squall.models.AlexNet`.
        rate: Of the wire, as ``tc`` writes it.
        batch_sizes: Images of a rank's step.
        alternatives: By name: ``strategy`` ("alone", "ddp", "downpour"), ``hook`` or ``options`` of it, and
            ``num_steps`` of each rank if they differ from the others'.
        claims: For an alternative's name and images of a step: how many times as fast Downpour with int8 has to be.
        num_rounds: How often the alternatives take turns.
        num_steps: Steps of each rank, a turn.

    Returns:
        Images/s of both ranks together, the median of the rounds' ratios to plain DDP, and bytes over the wire.

    """
    reason = why_not()
    if reason:
        return SuiteResult("Training over a slow wire", [], f"Not measured: {reason}.", failures=[reason])
    turns: dict[int, dict[str, list[Turn]]] = {size: {name: [] for name in alternatives} for size in batch_sizes}
    with shaped_hosts(rate) as link, programs("squall.conf.suites.wires", link) as ranks:
        port = 29500
        for number in track(range(num_rounds * len(batch_sizes) * len(alternatives)), description=f"over {rate}"):
            size = batch_sizes[number // len(alternatives) % len(batch_sizes)]
            name = list(alternatives)[number % len(alternatives)]
            port += 2
            order = {
                "net": dict(net), "batch_size": size, "num_steps": num_steps, "port": port, "link": link.main_address,
                **alternatives[name],
            }  # fmt: skip
            turns[size][name].append(_turn(ranks.ask({0: order, 1: order}), size))
    return _result(turns, net, rate, claims, num_rounds)


def _turn(answers: Mapping[int, Any], batch_size: int) -> Turn:
    speed = batch_size * steps_per_second([answer["ticks"][_UNTIMED:] for answer in answers.values()])
    sent = statistics.mean(answer["sent"] / (len(answer["ticks"]) - _UNTIMED) for answer in answers.values())
    return {"images/s": speed, "MB": sent / 1e6}


def _result(
    turns: Mapping[int, Mapping[str, list[Turn]]],
    net: Mapping[str, Any],
    rate: str,
    claims: Mapping[str, Mapping[int, float]],
    num_rounds: int,
) -> SuiteResult:
    def ratio(size: int, name: str, other: str) -> float:
        pairs = zip(turns[size][name], turns[size][other], strict=True)
        return statistics.median(a["images/s"] / b["images/s"] for a, b in pairs)

    rows = [
        {
            "images a rank": size,
            "alternative": name,
            "images/s": statistics.median(turn["images/s"] for turn in of_one),
            "slowest": min(turn["images/s"] for turn in of_one),
            "fastest": max(turn["images/s"] for turn in of_one),
            "against DDP": ratio(size, name, "ddp"),
            "MB sent a step": statistics.median(turn["MB"] for turn in of_one),
        }
        for size, of_size in turns.items()
        for name, of_one in of_size.items()
    ]
    failures = []
    for other, leasts in claims.items():
        for size, least in leasts.items():
            if size in turns and other in turns[size] and ratio(size, _BEST, other) < least:
                failures.append(
                    f"At {size} images a rank {_BEST} reached {ratio(size, _BEST, other):.2f} x {other}, not {least}."
                )
    notes = (
        f"AlexNet {dict(net)} on two hosts (network namespaces) of one rank of one thread each, joined by a wire of"
        f" {rate} each way; fused SGD with momentum. Images/s of both ranks together, over the time that both train;"
        f" medians of {num_rounds} rounds in which all alternatives took turns. MB are what the interface of a rank's"
        " host sent, all protocols included, a step. `alone` trains without any communication."
        " Downpour's workers push and fetch every `push_every` steps and step by themselves in between, as in the"
        " paper; half of the shards are on each host."
    )
    return SuiteResult(
        "Training over a slow wire",
        rows,
        notes,
        _plot(rows),
        {"turns": {str(k): v for k, v in turns.items()}},
        failures,
    )


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    from squall.conf.plots import BLUE, GREY, ORANGE, clean_axes, new_figure

    sizes = list(dict.fromkeys(row["images a rank"] for row in rows))
    figure = new_figure(7.2, 3.4)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        mine = [row for row in rows if row["images a rank"] == size][::-1]
        colours = {"alone": GREY, "downpour": ORANGE}
        axes.barh(
            [row["alternative"] for row in mine],
            [row["images/s"] for row in mine],
            0.66,
            color=[colours.get(row["alternative"].split()[0], BLUE) for row in mine],
            xerr=[
                [row["images/s"] - row["slowest"] for row in mine],
                [row["fastest"] - row["images/s"] for row in mine],
            ],
            error_kw={"lw": 0.8},
            capsize=2,
        )
        for place, row in enumerate(mine):
            axes.annotate(
                f"{row['MB sent a step']:.3g} MB", (0, place), xytext=(3, 0), textcoords="offset points", va="center",
                fontsize=7, color="white",
            )  # fmt: skip
        clean_axes(axes, "training images/s", "", f"{size} images a rank")
        axes.tick_params(axis="y", labelsize=8)
    return figure


# ---------------------------------------------------------------------- one rank


class _Rank:
    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._module: Any = None
        self._groups: list[Any] = []

    def carry_out(self, order: Order) -> dict[str, Any]:
        """Fit once; returns when each step ended, and the bytes that left this host meanwhile."""
        import torch
        from lightning.pytorch import Trainer
        from lightning.pytorch.strategies import DDPStrategy

        import squall

        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if self._module is None:
            self._module = make_classifier(order["net"])
        module, kind = self._module, order["strategy"]
        module.ticks = []
        for key in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"):
            os.environ.pop(key, None)
        if kind != "alone":
            os.environ.update(
                LOCAL_RANK="0", NODE_RANK=str(self._rank), WORLD_SIZE="2", MASTER_ADDR=order["link"],
                MASTER_PORT=str(order["port"]), SQUALL_SECRET="of two hosts that are one",
            )  # fmt: skip
        strategy: Any = "auto"
        if kind == "ddp":
            # PowerSGD's messages of several buckets overtake each other on gloo, and end the process: it has one.
            buckets: dict[str, Any] = {"bucket_cap_mb": 1 << 12} if order.get("hook") == "powersgd" else {}
            strategy = DDPStrategy(gradient_as_bucket_view=True, **buckets)
        elif kind == "downpour":
            strategy = squall.DownpourStrategy(**order.get("options", {}))
        num_steps = order["num_steps"] * (2 if kind == "downpour" else 1)
        callbacks = [_Meter()]
        if order.get("hook"):
            callbacks.insert(0, _hook(order["hook"]))
        Trainer(
            strategy=strategy, accelerator="cpu", devices=1, num_nodes=1 if kind == "alone" else 2, max_epochs=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=callbacks,
        ).fit(module, module.loader(order["batch_size"], num_steps))  # fmt: skip
        if torch.distributed.is_initialized():
            # PowerSGD's last callback holds the group, too: were that the last to let go, a thread would join itself.
            self._groups.append(torch.distributed.group.WORLD)
            torch.distributed.destroy_process_group()
        return {"ticks": module.ticks, "sent": callbacks[-1].num_bytes}


def _sent() -> int:
    """Bytes that have left this host."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _Meter() -> Any:
    from lightning.pytorch import Callback

    class Meter(Callback):
        """What training steps send, and not what comes before or after them."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == _UNTIMED:
                self.before = _sent()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx >= _UNTIMED:
                self.num_bytes = _sent() - self.before

    return Meter()


def _hook(name: str) -> Any:
    """A communication hook under stock DDP; on CPUs Lightning registers none."""
    from lightning.pytorch import Callback
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    from squall.consistency import CodecHook

    class Register(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if name == "fp16":
                trainer.strategy.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
            else:
                state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=_UNTIMED)
                trainer.strategy.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return Register() if name in ("fp16", "powersgd") else CodecHook(name)


if __name__ == "__main__":
    serve(_Rank(int(sys.argv[1])).carry_out)
