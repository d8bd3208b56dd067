"""``squall-plan simulate``: run one scenario of the event simulation, and write its table, its figures and its picture.

A scenario is a file ``conf/scenario/<name>.yaml`` whose ``_target_`` is a function that returns a
:class:`~squall.conf.bench.SuiteResult`, as those of ``squall-bench`` do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from squall.conf.bench import SuiteResult, write
from squall.conf.main import UserError, report_errors

_SHORT = ("workers", "seed")


def scenarios() -> list[str]:
    """List the scenarios there are.

    Returns:
        Their names, sorted.

    """
    return sorted(path.stem for path in (Path(__file__).parent / "scenario").glob("*.yaml"))


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
    result = hydra.utils.instantiate(cfg.scenario, _convert_="all")
    if not isinstance(result, SuiteResult):
        raise TypeError(f"{cfg.scenario._target_} returned {type(result).__name__}; a scenario returns a SuiteResult.")
    return result


@hydra.main(version_base="1.3", config_path=".", config_name="simulate")
def _app(cfg: DictConfig) -> None:
    result = run(cfg)
    config = HydraConfig.get()
    name = config.runtime.choices.get("scenario") or "scenario"  # one given by its _target_ alone has no name
    write(result, Path(config.runtime.output_dir) / str(name))
    if result.failures:
        raise UserError(" ".join(result.failures))


def main() -> None:
    """Run the command, whose own arguments follow ``simulate``; exit code 1 when the input is at fault."""
    sys.argv[0] = "squall-plan simulate"  # for the record of what a result was made with
    report_errors(_app)


if __name__ == "__main__":
    main()
