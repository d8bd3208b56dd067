"""A training of Deep Compression: masks that shrink from phase to phase, and values that weights share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .clusters import Clusters, used
from .deep_compression import DeepCompression
from .dropout import DropoutCorrection
from .layers import layer_name, plain_name
from .phases import Phase, all_at_once
from .sharing import share_weights
from .training import MaskedTraining

# Where optimizers keep the size of gradients, by which they divide.
_SIZES = ("exp_avg_sq", "exp_inf", "square_avg", "sum", "row_var")
_NUM_BINS = 200


class FirstValues(NamedTuple):
    """What a layer was when its weights began to share values, for pictures.

    Args:
        counts: How many weights fell into each of equal intervals.
        low: The smallest weight.
        high: The largest.
        centroids: The values that they began with.

    """

    counts: Tensor
    low: float
    high: float
    centroids: Tensor

    @classmethod
    def of(cls, values: Tensor, centroids: Tensor) -> FirstValues:
        """Count weights.

        Args:
            values: The live ones.
            centroids: What they become.

        """
        values = values.detach().double().cpu()
        low, high = float(values.min()), float(values.max())
        return cls(torch.histc(values, _NUM_BINS, low, high), low, high, centroids.detach().cpu().clone())


class CompressingTraining(MaskedTraining):
    """The masks, the shared values and the phases of a training.

    Args:
        algorithm: What is to be done.
        parameters: Those that can be pruned, by name.
        seed: As of every masked training; nothing is random here.
        share: Makes a tensor what it is on the first rank, in place; None if there is one rank.
        progress: Tells the part of the training that is done.
        module: Whose dropout is corrected.

    Raises:
        ValueError: What is to be done doesn't suit the layers.

    """

    algorithm: DeepCompression

    def __init__(
        self,
        algorithm: DeepCompression,
        parameters: Mapping[str, nn.Parameter],
        seed: int,
        share: Callable[[Tensor], object] | None,
        progress: Callable[[], float],
        module: nn.Module,
    ) -> None:
        super().__init__(algorithm, parameters, seed, share, progress)
        self.clusters: dict[str, Clusters] = {}
        self.phases: list[Phase] = []
        self.num_begun = 0
        self.first_values: dict[str, FirstValues] = {}
        self._plans = algorithm.settle(parameters)
        self._dropout = DropoutCorrection(module, parameters if algorithm.dropout else {})
        self._num_epochs = 0
        self.hurried = False
        self._lrs: dict[int, list[Any]] = {}  # of optimizers that are stepping
        self._before: dict[str, Tensor] = {}  # values before the step

    # ------------------------------------------------------------------ phases

    @property
    def phase(self) -> Phase:
        """The one that has begun last."""
        return self.phases[self.num_begun - 1] if self.num_begun else Phase("train", 0)

    @property
    def is_complete(self) -> bool:
        """Whether the last phase has begun."""
        return self.num_begun == len(self.phases)

    def expect(self, num_epochs: int | None, hurried: bool = False) -> None:
        """Take note of how long the training is, and refuse one that is too short for its phases.

        Args:
            num_epochs: Of the training.
            hurried: Whether all phases begin at once, to see that they run.

        Raises:
            ValueError: It is too short, or nobody knows.

        """
        if num_epochs is None or num_epochs < 1:
            raise ValueError(f"{self.algorithm} has phases of whole epochs: give the Trainer max_epochs.")
        self._num_epochs, self.hurried = num_epochs, hurried
        last = self.phases[-1].epoch if self.phases else 0
        if last >= num_epochs:
            raise ValueError(
                f"The checkpoint's last phase begins with epoch {last}, and the training ends before it: give the"
                f" Trainer max_epochs={last + 1} or more."
            )

    def reset(self, trained: bool = False) -> None:
        """Begin with all weights, and lay the phases out.

        Args:
            trained: Whether the weights come from another training.

        """
        num_epochs = max(self._num_epochs, 1 << 20) if self.hurried else self._num_epochs
        phases = self.algorithm.plan(num_epochs, trained)
        self.phases = all_at_once(phases) if self.hurried else phases
        self.num_begun = 0
        self.clusters.clear()
        super().reset(trained)

    def end_epoch(self, epoch: int) -> None:
        """Begin the phases that begin with an epoch.

        Args:
            epoch: The one that begins; nothing happens if it has begun before.

        """
        self.epoch = max(self.epoch, epoch)
        while not self.is_complete and self.phases[self.num_begun].epoch <= epoch:
            phase = self.phases[self.num_begun]
            self.num_begun += 1
            if phase.name == "prune":
                self._prune(phase.round / self.algorithm.num_rounds)
            elif phase.name == "share":
                self._share_weights()

    @torch.no_grad()
    def _prune(self, part: float) -> None:
        masks = {}
        for name, plan in self._plans.items():
            weight = self.parameters[name].detach()
            if not bool(weight.isfinite().all()):
                raise ValueError(f"A weight of {layer_name(name)} isn't finite: the training has diverged.")
            masks[name] = plan.shrink(weight, self.masks[name], part)
        self._change(masks, self._optimizers)
        self._dropout.apply(self.masks)

    @torch.no_grad()
    def _share_weights(self) -> None:
        for name, plan in self._plans.items():
            if plan.bits is None:
                continue
            try:
                shared = share_weights(self.parameters[name], plan.bits, self.masks[name])
            except ValueError as error:
                raise ValueError(f"{layer_name(name)}: {error}") from None
            assignments, centroids = shared.assignments.contiguous(), shared.centroids.contiguous()
            if self._share is not None:
                self._share(assignments)
                self._share(centroids)
            centroids, codes = used(centroids, assignments)
            self.clusters[name] = Clusters(self.masks[name], codes)
            self.first_values[name] = FirstValues.of(self.parameters[name][self.masks[name]], centroids)
            self.clusters[name].fill(self.parameters[name], centroids)
        for optimizer in self._optimizers:
            optimizer.state.clear()  # what it knows is about weights of their own

    def metrics(self) -> dict[str, float]:
        """What there is to log at the beginning of an epoch."""
        phase = self.phase
        return {
            "compression/phase": float(phase.number),
            "compression/round": float(phase.round),
            "compression/lr_factor": self.algorithm.lr_factor(phase),
        }

    # ------------------------------------------------------------------ weights

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Have masks, shared values and factors of learning rates respected by optimizers, until :meth:`detach`."""
        super().attach(optimizers)
        self._dropout.apply(self.masks)

    def detach(self) -> None:
        """Leave the optimizers and the dropout alone."""
        super().detach()
        self._dropout.undo()

    @torch.no_grad()
    def apply(self) -> None:
        """Set dead weights to 0, and those that share a value to one."""
        super().apply()
        for name, clusters in self.clusters.items():
            clusters.tie(self.parameters[name])

    def masked_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """As always; an average of weights has shared values too.

        Args:
            state_dict: As the module has it.

        """
        masked = super().masked_state_dict(state_dict)
        for key, value in masked.items():
            clusters = self.clusters.get(plain_name(key))
            if clusters is not None and isinstance(value, Tensor) and value.shape == clusters.mask.shape:
                masked[key] = value.clone()
                Clusters(clusters.mask.to(value.device), clusters.codes).tie(masked[key])
        return masked

    # ------------------------------------------------------------------ steps

    def _before_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        factor = self.algorithm.lr_factor(self.phase)
        self._lrs[id(optimizer)] = [group.get("lr") for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if factor != 1.0 and group.get("lr") is not None:
                group["lr"] = group["lr"] * factor
        for name, parameter, _ in self._layers_of(optimizer):
            if name in self.clusters:
                self._before[name] = self.clusters[name].means(parameter.detach()).double()
        changed = super()._before_step(optimizer, args, kwargs)
        if changed is None:
            return None
        arguments, options = changed
        closure = options["closure"]

        def closed(*values: Any) -> Any:
            try:
                return closure(*values)
            except BaseException:
                self._restore_lr(optimizer)  # a checkpoint of what went wrong has the user's rates
                raise

        return arguments, {**options, "closure": closed}

    def _restore_lr(self, optimizer: Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._lrs.pop(id(optimizer), []), strict=False):
            if lr is not None:
                group["lr"] = lr

    @torch.no_grad()
    def _complete(self, optimizer: Optimizer) -> None:
        """Replace each weight's gradient by the sum of those that share its value."""
        super()._complete(optimizer)
        gradients = {
            name: parameter.grad
            for name, parameter, _ in self._layers_of(optimizer)
            if name in self.clusters and parameter.grad is not None
        }
        if not gradients:
            return
        sums = torch.cat([self.clusters[name].sums(gradient) for name, gradient in gradients.items()])
        if self._share is not None:
            self._share(sums)  # a device may add in another order each time
        parts = sums.split([len(self.clusters[name]) for name in gradients])
        for (name, gradient), part in zip(gradients.items(), parts, strict=True):
            self.clusters[name].fill(gradient, part)

    def _after_step(self, index: int) -> Callable[..., None]:
        after = super()._after_step(index)

        @torch.no_grad()
        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._restore_lr(optimizer)
            after(optimizer, args, kwargs)
            for name, parameter, _ in self._layers_of(optimizer):
                if name in self.clusters:
                    self._move(name, parameter, optimizer.state.get(parameter, {}))

        return after_step

    def _move(self, name: str, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Let shared values go a part of the way that the optimizer took them."""
        clusters, before = self.clusters[name], self._before.pop(name)
        factor = self.algorithm.centroid_lr
        if factor is None:
            factor = 1.0 if any(key in state for key in _SIZES) else 1.0 / clusters.mean_count
        after = clusters.means(parameter).double()
        clusters.fill(parameter, after if factor == 1.0 else before + factor * (after - before))
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                clusters.tie(value)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to go on as if it had not been interrupted."""
        return super().state_dict() | {
            "phases": [list(phase) for phase in self.phases],
            "num_begun": self.num_begun,
            "first_values": {name: list(values) for name, values in self.first_values.items()},
            "codes": {name: _small(clusters.codes, len(clusters)) for name, clusters in self.clusters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Args:
            state: Of a training of the same layers.

        Raises:
            ValueError: It is of other layers, of another algorithm or a newer version, or its phases are longer than
                this training.

        """
        if "phases" not in state:
            raise ValueError("The checkpoint is of another sparse training: it has masks, and no phases.")
        self.clusters.clear()
        self.first_values = {name: FirstValues(*values) for name, values in state["first_values"].items()}
        self.phases = [Phase(*phase) for phase in state["phases"]]
        self.num_begun = state["num_begun"]
        self.expect(self._num_epochs, self.hurried)
        super().load_state_dict(state)
        for name, codes in state["codes"].items():
            self.clusters[name] = Clusters(self.masks[name], codes)
        self._dropout.apply(self.masks)


def _small(codes: Tensor, num_codes: int) -> Tensor:
    return codes.to(torch.uint8 if num_codes <= 1 << 8 else torch.int32)
