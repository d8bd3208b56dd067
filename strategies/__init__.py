"""Squall: Strategy plugins for PyTorch Lightning.

Importing registers the strategies' names, so that ``Trainer(strategy="column_parallel")`` finds them.
"""

from lightning.pytorch.strategies import StrategyRegistry

from . import consistency, kernels, placement
from .column_parallel import ColumnParallelStrategy
from .downpour import DownpourStrategy
from .hogwild import HogwildStrategy
from .injector import EventInjector

__version__ = "0.1.0"

for _name, _strategy, _description in (
    ("column_parallel", ColumnParallelStrategy, "Each layer's output channels split over the ranks (Krizhevsky 2012)"),
    ("downpour", DownpourStrategy, "Asynchronous workers around sharded parameter servers (Dean 2012)"),
    ("hogwild", HogwildStrategy, "Asynchronous workers in one host's shared memory, without a lock (Recht 2011)"),
):
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, _strategy, description=_description)

__all__ = [
    "ColumnParallelStrategy",
    "DownpourStrategy",
    "EventInjector",
    "HogwildStrategy",
    "consistency",
    "kernels",
    "placement",
]
