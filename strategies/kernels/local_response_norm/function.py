"""The public function: checks, dispatch to tensor subclasses, and the link to autograd."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from squall.kernels.native.direct import is_direct
from squall.kernels.pairs import whole

from . import op


def local_response_norm(
    x: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    r"""Normalise each channel by its neighbours' activity (Krizhevsky et al. 2012, section 3.3).

    .. math:: y_i = x_i \Big/ \Big(k + \frac{\alpha}{n} \sum_{j \in \mathrm{window}(i)} x_j^2\Big)^\beta

    The window of ``size`` :math:`n` channels reaches ``size // 2`` below channel i and ``(size - 1) // 2`` above, and
    ends at the group's edges. As in :func:`torch.nn.functional.local_response_norm` and in cuda-convnet2, which trained
    the 2012 network, alpha is divided by ``size``; the paper's formula doesn't say so. Gradients of any order work.

    Args:
        x: Shape (N, C), (N, C, L), (N, C, H, W) or with more dimensions; half precision is summed in float32.
        size: Channels in the window.
        alpha: Factor of the mean square over the window.
        beta: Exponent; 0.75, 0.5 and 1 are faster than others.
        k: What is added to the mean, positive.
        groups: Contiguous groups of channels, the columns of the 2012 network, that are normalised apart.
        relu: Normalise ``relu(x)``: the same as ``local_response_norm(x.relu(), ...)``, in fewer passes over memory.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError: ``size`` or ``groups`` isn't a whole number.
        ValueError: ``x`` has no channels or isn't floating-point, ``size`` is below 1, or ``groups`` doesn't divide the
            channels.

    Example:
        >>> x = torch.ones(1, 4, 2, 2)
        >>> local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0, groups=2).shape
        torch.Size([1, 4, 2, 2])

    """
    if has_torch_function_unary(x):
        return handle_torch_function(local_response_norm, (x,), x, size, alpha, beta, k, groups, relu)
    if x.ndim < 2:
        raise ValueError(f"x must have a batch and a channel dimension, (N, C, ...), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
    size, groups = whole("size", size), whole("groups", groups)
    if size < 1:
        raise ValueError(f"size must be at least 1 channel, got {size}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups={groups} doesn't divide the {x.shape[1]} channels of x; give a divisor")
    run = op.normalise if is_direct(x) else op.local_response_norm
    result: Tensor = run(x, size, float(alpha), float(beta), float(k), groups, bool(relu))
    return result
