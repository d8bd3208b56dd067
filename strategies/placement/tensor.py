"""Tensors that know that their channels are split, and code that doesn't have to.

A user's network is called from an arbitrary ``training_step``: with loops, functional calls, weight penalties, several
networks. Tracing that into a graph would refuse what it can't follow. Here the *data* carries the layout instead: a
:class:`ColumnTensor` holds this rank's channels, says that it has the global shape, and sees every torch function that
it meets through ``__torch_function__``. Functions with a rule (``rules/``) run on the local channels; before any
other, the channels are gathered. Code that nobody has thought of is therefore slow rather than wrong.

Parameters are converted in place (:class:`ColumnParameter`), so optimizers, shared weights and lists that users
keep stay valid. While an optimizer steps, :func:`local_view` makes them plain local tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import CheckpointFunction

from .columns import Columns
from .exchange import exchange, gather, take
from .partition import Partition
from .views import remember, writes_in_place

Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}
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

    def matches(self, other: Spec) -> bool:
        """Whether two tensors are split alike, whatever their names."""
        return self.dim == other.dim and self.partition == other.partition

    def moved(self, dim: int, partition: Partition | None = None) -> Spec:
        """The same columns with another dimension or partition."""
        return Spec(dim, self.partition if partition is None else partition, self.columns)


def rule(*functions: Any) -> Callable[[Handler], Handler]:
    """Register ``handler(function, args, kwargs)`` for torch functions; ``None`` among them is passed over.

    A handler runs with dispatch disabled, so column tensors behave as their local part in it. It returns
    ``NotImplemented`` to have everything gathered.
    """

    def register(handler: Handler) -> Handler:
        for function in functions:
            if function is not None:
                HANDLERS[function] = handler
        return handler

    return register


def _canonical(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call as rules read it: the tensor first, and torch's name for NumPy's ``axis``."""
    if "axis" in kwargs:
        kwargs = {("dim" if key == "axis" else key): value for key, value in kwargs.items()}
    if not args and "input" in kwargs and "condition" not in kwargs:
        args = (kwargs["input"],)
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
    return args, kwargs


class ColumnTensor(Tensor):
    """This rank's channels of a tensor that is split over the columns.

    ``shape`` and ``size()`` are global; everything that reads values without a rule of its own gathers them first.
    """

    _spec: Spec
    _holds_columns = True

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on local channels where there is a rule for it, else on gathered ones."""
        kwargs = kwargs or {}
        with no_dispatch():
            if getattr(_mode, "local", False):
                return func(*args, **kwargs)
            handler = HANDLERS.get(func)
            if handler is not None:
                result = handler(func, *_canonical(args, kwargs))
                if result is not NotImplemented:
                    return result
        return on_gathered(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with no_dispatch():
            return wrap(self.detach().clone(memory_format=torch.preserve_format), self._spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "A tensor whose channels are split over several ranks was about to be pickled. Save with "
            "trainer.save_checkpoint(path), which gathers it on all ranks, or after trainer.fit() has returned."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with no_dispatch():
            return (
                f"{type(self).__name__}(shape={tuple(global_shape(self))}, split dim={self._spec.dim}, local={self!s})"
            )

    def __str__(self) -> str:
        with no_dispatch():
            return str(self.detach().as_subclass(Tensor))


class ColumnParameter(ColumnTensor, nn.Parameter):
    """A parameter of which this rank holds, trains and saves only its own outputs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ColumnParameter:
        if id(self) in memo:
            known: ColumnParameter = memo[id(self)]
            return known
        with no_dispatch():
            copy = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        split_in_place(copy, self._spec)
        memo[id(self)] = copy
        return copy  # type: ignore[return-value]


def split_in_place(parameter: nn.Parameter, spec: Spec) -> None:
    """Turn a plain parameter that already holds this rank's part into a :class:`ColumnParameter`, same object."""
    parameter.__class__ = ColumnParameter
    parameter._spec = spec  # type: ignore[attr-defined]


def wrap(local: Tensor, spec: Spec) -> ColumnTensor:
    """Label a fresh local tensor as this rank's part."""
    if type(local) is Tensor:
        local.__class__ = ColumnTensor  # no alias, so in-place operations and grad_fn stay what they are
    elif type(local) is not ColumnTensor:
        local = local.as_subclass(ColumnTensor)
    local._spec = spec  # type: ignore[attr-defined]
    return local  # type: ignore[return-value]


def spec_of(value: Any) -> Spec | None:
    """How ``value`` is split, ``None`` for anything that isn't."""
    return value._spec if isinstance(value, ColumnTensor) else None


def global_shape(tensor: Tensor) -> torch.Size:
    """The shape that the tensor has on one device. Call with dispatch disabled."""
    shape = list(tensor.shape)
    spec = spec_of(tensor)
    if spec is not None:
        shape[spec.dim] = spec.partition.size
    return torch.Size(shape)


def whole(value: Any, name: str) -> Any:
    """Gather ``value`` if it is split. Call with dispatch disabled."""
    spec = spec_of(value)
    if spec is None:
        return value
    return gather(value, spec.dim, spec.partition, spec.columns, name)


def to_partition(value: Tensor, spec: Spec, name: str) -> Tensor:
    """The local part of ``value`` under ``spec``, whether it is replicated, split so already, or split otherwise."""
    own = spec_of(value)
    if own is None:
        return take(value, spec.dim, spec.partition, spec.columns, name)
    if own.matches(spec):
        return value
    if own.dim == spec.dim:
        return exchange(value, spec.dim, own.partition, spec.partition, spec.columns, name)
    return take(whole(value, name), spec.dim, spec.partition, spec.columns, name)


def layer_of(args: Any) -> str | None:
    """The first layer name that a parameter among ``args`` carries."""
    for value in args:
        if isinstance(value, Tensor):
            name = value._spec.name if isinstance(value, ColumnTensor) else getattr(value, "_squall_layer", "")
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
            if not isinstance(value, ColumnTensor):
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
        if isinstance(first, ColumnTensor) and not written:
            remember(result, name, first, full_of[id(first)])
        for target in written:
            spec = target._spec
            # ``nn.init`` writes without history, whoever calls it; so must this.
            recorded = full_of[id(target)].grad_fn is not histories[id(target)]
            with torch.set_grad_enabled(recorded and torch.is_grad_enabled()):
                target.copy_(take(full_of[id(target)], spec.dim, spec.partition, spec.columns, account))
            if result is full_of[id(target)]:
                result = target
    return result


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[ColumnTensor]:
    """The split tensors that a function writes to, judged by torch's naming."""
    targets: list[Any] = []
    args = args or tuple(kwargs.values())[:1]  # ``nn.init`` hands its tensor on by name
    if writes_in_place(name) and args:
        targets += args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    if kwargs.get("inplace") is True and args:
        targets.append(args[0])
    out = kwargs.get("out")
    targets += out if isinstance(out, (list, tuple)) else [out]
    return [target for target in targets if isinstance(target, ColumnTensor)]


@contextmanager
def local_view(enabled: bool = True) -> Iterator[None]:
    """Within, column tensors are plain tensors of the local shape (``True``), or global ones again (``False``)."""
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
