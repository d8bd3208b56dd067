"""The command ``squall-bench``: run one suite of measurements, and write its table, its figures and its picture.

A suite is a file ``conf/suite/<name>.yaml`` whose ``_target_`` is a function. It gets the file's other entries as
arguments and returns a :class:`SuiteResult`; all writing is done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from squall.conf.main import UserError, report_errors
from squall.conf.writers import format_value, print_whole, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class SuiteResult:
    """What a suite has measured.

    Args:
        title: Heading of the report.
        rows: The table; all values plain numbers or strings.
        notes: A paragraph below it: what was compared with what, and how.
        figure: A matplotlib figure, or None.
        extra: More figures that only the JSON file holds, such as every single timing.
        failures: A sentence for each claim that the figures don't bear out; with any the command ends with exit code 1.

    Example:
        >>> SuiteResult("Speed", [{"strategy": "ddp", "ratio": 1.0}]).rows[0]["ratio"]
        1.0

    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    notes: str = ""
    figure: Figure | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[str] = ()


def write(result: SuiteResult, stem: Path) -> None:
    """Write a result as Markdown, JSON and, if it has a figure, PNG; and print its table.

    Args:
        result: What was measured.
        stem: Path without suffix.

    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    write_results(
        stem, result.title, result.rows, notes=result.notes, extra={**result.extra, "failures": list(result.failures)}
    )
    if result.figure is not None:
        result.figure.savefig(stem.with_suffix(".png"))
    table = Table(title=result.title, title_style="bold", box=SIMPLE_HEAD)
    columns = list(dict.fromkeys(key for row in result.rows for key in row))
    for name in columns:
        values = [row.get(name) for row in result.rows]
        numeric = all(isinstance(value, int | float | None) for value in values)
        # A heading and a name may break between words; a number may not.
        texts = " ".join([name, *map(format_value, values)])
        table.add_column(name, justify="right" if numeric else "left", min_width=max(map(len, texts.split(" "))))
    for row in result.rows:
        table.add_row(*(format_value(row.get(name)) for name in columns))
    print_whole(table, result.notes, f"[dim]{stem.resolve()}.md .json[/dim]")


def names_of(group: str) -> list[str]:
    """List the entries of a group of the Hydra tree.

    Args:
        group: Its folder.

    Returns:
        Their names, sorted.

    """
    return sorted(path.stem for path in (Path(__file__).parent / group).glob("*.yaml"))


def suites() -> list[str]:
    """List the suites there are.

    Returns:
        Their names, sorted.

    """
    return names_of("suite")


def result_of(entry: DictConfig, **options: Any) -> SuiteResult:
    """Carry out an entry of the Hydra tree that measures, or simulates.

    Args:
        entry: Its ``_target_`` is a function.
        options: Further arguments of Hydra's ``instantiate``.

    Raises:
        TypeError: If the function returns something else.

    """
    result = hydra.utils.instantiate(entry, **options)
    if not isinstance(result, SuiteResult):
        raise TypeError(f"{entry._target_} returned {type(result).__name__}; it has to return a SuiteResult.")
    return result


def finish(result: SuiteResult, group: str) -> None:
    """Write a result to the run's folder.

    Args:
        result: What was found.
        group: Of the entry that found it, whose name the files have.

    Raises:
        UserError: If a claim isn't borne out.

    """
    config = HydraConfig.get()
    name = config.runtime.choices.get(group) or group  # one given by its _target_ alone has no name
    write(result, Path(config.runtime.output_dir) / str(name))
    if result.failures:
        raise UserError(" ".join(result.failures))


@hydra.main(version_base="1.3", config_path=".", config_name="bench")
def _app(cfg: DictConfig) -> None:
    if cfg.get("suite") is None:
        raise UserError(
            f"Say what to measure: squall-bench suite=NAME, with NAME one of: {', '.join(suites()) or '(none)'}"
        )
    finish(result_of(cfg.suite), "suite")


def main() -> None:
    """Run the command; exit code 1 when the input is at fault or a claim isn't borne out."""
    report_errors(_app)


if __name__ == "__main__":
    main()
