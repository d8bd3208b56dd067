"""A layer as the sparse algorithms see it: its weights, which of them live, and what else can be asked about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.weight_norm import WeightNorm

_COMPILED = "_orig_mod."
# What a layer of these holds is no matrix whose entries are connections; also where another layer is tied to it.
_NEVER = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.Embedding, nn.EmbeddingBag)


@dataclass(eq=False)
class Layer:
    """The weights of one layer and the mask over them.

    Args:
        name: The parameter's name in the module.
        weight: The parameter; zero where the mask is.
        mask: Which weights live; bool, of the weight's shape and on its device.
        signals: What functions have asked for with :func:`~squall.sparsity.reads`: see ``momentum`` and ``gradient``.
        generator: Where random numbers are to come from: its state is equal on all ranks and part of checkpoints.

    Example:
        >>> Layer("fc.weight", torch.eye(2), torch.eye(2, dtype=torch.bool)).density
        0.5

    """

    name: str
    weight: Tensor
    mask: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def momentum(self) -> Tensor:
        """The momentum of every weight, dead ones included; 0 where none has moved yet."""
        return self._signal("momentum")

    @property
    def gradient(self) -> Tensor:
        """The gradient of every weight at this step, dead ones included; 0 where the loss doesn't reach."""
        return self._signal("gradient")

    def _signal(self, name: str) -> Tensor:
        if name not in self.signals:
            raise ValueError(f"A function reads layer.{name}, which is only kept for those marked @reads({name!r}).")
        return self.signals[name]

    @property
    def num_live(self) -> int:
        """How many weights live."""
        return int(self.mask.sum())

    @property
    def num_dead(self) -> int:
        """How many weights don't."""
        return self.mask.numel() - self.num_live

    @property
    def density(self) -> float:
        """Live weights over all."""
        return self.num_live / self.mask.numel()


def plain_name(name: str) -> str:
    """Name a parameter as the module has it without torch.compile.

    Args:
        name: Its name.

    Example:
        >>> plain_name("net._orig_mod.fc.weight")
        'net.fc.weight'

    """
    return name.replace(_COMPILED, "")


def layer_name(parameter: str) -> str:
    """Name the layer of a parameter, as metrics and patterns do.

    Args:
        parameter: The parameter's name.

    Example:
        >>> layer_name("net.fc1.weight"), layer_name("lstm.weight_hh_l0")
        ('net.fc1', 'lstm.weight_hh_l0')

    """
    return parameter.removesuffix(".weight")


def find_layers(module: nn.Module, dense: Sequence[str] | None = ()) -> dict[str, nn.Parameter]:
    """Find the parameters that can be sparse.

    These are the trainable ones with two dimensions or more: weights of linear, convolutional, recurrent and attention
    layers. Biases, lengths that `weight_norm` keeps, normalisations, embeddings and what is tied to them, frozen
    weights and weights without elements are left whole.

    Args:
        module: Any module.
        dense: Names or patterns (``*``, ``?``) of layers or parameters to leave whole as well; any name of a parameter
            that has several. None for none.

    Returns:
        The parameters by name, the first of those they have, in the module's order. A part that torch.compile wraps
        has the name it has without.

    Raises:
        ValueError: A pattern matches no such layer, none is left, or a weight has no shape yet.

    Example:
        >>> list(find_layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), dense=["2"]))
        ['0.weight']

    """
    found: dict[str, nn.Parameter] = {}
    aliases: dict[int, list[str]] = {}
    whole: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} has uninitialized parameters, which can't be masked: run one forward pass before fit."
            )
        names = aliases.setdefault(id(parameter), [])
        if not names and parameter.ndim >= 2 and parameter.requires_grad and parameter.numel():
            found[plain_name(name)] = parameter
        names.append(plain_name(name))
        if not _connects(module, name):
            whole.add(id(parameter))
    found = {name: parameter for name, parameter in found.items() if id(parameter) not in whole}
    names_of = {name: aliases[id(parameter)] for name, parameter in found.items()}
    dense = () if dense is None else dense
    if isinstance(dense, str):
        raise ValueError(f"dense={dense!r} must be a list of names or patterns: dense=[{dense!r}].")
    left = dict(found)
    for pattern in dense:
        matching = {name for name in found if _matches(names_of[name], pattern)}
        left = {name: value for name, value in left.items() if name not in matching}
        if not matching:
            layers = ", ".join(map(layer_name, found)) or "none"
            raise ValueError(
                f"dense={list(dense)}: no layer is called {pattern!r}. Those that could be sparse: {layers}."
            )
    if not left:
        raise ValueError(
            "No layer is left to be sparse: the module has no trainable weights of two dimensions or more."
        )
    return left


def _matches(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(layer_name(name), pattern) for name in names)


def _connects(module: nn.Module, name: str) -> bool:
    """Whether a parameter, by one of its names, is a matrix whose entries are connections."""
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    # torch's two weight_norms keep the lengths of the rows in original0 and weight_g: one number a row.
    lengths = [f"{hook.name}_g" for hook in owner._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    # Attention has biases with a batch's and a sequence's dimension: bias_k, bias_v.
    return not (isinstance(owner, _NEVER) or own == "original0" or own in lengths or own.startswith("bias"))


def smallest(score: Tensor, among: Tensor, num: int) -> Tensor:
    """Choose the places with the smallest scores; of equal ones, the first.

    Args:
        score: A number a place.
        among: Which places can be chosen; bool.
        num: How many to choose.

    Returns:
        The chosen places; bool, of the same shape.

    Raises:
        ValueError: There aren't so many.

    Example:
        >>> smallest(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True]), 1)
        tensor([False, False,  True])

    """
    places = among.flatten().nonzero().squeeze(1)
    if not 0 <= num <= len(places):
        raise ValueError(f"can't choose {num} of {len(places)} places")
    chosen = torch.zeros(among.numel(), dtype=torch.bool, device=among.device)
    if num:
        scores = score.detach().flatten()[places]
        limit = scores.kthvalue(num).values  # much sooner found than an order of all
        if limit.isnan():  # which is larger than any number
            below, equal = ~scores.isnan(), scores.isnan()
        else:
            below, equal = scores < limit, scores == limit
        chosen[places[below]] = True
        chosen[places[equal][: num - int(below.sum())]] = True
    return chosen.view(among.shape)


def largest(score: Tensor, among: Tensor, num: int) -> Tensor:
    """Choose the places with the largest scores; of equal ones, the first. Otherwise as :func:`smallest`.

    Example:
        >>> largest(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([False, True, True]), 1)
        tensor([False, False,  True])

    """
    return smallest(-score.detach(), among, num)


def num_kept(density: float, num_weights: int) -> int:
    """How many weights a density leaves, at least one.

    Args:
        density: Share of the weights.
        num_weights: All of them.

    """
    return max(1, round(density * num_weights))


def densities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Say how dense each layer is, and all of them together, as metrics are called.

    Args:
        masks: The masks by parameter.

    Returns:
        ``density/<layer>`` and ``density/total``.

    Example:
        >>> densities({"fc.weight": torch.tensor([[True, False]])})
        {'density/fc': 0.5, 'density/total': 0.5}

    """
    live = {name: int(mask.sum()) for name, mask in masks.items()}
    values = {f"density/{layer_name(name)}": live[name] / mask.numel() for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    return {**values, "density/total": sum(live.values()) / total if total else 1.0}
