"""Suite ``all``: one suite after the other, whatever becomes of each."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException

from squall.conf.bench import SuiteResult, result_of, suites, write
from squall.conf.main import explain
from squall.conf.suites.headlines import headlines_of


def measure(names: Sequence[str] | None, settings: Mapping[str, Sequence[str]] | None) -> SuiteResult:
    """Run suites and write what each of them has found, beside a table of all.

    Args:
        names: Of the suites; None for all.
        settings: By name, what of a suite's file is to be otherwise, as on the command line: ``num_rounds=1``,
            ``~nets.LeNet5``; None for nothing.

    Returns:
        A row a suite: how long it took, what it comes to, and what falls short.

    Raises:
        MisconfigurationException: If there is no suite of such a name, or settings aren't lists of ``entry=value``.

    """
    there = [name for name in suites() if name != "all"]
    chosen, settings = there if names is None else list(names), settings or {}
    unknown = sorted({*chosen, *settings} - {*there})
    if unknown:
        raise MisconfigurationException(f"There is no suite {', '.join(unknown)}. There are: {', '.join(there)}.")
    for name, entries in settings.items():
        if isinstance(entries, str | Mapping) or not all(isinstance(entry, str) for entry in entries):
            raise MisconfigurationException(
                f"settings.{name}={entries} must be a list of what is to be otherwise, such as [num_rounds=1]."
            )
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for name in chosen:
        begin = time.perf_counter()
        try:
            result = _run(name, settings.get(name, ()))
            write(result, Path(HydraConfig.get().runtime.output_dir) / name)
            comes_to = "; ".join(f"{what}: {figure}" for what, figure in headlines_of(name, result.rows))
            short = list(result.failures)
        except Exception as error:  # the others are to be measured all the same
            comes_to, short = "", [f"was not measured: {explain(error) or error!r}"]
        minutes = (time.perf_counter() - begin) / 60
        rows.append({"suite": name, "minutes": minutes, "comes to": comes_to, "falls short": " ".join(short)})
        failures += [f"{name}: {sentence}" for sentence in short]
    return SuiteResult("Everything", rows, "Each suite's own table lies beside this one.", failures=failures)


def _run(name: str, settings: Sequence[str]) -> SuiteResult:
    own = [re.sub(r"^([~+]*)", r"\1suite.", entry) for entry in settings]
    return result_of(hydra.compose("bench", overrides=[f"suite={name}", *own]).suite)
