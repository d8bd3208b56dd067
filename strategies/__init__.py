"""Squall: Strategy plugins for PyTorch Lightning.

Importing registers the strategies' names, so that ``Trainer(strategy="column_parallel")`` finds them.
"""

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from . import consistency, kernels, placement, sparsity
from .column_parallel import ColumnParallelStrategy
from .downpour import DownpourStrategy
from .hogwild import HogwildStrategy
from .hybrid_parallel import HybridParallelStrategy
from .injector import EventInjector
from .sandblaster import SandblasterStrategy
from .sparse import SparseStrategy
from .spatial_parallel import SpatialParallelStrategy

__version__ = "0.1.0"

_STRATEGIES: tuple[tuple[str, type[Strategy], dict[str, Any], str], ...] = (
    ("column_parallel", ColumnParallelStrategy, {}, "Each layer's channels split over the ranks (Krizhevsky 2012)"),
    ("spatial_parallel", SpatialParallelStrategy, {}, "Images split in tiles over the ranks (Coates 2013)"),
    ("hybrid_parallel", HybridParallelStrategy, {}, "Convolutions whole, linear layers in columns (Krizhevsky 2014)"),
    ("downpour", DownpourStrategy, {}, "Asynchronous workers around sharded parameter servers (Dean 2012)"),
    ("hogwild", HogwildStrategy, {}, "Asynchronous workers in one host's shared memory, without a lock (Recht 2011)"),
    ("sandblaster", SandblasterStrategy, {}, "L-BFGS over whole batches, under a coordinator (Dean 2012)"),
    ("sparse", SparseStrategy, {}, "Few weights, from the first step to the last (Dettmers 2019)"),
    ("sparse_ddp", SparseStrategy, {"inner": "ddp"}, "The same with data parallelism"),
)
for _name, _strategy, _options, _description in _STRATEGIES:
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, _strategy, description=_description, **_options)

__all__ = [
    "ColumnParallelStrategy",
    "DownpourStrategy",
    "EventInjector",
    "HogwildStrategy",
    "HybridParallelStrategy",
    "SandblasterStrategy",
    "SparseStrategy",
    "SpatialParallelStrategy",
    "consistency",
    "kernels",
    "placement",
    "sparsity",
]
