"""Local response normalisation: the function users call, and the Torch path that serves it."""

from .function import local_response_norm
from .torch_path import differentiable_backward, torch_backward, torch_forward

__all__ = ["differentiable_backward", "local_response_norm", "torch_backward", "torch_forward"]
