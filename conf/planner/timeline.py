"""Play a rank's step: what computes, what travels meanwhile, and what waits.

Messages go one after the other over a rank's link, in the order in which they were started. While one is on its way,
what computes is slower by the link's share of the core, and the message by the link's slowdown: on a machine whose
cores carry messages themselves, overlapping hides less than all.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from .devices import Device
from .events import Compute, Phase, Ready, Send, Trace, Wait
from .links import Network


@dataclass
class Timeline:
    """Where a step's time goes.

    Args:
        seconds: Of the step.
        computing: Seconds by layer and phase, in which the rank computes (slowed down by messages or not).
        waiting: Seconds by layer and phase, in which nothing computes because a message isn't there.
        sending: Seconds in which a message was on its way, waited for or not.

    """

    seconds: float = 0.0
    computing: dict[tuple[str, Phase], float] = field(default_factory=lambda: defaultdict(float))
    waiting: dict[tuple[str, Phase], float] = field(default_factory=lambda: defaultdict(float))
    sending: float = 0.0

    def by_layer(self) -> dict[str, tuple[float, float]]:
        """Seconds of computing and of waiting of each layer, in the order of the step."""
        found: dict[str, tuple[float, float]] = {}
        for (layer, _), seconds in self.computing.items():
            found[layer] = (found.get(layer, (0.0, 0.0))[0] + seconds, 0.0)
        for (layer, _), seconds in self.waiting.items():
            computing, waiting = found.get(layer, (0.0, 0.0))
            found[layer] = (computing, waiting + seconds)
        return found


@dataclass
class _Message:
    send: Send
    left: float  # seconds, were nothing computed
    cpu_share: float
    slowdown: float


def play(trace: Trace, device: Device, network: Network) -> Timeline:
    """Play a step.

    Args:
        trace: Of a rank; all others do alike.
        device: What it computes on.
        network: How it reaches the others.

    Returns:
        Where its time goes.

    """
    line = Timeline()
    queue: deque[_Message] = deque()
    for event in trace:
        if isinstance(event, Compute):
            _compute(line, queue, device.seconds(event.operation), event)
        elif isinstance(event, Send):
            link = network.link_of(event.num_ranks, event.spans)
            seconds = network.seconds(event)
            line.sending += seconds
            queue.append(_Message(event, seconds, link.cpu_share, link.slowdown))
        elif isinstance(event, Wait):
            _wait(line, queue, event.number)
        else:
            assert isinstance(event, Ready)
    if queue:
        _wait(line, queue, queue[-1].send.number)
    return line


def _compute(line: Timeline, queue: deque[_Message], seconds: float, event: Compute) -> None:
    begin = line.seconds
    while queue and seconds > 0:
        message = queue[0]
        rate = max(1.0 - message.cpu_share, 0.02)
        until = min(seconds / rate, message.left * message.slowdown)
        seconds -= until * rate
        message.left -= until / message.slowdown
        line.seconds += until
        if message.left <= 1e-12:
            queue.popleft()
        elif seconds <= 1e-12:
            seconds = 0.0
    line.seconds += max(seconds, 0.0)
    line.computing[event.layer, event.phase] += line.seconds - begin


def _wait(line: Timeline, queue: deque[_Message], number: int) -> None:
    if not any(message.send.number == number for message in queue):
        return  # it is there
    while queue:
        message = queue.popleft()
        line.seconds += message.left
        line.waiting[message.send.layer, message.send.phase] += message.left
        if message.send.number == number:
            return
