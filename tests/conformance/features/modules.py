"""Modules: what users' networks are made of."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..cell import NUM_CLASSES, Cell, Classifier, Unlike, network, samples, warned, weights
from ..table import ASYNCHRONOUS, DDP, SANDBLASTER, STRATEGIES, feature

_UNUSED = "parameters that were not used in producing the loss"


@feature("BatchNorm: running statistics on every rank after each step")
def batch_norm(cell: Cell) -> dict[str, Any]:
    class Normalized(Classifier):
        def __init__(self) -> None:
            torch.manual_seed(2)
            net = network()
            net.insert(1, nn.BatchNorm2d(5))
            net.insert(4, nn.BatchNorm2d(8, momentum=None))
            super().__init__(net)
            self.statistics: list[Tensor] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.statistics += [buffer.double().sum() for buffer in self.buffers()]

    # Replicas keep statistics of their own, as under DDP: with equal samples in all of them these are one device's.
    trainer, module = cell.trainer(), Normalized()
    data = samples(16, cell.num_replicas)
    trainer.fit(module, cell.loader(data=data, batch=4 * cell.num_replicas), cell.loader(8))
    seen = torch.stack(module.statistics) if module.statistics else torch.empty(0)  # a rank may have had no batch
    return {"statistics": seen, **cell.after(trainer, module)}


_SYNC = "SyncBatchNorm (layers only work with GPU|expected input tensor to be on)"
_APART = "can't normalise over the batches of ranks that don't wait"


@feature(
    "sync_batchnorm on a CPU",
    errors={entry.name: _SYNC for entry in STRATEGIES if entry.num_replicas > 1}
    | {name: _APART for name in (*ASYNCHRONOUS, *SANDBLASTER) if name.endswith("workers")},
)
def sync_batch_norm(cell: Cell) -> dict[str, Any]:
    torch.manual_seed(2)
    net = network()
    net.insert(1, nn.BatchNorm2d(5))
    return cell.fit(Classifier(net), sync_batchnorm=True)


@feature("dropout: one device's masks on any columns, other masks in other replicas")
def dropout(cell: Cell) -> dict[str, Any]:
    torch.manual_seed(2)
    net = network()
    net.insert(2, nn.Dropout2d(0.3))
    net.insert(8, nn.Dropout(0.5))
    module = Classifier(net)
    if cell.num_replicas == 1:
        return {"observed": [cell.fit(module)]}
    cell.fit(module)
    mine = torch.cat([value.flatten() for value in weights(module).values()])
    assert torch.allclose(mine, cell.mean(mine.clone()), rtol=1e-12), "replicas parted"
    return {"observed": Unlike()}


@feature("frozen parameters")
def frozen(cell: Cell) -> dict[str, Any]:
    module = Classifier()
    for parameter in module.network[2].parameters():
        parameter.requires_grad_(False)
    before = module.network[2].weight.double().clone()
    observed = cell.fit(module)
    assert torch.equal(observed["weights"]["network.2.weight"], before)
    return observed


class Shared(nn.Module):
    """One layer twice, one weight in two layers, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.other = nn.Conv2d(6, 6, 3, padding=1)
        self.other.weight = self.twice.weight
        self.encode = nn.Linear(24, 9)
        self.head = nn.Linear(24, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.tanh(self.other(torch.tanh(self.twice(torch.tanh(self.twice(x))))))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        code = torch.tanh(self.encode(x))
        return self.head(F.linear(code, self.encode.weight.t()))


@feature("shared parameters")
def shared(cell: Cell) -> dict[str, Any]:
    torch.manual_seed(2)
    module = Classifier(Shared())
    observed = cell.fit(module)
    assert module.network.other.weight is module.network.twice.weight
    return observed


@feature("unused parameters", errors=dict.fromkeys((*DDP, "hybrid_parallel"), _UNUSED), late=(*DDP, "hybrid_parallel"))
def unused(cell: Cell) -> dict[str, Any]:
    class Unused(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

    return cell.fit(Unused())


class Swish(torch.autograd.Function):
    """A user's own function, with a gradient by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return x * torch.sigmoid(slope.view(1, -1, 1, 1) * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        wide = slope.view(1, -1, 1, 1)
        gate = torch.sigmoid(wide * x)
        return grad * (gate + wide * x * gate * (1 - gate)), (grad * x * x * gate * (1 - gate)).sum((0, 2, 3))


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.slope = nn.Parameter(torch.linspace(0.5, 2, 7))
        self.head = nn.Linear(7, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Swish.apply(self.conv(x), self.slope).mean((2, 3)))


@feature("a custom autograd.Function")
def custom_function(cell: Cell) -> dict[str, Any]:
    torch.manual_seed(2)
    return cell.fit(Classifier(WithFunction()))


@feature("gradient checkpointing")
def gradient_checkpointing(cell: Cell) -> dict[str, Any]:
    class Recomputing(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.network[:4], x, use_reentrant=False)
            x = checkpoint(self.network[4:7], x, use_reentrant=True)
            return self.network[7:](x)

    return cell.fit(Recomputing())


class Quiet(Classifier):
    """torch.compile can't follow Lightning's own ``self.log``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


@feature("torch.compile'd network")
def compiled_network(cell: Cell) -> dict[str, Any]:
    module = Quiet()
    module.network = torch.compile(module.network, backend="eager")  # type: ignore[assignment]
    return _fit_compiled(cell, module)


@feature("torch.compile'd LightningModule")
def compiled_module(cell: Cell) -> dict[str, Any]:
    return _fit_compiled(cell, torch.compile(Quiet(), backend="eager"))


def _fit_compiled(cell: Cell, module: Any) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            observed = cell.fit(module, max_epochs=1)
        if cell.shares_batches:
            assert warned(caught, "it runs uncompiled") == (cell.rank == 0)
        return observed
    finally:
        torch.compiler.reset()


@feature("deepcopy of the module while training")
def copied(cell: Cell) -> dict[str, Any]:
    class Copying(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            self.__dict__["teacher"] = copy.deepcopy(self.network).requires_grad_(False)

        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            if self.__dict__.get("teacher") is not None and self.training:
                loss = loss + F.mse_loss(self(batch[0]), self.__dict__["teacher"](batch[0] + 0.1))
            return loss

    return cell.fit(Copying())


@feature("recurrent and attention layers beside convolutions")
def kept_whole(cell: Cell) -> dict[str, Any]:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 6, batch_first=True)
            self.head = nn.Linear(6, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x)).mean(3).transpose(1, 2)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(2)
    return cell.fit(Classifier(Mixed()))


@feature("weight and spectral normalisation")
def parametrized(cell: Cell) -> dict[str, Any]:
    torch.manual_seed(2)
    net = network()
    nn.utils.parametrizations.weight_norm(net[2])
    nn.utils.parametrizations.spectral_norm(net[8])
    return cell.fit(Classifier(net))


@feature("module hooks, tensor hooks, register_post_accumulate_grad_hook")
def hooks(cell: Cell) -> dict[str, Any]:
    sums: list[Tensor] = []

    class Hooked(Classifier):
        def on_fit_start(self) -> None:
            conv = self.network[2]
            self.handles = [
                conv.register_forward_hook(lambda module, args, output: sums.append(output.detach().double().mean())),
                conv.register_full_backward_hook(lambda module, before, after: None),
                conv.weight.register_hook(lambda grad: grad * 0.5),
            ]

        def on_fit_end(self) -> None:
            for handle in self.handles:
                handle.remove()

    observed = cell.fit(Hooked())
    if not cell.entry.exact:
        return {"means": Unlike(), **observed}
    means = cell.mean(torch.stack([value.as_subclass(Tensor) for value in sums]))
    return {"means": means, **observed}


@feature("configure_model")
def configure_model(cell: Cell) -> dict[str, Any]:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.network, nn.Identity):
                torch.manual_seed(5)
                self.network = network()

    return cell.fit(Late())


@feature("lazy layers", errors={entry.name: "uninitialized parameters?" for entry in STRATEGIES[1:]})
def lazy(cell: Cell) -> dict[str, Any]:
    net = network()
    net[8] = nn.LazyLinear(7)
    return cell.fit(Classifier(net))
