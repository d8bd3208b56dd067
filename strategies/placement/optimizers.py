"""Any optimizer on split parameters: local where it may be, whole where it must.

An optimizer that treats every element alone (SGD, Adam, ...) steps on each rank's own part as if that were all there
is. One that doesn't (L-BFGS with its dot products, Adafactor, Muon, LAMB) would compute something else on a part, so
it gets whole parameters and gradients, the same on every rank, and only the result is cut again. Which kind an
unknown optimizer is, is tried out on a small parameter before the first batch.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from .module import gather_part, make_split, make_whole, take_part
from .tensor import Spec, SplitParameter, local_view
from .tiles import TileSpec

_ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in ["SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
    if hasattr(torch.optim, name)
)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether stepping on parts of a parameter gives the parts of the whole step.

    Known optimizers are looked up; any other is tried: three steps on a matrix, and on its halves, must agree. So they
    must with small and large gradients, as there are rules that have no effect up to some norm, or from some norm on.
    One that has another optimizer in it can't be tried, since that one would step the real parameters.
    """
    if type(optimizer) in _ELEMENTWISE:
        return True
    if isinstance(optimizer, torch.optim.LBFGS) or any(
        isinstance(part, Optimizer) for part in vars(optimizer).values()
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    drawn = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    try:
        return all(
            torch.allclose(
                _tried(optimizer, group, start, grads),
                torch.cat([_tried(optimizer, group, start[part], [grad[part] for grad in grads]) for part in parts]),
                rtol=1e-5,
                atol=1e-7,
            )
            for grads in ([scale * grad for grad in drawn] for scale in (1.0, 1e-3, 1e3))
            for group in optimizer.param_groups
            for parts in ((slice(0, 3), slice(3, 6)), (slice(0, 4), slice(4, 6)))
        )
    except Exception:  # whatever it needs (a closure, named parameters), whole tensors are always right
        return False


def _tried(optimizer: Optimizer, like: dict[str, Any], start: Tensor, grads: list[Tensor]) -> Tensor:
    """Where ``start`` ends after a copy of ``optimizer``, with a group ``like`` one of its, stepped with ``grads``."""
    parameter = nn.Parameter(start.clone())
    trial: Optimizer = object.__new__(type(optimizer))
    group = {**like, "params": [parameter]}
    state = {key: value for key, value in vars(optimizer).items() if key != "step"}
    trial.__dict__.update(state, param_groups=[group], state=defaultdict(dict))
    trial._optimizer_step_pre_hooks = OrderedDict()  # the user's hooks are not part of the trial
    trial._optimizer_step_post_hooks = OrderedDict()
    for grad in grads:
        parameter.grad = grad.clone()
        type(optimizer).step(trial)
    return parameter.detach()


def split_of(optimizer: Optimizer) -> list[SplitParameter]:
    """The split parameters that an optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, SplitParameter)]


def wrap_step(optimizer: Optimizer, average: Callable[[Any], Any] | None = None) -> None:
    """Make ``optimizer.step`` right for split parameters, whoever calls it.

    Args:
        optimizer: Any optimizer.
        average: Makes one loss of those of several replicas. An optimizer that follows the loss (L-BFGS searches
            along it) would lead each replica elsewhere by its own.

    """
    original = optimizer.step
    elementwise = is_elementwise(optimizer)
    if not elementwise and split_of(optimizer):
        rank_zero_warn(
            f"{type(optimizer).__name__} does not treat every weight alone, so each step gathers the split weights and "
            "their gradients on every rank: exact, but it costs the memory and time of one device."
        )

    def step(self: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        if elementwise:
            with local_view(), _hooks_see_global(self):
                return original(_globally(closure), *args, **kwargs) if closure else original(*args, **kwargs)
        if closure is not None and average is not None:
            closure = _averaged(closure, average)
        with _gathered(split_of(optimizer)) as cut:
            return original(cut(closure), *args, **kwargs) if closure else original(*args, **kwargs)

    if hasattr(original, "_wrapped_by_lr_sched"):  # or the scheduler takes it for a step that it doesn't see
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    # A method, since schedulers that are made later take it apart as one.
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    optimizer._squall_elementwise = elementwise  # type: ignore[attr-defined]


@contextmanager
def _hooks_see_global(optimizer: Optimizer) -> Iterator[None]:
    """Within, the optimizer's own hooks run on global tensors: a norm in one must be the norm."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    before = {name: getattr(optimizer, name) for name in names}

    def globally(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with local_view(False):
                return hook(*args, **kwargs)

        return call

    if not any(before.values()):
        yield
        return
    for name, hooks in before.items():
        setattr(optimizer, name, OrderedDict((key, globally(hook)) for key, hook in hooks.items()))
    try:
        yield
    finally:
        for name, hooks in before.items():
            setattr(optimizer, name, hooks)


def _globally(closure: Callable[[], Any]) -> Callable[[], Any]:
    def evaluate() -> Any:
        with local_view(False):
            return closure()

    return evaluate


def _averaged(closure: Callable[[], Any], average: Callable[[Any], Any]) -> Callable[[], Any]:
    def evaluate() -> Any:
        loss = closure()
        return average(loss.detach().clone() if isinstance(loss, Tensor) else loss)

    return evaluate


@contextmanager
def _gathered(parameters: list[SplitParameter]) -> Iterator[Callable[[Callable[[], Any]], Callable[[], Any]]]:
    """Within, the parameters are whole; a closure passed through the yielded function sees them split."""
    specs: list[Spec | TileSpec] = [make_whole(parameter) for parameter in parameters]

    def cut(closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            for parameter, spec in zip(parameters, specs, strict=True):
                make_split(parameter, spec)
            try:
                return closure()
            finally:
                for parameter in parameters:
                    make_whole(parameter)

        return evaluate

    try:
        yield cut
    finally:
        for parameter, spec in zip(parameters, specs, strict=True):
            make_split(parameter, spec)


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict that the optimizer has on one device. All columns must call it."""
    state: dict[str, Any] = optimizer.state_dict()
    if not split_of(optimizer) or not getattr(optimizer, "_squall_elementwise", True):
        return state
    return {**state, "state": map_state(optimizer, state["state"], gather_part, whole=False)}


def take_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of a state dict that was written on one device, or gathered."""
    if not split_of(optimizer) or not getattr(optimizer, "_squall_elementwise", True):
        return state
    return {**state, "state": map_state(optimizer, state["state"], take_part, whole=True)}


def gather_optimizer_state(optimizer: Optimizer) -> None:
    """Make the optimizer's own state whole, as its parameters are about to be. All columns must call it."""
    if getattr(optimizer, "_squall_elementwise", True):
        for parameter in split_of(optimizer):
            with local_view():
                shape = parameter.shape
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == shape:
                    optimizer.state[parameter][name] = gather_part(value, parameter._spec)


def map_state(
    optimizer: Optimizer, state: dict[Any, Any], convert: Callable[[Tensor, Any], Tensor], whole: bool
) -> dict[Any, Any]:
    """Convert what has its parameter's shape; step counts and the like are the same everywhere.

    Args:
        optimizer: Whose state it is.
        state: The part of its state dict that holds tensors by parameter.
        convert: Applied to each tensor that is split, with how it is split.
        whole: Whether the tensors in ``state`` have the shapes of one device, or this rank's.

    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    result = {}
    for key, entries in state.items():
        parameter = parameters[key]
        if not isinstance(parameter, SplitParameter) or not isinstance(entries, dict):
            result[key] = entries
            continue
        spec = parameter._spec
        with local_view():
            shape = list(parameter.shape)
        if whole:
            for axis in spec.axes:
                shape[axis.dim] = axis.partition.size
        result[key] = {
            name: convert(value, spec) if isinstance(value, Tensor) and list(value.shape) == shape else value
            for name, value in entries.items()
        }
    return result
