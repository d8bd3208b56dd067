"""A shard's slice of weights and optimizer state, and the one pass over it that is an update.

The slice lies in shared memory. A batch of units is updated at a time, and noted down first (:mod:`.journal`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .fused import Fused
from .journal import Journal
from .optimizers import Hyperparameters, adopt, make_faster, read_entry, write_entry
from .plan import Batch, Slice, Unit
from .staleness import MEAN_SQUARE, StalenessRule

Decode = Callable[[Unit, Tensor, Tensor], Tensor]  # unit, code, scratch -> gradient (may be the code itself)


class Memory(Protocol):
    """Bytes that can be seen as tensors."""

    def tensor(self, dtype: torch.dtype, offset: int, num_elements: int) -> Tensor:
        """As :meth:`Segment.tensor`."""


class SliceMemory:
    """The memory of a slice, by name of what lies in it.

    Args:
        segment: Of the slice's size, or what was copied of one.
        slice_: What lies where.

    """

    def __init__(self, segment: Memory, slice_: Slice) -> None:
        self.slice = slice_
        self.segment = segment
        self.control = segment.tensor(torch.int64, 0, 8).numpy()
        self.flags = segment.tensor(torch.uint8, slice_.flags_offset, len(slice_.units)).numpy()

    def weights(self, unit: Unit) -> Tensor:
        """A unit's weights, flat."""
        return self.segment.tensor(unit.info.dtype, unit.weight_offset, unit.num_elements)

    def state(self, unit: Unit) -> list[Tensor]:
        """Where each entry of a unit's state lies, flat."""
        return [
            self.segment.tensor(entry.dtype, offset, entry.num_elements(unit.num_elements))
            for entry, offset in zip(unit.info.state, unit.state_offsets, strict=True)
        ]

    def write_state(self, unit: Unit, state: Mapping[str, Any]) -> None:
        """Set a unit's optimizer state; entries that ``state`` lacks are zero."""
        for entry, memory in zip(unit.info.state, self.state(unit), strict=True):
            if entry.name in state and state[entry.name] is not None:
                write_entry(entry, memory, state[entry.name])
            else:
                memory.zero_()
        self.flags[unit.index] = 1

    def read_state(self, unit: Unit) -> dict[str, Any] | None:
        """A unit's optimizer state, on the memory itself; None if it has not been stepped."""
        if not self.flags[unit.index]:
            return None
        return {
            entry.name: read_entry(entry, memory, _shape(unit))
            for entry, memory in zip(unit.info.state, self.state(unit), strict=True)
            if entry.name != MEAN_SQUARE
        }


def _bytes_of(memory: SliceMemory, batch: Batch) -> Tensor:
    return memory.segment.tensor(torch.uint8, batch.offset, batch.num_bytes)


def _shape(unit: Unit) -> tuple[int, ...]:
    whole = unit.num_elements == unit.info.num_elements
    return unit.info.shape if whole else (unit.num_elements,)


class _Stepper:
    """One batch, ready to be stepped any number of times."""

    def __init__(self, memory: SliceMemory, batch: Batch, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        self.memory = memory
        self.batch = batch
        self.bytes = _bytes_of(memory, batch)
        self._optimizer = optimizer
        self._groups = groups
        self.weights = [memory.weights(unit) for unit in batch.units]
        self._parameters = [
            nn.Parameter(weight.view(_shape(unit)), requires_grad=True)
            for unit, weight in zip(batch.units, self.weights, strict=True)
        ]
        self._memories = [memory.state(unit) for unit in batch.units]
        self._named = [
            {entry.name: there for entry, there in zip(unit.info.state, memories, strict=True)}
            for unit, memories in zip(batch.units, self._memories, strict=True)
        ]
        self._states: list[dict[str, Any] | None] = [memory.read_state(unit) for unit in batch.units]

    def step(self, gradients: Sequence[Tensor | None], scale: float) -> None:
        """Step the optimizer on the units that have a gradient."""
        by_group: dict[tuple[int, bool], list[nn.Parameter]] = {}
        state: dict[Tensor, Any] = self._optimizer.state  # a defaultdict, which optimizers rely on
        state.clear()
        stepped = []
        for index, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            if gradient is None:
                continue
            unit = self.batch.units[index]
            parameter.grad = gradient.view(parameter.shape)
            kept = self._states[index]
            if kept is not None:
                state[parameter] = kept
            # Fused SGD can't take parameters with and without momentum in one call; a group each is two calls.
            begins = kept is None and bool(self._groups[unit.info.group].get("fused"))
            by_group.setdefault((unit.info.group, begins), []).append(parameter)
            stepped.append(index)
        groups = [{**self._groups[group], "params": members} for (group, _), members in sorted(by_group.items())]
        if scale != 1.0:
            for group in groups:
                group["lr"] = group["lr"] * scale
        self._optimizer.param_groups = groups
        type(self._optimizer).step(self._optimizer)
        for index in stepped:
            parameter = self._parameters[index]
            self._keep(index, state[parameter])
            parameter.grad = None

    def step_fused(self, fused: Fused, code: Tensor, present: Sequence[bool], scale: float) -> bool:
        """Decode and step in one pass the units that have a gradient, or none if that can't be done for all.

        Args:
            fused: Does it.
            code: The push.
            present: Whether each unit has a gradient.
            scale: What learning rates are multiplied with.

        Returns:
            Whether it was done.

        """
        plans = []
        for index, unit in enumerate(self.batch.units):
            if present[index]:
                begins, group = self._states[index] is None, self._groups[unit.info.group]
                plan = fused.plan(self._optimizer, group, self.weights[index], self._named[index], begins, scale)
                if plan is None:
                    return False
                plans.append((index, unit, plan, begins))
        for index, unit, plan, begins in plans:
            fused.step(plan, unit.code_in(code), self.weights[index], self._named[index], begins)
            self.memory.flags[unit.index] = 1
            if begins:
                self._states[index] = self.memory.read_state(unit)
        return True

    def _keep(self, index: int, state: dict[str, Any]) -> None:
        """Bring what the optimizer made or replaced to where it is found again."""
        unit = self.batch.units[index]
        for entry, memory in zip(unit.info.state, self._memories[index], strict=True):
            value = state.get(entry.name)
            if entry.name == MEAN_SQUARE or value is None:
                continue
            write_entry(entry, memory, value)
            if isinstance(value, Tensor) and value.data_ptr() != memory.data_ptr():
                state[entry.name] = read_entry(entry, memory, _shape(unit))
        self._states[index] = state
        self.memory.flags[unit.index] = 1


class Updater:
    """Applies pushes to a slice, exactly once each, whatever happens to the process.

    Args:
        memory: The slice, as an earlier process may have left it.
        optimizers: All optimizers, bare.
        groups: The hyperparameters of each one's groups.
        rule: What to do about staleness.
        decode: Makes a unit's gradient of its code.
        codec: Which codec ``decode`` is of, if it is one: then decoding and stepping may be one pass.

    """

    def __init__(
        self,
        memory: SliceMemory,
        optimizers: Sequence[Optimizer],
        groups: Sequence[list[dict[str, Any]]],
        rule: StalenessRule,
        decode: Decode,
        codec: str | None = None,
    ) -> None:
        self._memory = memory
        self._groups = [[dict(group) for group in of_one] for of_one in groups]
        for optimizer, of_one in zip(optimizers, self._groups, strict=True):
            for group in of_one:
                make_faster(optimizer, group)
        self._rule = rule
        self._decode = decode
        self._fused = None if codec is None or rule.compensates else Fused(codec)
        batches = memory.slice.batches
        self._journal = Journal(memory)
        self._journal.recover(lambda index, _: [_bytes_of(memory, batches[index])])
        self._steppers = [
            _Stepper(memory, batch, optimizers[batch.optimizer], self._groups[batch.optimizer]) for batch in batches
        ]
        self._scratch: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def last_command(self) -> int:
        """The last command that was carried out from end to end."""
        return self._journal.last_command

    def adopt(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Set what a scheduler has changed."""
        for groups, values in zip(self._groups, hyperparameters, strict=True):
            for group, new in zip(groups, values, strict=True):
                adopt(group, {key: value for key, value in new.items() if key not in ("foreach", "fused")})

    def finish(self, command: int) -> None:
        """Note that a command has been carried out."""
        self._journal.finish(command)

    def apply(
        self,
        command: int,
        code: Tensor,
        absent: Collection[int],
        staleness: int,
        base: Tensor | None = None,
        fetch: Tensor | None = None,
    ) -> None:
        """Decode a push, correct it for its staleness, step the optimizers and hand the new weights out, in one pass.

        Args:
            command: Its number, one more than the last.
            code: The push, as bytes.
            absent: Parameters that it has no gradient for; they stay as they are.
            staleness: Number of updates that it has missed.
            base: The weights that it was computed from, as bytes; only a compensating rule looks at them.
            fetch: Where to write the new weights, as bytes.

        """
        scale = self._rule.scale(staleness)
        for index in range(self._journal.next_batch, len(self._steppers)):
            stepper = self._steppers[index]
            batch = stepper.batch
            present = [unit.parameter not in absent for unit in batch.units]
            if any(present):
                self._journal.note_down(index, [stepper.bytes])
                if self._fused is None or not stepper.step_fused(self._fused, code, present, scale):
                    gradients = [
                        self._gradient(stepper, position, code, base) if there else None
                        for position, there in enumerate(present)
                    ]
                    stepper.step(gradients, scale)
            if fetch is not None:
                end = batch.fetch_offset + batch.num_weight_bytes
                fetch[batch.fetch_offset : end].copy_(stepper.bytes[: batch.num_weight_bytes])
            self._journal.advance(command, index)
        self.finish(command)

    def hand_out(self, fetch: Tensor) -> None:
        """Write all weights to where a worker fetches them."""
        for stepper in self._steppers:
            batch = stepper.batch
            end = batch.fetch_offset + batch.num_weight_bytes
            fetch[batch.fetch_offset : end].copy_(stepper.bytes[: batch.num_weight_bytes])

    def take_in(self, edits: Tensor) -> None:
        """Take weights that a worker has edited, in place of those here.

        Args:
            edits: As bytes, where it would fetch weights; NaN where it has edited nothing.

        """
        for stepper in self._steppers:
            for unit, weights in zip(stepper.batch.units, stepper.weights, strict=True):
                if weights.is_floating_point() or weights.is_complex():
                    edited = unit.weights_in(edits)
                    weights.copy_(torch.where(edited.isnan(), weights, edited))

    def _gradient(self, stepper: _Stepper, position: int, code: Tensor, base: Tensor | None) -> Tensor:
        unit = stepper.batch.units[position]
        key = (unit.num_elements, unit.info.dtype)
        scratch = self._scratch.get(key)
        if scratch is None or len(stepper.batch.units) > 1:
            scratch = torch.empty(unit.num_elements, dtype=unit.info.dtype)
            if len(stepper.batch.units) == 1:
                self._scratch[key] = scratch
        gradient = self._decode(unit, unit.code_in(code), scratch)
        if self._rule.compensates and base is not None:
            if gradient is not scratch:
                gradient = scratch.copy_(gradient)
            then = unit.weights_in(base)
            names = [entry.name for entry in unit.info.state]
            mean_square = self._memory.state(unit)[names.index(MEAN_SQUARE)]
            self._rule.compensate(gradient, stepper.weights[position], then, mean_square)
        return gradient
