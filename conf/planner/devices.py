"""What a device takes for an operation: a roofline, from its datasheet or measured, and single operations as measured.

A roofline (Williams et al. 2009) bounds an operation by arithmetic or by memory, whichever takes longer. What share of
the peak a kind of operation reaches is a figure of the device, too. Where an operation's own time was measured (as
OptCNN and FlexFlow do: Jia et al. 2018), that is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .events import Compute, Kind, Operation, Trace


@dataclass(frozen=True)
class Device:
    """One GPU, or one core.

    Args:
        name: What tables call it.
        flops: Floating point operations a second at the most, in the precision that is trained in.
        bandwidth: Bytes a second of its memory at the most.
        memory: Bytes of it; 0 if nobody says.
        efficiency: Shares of the peaks that are reached, by kind: ``gemm`` and ``conv`` of ``flops``, ``memory`` of
            ``bandwidth``.
        overhead: Seconds that each operation takes besides, such as a kernel's launch.
        price_per_hour: Of one device, in euros; 0 if nobody says.
        measured: Seconds of single operations by key.
        factor: By what all is multiplied: for a machine whose step was measured as a whole.

    Raises:
        MisconfigurationException: If a figure is not positive, or a kind is unknown.

    Example:
        >>> device = Device("half a TFLOP/s", flops=1e12, bandwidth=1e11, efficiency={"gemm": 0.5, "memory": 1.0})
        >>> device.seconds(Operation("", "gemm", flops=10**9, num_bytes=1000))
        0.002

    """

    name: str
    flops: float
    bandwidth: float
    memory: float = 0.0
    efficiency: Mapping[str, float] = field(default_factory=dict)
    overhead: float = 0.0
    price_per_hour: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict)
    factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "factor"):
            if getattr(self, name) <= 0:
                raise MisconfigurationException(f"device.{name}={getattr(self, name)!r} must be positive.")
        unknown = sorted(set(self.efficiency) - {"gemm", "conv", "memory"})
        if unknown:
            raise MisconfigurationException(
                f"device.efficiency has {', '.join(unknown)}: there are gemm, conv and memory."
            )

    def seconds(self, operation: Operation) -> float:
        """What an operation takes, forward, backward or update.

        Args:
            operation: Of a trace.

        """
        own = self.measured.get(operation.key)
        if own is not None:
            return self.factor * own
        arithmetic = operation.flops / (self.flops * self._share(operation.kind)) if operation.flops else 0.0
        return self.factor * (
            self.overhead + max(arithmetic, operation.num_bytes / (self.bandwidth * self._share("memory")))
        )

    def copy_seconds(self, num_bytes: float) -> float:
        """What reading and writing so many bytes, together, takes."""
        return self.factor * num_bytes / (self.bandwidth * self._share("memory"))

    def step_seconds(self, trace: Trace) -> float:
        """What a rank computes in a step, were nothing ever waited for."""
        return sum(self.seconds(event.operation) for event in trace if isinstance(event, Compute))

    def scaled_to(self, trace: Trace, seconds: float) -> Device:
        """The same device, on which a step is known to take so many seconds.

        Args:
            trace: The step of one device alone.
            seconds: What it was measured to take.

        """
        return replace(self, factor=self.factor * seconds / self.step_seconds(trace))

    def _share(self, kind: Kind) -> float:
        return float(self.efficiency.get(kind, 1.0))


def device_of(entry: Mapping[str, Any]) -> Device:
    """Read a file of ``conf/device``.

    Args:
        entry: Its entries; figures are in units of a datasheet (TFLOP/s, GB/s, GB).

    Raises:
        MisconfigurationException: If one is missing, or not known.

    """
    known = {
        "name", "tflops", "memory_bandwidth_gb", "memory_gb", "efficiency", "overhead_us", "price_per_hour",
    }  # fmt: skip
    unknown, missing = sorted(set(entry) - known), sorted({"name", "tflops", "memory_bandwidth_gb"} - set(entry))
    if unknown or missing:
        raise MisconfigurationException(
            f"device: {', '.join(unknown or missing)} {'is not known' if unknown else 'is missing'};"
            f" a device has {', '.join(sorted(known))}."
        )
    return Device(
        name=str(entry["name"]),
        flops=1e12 * float(entry["tflops"]),
        bandwidth=1e9 * float(entry["memory_bandwidth_gb"]),
        memory=1e9 * float(entry.get("memory_gb") or 0),
        efficiency=dict(entry.get("efficiency") or {}),
        overhead=1e-6 * float(entry.get("overhead_us") or 0),
        price_per_hour=float(entry.get("price_per_hour") or 0),
    )
