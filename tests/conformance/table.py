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
    Entry("hybrid_parallel", 2, 2, "hybrid_parallel"),
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


@dataclass(frozen=True)
class Table:
    """A table between two lines of docs/features.md.

    Args:
        name: Of the two lines.
        corner: Head of the rows' names.
        rows: The rows' names.
        columns: The columns' heads.
    """

    name: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def marks(self) -> tuple[str, str]:
        """The lines before and after it."""
        return f"<!-- {self.name}:start -->", f"<!-- {self.name}:end -->"

    def render(self, verdicts: Mapping[tuple[str, str], str]) -> str:
        """The table in Markdown."""
        lines = ["| " + " | ".join([self.corner, *self.columns]) + " |", "|" + " --- |" * (1 + len(self.columns))]
        for row in self.rows:
            cells = [verdicts.get((row, column), "not run") for column in self.columns]
            lines.append("| " + " | ".join([row, *cells]) + " |")
        return "\n".join(lines)

    def read(self) -> dict[tuple[str, str], str]:
        """The verdicts that the page shows."""
        text = PAGE.read_text()
        for mark in self.marks:
            assert mark in text, f"{PAGE.name} has no line {mark}"
        start, end = self.marks
        rows = [line for line in text.split(start)[1].split(end)[0].splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        heads = cells[0][1:]
        return {(row[0], head): verdict for row in cells[2:] for head, verdict in zip(heads, row[1:], strict=True)}

    def write(self, verdicts: Mapping[tuple[str, str], str]) -> None:
        """Put the table between the page's lines."""
        start, end = self.marks
        before, rest = PAGE.read_text().split(start)
        _, after = rest.split(end)
        PAGE.write_text(f"{before}{start}\n{self.render(verdicts)}\n{end}{after}")

    def check(self, verdicts: Mapping[tuple[str, str], str], update: bool) -> None:
        """Hold the page to what was seen.

        Args:
            verdicts: What this run's cells said.
            update: Write them first; then all must have been run.
        """
        if update:
            missing = [key for row in self.rows for column in self.columns if (key := (row, column)) not in verdicts]
            assert not missing, f"run all cells to update the table; not seen: {missing[:3]}"
            assert "FAILS" not in verdicts.values(), self.render(verdicts)
            self.write(verdicts)
        shown = self.read()
        late = f"the table {self.name} of {PAGE.name} is out of date: run with --update-conformance"
        assert {row for row, _ in shown} == set(self.rows), late
        assert {key: shown.get(key) for key in verdicts} == verdicts, late


def features_table() -> Table:
    """Every Strategy times every feature; to be asked for when features have been registered."""
    return Table("conformance", "feature", tuple(FEATURES), tuple(entry.name for entry in STRATEGIES))
