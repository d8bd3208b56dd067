"""Parameters and the state of their optimizers in one piece of shared memory, stepped in place by all workers.

No lock guards an element: two workers that update one at the same instant may lose one of the two updates (Recht et
al. 2011). An element is read and written in one piece, so it is never torn: it always is some worker's result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from .memory import Segment, aligned
from .optimizers import read_entry, write_entry
from .plan import ParameterInfo

_NUMBERS = ("int", "float", "bool")


@dataclass(frozen=True)
class SharedLayout:
    """Where each parameter and each quantity of its optimizer's state lies.

    Args:
        parameters: All of them.
        strides: Of each: the memory keeps its order of elements, ``channels_last`` for instance.
        weight_offsets: Of each, in bytes.
        state_offsets: Of each entry of its state.
        num_bytes: Of all.

    """

    parameters: tuple[ParameterInfo, ...]
    strides: tuple[tuple[int, ...], ...]
    weight_offsets: tuple[int, ...]
    state_offsets: tuple[tuple[int, ...], ...]
    num_bytes: int

    @property
    def digest(self) -> str:
        """What must be the same on all ranks."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def lay_out(infos: Sequence[ParameterInfo], parameters: Sequence[Tensor]) -> SharedLayout:
    """Give everything its place: a byte per parameter that says whether it has state, then each with its state.

    Args:
        infos: Of the parameters.
        parameters: The parameters, for their order of elements.

    """
    offset = aligned(max(len(infos), 1))
    weight_offsets, state_offsets = [], []
    for info in infos:
        weight_offsets.append(offset)
        offset += aligned(info.num_elements * info.dtype.itemsize)
        offsets = []
        for entry in info.state:
            offsets.append(offset)
            offset += aligned(entry.num_elements(info.num_elements) * entry.dtype.itemsize)
        state_offsets.append(tuple(offsets))
    strides = tuple(_dense_strides(parameter) for parameter in parameters)
    return SharedLayout(tuple(infos), strides, tuple(weight_offsets), tuple(state_offsets), offset)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's strides if its elements fill a piece of memory, else those of a contiguous one."""
    return tuple(torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride())


class SharedParameters:
    """One process's view of it all.

    Args:
        segment: Of the layout's size.
        layout: What lies where.

    """

    def __init__(self, segment: Segment, layout: SharedLayout) -> None:
        self.layout = layout
        infos = layout.parameters
        self._has_state = segment.tensor(torch.uint8, 0, len(infos)).numpy()
        self.weights = [
            segment.tensor(info.dtype, offset, info.num_elements).as_strided(info.shape, stride)
            for info, offset, stride in zip(infos, layout.weight_offsets, layout.strides, strict=True)
        ]
        self._memories = [
            [
                segment.tensor(entry.dtype, offset, entry.num_elements(info.num_elements))
                for entry, offset in zip(info.state, offsets, strict=True)
            ]
            for info, offsets in zip(infos, layout.state_offsets, strict=True)
        ]
        self._views: list[dict[str, Tensor]] = []
        for info, memories, stride in zip(infos, self._memories, layout.strides, strict=True):
            views = {}
            for entry, memory in zip(info.state, memories, strict=True):
                if entry.kind == "like":
                    views[entry.name] = memory.as_strided(info.shape, stride)
                elif entry.kind == "tensor":
                    views[entry.name] = memory.view(entry.shape)
            self._views.append(views)

    def has_state(self, index: int) -> bool:
        """Whether a parameter's optimizer state is here: always, if it needs none."""
        return bool(self._has_state[index]) or not self.layout.parameters[index].state

    @torch.no_grad()
    def attach(self, index: int, parameter: nn.Parameter) -> None:
        """Let a parameter, the same object, lie in this memory."""
        parameter.data = self.weights[index]

    def attach_state(self, index: int, state: dict[Any, Any]) -> None:
        """Let an optimizer's state of a parameter be what lies here; numbers are read, as they are now."""
        info = self.layout.parameters[index]
        views = self._views[index]
        for entry, memory in zip(info.state, self._memories[index], strict=True):
            state[entry.name] = views[entry.name] if entry.name in views else read_entry(entry, memory, ())

    @torch.no_grad()
    def write(self, index: int, parameter: Tensor, state: dict[Any, Any]) -> None:
        """Take over a parameter's weights and the state that its optimizer brings along."""
        self.weights[index].copy_(parameter.detach())
        self.put_back(index, None, state)

    @torch.no_grad()
    def put_back(self, index: int, parameter: nn.Parameter | None, state: dict[Any, Any]) -> None:
        """After a step, take over what the optimizer has not written here itself.

        Numbers, and tensors that it made anew, are written and replaced by the shared ones. A first step's state
        becomes everybody's.

        Args:
            index: Of the parameter.
            parameter: To be attached again, if the optimizer gave it other memory.
            state: What the optimizer keeps for it.

        Raises:
            MisconfigurationException: If it keeps something now that it did not when it was tried before the run.

        """
        if parameter is not None and parameter.data_ptr() != self.weights[index].data_ptr():
            self.weights[index].copy_(parameter.detach())
            self.attach(index, parameter)
        info = self.layout.parameters[index]
        views = self._views[index]
        complete = True
        for entry, memory in zip(info.state, self._memories[index], strict=True):
            value = state.get(entry.name)
            if entry.kind == "none":
                continue
            if value is None:
                complete = False
            elif entry.name not in views:
                write_entry(entry, memory, value)
            elif value is not views[entry.name]:
                if isinstance(value, Tensor) and value.shape == views[entry.name].shape:
                    views[entry.name].copy_(value.detach())
                else:
                    write_entry(entry, memory, value)
                state[entry.name] = views[entry.name]
        if complete and info.state:
            unknown = [key for key in state if all(key != entry.name for entry in info.state)]
            if unknown and any(state[key] is not None for key in unknown):
                raise MisconfigurationException(
                    f"The optimizer keeps {unknown[0]!r} for a parameter, which it did not in its first two steps, so"
                    " there is no shared memory for it. Let it make all of its state at its first step."
                )
            self._has_state[index] = 1

    @torch.no_grad()
    def read(self, with_state: bool) -> tuple[tuple[Tensor, ...], tuple[dict[str, Any], ...]]:
        """Copy everything in one pass; others go on writing meanwhile.

        Args:
            with_state: Copy the optimizers' state, too.

        Returns:
            The weights of each parameter, and its state, empty if it has none yet.

        """
        weights, states = [], []
        for index, weight in enumerate(self.weights):
            weights.append(weight.clone())
            state: dict[str, Any] = {}
            if with_state and self.has_state(index):
                self.attach_state(index, state)
            states.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()})
        return tuple(weights), tuple(states)


class InPlace:
    """An optimizer that steps shared parameters.

    Args:
        optimizer: The user's own.
        shared: The memory.
        index_of: Number of each of its parameters there.

    """

    def __init__(self, optimizer: Optimizer, shared: SharedParameters, index_of: dict[nn.Parameter, int]) -> None:
        self.optimizer = optimizer
        self.shared = shared
        self.members = [(index_of[p], p) for group in optimizer.param_groups for p in group["params"]]
        optimizer.state.clear()
        self._attached: set[int] = set()
        self._has_numbers = {
            index
            for index, _ in self.members
            if any(entry.kind in _NUMBERS for entry in shared.layout.parameters[index].state)
        }

    def stepped(self) -> list[tuple[int, nn.Parameter]]:
        """The parameters that have a gradient."""
        return [(index, parameter) for index, parameter in self.members if parameter.grad is not None]

    def attach(self, members: Sequence[tuple[int, nn.Parameter]]) -> bool:
        """Let the optimizer see the shared state of these parameters.

        Returns:
            Whether all of them have one: those that have not are to be stepped by one worker at a time.

        """
        complete = True
        for index, parameter in members:
            if index in self._attached and index not in self._has_numbers:
                continue
            if not self.shared.has_state(index):
                complete = False
                continue
            if self.shared.layout.parameters[index].state:
                self.shared.attach_state(index, self.optimizer.state[parameter])
            self._attached.add(index)
        return complete

    def put_back(self, members: Sequence[tuple[int, nn.Parameter]]) -> None:
        """Share what a step of these parameters has made."""
        for index, parameter in members:
            state = self.optimizer.state.get(parameter)
            self.shared.put_back(index, parameter, {} if state is None else state)
