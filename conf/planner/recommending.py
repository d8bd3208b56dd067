"""Which Strategy to take, and why."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .predictions import Prediction


def recommend(predictions: Sequence[Prediction], asynchronous: bool = False) -> tuple[Prediction, str]:
    """Choose: the fastest that fits, the simplest of those within a twentieth of it.

    Args:
        predictions: As of :func:`predict_all`.
        asynchronous: Whether Downpour may be chosen, whose gradients are late.

    Returns:
        The choice, and the reason.

    Raises:
        MisconfigurationException: If nothing fits.

    """
    able = [p for p in predictions if p.fits and (asynchronous or p.alternative.strategy != "downpour")]
    able = [p for p in able if p.alternative.overrides]  # what there is a Strategy for
    if not able:
        most = min(predictions, key=lambda p: p.memory.total)
        raise MisconfigurationException(
            f"No strategy fits: {most.alternative.label} needs least, {most.memory.total / 1e9:.1f} GB a rank."
            " Use more ranks, smaller batches, or devices with more memory."
        )
    best = max(able, key=lambda p: p.images_per_second)
    near = [p for p in able if p.images_per_second >= 0.95 * best.images_per_second]
    simplicity = ("single", "ddp", "columns", "spatial", "hybrid", "downpour")
    chosen = min(near, key=lambda p: (simplicity.index(p.alternative.strategy), -p.images_per_second))
    others = [p for p in able if p.alternative.strategy != chosen.alternative.strategy]
    reason = f"{chosen.images_per_second:,.0f} images/s"
    if others:
        second = max(others, key=lambda p: p.images_per_second)
        ratio = chosen.images_per_second / second.images_per_second
        reason += f", {ratio:.2f} x {second.alternative.label}: " + _why(chosen, second)
    return chosen, reason


def _why(chosen: Prediction, other: Prediction) -> str:
    waits = [sum(p.timeline.waiting.values()) if p.timeline is not None else 0.0 for p in (chosen, other)]
    if chosen.alternative.num_ranks == 1:
        return f"alone nothing is sent, and there each step waits {waits[1] * 1e3:,.0f} ms for messages"
    if other.alternative.num_ranks == 1:
        return (
            f"{chosen.alternative.num_ranks} ranks share the work, each of which sends {chosen.num_bytes / 1e6:,.1f} MB"
            f" a step and waits {waits[0] * 1e3:,.0f} ms for messages"
        )
    return (
        f"a rank sends {chosen.num_bytes / 1e6:,.1f} MB a step and waits {waits[0] * 1e3:,.0f} ms for messages, there"
        f" {other.num_bytes / 1e6:,.1f} MB and {waits[1] * 1e3:,.0f} ms"
    )
