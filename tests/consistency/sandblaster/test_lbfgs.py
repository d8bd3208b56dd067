"""L-BFGS by operations on vectors takes the steps of torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squall.consistency.sandblaster.lbfgs import LbfgsOptions, Point
from squall.consistency.sandblaster.wolfe import Trial, interpolate

from .vectors import HeldVectors, torch_iterates


def rosenbrock(w: Tensor) -> Tensor:
    return (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()


def quadratic(w: Tensor) -> Tensor:
    """Ill-conditioned: 1e6 between the largest curvature and the least."""
    return (0.5 * torch.logspace(-3, 3, len(w), dtype=w.dtype) * w * w - w).sum()


def logistic(w: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, len(w), generator=generator, dtype=w.dtype)
    y = (x.sum(1) > 0).to(w.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y) + 1e-3 * w @ w


FUNCTIONS = {"rosenbrock": rosenbrock, "quadratic": quadratic, "logistic": logistic}


def first(num: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("history_size", [1, 3, 10])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_iterates_are_torchs(name: str, history_size: int) -> None:
    held = HeldVectors(FUNCTIONS[name], first(), LbfgsOptions(history_size)).run(30)
    assert len(held.weights) > 10
    for iteration, weights in enumerate(held.weights[1:], start=1):
        expected, num_evaluations = torch_iterates(FUNCTIONS[name], first(), iteration, history_size)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)
        assert held.points[iteration].num_evaluations == num_evaluations


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(sorted(FUNCTIONS)))
def test_it_needs_no_more_vectors_than_it_says_and_ends_where_torch_does(
    num: int, seed: int, history_size: int, name: str
) -> None:
    """As near as torch's own come to each other that begin a rounding apart: some of these functions are chaotic."""
    function, begin = FUNCTIONS[name], first(num, seed)
    held = HeldVectors(function, begin, LbfgsOptions(history_size)).run(12)
    num_iterations = held.points[-1].iteration
    if not num_iterations:
        return
    expected, num_evaluations = torch_iterates(function, begin, num_iterations, history_size)
    beside = [torch_iterates(function, begin * (1 + k * 2**-52), num_iterations, history_size) for k in (-2, -1, 1, 2)]
    if all(number == num_evaluations for _, number in beside):
        spread = max(float((weights - expected).abs().max()) for weights, _ in beside)
        torch.testing.assert_close(held.weights[-1], expected, rtol=0, atol=1e-8 + 1000 * spread)
        assert held.points[-1].num_evaluations == num_evaluations


@pytest.mark.parametrize(("name", "num"), [("rosenbrock", 2), ("rosenbrock", 10), ("quadratic", 20)])
def test_it_converges(name: str, num: int) -> None:
    options = LbfgsOptions(40, tolerance_change=1e-13, tolerance_grad=1e-6, max_iterations=400)
    held = HeldVectors(FUNCTIONS[name], first(num), options).run()
    last = held.points[-1]
    assert last.largest_gradient < 1e-5, (held.reason, last)
    assert held.points[-1].iteration < 400, held.reason
    if name == "quadratic":
        solution = 1 / torch.logspace(-3, 3, num, dtype=torch.float64)
        torch.testing.assert_close(held.weights[-1], solution, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("iteration", [0, 1, 7])
def test_it_goes_on_from_a_point_as_if_nothing_had_been(iteration: int) -> None:
    """Though what is not named by the point was lost, in the middle of an iteration."""
    whole = HeldVectors(rosenbrock, first(), LbfgsOptions(4)).run(12)
    begun = HeldVectors(rosenbrock, first(), LbfgsOptions(4)).run(iteration)
    point = Point.of(begun.points[-1].header())
    for slot, vector in enumerate(begun.vectors):
        if slot not in point.slots:
            vector.fill_(torch.nan)
    begun.run(12, point)
    assert all(
        ours.equal(theirs)
        for ours, theirs in zip(begun.weights[iteration + 1 :], whole.weights[iteration + 1 :], strict=True)
    )
    assert begun.points[-1].loss == whole.points[-1].loss


def test_max_iterations_is_the_end() -> None:
    held = HeldVectors(rosenbrock, first(), LbfgsOptions(max_iterations=3)).run()
    assert (held.points[-1].iteration, held.reason) == (3, "max_steps")


def test_a_minimum_is_the_end() -> None:
    held = HeldVectors(lambda w: (w * w).sum(), torch.zeros(3, dtype=torch.float64), LbfgsOptions()).run()
    assert held.num_evaluations == 1
    assert "tolerance_grad" in held.reason


def test_a_loss_that_is_no_number_at_first_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="first weights the loss of the whole batch is nan"):
        HeldVectors(lambda w: w.sum() * math.nan, first(), LbfgsOptions()).run()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_to_where_the_loss_is_no_number_is_made_shorter(bad: float) -> None:
    """Torch's own search goes on with NaN from there."""

    def cliff(w: Tensor) -> Tensor:
        loss = ((w - 1.0) ** 2).sum() - 3 * w.sum()
        return loss if bool((w < 2.0).all()) else loss * bad

    held = HeldVectors(cliff, torch.zeros(3, dtype=torch.float64), LbfgsOptions(lr=50.0)).run(8)
    assert all(weights.isfinite().all() for weights in held.weights)
    losses = [point.loss for point in held.points]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_loss_never_rises() -> None:
    held = HeldVectors(rosenbrock, first(seed=5), LbfgsOptions(5)).run(40)
    losses = [point.loss for point in held.points]
    assert losses == sorted(losses, reverse=True)


def test_a_cubic_has_its_least_where_calculus_says() -> None:
    def value(t: float) -> tuple[float, float]:
        return t**3 - 3 * t, 3 * t**2 - 3  # least at 1

    left, right = Trial(0.0, value(0.0)[0], 0, value(0.0)[1]), Trial(3.0, value(3.0)[0], 0, value(3.0)[1])
    assert interpolate(left, right) == pytest.approx(1.0)
    assert interpolate(right, left) == pytest.approx(1.0)
    assert interpolate(left, right, (2.0, 2.5)) == 2.0
    assert interpolate(left, left) == 0.0  # no width: the middle of it
