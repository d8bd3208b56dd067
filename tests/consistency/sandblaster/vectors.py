"""L-BFGS over vectors that a test holds, and torch's own for comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squall.consistency.sandblaster.lbfgs import Lbfgs, LbfgsOptions, Point
from squall.consistency.sandblaster.operations import DOT, LARGEST, Combine, Evaluate

Function = Callable[[Tensor], Tensor]


class HeldVectors:
    """All vectors in this process.

    Args:
        function: What is minimised.
        first: Its first argument.
        options: Of the optimizer.
    """

    def __init__(self, function: Function, first: Tensor, options: LbfgsOptions) -> None:
        self.function, self.options = function, options
        self.vectors = [torch.full_like(first, torch.nan) for _ in range(options.num_vectors + 1)]
        self.vectors[0].copy_(first)
        self.vectors[1].copy_(first)
        self.num_evaluations = 0
        self.points: list[Point] = []
        self.weights: list[Tensor] = []  # at each point
        self.reason = ""

    def run(self, num_iterations: int = 10_000, point: Point | None = None) -> HeldVectors:
        """Optimize."""
        steps = Lbfgs(self.options, point).steps()
        answer: Any = None
        while True:
            try:
                wanted = steps.send(answer)
            except StopIteration as end:
                self.reason = end.value
                return self
            answer = None
            if isinstance(wanted, Point):
                self.points.append(wanted)
                self.weights.append(self.vectors[wanted.weights].clone())
                if wanted.iteration >= num_iterations:
                    return self
            elif isinstance(wanted, Evaluate):
                answer = self.evaluate(wanted.gradient)
            else:
                answer = self.combine(wanted)

    def evaluate(self, slot: int) -> float:
        weights = self.vectors[0].clone().requires_grad_()
        loss = self.function(weights)
        loss.backward()
        assert weights.grad is not None
        self.vectors[slot].copy_(weights.grad)
        self.num_evaluations += 1
        return float(loss.detach())

    def combine(self, wanted: Combine) -> list[float]:
        if wanted.out is not None:
            assert wanted.out not in {slot for _, slot in wanted.terms}, "a vector is made of itself"
            needed = set(self.points[-1].slots) if self.points else {1}
            assert wanted.out not in needed, "a vector is written over that a restart would need"
            parts = [factor * self.vectors[slot] for factor, slot in wanted.terms]
            self.vectors[wanted.out].copy_(torch.stack(parts).sum(0) if parts else torch.zeros_like(self.vectors[0]))
        numbers = []
        for reduction in wanted.reductions:
            first, second = self.vectors[reduction.first], self.vectors[reduction.second]
            if reduction.kind == DOT:
                numbers.append(float(first.dot(second)))
            else:
                numbers.append(float(first.abs().max() if reduction.kind == LARGEST else first.abs().sum()))
        return numbers


def torch_iterates(function: Function, first: Tensor, num_iterations: int, history_size: int) -> tuple[Tensor, int]:
    """Where torch's optimizer comes to, and after how many evaluations."""
    weights = first.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], lr=1, max_iter=num_iterations, max_eval=10**6, history_size=history_size,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    num_evaluations = 0

    def closure() -> Tensor:
        nonlocal num_evaluations
        num_evaluations += 1
        optimizer.zero_grad()
        loss = function(weights)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weights.detach(), num_evaluations
