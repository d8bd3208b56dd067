"""DeepSpeed's ZeRO for the replicated part of a module, on any device: Rajbhandari et al. 2020.

Lightning's ``DeepSpeedStrategy`` hands a whole module to DeepSpeed, on GPUs. Here DeepSpeed gets a module whose split
parameters it must not see, average or partition, and an optimizer of the others; on a CPU it talks through gloo.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from ._due import callbacks_of
from .placement.hybrid.updates import hyperparameters_of
from .placement.tensor import ColumnParameter

_GRADIENT_HOOKS = (
    "configure_gradient_clipping", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad",
)  # fmt: skip
_OURS = ("optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps", "fp16", "bf16")


def is_available() -> bool:
    """Whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def read_config(config: Mapping[str, Any] | str | Path | None, stage: int | None) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's entries, and what the rest needs.

    Args:
        config: Entries, or the path of a JSON or YAML file of them.
        stage: Of ZeRO.

    Raises:
        MisconfigurationException: If it is none, or says what the Trainer or another argument says.

    """
    if isinstance(config, (str, Path)):
        if not Path(config).is_file():
            raise MisconfigurationException(f"deepspeed_config={str(config)!r} is no file. Give its path, or a dict.")
        config = yaml.safe_load(Path(config).read_text())
    if config is not None and not isinstance(config, Mapping):
        raise MisconfigurationException(f"deepspeed_config must be a dict or the path of a file, not {config!r}.")
    entries = copy.deepcopy(dict(config or {}))
    if entries and stage is None:
        raise MisconfigurationException("deepspeed_config needs DeepSpeed: set zero_stage to 0, 1, 2 or 3.")
    for name in _OURS:
        if name in entries:
            raise MisconfigurationException(
                f"deepspeed_config has {name!r}, which the Trainer and configure_optimizers say. Leave it out there."
            )
    zero = entries.setdefault("zero_optimization", {})
    if zero.setdefault("stage", stage) != stage:
        raise MisconfigurationException(
            f"deepspeed_config says stage {zero['stage']}, and zero_stage={stage!r}. Say the same, or one of them only."
        )
    zero.setdefault("memory_efficient_linear", False)  # it puts another function in the place of torch's linear
    entries["gradient_clipping"] = 0.0  # left out, it means 1.0
    entries.setdefault("zero_allow_untested_optimizer", True)
    entries.setdefault("train_micro_batch_size_per_gpu", 1)  # only counts samples
    return entries


class ZeroEngine:
    """A DeepSpeed engine around what is not split of a module.

    Args:
        module: The module, whose split parameters are left alone.
        optimizer: The user's, of all parameters. It keeps stepping the split ones, and its learning rates and the like
            are what the others are stepped with.
        config: From :func:`read_config`.
        device: Of this rank.

    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, config: Mapping[str, Any], device: torch.device
    ) -> None:
        deepspeed = _import(device)
        self._optimizer = optimizer
        self._split = [
            (layer, name, parameter)
            for layer in module.modules()
            for name, parameter in layer._parameters.items()
            if isinstance(parameter, ColumnParameter)
        ]
        self.stage: int = config["zero_optimization"]["stage"]
        groups = [
            {**group, "params": [p for p in group["params"] if not isinstance(p, ColumnParameter)]}
            for group in optimizer.param_groups
        ]
        self._theirs = copy.copy(optimizer)
        self._theirs.__dict__.pop("step", None)  # wrapped for split parameters
        self._theirs.state = defaultdict(dict)
        self._theirs.param_groups = [group for group in groups if group["params"]]
        self._numbers = [number for number, group in enumerate(groups) if group["params"]]
        self._shared: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self._module = module
        self._known = {parameter: set(vars(parameter)) for parameter in self._shared}
        hooks = {layer: [set(hooks) for hooks in _hooks(layer)] for layer, _, _ in self._split}
        with self._hidden():
            self.engine, self._zero, _, _ = deepspeed.initialize(
                model=module, optimizer=self._theirs, config=dict(config), dist_init_required=False
            )
        for layer, before in hooks.items():  # they would fetch parameters that nobody has partitioned
            for known, registered in zip(before, _hooks(layer), strict=True):
                for key in set(registered) - known:
                    del registered[key]

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        """Within, the module has its split parameters as plain attributes, which DeepSpeed doesn't look at."""
        for layer, name, parameter in self._split:
            del layer._parameters[name]
            layer.__dict__[name] = parameter
        try:
            yield
        finally:
            for layer, name, parameter in self._split:
                del layer.__dict__[name]
                layer._parameters[name] = parameter

    def backward(self, loss: Tensor) -> None:
        """Compute all gradients, and average or partition those of what is not split."""
        with self._hidden():
            self.engine.backward(loss)

    def step(self, factor: float) -> None:
        """Step what is not split, at ``factor`` times the optimizer's current learning rates."""
        for number, theirs in zip(self._numbers, self._theirs.param_groups, strict=True):
            theirs.update(hyperparameters_of(self._optimizer.param_groups[number], factor))
        with self._hidden():
            self.engine.step()

    # ------------------------------------------------------------------ what it has partitioned

    def whole_weights(self) -> Any:
        """Within this context, all ranks have all weights. All ranks must enter it."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(self._shared)

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Within, the user's optimizer has the whole state of what is not split, too. All ranks must enter it."""
        states = self._gather_state()
        self._optimizer.state.update(states)
        try:
            yield
        finally:
            for parameter in states:
                del self._optimizer.state[parameter]

    def _gather_state(self) -> dict[Tensor, dict[str, Any]]:
        if self.stage == 0:
            return dict(self._theirs.state)
        from deepspeed.utils import safe_get_full_optimizer_state

        states: dict[Tensor, dict[str, Any]] = {}
        for parameters, flat in self._flat_parts():
            held = self._zero.optimizer.state.get(flat, {})
            for parameter in parameters if held else ():
                states[parameter] = {
                    name: safe_get_full_optimizer_state(parameter, name).clone()
                    if isinstance(value, Tensor) and value.shape == flat.shape and flat.ndim and value.ndim
                    else copy.deepcopy(value)
                    for name, value in held.items()
                }
        return states

    def take_state(self) -> None:
        """Partition the state that the user's optimizer has been given of what is not split."""
        given = {p: self._optimizer.state.pop(p) for p in self._shared if p in self._optimizer.state}
        if self.stage == 0:
            self._theirs.state.update(given)
            return
        if not given:
            return
        shape_of = {p: getattr(p, "ds_shape", p.shape) for p in given}
        tensors: list[tuple[Tensor, str, Tensor]] = []
        for parameters, flat in self._flat_parts():
            held = self._zero.optimizer.state[flat]
            for parameter in parameters:
                for name, value in given.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.shape == shape_of[parameter]:
                        held[name] = torch.zeros_like(flat)
                        tensors.append((parameter, name, value))
                    else:
                        held[name] = value
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()
        for parameter, name, value in tensors:
            self._partition(parameter, name, value)

    def _partition(self, parameter: Tensor, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        # Its function for whole tensors does not know that partitions are padded.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = value.new_zeros(size * dist.get_world_size())
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded.split(size)[dist.get_rank()], name)

    def _flat_parts(self) -> list[tuple[list[Tensor], Tensor]]:
        """This rank's flat part of each group of parameters, with the parameters."""
        zero = self._zero
        if self.stage == 3:
            return list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))
        return list(zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True))

    def close(self, alone: bool) -> None:
        """Give the module back as it came, and the whole state of what is not split to the user's optimizer.

        Args:
            alone: Whether the other ranks can't be asked any more.

        """
        if not alone:
            self._optimizer.state.update(self._gather_state())
            with self.whole_weights():
                whole = [parameter.data.clone() for parameter in self._shared]
        with self._hidden():
            self.engine.destroy()
        if alone:
            return
        for layer in self._module.modules():  # which it gave dictionaries of its own
            layer._parameters = dict(layer._parameters)
        for parameter, value in zip(self._shared, whole, strict=True):
            parameter.data = value
            for name in set(vars(parameter)) - self._known[parameter]:
                delattr(parameter, name)


def _import(device: torch.device) -> Any:
    """DeepSpeed, made ready for ``device``."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # It would compile a kernel for ranks of one host, and believe an environment variable that they are.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def _hooks(layer: nn.Module) -> list[Any]:
    return [layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks]


def reason_against(module: Any, trainer: Any, optimizers: list[Optimizer], fc_update: str, precision: Any) -> str:
    """Why DeepSpeed can't do what a training needs; empty if it can."""
    hooks = [
        f"{type(owner).__name__}.{name}"
        for owner in (module, *callbacks_of(trainer))
        for name in _GRADIENT_HOOKS
        if hasattr(owner, name) and is_overridden(name, owner)
    ]
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: not is_available(), "DeepSpeed is not installed (pip install lightning-squall[deepspeed])"),
        (lambda: fc_update == "pass", "fc_update='pass' adds gradients up over passes"),
        (lambda: not module.automatic_optimization, "optimization is manual"),
        (lambda: trainer.accumulate_grad_batches != 1, "accumulate_grad_batches adds gradients up over batches"),
        (
            lambda: any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)),
            "GradientAccumulationScheduler adds gradients up over batches",
        ),
        (lambda: bool(trainer.gradient_clip_val), "gradient_clip_val needs the norm of gradients that are partitioned"),
        (lambda: bool(hooks), f"{', '.join(hooks)} may look at gradients, and those that are partitioned aren't there"),
        (lambda: getattr(precision, "scaler", None) is not None, "the precision scales the loss"),
        (lambda: len(optimizers) != 1, f"there are {len(optimizers)} optimizers"),
        (
            lambda: not all(optimizer._squall_elementwise for optimizer in optimizers),  # type: ignore[attr-defined]
            "the optimizer does not treat every weight alone",
        ),
        (
            lambda: any(p.dtype is not torch.float32 for p in module.parameters() if p.requires_grad),
            "DeepSpeed keeps weights in single precision, and the module has others",
        ),
    ]
    return next((reason for check, reason in checks if check()), "")
