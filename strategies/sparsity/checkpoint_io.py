"""Checkpoints of a Trainer as one compressed file each, without pickle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import __version__
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from .coding import Coder, file
from .coding.state import read_any
from .coding.trees import to_tensors

_ZIP = b"PK\x03\x04"


class CompressedCheckpointIO(TorchCheckpointIO):
    """Write whole checkpoints, and read them, as :func:`~squall.sparsity.save_compressed` does a state_dict.

    Weights, optimizers, loops, callbacks, hyper-parameters, masks and phases are one safetensors file, and nothing in
    it is pickle. What can't be written so is an error that names the entry. Resuming from it is bit for bit what it is
    from Lightning's own.

    A file that torch has saved is read too, as weights only unless the caller says ``weights_only=False``; and one that
    :func:`~squall.sparsity.save_compressed` has written of a module's state_dict, to start from, validate or test.

    Args:
        coder: "ans", the smaller, or "huffman".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> keep = ModelCheckpoint()
        >>> keep.FILE_EXTENSION = ".safetensors"  # or .ckpt, as always: the name doesn't matter
        >>> trainer = Trainer(plugins=CompressedCheckpointIO(), callbacks=[keep], accelerator="cpu", logger=False)

    """

    def __init__(self, coder: Coder = "ans") -> None:
        self.coder = coder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Of a Trainer.
            path: A file of this host.
            storage_options: None.

        Raises:
            TypeError: There are storage options.
            ValueError: An entry can't be written, or the path is of no file of this host.

        """
        if storage_options is not None:
            raise TypeError("CompressedCheckpointIO has no storage_options: leave them out.")
        _check_local(path)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file.write(to_tensors(checkpoint), Path(path), self.coder)

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: A file of this host.
            map_location: Where tensors go, as of :func:`torch.load`; None: the CPU.
            weights_only: Of a file that torch has saved; None is True.

        Raises:
            CompressedFileError: The file is damaged, of another version, or none of these.
            FileNotFoundError: There is none.

        """
        _check_local(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        if is_saved_by_torch(path):
            location: Any = map_location if map_location is not None else "cpu"
            return super().load_checkpoint(path, location, True if weights_only is None else weights_only)
        _, checkpoint = read_checkpoint(path)
        if map_location is None:
            return checkpoint
        moved: dict[str, Any] = apply_to_collection(checkpoint, Tensor, _moved, map_location)
        return moved


def is_saved_by_torch(path: _PATH) -> bool:
    """Say whether a file begins as those of torch.save do, whatever its name is.

    Args:
        path: A file of this host.

    """
    with open(path, "rb") as opened:
        return opened.read(len(_ZIP)) == _ZIP


def read_checkpoint(path: _PATH) -> tuple[bool, dict[str, Any]]:
    """Read a compressed file as a checkpoint of Lightning's.

    Args:
        path: The file.

    Returns:
        Whether the file is a whole checkpoint; and that, or one of its weights alone, to validate and test.

    Raises:
        CompressedFileError: The file is damaged, of another version, or no such file.

    """
    whole, content = read_any(path)
    return whole, content if whole else {"state_dict": content, "pytorch-lightning_version": __version__}


def _check_local(path: _PATH) -> None:
    if not _is_local_file_protocol(path):
        raise ValueError(f"CompressedCheckpointIO writes and reads files of this host, and {path} is none.")


def _moved(tensor: Tensor, map_location: str | Callable[..., Any] | Any) -> Tensor:
    """Move a tensor as torch.load would."""
    if callable(map_location):
        storage = tensor.untyped_storage()
        moved = map_location(storage, "cpu")
        return tensor if moved is None else tensor.to(moved.device)
    if isinstance(map_location, dict):
        return tensor.to(map_location.get("cpu", "cpu"))
    return tensor.to(map_location)
