"""Tensors that know how they are split, and code that doesn't have to.

A user's network is called from an arbitrary ``training_step``: with loops, functional calls, weight penalties, several
networks. Tracing that into a graph would refuse what it can't follow. Here the *data* carries the layout instead: a
:class:`SplitTensor` holds this rank's part, says that it has the global shape, and sees every torch function that
it meets through ``__torch_function__``. Functions with a rule (``rules/``) run on the local part; before any
other, the parts are gathered. Code that nobody has thought of is therefore slow rather than wrong. A
:class:`ColumnTensor` is split by channels; one that is split in tiles of an image is in ``tiles``.

Parameters are converted in place (:class:`SplitParameter`), so optimizers, shared weights and lists that users
keep stay valid. While an optimizer steps, :func:`local_view` makes them plain local tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import CheckpointFunction

from .columns import Columns
from .exchange import cut, exchange, gather
from .partition import Partition

if TYPE_CHECKING:
    from .tiles import TileSpec

from .views import remember, writes_in_place

Handler = Callable[..., Any]
COLUMN_HANDLERS: dict[Any, Handler] = {}
TILE_HANDLERS: dict[Any, Handler] = {}
_mode = threading.local()
no_dispatch = torch._C.DisableTorchFunctionSubclass


@dataclass(frozen=True)
class Spec:
    """How a tensor is split: its dimension, who holds which part, and among whom.

    Args:
        dim: The split dimension, non-negative.
        partition: The ranges of that dimension that each column holds.
        columns: The ranks.
        name: The layer that a parameter belongs to, as the ledger and the layout call it.

    """

    dim: int
    partition: Partition
    columns: Columns
    name: str = ""

    @property
    def axes(self) -> tuple[Spec, ...]:
        """The split dimensions, each on its own; here one."""
        return (self,)

    @property
    def tensor_class(self) -> type[SplitTensor]:
        """Of tensors that are split so."""
        return ColumnTensor

    @property
    def parameter_class(self) -> type[SplitParameter]:
        """Of parameters that are split so."""
        return ColumnParameter

    @property
    def unnamed(self) -> Spec:
        """The same for what comes of a parameter, which is no parameter."""
        return Spec(self.dim, self.partition, self.columns)

    def along(self, axes: tuple[Spec, ...]) -> Spec:
        """The same ranks with other dimensions or partitions."""
        (axis,) = axes
        return Spec(axis.dim, axis.partition, self.columns)

    def moved(self, dim: int, partition: Partition | None = None) -> Spec:
        """The same columns with another dimension or partition."""
        return Spec(dim, self.partition if partition is None else partition, self.columns)


def rule(
    *functions: Any, handlers: tuple[dict[Any, Handler], ...] = (COLUMN_HANDLERS,)
) -> Callable[[Handler], Handler]:
    """Register ``handler(function, args, kwargs)`` for torch functions; ``None`` among them is passed over.

    A handler runs with dispatch disabled, so split tensors behave as their local part in it. It returns
    ``NotImplemented`` to have everything gathered.
    """

    def register(handler: Handler) -> Handler:
        for function in functions:
            if function is not None:
                for table in handlers:
                    table[function] = handler
        return handler

    return register


tile_rule = partial(rule, handlers=(TILE_HANDLERS,))  # for tensors that are split in tiles
split_rule = partial(rule, handlers=(COLUMN_HANDLERS, TILE_HANDLERS))  # for all that are split


def _canonical(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call as rules read it: the tensor first, and torch's name for NumPy's ``axis``."""
    if "axis" in kwargs:
        kwargs = {("dim" if key == "axis" else key): value for key, value in kwargs.items()}
    if not args and "input" in kwargs and "condition" not in kwargs:
        args = (kwargs["input"],)
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
    return args, kwargs


class SplitTensor(Tensor):
    """This rank's part of a tensor that is split over ranks.

    ``shape`` and ``size()`` are global; everything that reads values without a rule of its own gathers them first.
    """

    _spec: Spec | TileSpec
    _holds_columns = True
    _handlers: ClassVar[dict[Any, Handler]] = COLUMN_HANDLERS

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on the local part where there is a rule for it, else on what is gathered."""
        kwargs = kwargs or {}
        with no_dispatch():
            if getattr(_mode, "local", False):
                return func(*args, **kwargs)
            handler = cls._handlers.get(func)
            if handler is not None:
                result = handler(func, *_canonical(args, kwargs))
                if result is not NotImplemented:
                    return result
        return on_gathered(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with no_dispatch():
            copy: Tensor = wrap(self.detach().clone(memory_format=torch.preserve_format), self._spec)
            return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "A tensor that is split over several ranks was about to be pickled. Save with "
            "trainer.save_checkpoint(path), which gathers it on all ranks, or after trainer.fit() has returned."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with no_dispatch():
            return (
                f"{type(self).__name__}(shape={tuple(global_shape(self))}, "
                f"split dim={', '.join(str(axis.dim) for axis in self._spec.axes)}, local={self!s})"
            )

    def __str__(self) -> str:
        with no_dispatch():
            return str(self.detach().as_subclass(Tensor))


class ColumnTensor(SplitTensor):
    """This rank's channels of a tensor that is split over the columns."""

    _spec: Spec


class SplitParameter(SplitTensor, nn.Parameter):
    """A parameter of which this rank holds and trains only its own part."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitParameter:
        if id(self) in memo:
            known: SplitParameter = memo[id(self)]
            return known
        with no_dispatch():
            copy = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        split_in_place(copy, self._spec)
        memo[id(self)] = copy
        return copy  # type: ignore[return-value]


class ColumnParameter(ColumnTensor, SplitParameter):
    """A parameter of which this rank holds, trains and saves only its own outputs."""


def split_in_place(parameter: nn.Parameter, spec: Spec | TileSpec) -> None:
    """Turn a plain parameter that already holds this rank's part into a :class:`SplitParameter`, same object."""
    parameter.__class__ = spec.parameter_class
    parameter._spec = spec  # type: ignore[attr-defined]


def wrap(local: Tensor, spec: Spec | TileSpec) -> Any:
    """Label a fresh local tensor as this rank's part."""
    kind = spec.tensor_class
    if type(local) is Tensor:
        local.__class__ = kind  # no alias, so in-place operations and grad_fn stay what they are
    elif type(local) is not kind:
        local = local.as_subclass(kind)
    local._spec = spec  # type: ignore[attr-defined]
    return local


def spec_of(value: Any) -> Any:
    """How ``value`` is split, ``None`` for anything that isn't."""
    return value._spec if isinstance(value, SplitTensor) else None


def alike(first: Spec | TileSpec, second: Spec | TileSpec) -> bool:
    """Whether two tensors are split alike, whatever their names."""
    return [(axis.dim, axis.partition) for axis in first.axes] == [(axis.dim, axis.partition) for axis in second.axes]


def global_shape(tensor: Tensor) -> torch.Size:
    """The shape that the tensor has on one device. Call with dispatch disabled."""
    shape = list(tensor.shape)
    spec = spec_of(tensor)
    for axis in spec.axes if spec is not None else ():
        shape[axis.dim] = axis.partition.size
    return torch.Size(shape)


def whole(value: Any, name: str) -> Any:
    """Gather ``value`` if it is split. Call with dispatch disabled."""
    spec = spec_of(value)
    for axis in reversed(spec.axes) if spec is not None else ():
        value = gather(value, axis.dim, axis.partition, axis.columns, name)
    return value


def to_partition(value: Tensor, spec: Spec | TileSpec, name: str) -> Tensor:
    """The local part of ``value`` under ``spec``, whether it is replicated, split so already, or split otherwise."""
    own = spec_of(value)
    if own is not None and [axis.dim for axis in own.axes] == [axis.dim for axis in spec.axes]:
        for have, need in zip(own.axes, spec.axes, strict=True):
            value = exchange(value, need.dim, have.partition, need.partition, need.columns, name)
        return value
    return cut(whole(value, name), spec.axes, name)


def layer_of(args: Any) -> str | None:
    """The first layer name that a parameter among ``args`` carries."""
    for value in args:
        if isinstance(value, Tensor):
            name = value._spec.name if isinstance(value, SplitTensor) else getattr(value, "_squall_layer", "")
            if name:
                return str(name)
    return None


def on_gathered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function that has no rule: gather every split argument, and cut again what it changed in place."""
    name = getattr(func, "__name__", str(func))
    written = _written(name, args, kwargs)
    with no_dispatch():
        account = layer_of(tree_flatten((args, kwargs))[0]) or name
        full_of: dict[int, Tensor] = {}

        def full(value: Any) -> Any:
            if not isinstance(value, SplitTensor):
                return value
            if id(value) not in full_of:
                full_of[id(value)] = whole(value, account)
            return full_of[id(value)]

        full_args, full_kwargs = tree_map(full, (args, kwargs))
        histories = {id(target): full_of[id(target)].grad_fn for target in written}
    # Outside: what the function calls back (a user's distance, a hook, a recomputation) may meet split tensors.
    result = func(*full_args, **full_kwargs)
    with no_dispatch():
        first = next(iter(args), None)
        if isinstance(first, SplitTensor) and not written:
            remember(result, name, first, full_of[id(first)])
        for target in written:
            spec = target._spec
            # ``nn.init`` writes without history, whoever calls it; so must this.
            recorded = full_of[id(target)].grad_fn is not histories[id(target)]
            with torch.set_grad_enabled(recorded and torch.is_grad_enabled()):
                target.copy_(cut(full_of[id(target)], spec.axes, account))
            if result is full_of[id(target)]:
                result = target
    return result


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[SplitTensor]:
    """The split tensors that a function writes to, judged by torch's naming."""
    targets: list[Any] = []
    args = args or tuple(kwargs.values())[:1]  # ``nn.init`` hands its tensor on by name
    if writes_in_place(name) and args:
        targets += args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    if kwargs.get("inplace") is True and args:
        targets.append(args[0])
    out = kwargs.get("out")
    targets += out if isinstance(out, (list, tuple)) else [out]
    return [target for target in targets if isinstance(target, SplitTensor)]


@contextmanager
def local_view(enabled: bool = True) -> Iterator[None]:
    """Within, split tensors are plain tensors of the local shape (``True``), or global ones again (``False``)."""
    before = getattr(_mode, "local", False)
    _mode.local = enabled
    try:
        yield
    finally:
        _mode.local = before


_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


def _apply_on_gathered(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``Function.apply`` is the one door that ``__torch_function__`` does not watch: gather before it, too."""
    if torch._C._is_torch_function_enabled() and not getattr(_mode, "local", False):
        name = layer_of(args) or cls.__name__
        with no_dispatch():
            args = tuple(whole(value, name) for value in args)
        if issubclass(cls, CheckpointFunction):  # its gradients, too, go by the door: nothing split may leave it
            args = (_ending_whole(args[0]), *args[1:])
    return _apply(cls, *args, **kwargs)


def _ending_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, but what it returns is gathered."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        with no_dispatch():
            return tree_map(lambda value: whole(value, "checkpoint"), result)

    return call


def watch_autograd_functions() -> None:
    """Make custom autograd functions gather what is split. Idempotent; without split tensors nothing changes."""
    torch.autograd.Function.apply = classmethod(_apply_on_gathered)  # type: ignore[assignment, method-assign]
