"""Optimizers, schedulers, gradients."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

from ..cell import Cell, Classifier, network, warned
from ..table import ASYNCHRONOUS, DDP, SANDBLASTER, STRATEGIES, feature

_FIND_UNUSED = "parameters that were not used in producing the loss"


_CLIPPED = dict.fromkeys(SANDBLASTER, "gradient_clip_val|configure_gradient_clipping clips")
_BY_HAND = dict.fromkeys(SANDBLASTER, "automatic_optimization=False")


@feature("clip by norm", errors=_CLIPPED)
def clip_by_norm(cell: Cell) -> dict[str, Any]:
    norms: list[float] = []

    class Clipped(Classifier):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            if grads:
                norms.append(float(nn.utils.get_total_norm(grads)))

    observed = cell.fit(Clipped(lr=1.0), gradient_clip_val=0.05)
    assert norms or not cell.entry.exact  # a rank may have had one batch
    assert max(norms, default=0.05) <= 0.05 * (1 + 1e-9)
    assert min(norms, default=0.05) > 0.0499, "nothing was clipped"
    return {**observed, "norms": norms}


@feature("clip by value", errors=_CLIPPED)
def clip_by_value(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(lr=1.0), gradient_clip_val=0.003, gradient_clip_algorithm="value")


@feature("configure_gradient_clipping", errors=_CLIPPED)
def own_clipping(cell: Cell) -> dict[str, Any]:
    class Own(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.02, gradient_clip_algorithm="norm")

    return cell.fit(Own(lr=1.0))


@feature("grad_norm utility")
def logged_norms(cell: Cell) -> dict[str, Any]:
    class Logging(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(grad_norm(self, norm_type=2), on_step=True)

    return cell.fit(Logging())


@feature("manual optimization, clip_grad_norm_ by hand", errors=_BY_HAND)
def manual(cell: Cell) -> dict[str, Any]:
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            total = nn.utils.clip_grad_norm_(self.parameters(), 0.05, foreach=True)
            self.log("norm", total)
            optimizer.step()

    return cell.fit(Manual(lr=1.0))


@feature("manual optimization that accumulates", errors=_BY_HAND)
def manual_accumulation(cell: Cell) -> dict[str, Any]:
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    return cell.fit(Manual())


@feature("several optimizers", errors=_BY_HAND)
def several_optimizers(cell: Cell) -> dict[str, Any]:
    class Several(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step()
            if batch_idx % 2:
                second.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.network[:6].parameters(), lr=0.1, momentum=0.9),
                torch.optim.AdamW(self.network[6:].parameters(), lr=0.01),
            ]

    return cell.fit(Several())


@feature("optimizers in turn (toggle_optimizer)", errors={**dict.fromkeys(DDP, _FIND_UNUSED), **_BY_HAND}, late=DDP)
def toggled_optimizers(cell: Cell) -> dict[str, Any]:
    class Toggled(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(half.parameters(), lr=0.1) for half in (self.network[:6], self.network[6:])]

    return cell.fit(Toggled())


@feature("parameter groups")
def parameter_groups(cell: Cell) -> dict[str, Any]:
    class Groups(Classifier):
        def configure_optimizers(self) -> Any:
            decayed = [p for p in self.parameters() if p.ndim > 1]
            rest = [p for p in self.parameters() if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 0.02}]
            return torch.optim.Adam(groups, lr=0.01)

    return cell.fit(Groups())


class _Scheduled(Classifier):
    def scheduler(self, optimizer: Any) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


@feature("ReduceLROnPlateau")
def plateau(cell: Cell) -> dict[str, Any]:
    class Plateau(_Scheduled):
        def scheduler(self, optimizer: Any) -> Any:
            reduce = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, factor=0.5)
            return {"scheduler": reduce, "monitor": "val_loss"}

    module = Plateau()
    observed = cell.fit(module, max_epochs=4)
    rate = module.trainer.optimizers[0].param_groups[0]["lr"]
    assert rate < 0.1
    return {**observed, "rate": rate}


@feature("OneCycle")
def one_cycle(cell: Cell) -> dict[str, Any]:
    class OneCycle(_Scheduled):
        def scheduler(self, optimizer: Any) -> Any:
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
            return {"scheduler": cycle, "interval": "step"}

    return cell.fit(OneCycle())


@feature("scheduler a step, scheduler an epoch")
def schedulers(cell: Cell) -> dict[str, Any]:
    class Both(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return [optimizer], [{"scheduler": step, "interval": "step"}, epoch]

    module = Both()
    observed = cell.fit(module)
    return {**observed, "rate": module.trainer.optimizers[0].param_groups[0]["lr"]}


# Without locks, only elements can be stepped one by one.
_HOGWILD = {entry.name: "does not treat every element" for entry in STRATEGIES if entry.strategy == "hogwild"}


@feature(
    "L-BFGS",
    tolerance=1e-7,
    errors=dict.fromkeys(
        (*ASYNCHRONOUS, "sparse_ddp"), "LBFGS (asks for the loss|does not treat every|searches along)"
    ),
    wrong={"ddp": "each replica searches along its own loss, and they part"},
)
def lbfgs(cell: Cell) -> dict[str, Any]:
    class Whole(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.2, max_iter=4, line_search_fn="strong_wolfe")

    return cell.fit(Whole(), max_epochs=1)


@feature("Adafactor", errors=_HOGWILD, tolerance=1e-7)
def adafactor(cell: Cell) -> dict[str, Any]:
    class Factored(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adafactor(self.parameters(), lr=0.05)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observed = cell.fit(Factored())
    assert warned(caught, "gathers the split weights") == (cell.splits_weights and cell.rank == 0)
    return observed


class Normalized(torch.optim.Optimizer):
    """A user's own: each tensor moves by its gradient over the gradient's norm."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.mul_(0.5).add_(parameter.grad / (parameter.grad.norm() + 1e-3))
                    parameter.sub_(group["lr"] * momentum)
        return loss


@feature("a user's own optimizer, not elementwise", errors=_HOGWILD)
def own_optimizer(cell: Cell) -> dict[str, Any]:
    class Own(Classifier):
        def configure_optimizers(self) -> Any:
            return Normalized(self.parameters(), lr=0.05)

    return cell.fit(Own())


@feature("weight penalty over self.parameters()")
def weight_penalty(cell: Cell) -> dict[str, Any]:
    class Penalized(Classifier):
        def loss(self, batch: Any) -> Tensor:
            squares = sum(p.square().sum() for p in self.parameters())
            largest = torch.stack([p.abs().max() for p in self.parameters()]).sum()
            flat = torch.cat([p.flatten() for p in self.parameters()]).norm(1)
            return super().loss(batch) + 0.01 * squares + 0.01 * largest + 0.001 * flat

    return cell.fit(Penalized())


@feature("gradient penalty (double backward)")
def gradient_penalty(cell: Cell) -> dict[str, Any]:
    class Penalized(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            output = self(x).square().mean(1).sum()
            (grad,) = torch.autograd.grad(output, x, create_graph=True)
            penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
            return self.loss(batch) + penalty

    net = network()
    for index in (1, 6):  # a penalty on a piecewise linear function would not reach all weights
        net[index] = nn.Tanh()
    return cell.fit(Penalized(net))


@feature("detect_anomaly")
def detect_anomaly(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), detect_anomaly=True, max_epochs=1)


@feature("bf16-mixed", tolerance=0.05)
def bf16_mixed(cell: Cell) -> dict[str, Any]:
    observed = cell.fit(Classifier(), precision="bf16-mixed")
    return {**observed, "dtypes": sorted({str(value.dtype) for value in observed["weights"].values()})}


@feature("bf16-true", tolerance=0.1, errors=dict.fromkeys(SANDBLASTER, "of torch.bfloat16, in which"))
def bf16_true(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(lr=0.02), precision="bf16-true", max_epochs=1)


@feature("32-true", tolerance=1e-4)
def single_precision(cell: Cell) -> dict[str, Any]:
    return cell.fit(Classifier(), precision="32-true")


@feature("16-mixed on a CPU: Lightning warns and uses bf16", tolerance=0.05)
def fp16_on_cpu(cell: Cell) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observed = cell.fit(Classifier(), precision="16-mixed", max_epochs=1)
    assert warned(caught, "fp16 is not supported on CPU") or cell.rank
    return observed
