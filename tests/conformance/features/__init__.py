"""The rows of the table, by subject."""

from . import loops, optimization, callbacks, checkpoints, data, modules, failures  # noqa: F401, I001  (in the table's order)
