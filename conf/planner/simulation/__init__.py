"""An event simulation of training: stragglers, failures, restarts, leases and staleness, at any scale.

Example:
    >>> from squall.conf.planner.simulation import Crew, Downpour, Faults, Link, Rules, Constant
    >>> link = Link(Constant(0.0), Constant(0.0), Constant(0.0))
    >>> run = Downpour(Crew.of(4, 1.0), link, 1, Constant(0.0), Rules(), Faults()).run(updates=40, settle=4)
    >>> run.staleness, run.goodput
    ({3: 36}, 1.0)

"""

from .crew import Crew
from .distributions import (
    Constant,
    Distribution,
    Drifting,
    Empirical,
    Exponential,
    Gamma,
    Lognormal,
    make_distribution,
)
from .downpour import Downpour, Link, Rules
from .faults import Faults
from .fleet import Fleet, FleetOutcome
from .outcome import Outcome, total_variation
from .sandblaster import Sandblaster
from .shards import ShardLines
from .side_by_side import compare
from .synchronous import Synchronous

__all__ = [
    "Constant", "Crew", "Distribution", "Downpour", "Drifting", "Empirical", "Exponential", "Faults", "Fleet",
    "FleetOutcome", "Gamma", "Link", "Lognormal", "Outcome", "Rules", "Sandblaster", "ShardLines", "Synchronous",
    "compare", "make_distribution", "total_variation",
]  # fmt: skip
