"""One rank's training step under each Strategy, recorded from that Strategy's own placement."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from squall.placement.columns import Columns
from squall.placement.hybrid.layout import plan_hybrid
from squall.placement.hybrid.schemes import Scheme
from squall.placement.hybrid.updates import bucket_size
from squall.placement.layout import derive_layout, to_meta, without_values
from squall.placement.module import place
from squall.placement.rules.norms import synchronize_buffers
from squall.placement.speeds import Speeds
from squall.placement.tensor import local_view, no_dispatch, whole
from squall.placement.tiles import Grid
from squall.placement.tiling import derive_tiles, place_tiles

from .events import Compute, Event, Memory, Operation, Ready, Send, Trace, Wait
from .recorder import LOSS, GhostColumns, GhostExamples, Recorder

_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20  # bytes: torch's, of gradients that DDP averages together
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Prepare = Callable[[nn.Module, Recorder], object]


def momentum_sgd(parameters: Iterable[Tensor]) -> Optimizer:
    """The optimizer of AlexNet's authors."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


class Task:
    """What is to be trained: a network, the size of its images, and how it is stepped.

    Args:
        net: Maps images to logits. It is not changed.
        example: One image of it with a batch dimension, (1, C, H, W).
        make_optimizer: Makes the optimizer of the parameters.

    Example:
        >>> from squall.models import LeNet5
        >>> task = Task(LeNet5(), torch.zeros(1, 1, 28, 28))
        >>> trace = single(task, 64)
        >>> round(sum(event.operation.flops for event in trace if isinstance(event, Compute)) / 64 / 1e6, 1)
        13.2

    """

    def __init__(self, net: nn.Module, example: Tensor, make_optimizer: MakeOptimizer = momentum_sgd) -> None:
        self.net = without_values(net)
        self.example = to_meta(example)
        self.make_optimizer = make_optimizer
        self._recorded: dict[Any, Trace] = {}

    def remembered(self, key: Any, make: Callable[[], Trace]) -> Trace:
        """What was recorded under a key before, or is now: ranges of machines ask for the same steps often."""
        if key not in self._recorded:
            self._recorded[key] = make()
        return self._recorded[key]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def images(self, num_examples: int) -> Tensor:
        """A batch without values."""
        batch: Tensor = self.example.new_empty(num_examples, *self.example.shape[1:])
        return batch


def record(task: Task, num_examples: int, prepare: Prepare | None = None) -> Trace:
    """Record a step of one rank: forward, backward and update.

    Args:
        task: What is trained.
        num_examples: Of this rank.
        prepare: Places the network among ranks that aren't there.

    """
    net = without_values(task.net).train()
    recorder = Recorder()
    if prepare is not None:
        prepare(net, recorder)
    optimizer = task.make_optimizer(net.parameters())
    kept: dict[int, Tensor] = {}
    with no_dispatch():
        own = {parameter.untyped_storage()._cdata for parameter in net.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        with no_dispatch():
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with recorder, recorder.watching(net):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = net(task.images(num_examples))
            synchronize_buffers()
            with no_dispatch():
                output = whole(output, LOSS)
            loss = F.cross_entropy(output, torch.empty(num_examples, dtype=torch.long, device="meta"))
        recorder.adopt(loss, LOSS)
        activations = sum(_bytes(tensor) for storage, tensor in kept.items() if storage not in own)
        kept.clear()
        recorder.phase = "backward"
        loss.backward()
        recorder.phase = "update"
        with local_view():
            recorder.is_recording = False
            optimizer.step()  # makes its state
            recorder.is_recording = True
            optimizer.step()
    with no_dispatch():
        weights = sum(map(_bytes, [*net.parameters(), *net.buffers()]))
        gradients = sum(_bytes(parameter) for parameter in net.parameters() if parameter.requires_grad)
        state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    messages = max((event.num_bytes for event in recorder.events if isinstance(event, Send)), default=0)
    memory = Memory(weights, gradients, sum(map(_bytes, state)), activations, messages)
    return Trace(tuple(recorder.events), memory, num_examples)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def single(task: Task, num_examples: int) -> Trace:
    """One device with all examples."""
    return task.remembered(num_examples, lambda: record(task, num_examples))


# ---------------------------------------------------------------------- replicas in step


def ddp(task: Task, num_examples: int, num_ranks: int) -> Trace:
    """Torch's data parallelism: gradients leave in buckets while the backward pass goes on.

    Args:
        task: What is trained.
        num_examples: Of each rank.
        num_ranks: Number of ranks.

    """
    trace = in_buckets(single(task, num_examples), num_ranks, _FIRST_BUCKET, _BUCKET)
    buffers = {buffer.dtype: 0 for buffer in task.net.buffers()}
    for buffer in task.net.buffers():
        buffers[buffer.dtype] += _bytes(buffer)
    shared: list[Event] = []
    for number, size in enumerate(buffers.values(), 1):  # running statistics are the first rank's, before each step
        shared += [Send(-number, "broadcast", size, num_ranks, "", "forward"), Wait(-number)]
    return trace.with_events([*shared, *trace])


def in_buckets(trace: Trace, num_ranks: int, first: int, size: int, only: frozenset[str] | None = None) -> Trace:
    """Average gradients as torch's reducer does: buckets in the order in which gradients are ready.

    Args:
        trace: A step that ends with its own gradients.
        num_ranks: Number of ranks.
        first: Bytes at which the first bucket is full.
        size: Bytes at which the others are.
        only: Names of the layers whose gradients are averaged; ``None`` for all.

    """
    events: list[Event] = []
    number, held, filled, layers, pending = 1 << 20, 0, 0, [""], []
    for event in trace:
        updates = isinstance(event, Compute) and event.phase == "update"
        if updates and held:
            pending.append(_leave(events, number, held, num_ranks, layers[-1]))
            number, held = number + 1, 0
        if updates and pending:
            events += pending
            pending = []
        if not isinstance(event, Ready):
            events.append(event)
        elif only is None or event.layer in only:
            events.append(Compute(_copying(event.num_bytes), event.layer, "backward"))  # divided, into the bucket
            held, layers = held + event.num_bytes, [*layers, event.layer]
            if held >= (size if filled else first):
                pending.append(_leave(events, number, held, num_ranks, event.layer))
                number, held, filled = number + 1, 0, filled + 1
    assert not held, "a step ends with its update"
    return trace.with_events(events)


def _leave(events: list[Event], number: int, num_bytes: int, num_ranks: int, layer: str) -> Wait:
    events.append(Send(number, "all_reduce", num_bytes, num_ranks, layer, "backward"))
    return Wait(number)


def _copying(num_bytes: int) -> Operation:
    """Read so many bytes and write them elsewhere, times a number."""
    tensor = {"tensor": [[num_bytes // 4], [1], "float32"]}
    return Operation(
        _key("aten.mul.out", [tensor, {"tensor": [[], [], "float32"]}], tensor), "memory", 0, 2 * num_bytes
    )


def _key(name: str, args: Sequence[Any], out: Any) -> str:
    return json.dumps([name, list(args), {"out": out}])


def zero1(task: Task, num_examples: int, num_ranks: int) -> Trace:
    """DDP whose ranks each step a part of the parameters and send it to the others (ZeRO-1: Rajbhandari et al. 2020).

    Args:
        task: What is trained.
        num_examples: Of each rank.
        num_ranks: Number of ranks.

    """
    trace = ddp(task, num_examples, num_ranks)
    loads = [0] * num_ranks
    sizes = sorted((_bytes(parameter) for parameter in task.net.parameters()), reverse=True)
    for size in sizes:  # torch's: whole parameters, the largest first, to whoever has least
        loads[loads.index(min(loads))] += size
    share = max(loads) / max(sum(loads), 1)
    events: list[Event] = []
    done = 0.0
    updates = [event for event in trace if isinstance(event, Compute) and event.phase == "update"]
    whole_update = sum(event.operation.num_bytes for event in updates)
    for event in trace:
        if isinstance(event, Compute) and event.phase == "update":
            if done < share * whole_update:
                events.append(event)
            done += event.operation.num_bytes
        else:
            events.append(event)
    for number, size in enumerate(sizes, 1 << 24):
        events += [Send(number, "broadcast", size, num_ranks, "", "update"), Wait(number)]
    memory = trace.memory
    kept = Memory(
        memory.weights, memory.gradients, round(share * memory.optimizer), memory.activations, memory.messages
    )
    return Trace(tuple(events), kept, num_examples)


def hybrid(
    task: Task, num_examples: int, num_ranks: int, scheme: Scheme, measure: Callable[[], Speeds] | None = None
) -> Trace:
    """One weird trick: convolutions as under DDP, linear layers in columns.

    Args:
        task: What is trained.
        num_examples: Of each rank.
        num_ranks: Number of ranks.
        scheme: "a", "b" or "c".
        measure: The speeds by which linear layers are replicated after all, as of the Strategy.

    Raises:
        MisconfigurationException: If the network has no such boundary.

    """
    layout = plan_hybrid(task.net, num_ranks, {}, num_examples * num_ranks, measure)
    averaged = frozenset(row.name for row in layout if row.split == "whole")

    def prepare(net: nn.Module, recorder: Recorder) -> None:
        place(net, layout, GhostExamples(num_ranks, scheme, recorder))

    trace = record(task, num_examples, prepare)
    total = sum(event.num_bytes for event in trace if isinstance(event, Ready) and event.layer in averaged)
    size = round(bucket_size(total))
    return in_buckets(trace, num_ranks, size, size, averaged)


# ---------------------------------------------------------------------- replicas in parts


def columns(
    task: Task, num_examples: int, num_columns: int, num_replicas: int = 1, layout: Mapping[str, str] | None = None
) -> Trace:
    """Each layer's outputs over ranks; replicas of that average gradients after the backward pass.

    Args:
        task: What is trained.
        num_examples: Of each replica.
        num_columns: Ranks of a replica.
        num_replicas: Number of replicas.
        layout: Lines that differ from what is derived.

    """

    def make() -> Trace:
        derived = derive_layout(task.net, task.example, num_columns, layout or "auto")
        return record(
            task, num_examples, lambda net, recorder: place(net, derived, GhostColumns(num_columns, recorder))
        )

    key = ("columns", num_examples, num_columns, tuple((layout or {}).items()))
    return _averaged(task.remembered(key, make), num_replicas, num_columns)


def spatial(task: Task, num_examples: int, num_tiles: tuple[int, int], num_replicas: int = 1) -> Trace:
    """Images in tiles over ranks; replicas of that average gradients after the backward pass.

    Args:
        task: What is trained.
        num_examples: Of each replica.
        num_tiles: Rows and columns.
        num_replicas: Number of replicas.

    Raises:
        MisconfigurationException: If an image has fewer places than tiles.

    """
    num_ranks = num_tiles[0] * num_tiles[1]

    def prepare(net: nn.Module, recorder: Recorder) -> None:
        inner = [min(1, side - 1) if side > 2 else 0 for side in num_tiles]  # which has neighbours on both sides
        everyone = GhostColumns(num_ranks, recorder, inner[0] * num_tiles[1] + inner[1])
        lines: tuple[Columns, ...] = (everyone,)
        if num_tiles[1] > 1:
            lines = tuple(GhostColumns(side, recorder, place_) for side, place_ in zip(num_tiles, inner, strict=True))
        place_tiles(net, derive_tiles(task.net, task.example, Grid.dry(*num_tiles)), Grid(everyone, lines))

    trace = task.remembered(("tiles", num_examples, num_tiles), lambda: record(task, num_examples, prepare))
    return _averaged(trace, num_replicas, num_ranks)


def _averaged(trace: Trace, num_replicas: int, num_ranks: int) -> Trace:
    """With what averages the gradients of replicas: flat buckets, all under way at once."""
    if num_replicas == 1:
        return trace
    sizes = [0]
    for event in trace:
        if isinstance(event, Ready):
            if sizes[-1] > _BUCKET:
                sizes.append(0)
            sizes[-1] += event.num_bytes
    numbers = range(1 << 20, (1 << 20) + len(sizes))
    added: list[Event] = []
    for size in sizes:
        added.append(Compute(_copying(size), "", "backward"))
    for number, size in zip(numbers, sizes, strict=True):
        added.append(Send(number, "all_reduce", size, num_replicas, "", "backward", num_ranks))
    for number, size in zip(numbers, sizes, strict=True):
        added += [Wait(number), *[Compute(_copying(size), "", "backward")] * 2]
    events = list(trace)
    first = next((at for at, e in enumerate(events) if isinstance(e, Compute) and e.phase == "update"), len(events))
    return trace.with_events([*events[:first], *added, *events[first:]])


# ---------------------------------------------------------------------- replicas out of step


def gradient(task: Task, num_examples: int) -> Trace:
    """What a worker of Downpour computes: forward and backward; the update is the shards'."""
    trace = single(task, num_examples)
    return trace.with_events([e for e in trace if not (isinstance(e, Compute) and e.phase == "update")])
