"""Masks under optimizers: dead weights stay at 0, algorithms see what they read, and all of it can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from squall.sparsity import SET, MaskedTraining, RigL, SparseAlgorithm, SparseMomentum, Static, find_layers

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.2, max_iter=4, line_search_fn="strong_wolfe"),
}
OWN_MOMENTUM = ("momentum", "nesterov", "adam", "amsgrad", "adamw", "adamax", "foreach", "fused")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    return net.double()


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
    return F.cross_entropy(net(x), torch.randint(3, (8,), generator=generator))


def train(
    algorithm: SparseAlgorithm,
    optimizer: str = "momentum",
    num_steps: int = 12,
    state: dict[str, Any] | None = None,
    after: Callable[[MaskedTraining, Optimizer, int], None] | None = None,
) -> tuple[nn.Module, Optimizer, MaskedTraining]:
    """Train by hand: four steps are an epoch."""
    net = network()
    made = OPTIMIZERS[optimizer](net.parameters())
    done = 0
    training = MaskedTraining(algorithm, find_layers(net, algorithm.dense), 5, progress=lambda: done / num_steps)
    if state is None:
        training.reset()
    else:
        net.load_state_dict(state["net"])
        training.load_state_dict(state["training"])
        done = state["done"]
    training.attach([made])
    if state is not None:
        made.load_state_dict(state["optimizer"])
        training.apply()
    for step in range(done, num_steps):
        done = step
        training.end_epoch(step // 4)

        def closure(step: int = step) -> Tensor:
            made.zero_grad()
            loss = loss_of(net, step)
            loss.backward()
            training.cut_gradients()
            return loss

        made.step(closure)  # type: ignore[arg-type]
        if after is not None:
            after(training, made, step)
    return net, made, training


def algorithms() -> list[Any]:
    every = {"density": 0.3}
    return [
        pytest.param(lambda: SparseMomentum(**every), id="sparse_momentum"),
        pytest.param(lambda: RigL(update_every=3, stop=1.0, init="uniform", **every), id="rigl"),
        pytest.param(lambda: SET(init="uniform", **every), id="set"),
        pytest.param(lambda: Static(**every), id="static"),
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", algorithms())
def test_dead_weights_are_exactly_0_after_every_step(make: Callable[[], SparseAlgorithm], optimizer: str) -> None:
    algorithm = make()
    live: list[int] = []
    masks: list[Tensor] = []

    def after(training: MaskedTraining, made: Optimizer, step: int) -> None:
        for name, mask in training.masks.items():
            weight = training.parameters[name]
            assert not weight[~mask].any()
            assert weight.grad is None or not weight.grad[~mask].any()
            keeps = isinstance(algorithm, SparseMomentum) and optimizer in OWN_MOMENTUM
            for key, value in made.state.get(weight, {}).items():
                # exp_inf of Adamax is at least its epsilon.
                if isinstance(value, Tensor) and value.shape == weight.shape and not keeps and key != "exp_inf":
                    assert not value[~mask].any(), key
        live.append(sum(int(mask.sum()) for mask in training.masks.values()))
        masks.append(torch.cat([mask.flatten() for mask in training.masks.values()]).clone())

    net, _, _ = train(algorithm, optimizer, after=after)
    assert len(set(live)) == 1
    assert live[0] == round(0.3 * 72) + round(0.3 * 512) + round(0.3 * 24)
    assert torch.equal(masks[0], masks[-1]) == isinstance(algorithm, Static)
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adamw"])
def test_a_static_mask_is_training_of_the_live_weights_alone(optimizer: str) -> None:
    net, _, training = train(Static(density=0.3), optimizer)

    # Each weight is its live numbers, scattered into zeros: a network that has no others.
    other = network()
    small: dict[str, nn.Parameter] = {}
    for name, parameter in other.named_parameters():
        mask = training.masks.get(name)
        small[name] = nn.Parameter(parameter.detach().clone() if mask is None else parameter.detach()[mask].clone())
    made = OPTIMIZERS[optimizer](list(small.values()))
    for step in range(12):
        made.zero_grad()
        whole = {
            name: torch.zeros_like(training.parameters[name]).masked_scatter(training.masks[name], value)
            if name in training.masks else value
            for name, value in small.items()
        }  # fmt: skip
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)
        F.cross_entropy(torch.func.functional_call(other, whole, (x,)), y).backward()
        made.step()
    for name, parameter in net.named_parameters():
        mask = training.masks.get(name)
        values = parameter if mask is None else parameter[mask]
        torch.testing.assert_close(values, small[name], rtol=1e-12, atol=1e-14)


def test_sparse_momentum_s_buffer_is_that_of_a_dense_gradient() -> None:
    """Algorithm 1: the momentum of a dead weight is the decayed sum of all its gradients."""
    expected: dict[str, Tensor] = {}
    net = network()
    made = OPTIMIZERS["momentum"](net.parameters())
    training = MaskedTraining(SparseMomentum(density=0.3), find_layers(net), 5)
    training.reset()
    training.attach([made])
    for step in range(5):
        made.zero_grad()
        loss_of(net, step).backward()
        for name in training.masks:
            parameter = training.parameters[name]
            gradient = parameter.grad + 0.01 * parameter.detach()
            expected[name] = 0.9 * expected.get(name, 0) + gradient
        training.cut_gradients()
        assert not training.parameters["0.weight"].grad[~training.masks["0.weight"]].any()
        made.step()
    for name in training.masks:
        actual = made.state[training.parameters[name]]["momentum_buffer"]
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-14)


def _grown_at_the_first_update(optimizer: str) -> tuple[MaskedTraining, dict[str, Tensor], dict[str, Tensor]]:
    before: dict[str, Tensor] = {}
    momentum: dict[str, Tensor] = {}

    def after(training: MaskedTraining, made: Optimizer, step: int) -> None:
        if step != 3:
            return
        for name, mask in training.masks.items():
            state = made.state.get(training.parameters[name], {})
            before[name] = mask.clone()
            if "exp_avg_sq" in state:
                momentum[name] = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
            elif "momentum_buffer" in state:
                momentum[name] = state["momentum_buffer"].clone()
            else:
                momentum[name] = training.state_dict()["momentum"][name]

    _, _, training = train(SparseMomentum(density=0.3), optimizer, num_steps=5, after=after)
    return training, before, momentum


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "sgd", "adagrad"])
def test_sparse_momentum_grows_the_largest_momentum_among_the_dead(optimizer: str) -> None:
    training, before, momentum = _grown_at_the_first_update(optimizer)
    num_grown = 0
    for name, mask in training.masks.items():
        grown, left = mask & ~before[name], ~mask & ~before[name]
        num_grown += int(grown.sum())
        if grown.any() and left.any():
            assert momentum[name][grown].abs().min() >= momentum[name][left].abs().max()
    assert num_grown > 8


def test_momentum_beside_an_optimizer_without_one_is_that_of_sgd() -> None:
    def momentum(name: str, weight_decay: float) -> Tensor:
        net = network()
        made = torch.optim.SGD(net.parameters(), lr=1e-30, momentum=0.9 if name == "own" else 0.0)
        training = MaskedTraining(SparseMomentum(density=0.3), find_layers(net), 5)
        training.reset()
        training.attach([made])
        for step in range(4):
            made.zero_grad()
            loss_of(net, step).backward()
            made.step()
        if name == "own":
            return made.state[net[3].weight]["momentum_buffer"]
        return training.state_dict()["momentum"]["3.weight"]

    torch.testing.assert_close(momentum("own", 0.0), momentum("beside", 0.0), rtol=1e-12, atol=0)


def test_rigl_reads_the_gradient_of_the_step_and_grows_from_0() -> None:
    net = network()
    made = OPTIMIZERS["momentum"](net.parameters())
    training = MaskedTraining(RigL(density=0.3, update_every=3, stop=1.0, init="uniform"), find_layers(net), 5)
    training.reset()
    training.attach([made])
    for step in range(3):
        made.zero_grad()
        loss_of(net, step).backward()
        gradient = net[3].weight.grad.clone()
        before = training.masks["3.weight"].clone()
        training.cut_gradients()
        made.step()
    after = training.masks["3.weight"]
    grown = after & ~before
    assert 20 < int(grown.sum()) <= -(-0.3 * before.sum() // 1)
    assert gradient[grown].abs().min() >= gradient[~after & ~before].abs().max()
    assert not net[3].weight[grown].any()
    assert not made.state[net[3].weight]["momentum_buffer"][grown].any()


def test_clipping_sees_live_gradients_and_what_was_cut_is_scaled_alike() -> None:
    net = network()
    made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    training = MaskedTraining(SparseMomentum(density=0.3), find_layers(net), 5)
    training.reset()
    training.attach([made])
    loss_of(net, 0).backward()
    dense = {name: p.grad.clone() for name, p in net.named_parameters()}
    training.cut_gradients()
    live = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    kept = [dense[name][training.masks[name]] if name in training.masks else dense[name] for name in dense]
    assert float(live) == pytest.approx(float(torch.cat([value.flatten() for value in kept]).norm()))
    nn.utils.clip_grad_norm_(net.parameters(), float(live) / 4)
    made.step()
    for name in training.masks:
        buffer = made.state[training.parameters[name]]["momentum_buffer"]
        torch.testing.assert_close(buffer, dense[name] / 4, rtol=1e-5, atol=1e-12)


def test_gradients_of_several_backward_passes_add_up() -> None:
    def buffer(cut_each: bool) -> Tensor:
        net = network()
        made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        training = MaskedTraining(SparseMomentum(density=0.3), find_layers(net), 5)
        training.reset()
        training.attach([made])
        for step in range(3):
            loss_of(net, step).backward()
            if cut_each:
                training.cut_gradients()
        made.step()
        return made.state[net[3].weight]["momentum_buffer"]

    torch.testing.assert_close(buffer(True), buffer(False), rtol=1e-12, atol=1e-15)


def test_what_was_cut_goes_with_the_gradient() -> None:
    def buffer(discarded: bool) -> Tensor:
        net = network()
        made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        training = MaskedTraining(SparseMomentum(density=0.3), find_layers(net), 5)
        training.reset()
        training.attach([made])
        if discarded:
            loss_of(net, 0).backward()
            training.cut_gradients()
            made.zero_grad()
        loss_of(net, 1).backward()
        training.cut_gradients()
        made.step()
        return made.state[net[3].weight]["momentum_buffer"]

    assert torch.equal(buffer(True), buffer(False))


@pytest.mark.parametrize("way", ["none", "zero", "same"])
def test_what_was_cut_goes_when_the_gradient_is_zeroed_without_a_step(way: str) -> None:
    """DDP's gradient_as_bucket_view puts the same tensor back after it was None."""
    net = nn.Linear(4, 4, bias=False)
    made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    training = MaskedTraining(SparseMomentum(density=0.25, seed=0), {"weight": net.weight}, 0)
    training.reset()
    training.attach([made])
    for number in range(3):
        kept = net.weight.grad
        made.zero_grad(set_to_none=way != "zero")
        if way == "same" and kept is not None:

            def put_back(gradient: Tensor, kept: Tensor = kept) -> Tensor:
                net.weight.grad = kept.zero_()
                return gradient

            handle = net.weight.register_hook(put_back)
        net.weight.sum().mul(number + 1).backward()
        if way == "same" and kept is not None:
            handle.remove()
        training.cut_gradients()
    made.step()
    assert torch.equal(made.state[net.weight]["momentum_buffer"], torch.full((4, 4), 3.0))


def test_a_gradient_that_is_zeroed_and_stepped_on_feeds_nothing() -> None:
    net = nn.Linear(4, 4, bias=False)
    made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    training = MaskedTraining(SparseMomentum(density=0.25, seed=0), {"weight": net.weight}, 0)
    training.reset()
    training.attach([made])
    net.weight.sum().backward()
    training.cut_gradients()
    made.zero_grad(set_to_none=False)
    made.step()
    assert not made.state[net.weight]["momentum_buffer"].any()


def test_a_layer_whose_live_gradient_is_zero_is_unscaled_as_the_others_are() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    training = MaskedTraining(SparseMomentum(density=0.25, seed=0), find_layers(net), 0)
    training.reset()
    training.attach([made])
    dead = ~training.masks["0.weight"]
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)  # type: ignore[attr-defined]
    scaler.scale((net[0].weight * dead).sum() + net[1].weight.sum()).backward()
    training.cut_gradients()
    scaler.unscale_(made)
    scaler.step(made)
    assert torch.equal(made.state[net[0].weight]["momentum_buffer"], dead.float())
    assert torch.equal(made.state[net[1].weight]["momentum_buffer"], torch.ones(4, 4))


def test_weights_that_rprop_grows_move() -> None:
    net = network()
    made = torch.optim.Rprop(net.parameters(), lr=0.01)
    training = MaskedTraining(SET(density=0.3, update_every=2), find_layers(net), 5)
    training.reset()
    training.attach([made])
    for step in range(4):
        before = training.masks["3.weight"]
        made.zero_grad()
        loss_of(net, step).backward()
        made.step()
    grown = training.masks["3.weight"] & ~before
    assert grown.any()
    made.zero_grad()
    loss_of(net, 4).backward()
    made.step()
    torch.testing.assert_close(net[3].weight[grown].abs(), torch.full((int(grown.sum()),), 0.01, dtype=torch.float64))


def test_set_prunes_complex_weights_by_magnitude() -> None:
    net = nn.Linear(8, 8, dtype=torch.complex64)
    made = torch.optim.SGD(net.parameters(), lr=0.1)
    training = MaskedTraining(SET(density=0.5, update_every=1), find_layers(net), 5)
    training.reset()
    training.attach([made])
    net(torch.ones(1, 8, dtype=torch.complex64)).abs().sum().backward()
    made.step()
    assert int(training.masks["weight"].sum()) == 32


def test_layers_of_one_optimizer_trade_among_themselves() -> None:
    net = network()
    first, second = (OPTIMIZERS["momentum"](part.parameters()) for part in (net[:4], net[4:]))
    training = MaskedTraining(SparseMomentum(density=0.3), find_layers(net), 5)
    training.reset()
    training.attach([first, second])
    before = {name: int(mask.sum()) for name, mask in training.masks.items()}
    for step in range(4):
        loss_of(net, step).backward()
        first.step()
        second.step()
        net.zero_grad()
    training.end_epoch(1)
    after = {name: int(mask.sum()) for name, mask in training.masks.items()}
    assert after["0.weight"] != before["0.weight"]
    assert after["0.weight"] + after["3.weight"] == before["0.weight"] + before["3.weight"]
    assert after["5.weight"] == before["5.weight"]


@pytest.mark.parametrize("optimizer", ["momentum", "sgd"])
@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize("make", algorithms())
def test_an_interrupted_training_is_an_uninterrupted_one(
    make: Callable[[], SparseAlgorithm], at: int, optimizer: str
) -> None:
    saved: dict[str, Any] = {}

    def after(training: MaskedTraining, made: Optimizer, step: int) -> None:
        if step == at - 1:
            net = {name: p.detach().clone() for name, p in zip(names, made.param_groups[0]["params"], strict=True)}
            state = torch.load(_through_a_file({"net": net, "optimizer": made.state_dict()}), weights_only=True)
            saved.update(state, training=torch.load(_through_a_file(training.state_dict()), weights_only=True), done=at)

    names = [name for name, _ in network().named_parameters()]
    straight, _, masks = train(make(), optimizer, after=after)
    resumed, _, again = train(make(), optimizer, state=saved)
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    for name, mask in masks.masks.items():
        assert torch.equal(mask, again.masks[name])


def _through_a_file(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_masks_of_another_model_are_refused() -> None:
    _, _, training = train(Static(density=0.3), num_steps=1)
    state = training.state_dict()
    for broken, words in (
        ({**state, "version": 2}, "version 2"),
        ({**state, "masks": {"nope.weight": torch.ones(2, 2, dtype=torch.bool)}}, "nope.weight"),
        ({**state, "masks": {"3.weight": torch.ones(2, 2, dtype=torch.bool)}}, r"3.weight of shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=words):
            training.load_state_dict(broken)


def test_infinite_gradients_of_dead_weights_hurt_nobody() -> None:
    net = network()
    made = OPTIMIZERS["momentum"](net.parameters())
    training = MaskedTraining(SparseMomentum(density=0.3), find_layers(net), 5)
    training.reset()
    training.attach([made])
    loss_of(net, 0).backward()
    net[3].weight.grad[~training.masks["3.weight"]] = float("inf")
    training.cut_gradients()
    made.step()
    assert torch.isfinite(net[3].weight).all()
    assert torch.isfinite(made.state[net[3].weight]["momentum_buffer"]).all()


def test_a_layer_of_density_1_is_left_alone() -> None:
    net, _, training = train(SparseMomentum(density=1.0), num_steps=6)
    assert training.masks == {}
    dense = network()
    made = OPTIMIZERS["momentum"](dense.parameters())
    for step in range(6):
        made.zero_grad()
        loss_of(dense, step).backward()
        made.step()
    for mine, other in zip(net.parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, other)
