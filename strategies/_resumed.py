"""What a checkpoint of a sparse training says of its settings, and whether those of the training that goes on agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .sparsity import SparseAlgorithm
from .sparsity.layers import layer_name

_ANEW = (
    " To begin a new training with its weights instead, load them into the module"
    " (module.load_state_dict(torch.load(path)['state_dict'])), and leave ckpt_path out."
)


def settings_of(algorithm: SparseAlgorithm, layers: Iterable[str]) -> dict[str, Any]:
    """What to save beside the masks.

    Args:
        algorithm: Of the training.
        layers: The parameters that can be sparse.

    """
    return {"density": algorithm.density_asked, "layers": list(layers)}


def check_resumed(saved: Mapping[str, Any], algorithm: SparseAlgorithm, layers: Iterable[str]) -> None:
    """Refuse to go on with other settings: masks have the density that they have.

    Args:
        saved: Of the checkpoint; one of an early version says nothing.
        algorithm: Of the training that goes on.
        layers: The parameters that can be sparse.

    Raises:
        MisconfigurationException: The density is another one, or layers can be sparse that were whole.

    """
    density = saved.get("density", algorithm.density_asked)
    if density != algorithm.density_asked:
        raise MisconfigurationException(
            f"The checkpoint is of a training with density={density}, and this one has"
            f" density={algorithm.density_asked}: give it density={density} to go on.{_ANEW}"
        )
    whole = [layer_name(name) for name in layers if name not in saved.get("layers", layers)]
    if whole:
        raise MisconfigurationException(
            f"The checkpoint is of a training that left {', '.join(whole)} whole, and in this one they can be sparse:"
            f" give it dense={whole} to go on, or freeze what was frozen.{_ANEW}"
        )
