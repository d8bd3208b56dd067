"""Gradients and weight deltas as bytes, by name: :func:`get_codec`.

========  =====================  ======================================================  =============================
name      bits an element        what it is                                              source
========  =====================  ======================================================  =============================
``fp32``  32                     the number itself; ``fp64`` for float64, exact
``bf16``  16                     the nearest bfloat16
``int8``  8, 32 a block          the dynamic type, scaled by blocks of 2048              Dettmers 2015
``1bit``  1, 64 a block          a sign and the means of either side; error feedback     Seide et al. 2014
``topk``  64 x density           the largest numbers and their places; error feedback    Lin et al. 2018
========  =====================  ======================================================  =============================
"""

from .choices import get_codec
from .codec import Codec

__all__ = ["Codec", "get_codec"]
