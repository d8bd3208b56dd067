"""``squall-plan simulate``: run one scenario of the event simulation, and write its table, its figures and its picture.

A scenario is a file ``conf/scenario/<name>.yaml`` whose ``_target_`` is a function that returns a
:class:`~squall.conf.bench.SuiteResult`, as those of ``squall-bench`` do.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from squall.conf.bench import SuiteResult, finish, names_of, result_of
from squall.conf.main import UserError, report_errors

_SHORT = ("workers", "seed")


def scenarios() -> list[str]:
    """List the scenarios there are.

    Returns:
        Their names, sorted.

    """
    return names_of("scenario")


def run(cfg: DictConfig) -> SuiteResult:
    """Simulate what a configuration says.

    Args:
        cfg: The composed tree, see ``conf/simulate.yaml``.

    Raises:
        UserError: If it names no scenario, or sets what the scenario doesn't have.

    """
    if cfg.get("scenario") is None:
        raise UserError(
            f"Say what to simulate: squall-plan simulate scenario=NAME, with NAME one of: {', '.join(scenarios())}"
        )
    for name in _SHORT:
        if cfg.get(name) is not None:
            if name not in cfg.scenario:
                known = ", ".join(key for key in map(str, cfg.scenario) if not key.startswith("_"))
                raise UserError(f"{name}={cfg[name]}: this scenario has none. It has {known}.")
            OmegaConf.update(cfg, f"scenario.{name}", cfg[name])
    return result_of(cfg.scenario, _convert_="all")


@hydra.main(version_base="1.3", config_path=".", config_name="simulate")
def _app(cfg: DictConfig) -> None:
    finish(run(cfg), "scenario")


def main() -> None:
    """Run the command, whose own arguments follow ``simulate``; exit code 1 when the input is at fault."""
    sys.argv[0] = "squall-plan simulate"  # for the record of what a result was made with
    report_errors(_app)


if __name__ == "__main__":
    main()
