"""Torch's own optimizers on a shard, decoded and stepped in one pass by a compiled kernel.

Numbers are those of Torch within two roundings of what is added up; with AVX2 and AVX-512 products and sums are rounded
where its own fused kernels round them, so most are equal to the bit. State lies where Torch's optimizers keep it, so
either may go on where the other has stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from squall.kernels import native, shard_update
from squall.kernels.shard_update import CODECS, Step

from .codecs import get_codec
from .codecs.dynamic import float_values
from .codecs.top_k import TopKCodec

_STATES: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    Adagrad: ("sum",),
    Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}
_NOT_PLAIN = ("foreach", "capturable", "differentiable")


class Fused:
    """Decodes and steps where a codec, an optimizer and its options let it.

    Args:
        codec: How gradients are coded.

    """

    def __init__(self, codec: str) -> None:
        self._codec = get_codec(codec)
        self._values = float_values(torch.device("cpu")) if codec == "int8" else None

    def plan(
        self,
        optimizer: Optimizer,
        group: Mapping[str, Any],
        weights: Tensor,
        memories: Mapping[str, Tensor],
        begins: bool,
        scale: float,
    ) -> tuple[Step, list[Tensor]] | None:
        """Say what a step of a unit comes to, and which memory it changes besides the weights.

        Args:
            optimizer: Of the unit.
            group: Its options.
            weights: The unit's.
            memories: Where the optimizer's state of it lies, by name.
            begins: There is none yet.
            scale: What the learning rate is multiplied with.

        Returns:
            None where the optimizer itself has to be stepped: it is not exactly one of Torch's, it has hooks, options
            that ask for another way, or other types; or there is no kernel.

        """
        kind = type(optimizer)
        if kind not in _STATES or self._codec.name not in CODECS or not group.get("fused"):
            return None
        if any(group.get(key) for key in _NOT_PLAIN) or _has_hooks(optimizer) or (begins and kind is Adagrad):
            return None
        states = [memories[name] for name in _STATES[kind] if name in memories]
        if not native.serves_rows(weights, *states) or any(s.numel() != weights.numel() for s in states):
            return None
        number = 1.0 if begins or "step" not in memories else float(memories["step"]) + 1.0
        step = _sgd(group, scale) if kind is SGD else None
        step = _adagrad(group, scale, number) if kind is Adagrad else step
        step = step or _adam(group, scale, number, kind is AdamW or bool(group.get("decoupled_weight_decay")))
        wanted = {"sgd": int(step.first != 0), "adagrad": 1, "adam": 3 if group.get("amsgrad") else 2}[step.optimizer]
        return (step, states) if len(states) == wanted and ("step" in memories) == (kind is not SGD) else None

    def step(
        self,
        plan: tuple[Step, list[Tensor]],
        code: Tensor,
        weights: Tensor,
        memories: Mapping[str, Tensor],
        begins: bool,
    ) -> None:
        """Do what was planned.

        Raises:
            ValueError: If that is no code.

        """
        step, states = plan
        if isinstance(self._codec, TopKCodec):
            self._codec.check(code, weights.numel())
        if "step" in memories:
            if begins:
                for memory in memories.values():
                    memory.zero_()
            memories["step"].add_(1)
        shard_update(self._codec.name, code, weights, states, step, begins, self._values)


def _has_hooks(optimizer: Optimizer) -> bool:
    of_all = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return any(of_all) or any(own)


def _sgd(group: Mapping[str, Any], scale: float) -> Step:
    return Step(
        "sgd", float(group["lr"]) * scale, -1.0 if group.get("maximize") else 1.0, float(group["weight_decay"]),
        first=float(group["momentum"]), new_first=1.0 - float(group["dampening"]), nesterov=bool(group.get("nesterov")),
    )  # fmt: skip


def _adagrad(group: Mapping[str, Any], scale: float, number: float) -> Step:
    rate = float(group["lr"]) * scale / (1.0 + (number - 1.0) * float(group["lr_decay"]))
    sign = -1.0 if group.get("maximize") else 1.0
    return Step("adagrad", rate, sign, float(group["weight_decay"]), eps=float(group["eps"]))


def _adam(group: Mapping[str, Any], scale: float, number: float, decouples: bool) -> Step:
    rate, decay = float(group["lr"]) * scale, float(group["weight_decay"])
    first, second = (float(beta) for beta in group["betas"])
    return Step(
        "adam", rate / (1.0 - first**number), -1.0 if group.get("maximize") else 1.0, 0.0 if decouples else decay,
        1.0 - rate * decay if decouples else 1.0, first, 1.0 - first, second, 1.0 - second, float(group["eps"]),
        math.sqrt(1.0 - second**number),
    )  # fmt: skip
