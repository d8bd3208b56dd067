"""Who owns the masks of a training: keeps dead weights at 0 under any optimizer, and lets an algorithm move the masks.

A gradient is *cut* as soon as it is complete: what clipping and hooks see of it is that of live weights. What was cut
off is kept until the optimizer has stepped, or the gradient has been set to zero or to None. Where an algorithm reads
the momentum of dead weights, it is put back right before the optimizer computes, scaled as the live part was meanwhile
(clipped, unscaled), so that the optimizer's own momentum is dense. Otherwise the optimizer never sees it, and its state
of dead weights is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from .algorithms import SparseAlgorithm, Update
from .cuts import Cut, rescaled
from .layers import Layer, plain_name
from .parts import Parts

_BETA = 0.9  # of the momentum that is kept beside an optimizer without one
VERSION = 1


class MaskedTraining:
    """The masks of a training, and what there is to remember about it.

    There are none before :meth:`reset` or :meth:`load_state_dict`.

    Args:
        algorithm: Moves the masks.
        parameters: Those that can be sparse, by name.
        seed: Of the masks and of random growth; equal on all ranks.
        share: Makes a tensor what it is on the first rank, in place; None if there is one rank.
        progress: Tells the part of the training that is done.
        parts: What this rank holds of each weight; None for all of it.

    Example:
        >>> from squall.sparsity import Static
        >>> net = nn.Linear(4, 4)
        >>> training = MaskedTraining(Static(density=0.25), {"weight": net.weight}, seed=0)
        >>> training.reset()
        >>> int(training.masks["weight"].sum()), int(net.weight.count_nonzero())
        (4, 4)

    """

    def __init__(
        self,
        algorithm: SparseAlgorithm,
        parameters: Mapping[str, nn.Parameter],
        seed: int,
        share: Callable[[Tensor], object] | None = None,
        progress: Callable[[], float] = lambda: 0.0,
        parts: Parts | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.parameters = dict(parameters)
        self.masks: dict[str, Tensor] = {}
        self.num_steps: list[int] = []
        self.epoch = 0
        self.last_update = Update()
        self.num_grown = 0
        self._dead: dict[str, Tensor] = {}  # this rank's part, where weights are split
        self._momentum: dict[str, Tensor] = {}  # of optimizers that have none
        self._cuts: dict[str, Cut] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._share, self._progress = share, progress
        self._parts = Parts() if parts is None else parts
        self._optimizers: list[Optimizer] = []
        self._holders: dict[str, int] = {}  # which of the optimizers steps a layer
        self._handles: list[Any] = []
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def expect(self, num_epochs: int | None, hurried: bool = False) -> None:
        """Take note of how long the training is, for an algorithm that has phases.

        Args:
            num_epochs: Of the training.
            hurried: Whether it is only to be seen that it runs.

        """

    @torch.no_grad()
    def hold(self, parts: Parts | None) -> None:
        """Hold parts of weights from here on. All ranks call it, while what they have held is where it was.

        Args:
            parts: What this rank holds of each; None for all of each.

        """
        whole = {name: self._whole(self.parameters[name], value) for name, value in self._momentum.items()}
        self._parts = Parts() if parts is None else parts
        self._momentum = {name: self._parts.take(self.parameters[name], value) for name, value in whole.items()}
        self._dead = {name: self._parts.take(self.parameters[name], ~mask) for name, mask in self.masks.items()}

    def metrics(self) -> dict[str, float]:
        """What there is to log at the beginning of an epoch, beside densities."""
        return {"sparsity/prune_rate": self.last_update.prune_rate}

    # ------------------------------------------------------------------ masks

    def reset(self, trained: bool = False) -> None:
        """Begin with new masks.

        Args:
            trained: Whether the weights come from a training without masks.

        """
        weights = {name: self._whole(parameter, parameter) for name, parameter in self.parameters.items()}
        self._set(self.algorithm.first_masks(weights, self._generator, trained))
        self._momentum.clear()
        self.num_steps = [0] * len(self._optimizers)
        self.apply()

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        """Take masks over, the first rank's on all of them."""
        self.masks |= {name: mask.to(self.parameters[name].device) for name, mask in masks.items()}
        if self._share is not None and masks:
            flat = torch.cat([self.masks[name].flatten() for name in masks]).view(torch.uint8)
            self._share(flat)
            parts = flat.view(torch.bool).split([mask.numel() for mask in masks.values()])
            self.masks |= {name: part.view(masks[name].shape).clone() for name, part in zip(masks, parts, strict=True)}
        self._dead |= {name: self._parts.take(self.parameters[name], ~self.masks[name]) for name in masks}

    def _whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        return self._parts.gather(parameter, part.detach())

    def _change(self, masks: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
        """Take masks over in the middle of a training by optimizers that know the ones before."""
        self._set(masks)
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                optimizer.state.clear()  # its past directions are those of other masks
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set dead weights to 0, and their state in optimizers that have no use for it."""
        with self._parts.locally():
            for name, dead in self._dead.items():
                self.parameters[name].masked_fill_(dead, 0)
            for optimizer in self._optimizers:
                self._clear_state(optimizer)

    def masked_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A module's state with zeros where nothing lives, such as an average of weights of several masks.

        Args:
            state_dict: As the module has it.

        """
        masked = dict(state_dict)
        for key, value in state_dict.items():
            mask = self.masks.get(plain_name(key))
            if mask is not None and isinstance(value, Tensor) and value.shape == mask.shape:
                masked[key] = value.masked_fill(~mask.to(value.device), 0)
        return masked

    # ------------------------------------------------------------------ optimizers

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Have the masks respected by optimizers, until :meth:`detach`.

        Args:
            optimizers: Each one's layers trade weights among themselves.

        """
        self.detach()
        self._optimizers = list(optimizers)
        self._holders = {
            name: index
            for index, optimizer in enumerate(self._optimizers)
            for name in (self._names.get(id(p)) for group in optimizer.param_groups for p in group["params"])
            if name is not None
        }
        self.num_steps = (self.num_steps + [0] * len(self._optimizers))[: len(self._optimizers)]
        self._set(self.masks)
        for index, optimizer in enumerate(self._optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step(index)))
            if self.algorithm.reads:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    if name := self._names.get(id(parameter)):
                        with self._parts.locally():
                            self._handles.append(parameter.register_hook(self._before_gradient(name, parameter)))
        self.apply()

    def detach(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._cuts.clear()
        self._optimizers, self._holders = [], {}

    def _layers_of(self, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name in self.masks:
                    yield name, parameter, group

    def _feeds(self, group: Mapping[str, Any]) -> bool:
        """Whether an optimizer is to see the gradients of dead weights, for its momentum."""
        return "momentum" in self.algorithm.reads and (bool(group.get("momentum")) or "betas" in group)

    @torch.no_grad()
    def cut_gradients(self) -> None:
        """Set the gradients of dead weights to 0; called when a backward pass has completed them."""
        for index, optimizer in enumerate(self._optimizers):
            keep = self._reads_gradients(index)
            with self._parts.locally():
                for name, parameter, _ in self._layers_of(optimizer):
                    if parameter.grad is not None:
                        self._cut(name, parameter.grad, keep)

    def _reads_gradients(self, index: int) -> bool:
        reads, step = self.algorithm.reads, self.num_steps[index] + 1
        return ("momentum" in reads and step % self.algorithm.dense_every == 0) or (
            "gradient" in reads and self.algorithm.is_due(step, False, self._progress())
        )

    def wants_dense(self, name: str) -> bool:
        """Tell whether the gradient of dead weights will be read in the step that is being made.

        Args:
            name: Of a parameter.

        """
        index = self._holders.get(name)
        return index is None or self._reads_gradients(index)

    def _before_gradient(self, name: str, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def before_gradient(more: Tensor) -> None:
            """What was cut off belongs to the gradient that this one is added to, or to none that there is."""
            cut = self._cuts.get(name)
            if cut is None:
                return
            with self._parts.locally():
                if cut.is_over(parameter.grad) or cut.is_zeroed():
                    del self._cuts[name]
                else:
                    cut.grows = True

        return before_gradient

    def _cut(self, name: str, gradient: Tensor, keep: bool) -> None:
        dead, before = self._dead[name], self._cuts.pop(name, None)
        if not keep:
            gradient.masked_fill_(dead, 0)
            return
        off = gradient.masked_fill(~dead, 0)
        if before is not None and (before.grows or before.gradient is gradient):
            off += before.off
        gradient.masked_fill_(dead, 0)
        self._cuts[name] = Cut(gradient, off)

    def _cut_off(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What was cut off these layers, the same ones on all ranks."""
        return rescaled({name: self._cuts.get(name) for name in names}, self._parts.norms)

    def _before_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Have the last word before the optimizer computes: after its closure, if that is what computes gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._complete(optimizer)
            return None

        def closed(*arguments: Any) -> Any:
            result = closure(*arguments)
            self._complete(optimizer)
            return result

        return args[:1], {**kwargs, "closure": closed}

    @torch.no_grad()
    def _complete(self, optimizer: Optimizer) -> None:
        keep = self._reads_gradients(self._optimizers.index(optimizer))
        fed = []
        with self._parts.locally():
            for name, parameter, group in self._layers_of(optimizer):
                if self._feeds(group):
                    fed.append(name)
                gradient, cut = parameter.grad, self._cuts.get(name)
                if gradient is None:
                    self._cuts.pop(name, None)
                elif cut is None or cut.grows or cut.is_over(gradient):  # a backward pass that nobody announced
                    self._cut(name, gradient, keep)
                elif cut.is_zeroed() and bool(cut.norm > 0):
                    del self._cuts[name]
            for name, off in self._cut_off(fed if keep else ()).items():
                self._cuts[name].gradient.add_(off)
                self._cuts[name].is_fed = True

    def _after_step(self, index: int) -> Callable[..., None]:
        @torch.no_grad()
        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            with self._parts.locally():
                gradients = self._take_gradients(index, optimizer)
            self.num_steps[index] += 1
            if self.algorithm.is_due(self.num_steps[index], False, self._progress()):
                self._update(index, gradients)

        return after_step

    def _take_gradients(self, index: int, optimizer: Optimizer) -> dict[str, Tensor]:
        """Leave dead weights and their gradients at 0; returns what the gradients were, where that is kept."""
        gradients = {}
        layers = list(self._layers_of(optimizer))
        unfed = [name for name, _, group in layers if not self._feeds(group)]
        offs = self._cut_off(unfed if self._reads_gradients(index) else ())
        for name, parameter, _ in layers:
            dead, gradient, cut = self._dead[name], parameter.grad, self._cuts.pop(name, None)
            parameter.masked_fill_(dead, 0)
            if gradient is None:
                continue
            if cut is not None and not cut.is_over(gradient):
                complete = gradient + offs[name] if name in offs else gradient.clone()
                if "momentum" in self.algorithm.reads and _momentum_in(optimizer, parameter) is None:
                    self._momentum[name] = _BETA * self._momentum.get(name, 0) + complete
                gradients[name] = complete
            gradient.masked_fill_(dead, 0)
        return gradients

    def _clear_state(self, optimizer: Optimizer) -> None:
        for name, parameter, group in self._layers_of(optimizer):
            if self._feeds(group):
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # Rprop's step begins with the rate, and what is 0 stays 0.
                    first = float(group["lr"]) if key == "step_size" else 0.0
                    value.masked_fill_(self._dead[name], complex(first, first) if value.is_complex() else first)

    # ------------------------------------------------------------------ moving

    def end_epoch(self, epoch: int) -> None:
        """Move the masks between epochs, if it is time to.

        Args:
            epoch: The one that begins; nothing happens if it has begun before.

        """
        if epoch <= self.epoch:
            return
        self.epoch = epoch
        for index, num_steps in enumerate(self.num_steps):
            if num_steps and self.algorithm.is_due(num_steps, True, self._progress()):
                self._update(index, {})

    @torch.no_grad()
    def _update(self, index: int, gradients: Mapping[str, Tensor]) -> None:
        optimizer = self._optimizers[index]
        with self._parts.locally():
            layers, anything = self._gather_layers(optimizer, gradients)
        if layers and anything:  # a new optimizer has no momentum yet, and there is nothing to go by
            self.last_update = self.algorithm.update(layers, self.num_steps[index], self._progress())
            self.num_grown += self.last_update.num_grown
            self._change({layer.name: layer.mask for layer in layers}, [optimizer])
            with self._parts.locally():
                for name, parameter, _ in self._layers_of(optimizer):
                    if parameter.grad is not None:
                        parameter.grad.masked_fill_(self._dead[name], 0)

    def _gather_layers(self, optimizer: Optimizer, gradients: Mapping[str, Tensor]) -> tuple[list[Layer], bool]:
        """Layers as an algorithm sees them, whole; and whether there is anything of what it reads."""
        layers: list[Layer] = []
        anything = not self.algorithm.reads
        for name, parameter, _ in self._layers_of(optimizer):
            momentum = _momentum_in(optimizer, parameter)
            found = {
                "momentum": self._momentum.get(name) if momentum is None else momentum,
                "gradient": gradients.get(name),
            }
            anything |= any(found[signal] is not None for signal in self.algorithm.reads)
            signals = {
                signal: self._whole(parameter, _or_zeros(found[signal], parameter)) for signal in self.algorithm.reads
            }
            weight = self._whole(parameter, parameter)
            layers.append(Layer(name, weight, self.masks[name], signals, self._generator))
        return layers, anything

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to go on as if it had not been interrupted. All ranks must call it."""
        return {
            "version": VERSION,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "momentum": {
                name: self._whole(self.parameters[name], value).clone() for name, value in self._momentum.items()
            },
            "generator": self._generator.get_state(),
            "num_steps": list(self.num_steps),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Args:
            state: Of a training of the same layers.

        Raises:
            ValueError: It is of other layers, or of a newer version.

        """
        if state.get("version") != VERSION:
            raise ValueError(
                f"The checkpoint's masks are of version {state.get('version')}; this is version {VERSION}."
            )
        for name, mask in state["masks"].items():
            if name not in self.parameters or self.parameters[name].shape != mask.shape:
                raise ValueError(
                    f"The checkpoint has a mask for {name} of shape {tuple(mask.shape)}, and this training has no such"
                    " sparse layer. Give the Strategy the same `dense` layers, and the same model."
                )
        self.masks, self._dead = {}, {}
        self._set(state["masks"])
        self._momentum = {
            name: self._parts.take(self.parameters[name], value.to(self.parameters[name].device, copy=True))
            for name, value in state["momentum"].items()
        }
        self._generator.set_state(state["generator"].cpu())
        self.num_steps = list(state["num_steps"])
        self.epoch = state["epoch"]
        self.apply()


def _or_zeros(value: Tensor | None, parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if value is None else value


def _momentum_in(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor | None:
    """The momentum that an optimizer keeps; of Adam and its kin in units of its size, as its steps are."""
    state = optimizer.state.get(parameter, {})
    if isinstance(state.get("exp_avg"), Tensor):
        average: Tensor = state["exp_avg"]
        squares = state.get("exp_avg_sq")
        return average / (squares.sqrt() + 1e-8) if isinstance(squares, Tensor) else average
    buffer = state.get("momentum_buffer")
    return buffer if isinstance(buffer, Tensor) else None
