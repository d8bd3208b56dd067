"""The command ``squall-compress``: prune, share and code the checkpoint of a model that is already trained.

Deep Compression (Han et al. 2016) retrains after each step, which keeps the accuracy; this command has only weights.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from squall.conf.main import UserError, report_errors

_GROUPS = ("density", "bits")
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
        ["source='epoch=1.ckpt'", "target='x.safetensors'", "density=['fc6=0.09']"]

    """
    overrides, paths = [], []
    settings: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for argument in arguments:
        key = re.split(r"[.=]", argument.lstrip("+~"), maxsplit=1)[0]
        if argument == "--decode":
            overrides.append("decode=true")
        elif argument.startswith("-"):
            overrides.append(argument)
        elif "=" in argument and key in _GROUPS and argument.startswith(key):
            settings[key].append(argument.removeprefix(key).removeprefix("."))
        elif "=" in argument and key in _KEYS:
            overrides.append(argument)
        else:
            paths.append(argument)
    if len(paths) > 2:
        raise UserError(f"{paths[2]!r} is neither a setting nor one of two paths: {_USAGE}")
    names = zip(("source", "target"), paths, strict=False)
    for group, values in settings.items():
        if values:  # a list, as Hydra would take the dots in names for a tree, in which net.fc1 replaces net
            overrides.append(f"{group}=[{','.join(_quote(value) for value in values)}]")
    return [f"{name}={_quote(path)}" for name, path in names] + overrides


def _quote(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'"


def read_settings(node: Any) -> dict[str, Any]:
    """Say which value each name has.

    Args:
        node: A list of ``name=value``; or of ``=value``, for all layers. None if there is none.

    Returns:
        Values by whole names, that of all layers by an empty one. What is no number is left as it is.

    Example:
        >>> read_settings(["=0.5", "features.0=0.1", "fc6=much"])
        {'': 0.5, 'features.0': 0.1, 'fc6': 'much'}

    """
    pairs = [str(entry).rpartition("=") for entry in node or ()]
    return {name: _number(value) for name, _, value in pairs}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def find_layers(layers: Iterable[str], group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Find out which setting each layer has.

    Args:
        layers: Names of layers.
        group: What is set, for messages.
        settings: Values by names, or by how names begin: "conv" is conv1 and model.conv2, "fc1" isn't fc10; "" is
            every layer.

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
    from torch import Tensor

    from squall.sparsity import magnitude_mask, share_weights
    from squall.sparsity.coding.tensors import memory_of
    from squall.sparsity.layers import layer_name

    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor) and value.numel()}
    names = {
        layer_name(name): name for name, tensor in tensors.items() if tensor.dim() > 1 and tensor.is_floating_point()
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
    new = {name: changed.get(memory_of(tensor), tensor) for name, tensor in tensors.items()}
    return {name: new.get(name, value) for name, value in state_dict.items()}


def _checked(value: Any, name: str) -> Any:
    if not isinstance(value, int if name == "bits" else int | float):
        raise ValueError(f"{name}={value} must be a {'whole ' * (name == 'bits')}number.")
    return value


def read_state_dict(path: Path) -> dict[str, Any]:
    """Read the weights of a checkpoint, without running any code that may be in it.

    Args:
        path: A Lightning checkpoint, a state_dict that torch or safetensors has saved, or a compressed file, of either.

    Returns:
        The state_dict.

    Raises:
        UserError: If it is none of these.

    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from squall.sparsity import load_compressed
    from squall.sparsity.checkpoint_io import is_saved_by_torch
    from squall.sparsity.coding import is_compressed

    if is_compressed(path):
        return load_compressed(path)  # to be pruned further, or coded otherwise
    if path.suffix == ".safetensors" and not is_saved_by_torch(path):
        try:
            return dict(load_file(path))
        except (SafetensorError, KeyError) as error:  # a data type that torch has not
            raise UserError(f"{path}: it is no whole safetensors file ({error}).") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch says to a damaged file may be anything
        words = str(error).strip().splitlines() or ["it is empty, or cut off"]
        raise UserError(f"{path} can't be read as weights alone: {type(error).__name__}: {words[0]}") from None
    state_dict = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state_dict, Mapping) or not all(map(_is_entry, state_dict.items())):
        raise UserError(f"{path} is neither a Lightning checkpoint nor a state_dict.")
    return dict(state_dict)


def _is_entry(entry: tuple[Any, Any]) -> bool:
    """Whether a name and a value are of a state_dict: a tensor, or what a module says by ``get_extra_state``."""
    from torch import Tensor

    name, value = entry
    return isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))


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
    if not cfg.decode:
        settings = [read_settings(cfg[group]) for group in _GROUPS]
        compress(source, target, *settings, coder=cfg.coder, gap_bits=cfg.gap_bits)
        return
    given = [name for name in (*_GROUPS, "gap_bits") if cfg[name] is not None] + ["coder"] * (cfg.coder != "ans")
    if given:
        raise UserError(f"--decode changes nothing in a file: leave {', '.join(given)} out.")
    decode(source, target)


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
    Console().print(report.table(), report.sentence(target), sep="\n", highlight=False)


def decode(source: Path, target: Path) -> None:
    """Write a compressed file as a checkpoint.

    Args:
        source: The file.
        target: If it is a ``.ckpt``, Lightning's checkpoint: the whole one, if the file is one, or else one to validate
            and test. If it is anything else, a state_dict.

    """
    import torch
    from rich.console import Console

    from squall.sparsity import load_compressed
    from squall.sparsity.checkpoint_io import read_checkpoint

    whole = False
    if target.suffix == ".ckpt":
        whole, content = read_checkpoint(source)
        state_dict = content.get("state_dict", {})
    else:
        content = state_dict = load_compressed(source)
    torch.save(content, target)
    what = "a whole checkpoint is" if whole else f"{len(state_dict)} tensors are"
    Console().print(f"{what} in {target}", highlight=False)


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
