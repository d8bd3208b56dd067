"""Local response normalisation: the function users call, the compiled kernel, and the Torch path."""

from .function import local_response_norm
from .torch_path import differentiable_backward, torch_backward, torch_forward

__all__ = ["differentiable_backward", "local_response_norm", "torch_backward", "torch_forward"]
