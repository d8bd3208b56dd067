"""Deep Compression's parts by hand: gradients of centroids, a step, masks that shrink, dropout, phases, patterns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from squall.sparsity import DeepCompression, find_layers
from squall.sparsity.clusters import Clusters, used
from squall.sparsity.compressing import CompressingTraining
from squall.sparsity.dropout import DropoutCorrection
from squall.sparsity.patterns import settings_of
from squall.sparsity.phases import Phase, plan_phases
from tests.sparsity.test_training import OPTIMIZERS, network


def training_of(net: nn.Module, optimizer: Optimizer, **options: Any) -> CompressingTraining:
    """An epoch of each: training, pruning, and sharing."""
    wanted: dict[str, Any] = {"density": None, "bits": 1, "train": 1, "retrain": 1, "share": 1, "num_rounds": 1}
    algorithm = DeepCompression(**{**wanted, **options})
    made = algorithm.new_training(net, find_layers(net), 0, None, lambda: 0.0)
    assert isinstance(made, CompressingTraining)
    made.expect(3)
    made.reset()
    made.attach([optimizer])
    return made


# ------------------------------------------------------------------ a step, by hand


class Row(nn.Module):
    """Four weights, whose gradients are what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 1.5, -1.0, 0.125]], dtype=torch.float64))

    def step(self, training: CompressingTraining, optimizer: Optimizer, gradient: list[float]) -> list[float]:
        optimizer.zero_grad()
        (self.weight * torch.tensor([gradient], dtype=torch.float64)).sum().backward()
        training.cut_gradients()
        optimizer.step()
        return [float(value) for value in self.weight.detach().flatten()]


def test_a_step_of_shared_values_by_hand() -> None:
    net = Row()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    training = training_of(net, optimizer, density=0.75, retrain_lr=1.0, share_lr=0.5, centroid_lr=0.2)
    net.step(training, optimizer, [0.0] * 4)
    training.end_epoch(1)
    assert training.masks["weight"].tolist() == [[True, True, True, False]]
    training.end_epoch(2)
    assert net.weight.tolist() == [[1.25, 1.25, -1.0, 0.0]], "the mean of each cluster"
    # C -= 0.1 * 0.5 * 0.2 * (1 + 2), and 0.1 * 0.5 * 0.2 * 4; the dead weight's gradient counts nowhere.
    first = net.step(training, optimizer, [1.0, 2.0, 4.0, 8.0])
    assert first == pytest.approx([1.25 - 0.03, 1.25 - 0.03, -1.0 - 0.04, 0.0])
    assert net.weight.grad is not None
    assert net.weight.grad.tolist() == [[3.0, 3.0, 4.0, 0.0]]
    # Momentum is of the sums: 0.5 * 3 + (1 + 0), 0.5 * 4 + 0.
    second = net.step(training, optimizer, [1.0, 0.0, 0.0, 8.0])
    assert second == pytest.approx([1.22 - 0.025, 1.22 - 0.025, -1.04 - 0.02, 0.0])
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(("kind", "factor"), [("sgd", 1 / 1.5), ("adam", 1.0), ("adagrad", 1.0), ("rmsprop", 1.0)])
def test_the_rate_of_shared_values_suits_the_optimizer(kind: str, factor: float) -> None:
    steps = []
    for centroid_lr in (None, factor):
        net = Row()
        optimizer = OPTIMIZERS[kind](net.parameters())
        training = training_of(net, optimizer, density=0.75, share_lr=1.0, centroid_lr=centroid_lr)
        training.end_epoch(2)
        steps.append(net.step(training, optimizer, [1.0, 2.0, 4.0, 8.0]))
    assert steps[0] == steps[1]
    assert steps[0][0] != 1.25


def test_what_the_optimizer_knew_of_single_weights_goes() -> None:
    net = Row()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    training = training_of(net, optimizer, density=0.75)
    net.step(training, optimizer, [1.0, 1.0, 1.0, 1.0])
    training.end_epoch(1)
    assert optimizer.state[net.weight]["momentum_buffer"].tolist() == [[1.0, 1.0, 1.0, 0.0]]
    training.end_epoch(2)
    assert not optimizer.state


def test_an_error_within_a_step_leaves_the_user_s_rate() -> None:
    net = Row()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    training = training_of(net, optimizer, density=0.75)
    training.end_epoch(2)

    def fail() -> float:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    assert optimizer.param_groups[0]["lr"] == 0.1


# ------------------------------------------------------------------ under any optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_and_state_are_shared_bit_for_bit_after_every_step(kind: str) -> None:
    net = network().float()
    optimizer = OPTIMIZERS[kind](net.parameters())
    training = training_of(net, optimizer, density=0.4, bits={"*": 2, "0": 3}, retrain_lr=1.0, share_lr=1.0)
    before: list[Tensor] = []
    for step in range(9):
        training.end_epoch(step // 3)

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(net, step)
            loss.backward()
            training.cut_gradients()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        assert training.phase.name == ("train", "prune", "share")[step // 3]
        if step < 6:
            continue
        for name, clusters in training.clusters.items():
            parameter = training.parameters[name]
            assert not parameter[~clusters.mask].any()
            shared = [parameter.detach()]
            shared += [v for v in optimizer.state.get(parameter, {}).values() if _is_like(v, parameter)]
            for value in shared:
                for code in range(len(clusters)):
                    assert len(value[clusters.mask][clusters.codes == code].unique()) == 1, (name, step)
        before.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    assert not torch.equal(before[0], before[-1])


def _loss(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 6, 6, generator=generator)
    return nn.functional.cross_entropy(net(x), torch.randint(3, (8,), generator=generator))


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


class Uneven(Optimizer):
    """Moves each weight, and keeps a number for it, as it pleases."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                ramp = torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter)
                parameter.data.add_(ramp)
                self.state[parameter]["seen"] = ramp.clone()


def test_an_optimizer_that_parts_weights_is_brought_back_to_the_mean() -> None:
    net = Row()
    optimizer = Uneven(net.parameters(), {"lr": 1.0})
    training = training_of(net, optimizer, density=0.75, share_lr=1.0, centroid_lr=1.0)
    training.end_epoch(2)
    assert net.step(training, optimizer, [1.0, 1.0, 1.0, 1.0]) == [1.25 + 0.5, 1.25 + 0.5, -1.0 + 2.0, 0.0]
    assert optimizer.state[net.weight]["seen"].tolist()[0][:3] == [0.5, 0.5, 2.0]


# ------------------------------------------------------------------ clusters


def test_the_mean_of_equal_doubles_is_that_double() -> None:
    weight = torch.full((1000,), 0.1, dtype=torch.float64)
    assert weight.sum() / 1000 != 0.1
    assert Clusters(weight > 0, torch.zeros(1000, dtype=torch.int64)).means(weight).tolist() == [0.1]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_clusters_sum_average_and_fill(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    mask = torch.rand(shape, generator=generator) < 0.7
    mask.view(-1)[0] = True
    _, codes = used(torch.zeros(4), torch.randint(4, (int(mask.sum()),), generator=generator))
    clusters = Clusters(mask, codes)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    if data.draw(st.booleans()):
        tensor = tensor.transpose(0, 2).contiguous().transpose(0, 2)  # other strides
    live, original = tensor[mask].double(), tensor.clone()
    for code, total in enumerate(clusters.sums(tensor).tolist()):
        assert total == pytest.approx(float(live[codes == code].sum()), abs=1e-9)
    clusters.tie(tensor)
    assert torch.equal(tensor[~mask], original[~mask])
    assert torch.equal(clusters.means(tensor)[codes], tensor[mask])
    again = tensor.clone()
    clusters.tie(again)
    assert torch.equal(again, tensor), "what is one value stays what it is"


# ------------------------------------------------------------------ pruning and dropout


@given(st.floats(0.001, 1.0), st.integers(1, 6), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_masks_only_shrink_and_arrive_at_the_density(density: float, num_rounds: int, seed: int) -> None:
    weight = nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)))
    plan = DeepCompression(density=density, bits=None).settle({"weight": weight})["weight"]
    mask = torch.ones_like(weight, dtype=torch.bool)
    for index in range(num_rounds):
        with torch.no_grad():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
            weight.masked_fill_(~mask, 0)
        smaller = plan.shrink(weight.detach(), mask, (index + 1) / num_rounds)
        assert not (smaller & ~mask).any()
        dropped = weight.abs()[mask & ~smaller]
        assert not len(dropped) or dropped.max() <= weight.abs()[smaller].min()
        mask = smaller
    assert int(mask.sum()) == max(1, round(density * 600))


def test_what_is_dead_does_not_come_back_for_a_live_weight_that_is_zero() -> None:
    weight = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    plan = DeepCompression(density=0.5, bits=None).settle({"w.weight": weight})["w.weight"]
    mask = torch.tensor([False, True, True, True])
    assert plan.shrink(weight.detach(), mask, 1.0).tolist() == [False, True, False, True]


def test_masks_that_are_loaded_have_their_dropout() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    training = training_of(net, optimizer, density=0.25)
    training.end_epoch(1)
    state = training.state_dict()
    training.reset()
    training.attach([optimizer])
    assert net[0].p == 0.5
    training.load_state_dict(state)
    assert net[0].p == 0.25


def test_dropout_goes_with_the_layer_that_it_feeds() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.4), nn.ReLU(), nn.Linear(4, 4), nn.Sequential(nn.Dropout2d(0.2)), nn.Linear(4, 4),
        nn.Dropout(0.1),
    )  # fmt: skip
    correction = DropoutCorrection(net, find_layers(net))
    masks = {
        "0.weight": torch.ones(4, 4, dtype=torch.bool),
        "3.weight": torch.eye(4, dtype=torch.bool),
        "5.weight": torch.tensor([[True] * 2 + [False] * 2] * 4),
    }
    correction.apply(masks)
    found = [child.p for child in net.modules() if isinstance(child, (nn.Dropout, nn.Dropout2d))]
    assert found == pytest.approx([0.4 * math.sqrt(4 / 16), 0.2 * math.sqrt(8 / 16), 0.1 * math.sqrt(8 / 16)])
    correction.undo()
    assert [child.p for child in net.modules() if isinstance(child, (nn.Dropout, nn.Dropout2d))] == [0.4, 0.2, 0.1]


# ------------------------------------------------------------------ phases and patterns


@given(
    st.integers(1, 200), st.one_of(st.none(), st.integers(0, 20), st.floats(0.01, 0.4)),
    st.one_of(st.integers(5, 60), st.floats(0.01, 0.99)), st.one_of(st.integers(1, 20), st.floats(0.01, 0.99)),
    st.integers(1, 5), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_phases_fill_the_training_and_none_is_empty(
    num_epochs: int, train: Any, retrain: Any, share: Any, num_rounds: int, trained: bool
) -> None:
    try:
        phases = plan_phases(num_epochs, train, retrain, share, num_rounds, trained)
    except ValueError as error:
        needed = int(str(error).split("max_epochs=")[1].split()[0])
        assert needed > num_epochs
        return
    begins = [phase.epoch for phase in phases]
    assert begins[0] == 0
    assert all(one < other for one, other in zip(begins, [*begins[1:], num_epochs], strict=True))
    names = [phase.name for phase in phases]
    assert names[-num_rounds - 1 :] == ["prune"] * num_rounds + ["share"]
    assert names[: -num_rounds - 1] in ([], ["train"])
    assert not trained or names[0] == "prune"
    if isinstance(share, int):
        assert num_epochs - begins[-1] == share
    if isinstance(train, int) and train and not trained:
        assert phases[1].epoch == train


def test_what_is_left_of_a_trained_net_s_epochs_goes_to_the_last_round() -> None:
    phases = plan_phases(10, None, 4, 2, 2, trained=True)
    assert phases == [Phase("prune", 0, 1), Phase("prune", 2, 2), Phase("share", 8)]
    assert plan_phases(10, 3, 4, 2, 2)[-1] == Phase("share", 8)


def test_patterns() -> None:
    layers = ["model.conv1", "model.conv2", "model.fc1", "model.fc10"]
    wanted = {"*": 1, "conv*": 2, "fc1": 3, "model.conv2": None}
    assert settings_of(layers, wanted, "bits") == {"model.conv1": 2, "model.fc1": 3, "model.fc10": 1}
    with pytest.raises(ValueError, match=r"bits=.*no layer is called 'fc2'. There are: model.conv1, "):
        settings_of(layers, {"fc2": 1}, "bits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0"), ({"density": {"a": 1.5}}, "density=1.5 of 'a'"),
        ({"density": True}, "density"),
        ({"density": float("nan")}, "density=nan"), ({"bits": 0}, "bits=0"), ({"bits": 17}, "bits=17"),
        ({"bits": {"a": 2.5}}, "bits=2.5 of 'a'"), ({"sensitivity": -1.0}, "sensitivity=-1.0"),
        ({"num_rounds": 0}, "num_rounds=0"), ({"train": -1}, "train=-1"), ({"train": 1.0}, "train=1.0"),
        ({"retrain": 2, "num_rounds": 3}, "retrain=2"), ({"retrain": None}, "retrain"), ({"share": 0}, "share=0"),
        ({"retrain_lr": -0.1}, "retrain_lr=-0.1"), ({"centroid_lr": "x"}, "centroid_lr='x'"),
        ({"coder": "zip"}, "coder"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepCompression(**options)
