"""How long something takes: distributions of seconds, as a scenario's YAML names them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_BLOCK = 1024  # drawn at once: a call for each number takes twenty times as long


class Distribution(ABC):
    """Of numbers that are 0 or more."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """Their mean."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """Draw independent ones.

        Args:
            rng: What to draw with.
            size: How many.

        Returns:
            ``(size,)``.

        """

    @abstractmethod
    def quantile(self, share: Array) -> Array:
        """Below which number a share of them lies.

        Args:
            share: ``(n,)``, from 0 to 1.

        Returns:
            ``(n,)``.

        """

    def largest(self, rng: np.random.Generator, size: int, among: int) -> Array:
        """Draw the largest of several, without drawing them all: ``F(max) = F^among``.

        Args:
            rng: What to draw with.
            size: How many largest ones.
            among: Of how many each is the largest.

        Returns:
            ``(size,)``.

        """
        return self.quantile(rng.random(size) ** (1.0 / among))

    def stream(self, rng: np.random.Generator) -> Iterator[float]:
        """Draw one after the other, without end."""
        return chain.from_iterable(self.sample(rng, _BLOCK).tolist() for _ in iter(int, 1))


class Constant(Distribution):
    """Always the same.

    Args:
        value: Which.

    Example:
        >>> Constant(2.0).sample(np.random.default_rng(0), 2).tolist()
        [2.0, 2.0]

    """

    def __init__(self, value: float) -> None:
        self._value = _checked("value", value, 0.0)

    @property
    def mean(self) -> float:
        """The value."""
        return self._value

    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """Repeat it."""
        return np.full(size, self._value)

    def quantile(self, share: Array) -> Array:
        """Repeat it."""
        return np.full(len(share), self._value)

    def stream(self, rng: np.random.Generator) -> Iterator[float]:
        """Draw nothing."""
        return iter(lambda: self._value, math.nan)


class Exponential(Distribution):
    """Without memory.

    Args:
        mean: Of them.

    """

    def __init__(self, mean: float) -> None:
        self._mean = _checked("mean", mean, 0.0)

    @property
    def mean(self) -> float:
        """As given."""
        return self._mean

    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """Draw independent ones."""
        return rng.exponential(self._mean, size)

    def quantile(self, share: Array) -> Array:
        """``-mean log(1 - share)``."""
        return np.asarray(-self._mean * np.log1p(-share))


class Lognormal(Distribution):
    """Its logarithm is normal.

    Args:
        mean: Of them, not of their logarithms.
        cv: Standard deviation over mean.

    """

    def __init__(self, mean: float, cv: float) -> None:
        self._mean = _checked("mean", mean, 0.0)
        self._sigma = math.sqrt(math.log1p(_checked("cv", cv, 0.0) ** 2))

    @property
    def mean(self) -> float:
        """As given."""
        return self._mean

    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """Draw independent ones."""
        return self._of(rng.standard_normal(size))

    def quantile(self, share: Array) -> Array:
        """By the normal distribution's."""
        inverse = NormalDist().inv_cdf
        inside = np.clip(share, 1e-300, 1 - 2**-53)
        return self._of(np.fromiter(map(inverse, inside.tolist()), dtype=np.float64, count=len(inside)))

    def _of(self, normal: Array) -> Array:
        return np.asarray(self._mean * np.exp(self._sigma * normal - self._sigma**2 / 2))


class Gamma(Distribution):
    """A sum of waits; with ``cv=1`` exponential.

    Args:
        mean: Of them.
        cv: Standard deviation over mean, above 0.

    """

    def __init__(self, mean: float, cv: float) -> None:
        self._mean = _checked("mean", mean, 0.0)
        self._shape = _checked("cv", cv, 1e-3) ** -2

    @property
    def mean(self) -> float:
        """As given."""
        return self._mean

    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """Draw independent ones."""
        return rng.gamma(self._shape, self._mean / self._shape, size)

    def quantile(self, share: Array) -> Array:
        """By the inverse of the incomplete gamma function."""
        from scipy.special import gammaincinv

        return np.asarray(gammaincinv(self._shape, share) * (self._mean / self._shape))


class Empirical(Distribution):
    """Values that were measured, each as likely as the others.

    Args:
        values: Which, in any order.

    Example:
        >>> Empirical([3.0, 1.0]).quantile(np.array([0.0, 0.5, 1.0])).tolist()
        [1.0, 3.0, 3.0]

    """

    def __init__(self, values: Sequence[float]) -> None:
        if not len(values):
            raise ValueError("values: an empirical distribution needs one or more.")
        self._values = np.sort(np.asarray([_checked("values", value, 0.0) for value in values]))

    @property
    def mean(self) -> float:
        """Of the values."""
        return float(self._values.mean())

    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """Draw them with replacement."""
        return np.asarray(rng.choice(self._values, size))

    def quantile(self, share: Array) -> Array:
        """A step at each value."""
        places = np.minimum((share * len(self._values)).astype(np.int64), len(self._values) - 1)
        return np.asarray(self._values[places])


class Drifting(Empirical):
    """Values that were measured one after the other, while what they depend on changed.

    A stream draws each among those that were measured around the same time; after the last it begins anew.

    Args:
        values: In the order in which they were measured.
        window: How many one after the other are as good as each other.

    Example:
        >>> drawn = Drifting([1.0, 2.0, 30.0, 40.0], 2).stream(np.random.default_rng(0))
        >>> [next(drawn) < 10 for _ in range(6)]
        [True, True, False, False, True, True]

    """

    def __init__(self, values: Sequence[float], window: int) -> None:
        super().__init__(values)
        self._windows = [np.asarray(values[at : at + window]) for at in range(0, len(values), window)]

    def stream(self, rng: np.random.Generator) -> Iterator[float]:
        """Draw as many from each window as it has, with replacement."""
        return chain.from_iterable(
            rng.choice(window, len(window)).tolist() for _ in iter(int, 1) for window in self._windows
        )


class Scaled(Distribution):
    """Another one's numbers, each so many times as large: a slower worker's.

    Args:
        base: The other.
        factor: How many times.

    """

    def __init__(self, base: Distribution, factor: float) -> None:
        self._base, self._factor = base, _checked("factor", factor, 0.0)

    @property
    def mean(self) -> float:
        """So many times the other's."""
        return self._factor * self._base.mean

    def sample(self, rng: np.random.Generator, size: int) -> Array:
        """Draw independent ones."""
        return self._factor * self._base.sample(rng, size)

    def quantile(self, share: Array) -> Array:
        """So many times the other's."""
        return self._factor * self._base.quantile(share)


_KINDS: dict[str, type[Distribution]] = {
    "constant": Constant, "exponential": Exponential, "lognormal": Lognormal, "gamma": Gamma, "empirical": Empirical,
}  # fmt: skip


def make_distribution(name: str, said: float | Mapping[str, Any]) -> Distribution:
    """Make what a scenario says.

    Args:
        name: Of the argument, for messages.
        said: Seconds, or ``{kind: lognormal, mean: 0.1, cv: 0.2}``; kinds are ``constant`` (``value``), ``exponential``
            (``mean``), ``lognormal`` and ``gamma`` (``mean``, ``cv``), and ``empirical`` (``values``).

    Raises:
        ValueError: If there is no such distribution; names the argument and what it may be.

    Example:
        >>> make_distribution("compute", {"kind": "gamma", "mean": 0.1, "cv": 0.5}).mean
        0.1

    """
    if isinstance(said, int | float) and not isinstance(said, bool):
        said = {"kind": "constant", "value": said}
    if not isinstance(said, Mapping) or said.get("kind") not in _KINDS:
        raise ValueError(f"{name}={said!r} must be seconds, or a mapping with kind: one of {', '.join(_KINDS)}.")
    arguments = {key: value for key, value in said.items() if key != "kind"}
    try:
        return _KINDS[said["kind"]](**arguments)
    except TypeError:
        raise ValueError(f"{name}: {said['kind']} doesn't go with {', '.join(arguments) or 'nothing'}.") from None
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def _checked(name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not least <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number, {least:g} or more.")
    return float(value)
