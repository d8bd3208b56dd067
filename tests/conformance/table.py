"""The table: strategies, features, what each cell is expected to say, and how it is written down."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import squall

if TYPE_CHECKING:
    from .cell import Cell

WORKS = "works"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "features.md"
START, END = "<!-- conformance:start -->", "<!-- conformance:end -->"


@dataclass(frozen=True)
class Entry:
    """A column of the table.

    Args:
        name: Its head, and the key of expected errors.
        num_ranks: Processes that its cells run on.
        num_replicas: Parts into which each global batch is dealt.
        strategy: What a user passes as ``Trainer(strategy=...)``, or a function that makes it.
        exact: Whether its ranks must have what one device has. Ranks that don't wait for each other have not: their
            cells must end, agree on the weights, and have trained on all samples.
        reference: The column that this one is compared with. Few weights don't compute what all do: one rank that has
            few is compared with itself, in what each feature asks of it, and several ranks with one.
    """

    name: str
    num_ranks: int
    num_replicas: int
    strategy: str | Callable[[], Any]
    exact: bool = True
    reference: str = "single"


def _sparse(inner: str) -> Callable[[], Any]:
    def strategy() -> Any:
        return squall.SparseStrategy(squall.sparsity.SparseMomentum(density=0.5), inner=inner)

    return strategy


# Adding a strategy is adding a line here. The first one is what all others are compared with.
STRATEGIES = (
    Entry("single", 1, 1, "auto"),
    Entry("ddp", 2, 2, "ddp"),
    Entry("column_parallel", 2, 1, "column_parallel"),
    Entry("column_parallel 2x2", 4, 2, "column_parallel"),
    Entry("spatial_parallel", 2, 1, "spatial_parallel"),
    Entry("downpour", 1, 1, "downpour"),
    Entry("downpour 2 workers", 2, 1, "downpour", exact=False),
    Entry("hogwild", 1, 1, "hogwild"),
    Entry("hogwild 2 workers", 2, 1, "hogwild", exact=False),
    Entry("sandblaster", 1, 1, "sandblaster", reference="sandblaster"),
    Entry("sandblaster 2 workers", 2, 1, "sandblaster", exact=False, reference="sandblaster"),
    Entry("sparse", 1, 1, _sparse("single"), reference="sparse"),
    Entry("sparse_ddp", 2, 2, _sparse("ddp"), reference="sparse"),
)
# Those that have torch's DistributedDataParallel around the module.
DDP = ("ddp", "sparse_ddp")
# Those whose ranks don't wait for each other.
ASYNCHRONOUS = tuple(entry.name for entry in STRATEGIES if entry.strategy in ("downpour", "hogwild"))
# Those that minimise one loss by a line search.
SANDBLASTER = tuple(entry.name for entry in STRATEGIES if entry.strategy == "sandblaster")


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Args:
        name: Its head.
        run: Called on every rank; what it returns must be the same under every strategy.
        tolerance: Largest relative difference from one device.
        errors: ``{strategy: pattern}`` where a clear error is expected instead.
        late: Strategies whose error may come after the first batch (Lightning's own do at times).
        wrong: ``{strategy: why}`` where a strategy of Lightning's silently differs from one device.
    """

    name: str
    run: Callable[[Cell], Mapping[str, Any]]
    tolerance: float = 1e-9
    errors: Mapping[str, str] = field(default_factory=dict)
    late: tuple[str, ...] = ()
    wrong: Mapping[str, str] = field(default_factory=dict)


FEATURES: dict[str, Feature] = {}


def feature(
    name: str,
    *,
    tolerance: float = 1e-9,
    errors: Mapping[str, str] | None = None,
    late: tuple[str, ...] = (),
    wrong: Mapping[str, str] | None = None,
) -> Callable[[Callable[[Cell], Mapping[str, Any]]], Callable[[Cell], Mapping[str, Any]]]:
    """Make the decorated function a row of the table."""

    def register(run: Callable[[Cell], Mapping[str, Any]]) -> Callable[[Cell], Mapping[str, Any]]:
        assert name not in FEATURES, name
        FEATURES[name] = Feature(name, run, tolerance, errors or {}, late, wrong or {})
        return run

    return register


# What the cells of this session said: {(feature, strategy): verdict}
seen: dict[tuple[str, str], str] = {}


def first_words(message: str, limit: int = 60) -> str:
    """The start of a message as one table cell shows it.

    >>> first_words("A | B, which is long", 8)
    'A / B, …'
    """
    text = " ".join(re.sub(r"[|`*<>_]", lambda match: "/" if match[0] == "|" else "", message).split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"


def render(verdicts: Mapping[tuple[str, str], str]) -> str:
    """The table in Markdown."""
    heads = ["feature", *(entry.name for entry in STRATEGIES)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in FEATURES:
        cells = [verdicts.get((name, entry.name), "not run") for entry in STRATEGIES]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def read_page() -> dict[tuple[str, str], str]:
    """The verdicts that the page shows."""
    text = PAGE.read_text()
    assert START in text, f"{PAGE.name} has no line {START}"
    assert END in text, f"{PAGE.name} has no line {END}"
    rows = [line for line in text.split(START)[1].split(END)[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {(row[0], head): verdict for row in cells[2:] for head, verdict in zip(cells[0][1:], row[1:], strict=True)}


def write_page(verdicts: Mapping[tuple[str, str], str]) -> None:
    """Put the table between the page's markers."""
    text = PAGE.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n{render(verdicts)}\n{END}{after}")
