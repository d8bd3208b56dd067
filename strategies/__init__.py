"""Squall: Strategy plugins for PyTorch Lightning.

Importing registers the strategies' names, so that ``Trainer(strategy="column_parallel")`` finds them.
"""

from lightning.pytorch.strategies import StrategyRegistry

from . import kernels, placement
from .column_parallel import ColumnParallelStrategy

__version__ = "0.1.0"

if "column_parallel" not in StrategyRegistry:
    StrategyRegistry.register(
        "column_parallel",
        ColumnParallelStrategy,
        description="Each layer's output channels split over the ranks (Krizhevsky 2012)",
    )

__all__ = ["ColumnParallelStrategy", "kernels", "placement"]
