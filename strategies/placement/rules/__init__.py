"""What each torch function does to split channels, a file for each kind of function.

A handler that returns ``NotImplemented`` has the arguments gathered, so a rule only ever makes things faster.
"""

from . import attributes, channelwise, elementwise, foreach, layers, norms, random, shapes

__all__ = ["attributes", "channelwise", "elementwise", "foreach", "layers", "norms", "random", "shapes"]
