"""Record what a rank does, from its own code run on tensors without values.

A Strategy's placement works on any tensors, so on those, too, that have shapes only; and its ranks talk through
:class:`~squall.placement.Columns`, so ranks that aren't there can write down what they would be sent. What comes out is
the order of operations and messages that a rank really has, whatever the network's code does, without arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from squall.placement.columns import DryColumns
from squall.placement.hybrid.linear import ExampleColumns
from squall.placement.hybrid.schemes import Scheme
from squall.placement.tensor import no_dispatch

from .events import Collective, Compute, Event, Phase, Ready, Send, Wait
from .operators import describe, is_free

LOSS = "loss"


class Recorder(TorchDispatchMode):
    """Writes events down while it is entered.

    Example:
        >>> with Recorder() as recorder:
        ...     _ = torch.ones(2, 3, device="meta") @ torch.ones(3, 4, device="meta")
        >>> [event.operation.flops for event in recorder.events if event.operation.kind == "gemm"]
        [48]

    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.phase: Phase = "forward"
        self.is_recording = True
        self._layers: list[str] = []
        self._last = ""
        self._owners: dict[Any, str] = {}  # of nodes of the graph
        self._num_sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator on shapes, and write it down."""
        kwargs = kwargs or {}
        with no_dispatch():  # split tensors are their local parts here
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
                return 1.0 if args[0].dtype.is_floating_point else 1  # code that looks at a value gets one
            result = func(*args, **kwargs)
            tensors = [leaf for leaf in tree_flatten((args, result))[0] if isinstance(leaf, Tensor)]
            if self.is_recording and tensors and not is_free(func):
                self.events.append(Compute(describe(func, args, kwargs, result), self.layer, self.phase))
            return result

    # ------------------------------------------------------------------ whose work it is

    @property
    def layer(self) -> str:
        """The layer that is at work: in the backward pass, the one whose gradients are computed."""
        if self.phase == "backward":
            node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
            return self._owners.get(node, self._last)
        return self._layers[-1] if self._layers else self._last

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Within, know which layer of a module is at work.

        Args:
            module: The network; its layers are those modules that have none below them.

        """
        handles = []
        for name, layer in module.named_modules():
            if not any(True for _ in layer.children()):
                handles.append(layer.register_forward_pre_hook(self._enter(name)))
                handles.append(layer.register_forward_hook(self._leave(name)))
        with no_dispatch():
            for name, parameter in module.named_parameters():
                owner = name.rpartition(".")[0]
                handles.append(parameter.register_post_accumulate_grad_hook(self._ready(owner)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(layer: nn.Module, args: Any) -> None:
            self.adopt(args, self._last)
            self._layers.append(name)

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(layer: nn.Module, args: Any, result: Any) -> None:
            self._layers.pop()
            self._last = name
            self.adopt(result, name)

        return leave

    def _ready(self, layer: str) -> Callable[[Tensor], None]:
        def ready(parameter: Tensor) -> None:
            with no_dispatch():
                self.events.append(Ready(parameter.numel() * parameter.element_size(), layer))

        return ready

    def adopt(self, value: Any, layer: str) -> None:
        """Let the part of the graph that is new behind a value belong to a layer."""
        with no_dispatch():
            nodes = [leaf.grad_fn for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self._owners:
                self._owners[node] = layer
                nodes += [following for following, _ in node.next_functions]

    # ------------------------------------------------------------------ messages

    def send(
        self, collective: Collective, num_bytes: int, num_ranks: int, layer: str | None = None, **options: Any
    ) -> int:
        """Write a message down that starts now, with such options of :class:`Send`; returns its number."""
        self._num_sent += 1
        if self.is_recording:
            layer = self.layer if layer is None else layer
            self.events.append(Send(self._num_sent, collective, num_bytes, num_ranks, layer, self.phase, **options))
        return self._num_sent

    def wait(self, number: int) -> None:
        """Write down that nothing goes on before a message has come."""
        if self.is_recording:
            self.events.append(Wait(number))


class _Message:
    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self._number = recorder, number

    def wait(self) -> None:
        self._recorder.wait(self._number)


def _num_bytes(tensors: Mapping[int, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class GhostColumns(DryColumns):
    """Ranks that aren't there, and write down what they would send and receive.

    Args:
        num_columns: How many.
        recorder: Where it is written.
        rank: Which of them this one is.

    """

    def __init__(self, num_columns: int, recorder: Recorder, rank: int = 0) -> None:
        super().__init__(num_columns, rank)
        self._recorder = recorder

    def start_swap(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> list[dist.Work]:
        """Write a message down."""
        num_bytes, num_messages = max(_num_bytes(sends), _num_bytes(receives)), max(len(sends), len(receives))
        return _start(self._recorder, num_bytes, self.num_columns, num_messages)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Write an all-reduce down that is waited for."""
        return _sum(self._recorder, tensor, self.num_columns)

    max_ = sum_


class GhostExamples(ExampleColumns):
    """The same for ranks with examples of their own.

    Args:
        num_columns: How many.
        scheme: How examples are dealt out to passes.
        recorder: Where it is written.

    """

    def __init__(self, num_columns: int, scheme: Scheme, recorder: Recorder) -> None:
        super().__init__(None, 0, num_columns, scheme)
        self._recorder = recorder

    def agree(self, layer: str, backward: bool, num_examples: int, device: torch.device) -> list[int]:
        """Write the two numbers down that ranks tell each other; all have as many examples."""
        self._recorder.wait(self._recorder.send("all_gather", 16 * self.num_columns, self.num_columns, layer))
        return [num_examples] * self.num_columns

    def start_swap(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> list[dist.Work]:
        """Write a message down: what the busiest rank sends, all of it or, in scheme b, the one whose turn it is."""
        each = max((_num_bytes({0: tensor}) for tensor in (*sends.values(), *receives.values())), default=0)
        others = self.num_columns - 1
        return _start(self._recorder, others * each, self.num_columns, others, self.scheme == "b")

    def sum_(self, tensor: Tensor) -> Tensor:
        """Write an all-reduce down that is waited for."""
        return _sum(self._recorder, tensor, self.num_columns)


def _start(
    recorder: Recorder, num_bytes: int, num_ranks: int, num_messages: int, alone: bool = False
) -> list[dist.Work]:
    if not num_bytes:
        return []
    number = recorder.send("pair", num_bytes, num_ranks, num_messages=num_messages, alone=alone)
    return cast("list[dist.Work]", [_Message(recorder, number)])


def _sum(recorder: Recorder, tensor: Tensor, num_ranks: int) -> Tensor:
    if num_ranks > 1:
        recorder.wait(recorder.send("all_reduce", tensor.numel() * tensor.element_size(), num_ranks))
    return tensor
