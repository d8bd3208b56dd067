"""The command ``squall-compress``: prune, share and code the checkpoint of a model that is already trained.

Deep Compression (Han et al. 2016) retrains after each step, which keeps the accuracy; this command has only weights.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from squall.conf.main import UserError, report_errors

_KEYS = ("source", "target", "decode", "density", "bits", "coder", "gap_bits", "hydra")
_USAGE = (
    "squall-compress IN.ckpt OUT.safetensors [density.LAYER=0.09] [bits.LAYER=5], or --decode IN.safetensors OUT.ckpt"
)


def to_overrides(arguments: Iterable[str]) -> list[str]:
    """Turn what is typed into what Hydra reads.

    Args:
        arguments: Two paths, options, and settings of the tree.

    Returns:
        Overrides. A path may have a ``=`` in it, as Lightning's own checkpoints do.

    Raises:
        UserError: If there are more than two paths.

    Example:
        >>> to_overrides(["epoch=1.ckpt", "x.safetensors", "density.fc6=0.09"])
        ["source='epoch=1.ckpt'", "target='x.safetensors'", '+density.fc6=0.09']

    """
    overrides, paths = [], []
    for argument in arguments:
        key = re.split(r"[.=]", argument.lstrip("+~"), maxsplit=1)[0]
        if argument == "--decode":
            overrides.append("decode=true")
        elif argument.startswith("-"):
            overrides.append(argument)
        elif "=" in argument and key in _KEYS:
            overrides.append(f"+{argument}" if argument.startswith(("density.", "bits.")) else argument)
        else:
            paths.append(argument)
    if len(paths) > 2:
        raise UserError(f"{paths[2]!r} is neither a setting nor one of two paths: {_USAGE}")
    names = zip(("source", "target"), paths, strict=False)
    return [f"{name}='{_escape(path)}'" for name, path in names] + overrides


def _escape(text: str) -> str:
    return text.replace("'", r"\'")


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Undo what dots in a layer's name have made of it.

    Args:
        node: Settings, nested by the parts of names.
        prefix: Of all of them.

    Returns:
        Settings by whole names.

    Example:
        >>> flatten({"features": {"0": 0.5}, "fc6": 0.09})
        {'features.0': 0.5, 'fc6': 0.09}

    """
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def find_layers(layers: Iterable[str], group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Find out which setting each layer has.

    Args:
        layers: Names of layers.
        group: What is set, for messages.
        settings: Values by names, or by how names begin: "conv" is conv1 and model.conv2, "fc1" isn't fc10.

    Returns:
        The value of each layer that has one; where several names fit, that of the one that reaches furthest, and of
        those the longest: "net.conv2" before "conv2", and that before "net".

    Raises:
        UserError: If a name fits no layer.

    Example:
        >>> find_layers(["net.conv1", "net.conv2", "net.fc"], "bits", {"conv": 8, "conv2": 6})
        {'net.conv1': 8, 'net.conv2': 6}

    """
    layers = list(layers)
    found: dict[str, tuple[tuple[int, int], Any]] = {}
    for name, value in settings.items():
        pattern = re.compile(rf"(?:^|\.){re.escape(name)}" + r"(?!\d)" * name[-1:].isdigit())
        fitting = {layer: match for layer in layers if (match := pattern.search(layer))}
        if not fitting:
            raise UserError(f"{group}.{name}: no layer is called so. There are: {', '.join(layers) or 'none'}")
        for layer, match in fitting.items():
            rank = (match.end(), len(name))
            if layer not in found or rank > found[layer][0]:
                found[layer] = (rank, value)
    return {layer: found[layer][1] for layer in layers if layer in found}


def shrink(state_dict: Mapping[str, Any], density: Mapping[str, Any], bits: Mapping[str, Any]) -> dict[str, Any]:
    """Prune layers by magnitude, and share their weights.

    Args:
        state_dict: Tensors by name. Those that have two dimensions or more, of floating numbers, are layers, by their
            names without ``.weight``.
        density: Share of weights to keep, by layer as in :func:`find_layers`.
        bits: Of the number of a centroid, by layer.

    Returns:
        A new state_dict, in which those tensors are others. Tied ones are still tied.

    Raises:
        UserError: If a name fits no layer, or a layer can't be pruned or shared so.

    """
    from squall.sparsity import magnitude_mask, share_weights
    from squall.sparsity.coding.tensors import memory_of
    from squall.sparsity.layers import layer_name

    names = {
        layer_name(name): name for name, tensor in state_dict.items() if tensor.dim() > 1 and tensor.is_floating_point()
    }
    densities, widths = find_layers(names, "density", density), find_layers(names, "bits", bits)
    changed = {}
    for layer in dict.fromkeys((*densities, *widths)):
        tensor = weight = state_dict[names[layer]]
        if memory_of(tensor) in changed:
            continue
        try:
            if layer in densities:
                weight = weight.masked_fill(~magnitude_mask(weight, _checked(densities[layer], "density")), 0)
            if layer in widths:
                weight = share_weights(weight, _checked(widths[layer], "bits")).dense()
        except ValueError as error:
            raise UserError(f"{layer}: {error}") from None
        changed[memory_of(tensor)] = weight
    return {name: changed.get(memory_of(tensor), tensor) for name, tensor in state_dict.items()}


def _checked(value: Any, name: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if name == "bits" else int | float):
        raise ValueError(f"{name}={value} must be a {'whole ' * (name == 'bits')}number.")
    return value


def read_state_dict(path: Path) -> dict[str, Any]:
    """Read the weights of a checkpoint, without running any code that may be in it.

    Args:
        path: A Lightning checkpoint, a state_dict that torch has saved, or a compressed file.

    Returns:
        The state_dict.

    Raises:
        UserError: If it is none of these.

    """
    import torch

    from squall.sparsity import load_compressed

    if path.suffix == ".safetensors":
        return load_compressed(path)  # to be pruned further, or coded otherwise
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} can't be read as weights alone: {str(error).strip().splitlines()[0]}") from None
    state_dict = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in state_dict.values()
    ):
        raise UserError(f"{path} is neither a Lightning checkpoint nor a state_dict.")
    return dict(state_dict)


def run(cfg: DictConfig) -> None:
    """Do what a configuration says.

    Args:
        cfg: The composed tree, see ``conf/compress.yaml``.

    Raises:
        UserError: If it asks for what can't be done.

    """
    if cfg.source is None or cfg.target is None:
        raise UserError(f"Say what to read and where to write: {_USAGE}")
    source, target = Path(str(cfg.source)), Path(str(cfg.target))
    if not source.is_file():
        raise UserError(f"{source}: there is no such file.")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target}: there is no such folder.")
    if cfg.decode:
        decode(source, target)
    else:
        settings = [flatten(OmegaConf.to_container(cfg[group])) for group in ("density", "bits")]  # type: ignore[arg-type]
        compress(source, target, *settings, coder=cfg.coder, gap_bits=cfg.gap_bits)


def compress(source: Path, target: Path, density: Mapping[str, Any], bits: Mapping[str, Any], **options: Any) -> None:
    """Write a checkpoint as a compressed file, and print what it came to.

    Args:
        source: The checkpoint.
        target: The file.
        density: Share of weights to keep, by layer.
        bits: Of the number of a centroid, by layer.
        **options: Of :func:`squall.sparsity.save_compressed`.

    """
    from rich.console import Console

    from squall.sparsity import save_compressed

    report = save_compressed(shrink(read_state_dict(source), density, bits), target, **options)
    sizes = (
        f"{report.num_dense_bytes:,} bytes of weights are {report.num_file_bytes:,} in {target}: {report.rate:.1f} x"
    )
    Console().print(report.table(), sizes, sep="\n", highlight=False)


def decode(source: Path, target: Path) -> None:
    """Write a compressed file as a checkpoint.

    Args:
        source: The file.
        target: The checkpoint: Lightning's, to validate and test, if it is a ``.ckpt``, or else a state_dict.

    """
    import torch
    from lightning.pytorch import __version__
    from rich.console import Console

    from squall.sparsity import load_compressed

    state_dict = load_compressed(source)
    lightning = {"state_dict": state_dict, "pytorch-lightning_version": __version__}
    torch.save(lightning if target.suffix == ".ckpt" else state_dict, target)
    Console().print(f"{len(state_dict)} tensors are in {target}", highlight=False)


@hydra.main(version_base="1.3", config_path=".", config_name="compress")
def _app(cfg: DictConfig) -> None:
    run(cfg)


def main() -> None:
    """Run the command; a message and exit code 1 when the user's input is at fault."""

    def app() -> None:
        sys.argv[1:] = to_overrides(sys.argv[1:])
        _app()

    report_errors(app)


if __name__ == "__main__":
    main()
