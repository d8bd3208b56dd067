"""Sparse inference: the same answers, layers chosen by what was measured, and ReLUs made part of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squall.models import AlexNet, ImageClassifier, LeNet5
from squall.sparsity import InferenceReport, inference, to_inference
from squall.sparsity.sparse_layers import MaxPool2d, SparseConv2d, SparseLinear


def pruned(module: nn.Module, density: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            parameter.data *= torch.rand(parameter.shape, generator=generator) < density
    return module


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that can be sparse was faster so."""
    monkeypatch.setattr(inference, "_time", lambda ways, x, num_runs: [[2.0], [1.0]][: len(ways)])


class Odd(nn.Module):
    """All kinds of layers, used in all kinds of ways."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 6, 3, padding="same")
        self.lopsided = nn.Conv2d(6, 6, 2, padding="same")
        self.reflecting = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 9, 3, stride=2, groups=3, bias=False)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.norm = nn.BatchNorm2d(9)
        self.attention = nn.MultiheadAttention(9, 3)
        self.twice = nn.Linear(9, 9)
        self.part = nn.Sequential(nn.Linear(9, 20), nn.Dropout(), nn.ReLU(), nn.Linear(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.lopsided(self.same(x)))
        x = self.norm(self.pool(self.grouped(self.reflecting(x)).relu()))
        x = x.flatten(2).permute(2, 0, 1)
        x = self.attention(x, x, x)[0].mean(0)
        return self.part(self.twice(self.twice(x)).relu())


NETS: list[tuple[Any, tuple[int, ...]]] = [  # and the shape of what each is given
    (lambda: AlexNet(num_classes=5, image_size=32, width=0.1, in_channels=1), (3, 1, 32, 32)),
    (LeNet5, (2, 1, 28, 28)),
    (lambda: ImageClassifier(LeNet5()), (1, 1, 28, 28)),
    (Odd, (2, 3, 9, 12)),
]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("net", "shape"), [*NETS, (lambda: nn.Linear(7, 3), (4, 5, 7))])
def test_the_same_answers(net: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = pruned(net()).eval()
    x = torch.randn(shape)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fast = to_inference(module, x, show=False)
    torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
    assert any(isinstance(part, SparseConv2d | SparseLinear) for part in fast.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "it stays as it is"
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    again = to_inference(module, (x,), show=False)
    again.load_state_dict(fast.state_dict())
    assert torch.equal(again(x), fast(x))


@pytest.mark.usefixtures("always")
def test_what_cant_be_sparse_stays() -> None:
    fast = to_inference(pruned(Odd()), torch.randn(2, 3, 9, 12), show=False)
    kinds = {row.name: row.is_sparse for row in fast.inference_report}
    assert kinds == {
        "same": True, "lopsided": False, "reflecting": False, "grouped": True, "twice": True, "part.0": True,
        "part.3": True,
    }  # fmt: skip
    assert math.isnan(next(row.sparse_ms for row in fast.inference_report if row.name == "lopsided"))
    assert isinstance(fast.pool, MaxPool2d)
    assert type(fast.attention.out_proj) is not SparseLinear


@pytest.mark.usefixtures("always")
def test_relus_become_part_of_sparse_layers() -> None:
    fast = to_inference(
        pruned(nn.Sequential(nn.Linear(9, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2))), torch.ones(1, 9)
    )
    relus = [part.relu for part in fast.modules() if isinstance(part, SparseLinear)]
    assert relus == [True, False]
    assert not any(isinstance(part, nn.ReLU | nn.Dropout) for part in fast.modules())


def test_relus_work_in_place_behind_dense_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_time", lambda ways, x, num_runs: [[1.0], [2.0]][: len(ways)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.watched, self.again = (nn.Linear(6, 6) for _ in range(4))
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.first(self.relu(x)))  # what a user gives stays as it is
            y = self.second(x)
            x = self.watched(y.relu() + y).relu()  # whose input is needed once more
            return F.relu(self.again(F.relu(self.again(x))))

    shown = []
    net = Net().eval()
    net.watched.register_forward_hook(lambda layer, given, result: shown.append(result))
    x = torch.randn(5, 6)
    given = x.clone()
    expected = net(x)
    fast = to_inference(net, x, show=False)
    assert torch.equal(fast(x), expected)
    assert torch.equal(x, given)
    assert (shown[-1] < 0).any(), "a hook keeps what it was shown"
    in_place = [str(node.args[0]) for node in fast.graph.nodes if node.target is torch.relu_]
    assert in_place == ["first", "again", "again_1"]


def test_dense_convolutions_of_few_channels_are_measured() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 8, 3, padding=1), nn.Flatten(), nn.Linear(800, 4)
    ).eval()
    x = torch.randn(2, 3, 10, 10)
    fast = to_inference(net, x, show=False)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert [math.isnan(row.sparse_ms) for row in fast.inference_report] == [False, True, True]


def test_the_faster_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[[1.0], [2.0]], [[2.0], [1.0]]])
    monkeypatch.setattr(inference, "_time", lambda ways, x, num_runs: next(times))
    net = pruned(nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2)))
    fast = to_inference(net, torch.ones(1, 9), show=False)
    assert [type(part) for part in fast] == [nn.Linear, nn.Tanh, SparseLinear]
    report = fast.inference_report
    assert isinstance(report, InferenceReport)
    assert [(row.name, row.dense_ms, row.sparse_ms) for row in report] == [("0", 1000.0, 2000.0), ("2", 2000.0, 1000.0)]
    assert report[0].dense_flops == 2 * 72
    assert report[0].density == pytest.approx(int(net[0].weight.count_nonzero()) / 72)
    assert "all as they run" in str(report)


def test_it_is_really_measured() -> None:
    net = pruned(nn.Sequential(nn.Linear(2000, 2000), nn.Linear(2000, 10)), 0.01)
    net[1].weight.data.fill_(1.0)
    report = to_inference(net, torch.ones(1, 2000), show=False).inference_report
    assert 0 < report[0].sparse_ms < 100
    assert 0 < report[0].dense_ms < 1000
    assert math.isnan(report[1].sparse_ms), "nothing to gain where all weights live"


def test_few_values_are_a_codebook() -> None:
    layer = pruned(nn.Linear(300, 40), 0.2)
    assert SparseLinear.from_dense(layer).packed.codes is None
    layer.weight.data = layer.weight.data.mul(10).round().div(10)
    shared = SparseLinear.from_dense(layer)
    assert shared.packed.codes is not None
    x = torch.randn(3, 300)
    torch.testing.assert_close(shared(x), layer(x), rtol=1e-5, atol=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_runs=0"):
        to_inference(nn.Linear(2, 2), torch.ones(1, 2), num_runs=0)


@pytest.mark.usefixtures("always")
def test_in_inference_mode() -> None:
    with torch.inference_mode():
        net, x = pruned(nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 3))), torch.randn(2, 2, 4, 4)
        fast = to_inference(net, x, show=False)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert isinstance(fast[0], SparseConv2d)
