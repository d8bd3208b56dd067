"""Prints the conformance table at the end of a run."""

from __future__ import annotations

import pytest

from .table import render, seen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-conformance",
        action="store_true",
        help="write the table that `pytest tests/conformance` saw into docs/features.md",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if seen:
        terminalreporter.section("conformance")
        terminalreporter.write_line(render(seen))
