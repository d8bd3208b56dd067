"""What a launcher needs to know of Hydra: how to start another rank of *this* job, and when the job is over.

Under Hydra a program's command line doesn't say what a process is to do: in a sweep it names many jobs, and a child
that repeats it would compose its own output folder. A rank is therefore started with the configuration that its job
was composed to, in the job's own folder, and with everything of Hydra that writes turned off. Hydra need not be
installed.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_RUNTIME_INTERPOLATION = re.compile(r"\$\{\s*(hydra|now)\s*:")
_RANKS_CONFIG = "ranks"


class HydraJob:
    """The Hydra job that is running in this process.

    Args:
        config: The job's composed configuration, Hydra's own node included.
        task_config: What the application's function was called with.
        callbacks: Hydra's callbacks of the job.

    """

    def __init__(self, config: Any, task_config: Any, callbacks: Any) -> None:
        self.config = config
        self._task_config = task_config
        self._callbacks = callbacks

    def command(self) -> tuple[list[str], str]:
        """Build the command line that runs one more rank of this job.

        Returns:
            The command line, and the folder to start it in.

        Raises:
            ValueError: If the job runs inside a worker of a Hydra launcher, where the program isn't known.

        """
        hydra = self.config.hydra
        launcher = str(hydra.launcher.get("_target_", ""))
        if hydra.mode is not None and hydra.mode.name == "MULTIRUN" and not launcher.endswith("BasicLauncher"):
            raise ValueError(
                f"hydra/launcher={launcher.split('.')[-1]} runs jobs in workers of its own, where a job of several"
                " processes can't start the rest of itself. Use hydra/launcher=basic, or let the cluster start every"
                " process (tasks_per_node equal to trainer.devices)."
            )
        overrides = [
            "hydra.mode=RUN",
            f"hydra.run.dir={_quote(hydra.runtime.output_dir)}",
            "hydra.output_subdir=null",
            f"hydra.job.name={_quote(hydra.job.name)}",
            f"hydra.job.chdir={str(bool(hydra.job.chdir)).lower()}",
            # A job that logs to the console has all its ranks do so; none but the first writes a file.
            f"hydra/job_logging={'stdout' if 'console' in (hydra.job_logging.root.handlers or []) else 'none'}",
            "hydra/hydra_logging=none",
        ]
        for key in ("num", "id"):
            if not _is_missing(hydra.job, key):
                overrides.append(f"hydra.job.{key}={_quote(hydra.job[key])}")
        source = self._recomposed() if _is_typed(self.config) else self._dumped()
        return [*_program(), *source, *overrides], str(hydra.runtime.cwd)

    def at_end(self, function: Callable[[bool], None]) -> None:
        """Call `function` when the job is over, before Hydra starts the next one of a sweep.

        Args:
            function: Gets whether the job failed. If it raises, the job counts as failed.

        """
        self._callbacks.callbacks.append(_AtJobEnd(self._callbacks.callbacks, function))

    def _dumped(self) -> list[str]:
        """Write the configuration to a file, with what only this process can know put in."""
        from omegaconf import OmegaConf, open_dict, read_write

        hydra = self.config.hydra
        config = self.config.copy()
        # ${now:...} is to be the same on every rank, whether this one has asked for it already or not.
        OmegaConf.copy_cache(from_config=self._task_config, to_config=config)
        with read_write(config), open_dict(config):
            del config["hydra"]
            _resolve_runtime(config)
        OmegaConf.copy_cache(from_config=config, to_config=self._task_config)
        folder = Path(hydra.runtime.output_dir) / (hydra.output_subdir or "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_RANKS_CONFIG}.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
        return ["--config-path", str(folder), "--config-name", _RANKS_CONFIG]

    def _recomposed(self) -> list[str]:
        """Name the configuration and its overrides: a file would lose the dataclasses it is made of."""
        from hydra._internal.utils import get_args_parser

        args = get_args_parser().parse_args(sys.argv[1:])
        command = []
        for flag in ("config_path", "config_name", "config_dir"):
            if getattr(args, flag) is not None:
                command += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
        own = [f"~hydra.callbacks.{name}" for name in self.config.hydra.callbacks]
        return [*command, *self.config.hydra.overrides.task, *own]


class _AtJobEnd:
    """A Hydra callback that one job adds for itself, and that removes itself again."""

    def __init__(self, callbacks: list[Any], function: Callable[[bool], None]) -> None:
        self._callbacks = callbacks
        self._function = function

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Run the function, and let its error be the job's."""
        from hydra.core.utils import JobStatus

        with contextlib.suppress(ValueError):
            self._callbacks.remove(self)
        try:
            self._function(job_return.status is not JobStatus.COMPLETED)
        except Exception as error:
            if job_return.status is JobStatus.COMPLETED:
                job_return.status = JobStatus.FAILED
                job_return.return_value = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def current_job() -> HydraJob | None:
    """Find the Hydra job this code runs in.

    Returns:
        The job, or None without Hydra, and when Hydra only composed a configuration (its compose API): then the program
        itself knows how to compose it again.

    """
    core: ModuleType | None = sys.modules.get("hydra.core.utils")
    if core is None:
        return None
    # HydraConfig tells that there is a job, but neither the job's configuration nor its end. The frame of run_job
    # has both.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is core.run_job.__code__:
            return HydraJob(*(frame.f_locals[name] for name in ("config", "task_cfg", "callbacks")))
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _program() -> list[str]:
    """Tell the program this process runs, as a command: a script, a module or a console script."""
    import __main__

    if __main__.__spec__ is not None:
        name = __main__.__spec__.name
        return [sys.executable, "-m", name.removesuffix(".__main__")]
    from hydra.utils import to_absolute_path  # the script was named relative to where the program began

    return [sys.executable, to_absolute_path(sys.argv[0])]


def _quote(value: object) -> str:
    """Write a value as a string of Hydra's override grammar."""
    if isinstance(value, int):
        return str(value)
    # A backslash run before a quote must be doubled; interpolations must stay text.
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", str(value))
    text = re.sub(r"(\\+)$", lambda match: match[1] * 2, text)
    return "'" + text.replace("${", "\\${") + "'"


def _is_missing(node: Any, key: str) -> bool:
    from omegaconf import OmegaConf

    return OmegaConf.is_missing(node, key) or node.get(key) is None


def _is_typed(config: Any) -> bool:
    """Whether the user's part of the configuration has dataclasses in it."""
    from omegaconf import OmegaConf

    nodes = [node for key, top in _items(config) if key != "hydra" for node in _containers(top)]
    return any(OmegaConf.get_type(node) not in (dict, list, None) for node in [config, *nodes])


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    from omegaconf import DictConfig, ListConfig

    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    if isinstance(node, DictConfig):
        yield from ((key, node._get_node(key)) for key in list(node.keys()))
    elif isinstance(node, ListConfig):
        yield from ((index, node._get_node(index)) for index in range(len(node)))


def _containers(node: Any) -> Iterator[Any]:
    from omegaconf import Container

    if isinstance(node, Container):
        yield node
        for _, child in _items(node):
            yield from _containers(child)


def _resolve_runtime(node: Any) -> None:
    """Put in, in place, what ``${hydra:…}`` and ``${now:…}`` stand for in this process."""
    from omegaconf import Container
    from omegaconf.errors import OmegaConfBaseException

    for key, child in _items(node):
        if child._is_interpolation():
            if _RUNTIME_INTERPOLATION.search(str(child._value())):
                with contextlib.suppress(OmegaConfBaseException):
                    node[key] = node[key]
        elif isinstance(child, Container):
            _resolve_runtime(child)
