"""Prints the conformance tables at the end of a run."""

from __future__ import annotations

import pytest

from .pairs import PAIRS, seen_pairs
from .table import features_table, seen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-conformance",
        action="store_true",
        help="write the tables that `pytest tests/conformance` saw into docs/features.md",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for table, verdicts in ((features_table(), seen), (PAIRS, seen_pairs)):
        if verdicts:
            terminalreporter.section(table.name)
            terminalreporter.write_line(table.render(verdicts))
