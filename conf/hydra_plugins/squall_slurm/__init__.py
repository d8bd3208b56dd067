"""Submit a Hydra job to SLURM as the ranks that its Trainer wants: ``hydra/launcher=slurm``.

hydra-submitit-launcher gives all jobs of a sweep the same nodes, lets every rank write the job's folder, and has
submitit own the requeue signal, which starts the job again without a checkpoint. So this uses submitit itself, for
what it is good at: the batch script, and the call in every task.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    import submitit


class SlurmLauncher(Launcher):
    """Submit jobs, and return.

    Args:
        time: Limit in minutes.
        signal_seconds: How long before it the job hears ``USR1``, on which a Strategy of Squall's saves the run and has
            it queued again.
        mode: Of Hydra, which reads it in the configuration.
        **options: Of submitit's ``SlurmExecutor``; those that are None are left to SLURM.

    Raises:
        ImportError: On launch, without submitit.
        squall.conf.main.UserError: On launch, if the Trainer's nodes and devices don't fit its Strategy.

    """

    def __init__(self, time: int, signal_seconds: int, mode: str = "", **options: Any) -> None:
        self._time = time
        self._signal_seconds = signal_seconds
        self._options: dict[str, Any] = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in options.items()
            if value is not None
        }
        self._config: DictConfig | None = None
        self._context: HydraContext | None = None
        self._function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra knows.

        Args:
            hydra_context: Composes configurations.
            task_function: The application.
            config: Of the sweep.

        """
        self._context, self._function, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs.

        Args:
            job_overrides: Of each.
            initial_job_idx: Number of the first.

        Returns:
            What says that each was submitted: its result is in its folder, one day.

        """
        try:
            import submitit
        except ImportError as error:
            raise ImportError("hydra/launcher=slurm needs submitit: pip install lightning-squall[slurm]") from error
        assert self._context is not None
        assert self._config is not None
        setup_globals()
        sweep_dir = Path(str(self._config.hydra.sweep.dir)).absolute()
        sweep_dir.mkdir(parents=True, exist_ok=True)
        jobs = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            told = [*overrides, f"hydra.sweep.dir='{sweep_dir}'"]
            config = self._context.config_loader.load_sweep_config(self._config, told)
            shape = shape_of(config)  # of all jobs, before any is submitted
            jobs.append((number, told, shape))
        done = []
        for number, told, shape in jobs:
            executor = submitit.SlurmExecutor(folder=sweep_dir / "slurm")
            executor.update_parameters(**self._parameters(shape))
            job: submitit.Job[Any] = executor.submit(self, told, number, Singleton.get_state())
            words = " ".join(filter_overrides(told[:-1]))
            print(f"#{number} {words}: job {job.job_id}, {shape['nodes']} x {shape['ntasks_per_node']} ranks")
            done.append(JobReturn(overrides=told, status=JobStatus.COMPLETED))
        print(f"Folders, and what the ranks write: {sweep_dir}")
        return done

    def _parameters(self, shape: Mapping[str, int]) -> dict[str, Any]:
        options = {"cpus_per_task": 1, **self._options}
        more = {"requeue": True, "signal": f"USR1@{self._signal_seconds}", **options.pop("additional_parameters", {})}
        return {
            "job_name": "squall", "time": self._time, "stderr_to_stdout": True, **options, **shape,
            "srun_args": [f"--cpus-per-task={options['cpus_per_task']}"], "additional_parameters": more,
        }  # fmt: skip

    def __call__(self, overrides: Sequence[str], number: int, state: Any) -> Any:
        """Be one rank of a job; called by submitit in each of SLURM's tasks."""
        from squall.conf.main import WRITES_NOTHING

        assert self._context is not None
        assert self._config is not None
        assert self._function is not None
        Singleton.set_state(state)
        setup_globals()
        told = list(overrides) if os.environ["SLURM_PROCID"] == "0" else [*overrides, *WRITES_NOTHING]
        config = self._context.config_loader.load_sweep_config(self._config, told)
        with open_dict(config.hydra.job):
            config.hydra.job.id, config.hydra.job.num = os.environ["SLURM_JOB_ID"], number
        done = run_job(
            task_function=self._function, config=config, job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir", hydra_context=self._context,
        )  # fmt: skip
        return done.return_value  # or its error is raised here


def shape_of(config: DictConfig) -> dict[str, int]:
    """What a job asks SLURM for, as its Trainer says.

    Args:
        config: Of the job, with a node ``trainer``, and a ``strategy`` if ``trainer.devices`` is null.

    Returns:
        Options of sbatch.

    """
    from squall.conf.main import num_devices

    num_nodes, devices = int(config.trainer.get("num_nodes") or 1), int(num_devices(config))
    shape = {"nodes": num_nodes, "ntasks_per_node": devices}
    if config.trainer.get("accelerator") in ("gpu", "cuda"):
        shape["gpus_per_node"] = devices
    return shape
