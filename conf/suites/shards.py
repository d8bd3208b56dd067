"""Suite ``shards``: a push and a fetch through one shard, its update included, against bare messages of that size.

Run as a program, this is one of the two processes: rank 0 pushes, fetches and talks to rank 1, which sends back what
it gets. No Trainer, no training step: what is timed is the engine alone.
"""

from __future__ import annotations

import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from squall.conf.bench import SuiteResult
from squall.conf.suites.programs import Order, programs, serve

if TYPE_CHECKING:
    from squall.consistency.replica import Replica

_LEAST = 0.5
_ERROR = 1e-5
_WARM_UP = 2


def measure(net: Mapping[str, Any], num_rounds: int) -> SuiteResult:
    """Time the round trips of all of a net's parameters.

    Args:
        net: Arguments of :class:`squall.models.AlexNet`, whose parameters are pushed and fetched.
        num_rounds: How often the two take turns, after two times that don't count: there are two mailboxes to touch.

    Returns:
        Median seconds of both, and the median of the rounds' ratios.

    """
    rounds = []
    with tempfile.TemporaryDirectory() as folder, programs("squall.conf.suites.shards", 2) as ranks:
        start = {"do": "start", "net": dict(net), "store": str(Path(folder) / "store")}
        num_bytes = int(ranks.ask({0: start, 1: start})[0])
        for _ in track(range(num_rounds + _WARM_UP), description="round trips"):
            seconds = {"gloo": ranks.ask({0: {"do": "gloo"}, 1: {"do": "gloo"}})[0]}
            rounds.append(seconds | ranks.ask({0: {"do": "shard"}})[0])
        error = float(ranks.ask({0: {"do": "check"}})[0])
    return _result(num_bytes, rounds[_WARM_UP:], error)


def _result(num_bytes: int, rounds: list[dict[str, float]], error: float) -> SuiteResult:
    def milliseconds(name: str) -> float:
        return 1e3 * statistics.median(there[name] for there in rounds)

    ratio = statistics.median(there["gloo"] / there["shard"] for there in rounds)
    rows = [
        {
            "round trip": label,
            "MB each way": num_bytes / 1e6,
            "ms": milliseconds(name),
            "fastest": 1e3 * min(there[name] for there in rounds),
            "slowest": 1e3 * max(there[name] for there in rounds),
            "speed against gloo": 1.0 if name == "gloo" else ratio,
        }
        for name, label in (("gloo", "bare gloo, two ranks"), ("shard", "push + fetch, one shard with Adagrad"))
    ]
    notes = (
        f"{num_bytes:,} bytes of single precision there and back, one thread a process, no Trainer. A push + fetch ends"
        " when the shard has applied the push with Adagrad, journal included, and the worker computes with the new"
        f" weights: {milliseconds('push'):.0f} ms until the push lies with the shard, {milliseconds('wait'):.0f} ms"
        f" until all is applied and back. The ratio is the median over {len(rounds)} rounds in which the two took"
        " turns."
    )
    failures = []
    if ratio < _LEAST:
        failures.append(f"Push + fetch reached {ratio:.2f} x a bare gloo round trip, not {_LEAST}.")
    if not error < _ERROR:
        failures.append(f"The shard's weights differ from Adagrad's own by {error:.2g}.")
    return SuiteResult(
        "A shard against bare messages", rows, notes, None, {"seconds": rounds, "error": error}, failures
    )


class _Peer:
    """Rank 1: sends back what it gets."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def carry_out(self, order: Order) -> Any:
        return getattr(self, f"do_{order.pop('do')}")(**order)

    def do_start(self, net: Mapping[str, Any], store: str) -> int:
        import torch
        from torch import distributed

        from squall.models import AlexNet

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.parameters = list(AlexNet(**net).parameters())
        num_elements = sum(parameter.numel() for parameter in self.parameters)
        self.message, self.received = torch.randn(num_elements), torch.empty(num_elements)
        both = distributed.FileStore(store, 2)
        self.gloo: Any = distributed.ProcessGroupGloo(both, self.rank, 2, timedelta(seconds=60))
        return num_elements * self.message.element_size()

    def do_gloo(self) -> float:
        begin = time.perf_counter()
        if self.rank == 0:
            self.gloo.send([self.message], 1, 0).wait()
            self.gloo.recv([self.received], 1, 0).wait()
        else:
            self.gloo.recv([self.received], 0, 0).wait()
            self.gloo.send([self.message], 0, 0).wait()
        return time.perf_counter() - begin


class _Worker(_Peer):
    """Rank 0: pushes and fetches, too."""

    def do_start(self, net: Mapping[str, Any], store: str) -> int:
        import torch

        num_bytes = super().do_start(net, store)
        self.optimizer = torch.optim.Adagrad(self.parameters, lr=1e-3)
        self.replica = _replica(self.optimizer)
        gradients = self.message.split([parameter.numel() for parameter in self.parameters])
        self.gradients = [g.view(p.shape) for g, p in zip(gradients, self.parameters, strict=True)]
        self.num_pushes = 0
        self.small = min(range(len(self.parameters)), key=lambda index: self.parameters[index].numel())
        self.first = self.parameters[self.small].detach().clone()
        return num_bytes

    def do_shard(self) -> dict[str, float]:
        begin = time.perf_counter()
        self.replica.push(self.gradients, [], fetch=True)
        pushed = time.perf_counter()
        self.replica.land()
        self.num_pushes += 1
        end = time.perf_counter()
        return {"shard": end - begin, "push": pushed - begin, "wait": end - pushed}

    def do_check(self) -> float:
        """How far a parameter is from where torch's own Adagrad has it after as many steps."""
        import torch

        expected = torch.nn.Parameter(self.first)
        expected.grad = self.gradients[self.small]
        optimizer = torch.optim.Adagrad([expected], lr=1e-3)
        for _ in range(self.num_pushes):
            optimizer.step()
        error = float((expected - self.parameters[self.small]).abs().max())
        self.replica.leave(stop=True)
        self.replica.client.close()
        return error


def _replica(optimizer: Any) -> Replica:
    """One worker and one shard, as :class:`squall.DownpourStrategy` starts them."""
    from squall.consistency import snapshot
    from squall.consistency.client import Client
    from squall.consistency.hosting import get_host
    from squall.consistency.jobs import Job, open_job
    from squall.consistency.memory import Segment
    from squall.consistency.optimizers import carry, carry_groups, try_state
    from squall.consistency.plan import ParameterInfo, make_plan
    from squall.consistency.replica import Replica
    from squall.consistency.rows import Rows
    from squall.consistency.shard import ShardSpec
    from squall.consistency.staleness import StalenessRule
    from squall.consistency.updates import SliceMemory

    group = optimizer.param_groups[0]
    parameters = group["params"]
    state = tuple(try_state(optimizer, group, (5,), parameters[0].dtype))
    infos = [ParameterInfo(tuple(p.shape), p.dtype, 0, 0, state) for p in parameters]
    plan = make_plan(infos, [True], 1, lambda num_elements, dtype: num_elements * dtype.itemsize)
    address, host = open_job(Job(main_port=f"suite-shards-{time.time_ns()}")), get_host()
    run = host.request({"op": "run", "options": {"world_size": 1}})
    client = Client(address, 0, int(run["run"]), heartbeat=5.0)
    names = host.request({"op": "memory", "num_bytes": [slice_.num_bytes for slice_ in plan.slices]})["names"]
    memories = [SliceMemory(Segment(name), slice_) for name, slice_ in zip(names, plan.slices, strict=True)]
    snapshot.fill(memories, Rows(parameters), [optimizer])
    spec = ShardSpec(plan, (carry(optimizer),), carry_groups([optimizer]), StalenessRule(), "fp32", 2)
    host.request({"op": "go", "version": 0}, pickle.dumps(spec))
    replica = Replica(client, plan, parameters, str(run["name"]))
    replica.join()
    return replica


if __name__ == "__main__":
    rank = int(sys.argv[1])
    serve((_Worker if rank == 0 else _Peer)(rank).carry_out)
