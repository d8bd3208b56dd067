"""Start the ranks of a run on one host: one run, one output folder, and one end.

Lightning's launcher repeats the program's command line in every process. Under Hydra that goes wrong in two ways: a
sweep (``-m``) is repeated as a sweep in every rank, and each rank makes an output folder of its own. And a rank
that dies takes the others down with ``kill -9``, which leaves the user without a message.
:class:`HydraAwareLauncher` is Lightning's launcher with those three things put right; without Hydra it starts the
very processes that Lightning would.

Example:
    A strategy uses it in place of Lightning's own::

        def _configure_launcher(self):
            self._launcher = HydraAwareLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy as _LightningDDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import distributed

from squall._allocation import check_allocation, find_main_address
from squall._gang import Gang, RankFailedError, membership
from squall._hydra_job import HydraJob, current_job
from squall._requeue import run_in_slurm
from squall.consistency.addresses import facing

__all__ = ["DDPStrategy", "HydraAwareLauncher", "RankFailedError", "finish"]

# What a launch leaves in the environment, and what the next job of a sweep must not find there.
_LAUNCH_VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"),
)
_CONNECTION_WORDS = ("connection", "closed by peer", "gloo", "nccl", "tcpstore", "store", "timed out", "broken pipe")


class _Run:
    """One launch in this process: its gang, and the state of the process from before."""

    def __init__(self, gang: Gang, job: HydraJob | None, num_processes: int) -> None:
        self.gang = gang
        self.job_config = None if job is None else job.config
        self.num_processes = num_processes
        self.variables = {name: os.environ.get(name) for name in _LAUNCH_VARIABLES}
        self.num_threads = torch.get_num_threads()

    def restore(self) -> None:
        for name, value in self.variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads(self.num_threads)


_run: _Run | None = None


class HydraAwareLauncher(_SubprocessScriptLauncher):
    """Lightning's subprocess launcher, at home in Hydra, and with ranks that end together.

    Every rank but the first is started as the same program (a script, ``python -m`` a module, or a console script).
    In a Hydra job it gets the configuration that the job was composed to and the job's output folder, and writes
    nothing of its own there; every job of a sweep has its own ranks on a port of its own. At the end of the job
    they are waited for, the process group is destroyed, and the environment is what it was.

    Several Trainers in one program share its ranks, as with Lightning.

    Failures: an error in any rank ends all of them. The launching process raises :class:`RankFailedError` with the
    traceback of the rank that failed first, or with the signal that killed it, unless the error was its own; where
    it can't be made to raise (it waits for a rank that will never come) it writes the message and exits with code 1
    within seconds. Ranks don't outlive a launching process that is killed.

    Threads: of the cores that this process may use, every one of the host's R ranks gets 1/R as torch threads, unless
    ``OMP_NUM_THREADS`` is set.

    Args:
        cluster_environment: Knows addresses and ranks.
        num_processes: Ranks on this host.
        num_nodes: Hosts.
        ends_together: Whether a rank that is lost ends the others. Without, the run goes on, the end says which rank
            was lost, and ranks outlive a launching process that is killed, to end by themselves; one that fails can
            wait for them, see :meth:`let_others_end`.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: On launch, if an earlier Trainer of the
            same program has already started another number of processes.

    Example:
        >>> from lightning.fabric.plugins.environments import LightningEnvironment
        >>> launcher = HydraAwareLauncher(LightningEnvironment(), num_processes=1, num_nodes=1)
        >>> launcher.launch(lambda: "result")
        'result'

    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        ends_together: bool = True,
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._ends_together = ends_together

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the ranks, unless they are there already, and call `function` on each of them.

        Args:
            function: What to call.
            *args: Its positional arguments.
            trainer: Lightning's Trainer.
            **kwargs: Its keyword arguments.

        Returns:
            What `function` returned on this rank.

        Raises:
            RankFailedError: If another rank failed first.
            MisconfigurationException: If SLURM has started other ranks than these, or this host finds no way to rank 0.

        """
        with self._noting_sigterm(trainer):
            return self._launch(function, *args, trainer=trainer, **kwargs)

    @contextlib.contextmanager
    def _noting_sigterm(self, trainer: Any) -> Iterator[None]:
        """Keep Lightning from telling others of SIGTERM within the signal: they hear of it before the next batch.

        Its handler broadcasts wherever this rank is; another one that waits for this rank there would wait for ever.
        """
        if trainer is None:
            yield
            return
        connector = trainer._signal_connector

        def note(signum: int, frame: Any) -> None:
            if not connector.received_sigterm:
                self.kill(signum)
            connector.received_sigterm = True

        connector._sigterm_notifier_fn = note
        try:
            yield
        finally:
            vars(connector).pop("_sigterm_notifier_fn", None)

    def _launch(self, function: Callable[..., Any], *args: Any, trainer: Any, **kwargs: Any) -> Any:
        on_gpu = trainer is not None and isinstance(trainer.accelerator, CUDAAccelerator)
        check_allocation(self.cluster_environment, self.num_processes, self.num_nodes, on_gpu)
        if membership.started_by_launcher:
            return self._call_as_member(function, *args, **kwargs)
        job = current_job()
        is_alone = _run is not None and not _run.gang.procs and self.num_nodes == 1
        if _run is not None and (is_alone or _run.job_config is not (job and job.config)):
            finish()  # a rank alone, or an earlier job whose end went unnoticed
        if _run is None and self.cluster_environment.creates_processes_externally:
            find_main_address(self.cluster_environment)
            self._choose_interface()
            _share_threads(self.num_processes)
            return run_in_slurm(self.cluster_environment, not self._ends_together, trainer, function, *args, **kwargs)
        if _run is None:
            self._start(job)
        elif _run.num_processes != self.num_processes:
            raise MisconfigurationException(
                f"This program already runs as {_run.num_processes} processes, and a Trainer in it now asks for"
                f" devices={self.num_processes}. Give every Trainer of one program the same `devices`."
            )
        assert _run is not None
        self.procs = _run.gang.procs
        return self._call_with_gang(_run.gang, function, *args, **kwargs)

    def _start(self, job: HydraJob | None) -> None:
        global _run
        self._check_can_spawn_children()
        command, cwd = (list(_basic_subprocess_cmd()), None) if job is None else job.command()
        run = _Run(Gang([], [], None), job, self.num_processes)
        environment = self.cluster_environment
        self._choose_interface()
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        os.environ["NODE_RANK"] = str(environment.node_rank())
        os.environ["LOCAL_RANK"] = str(environment.local_rank())
        os.environ["WORLD_SIZE"] = str(self.num_processes * self.num_nodes)
        _share_threads(self.num_processes)

        environments = []
        for local_rank in range(1, self.num_processes):
            child = os.environ | {"LOCAL_RANK": str(local_rank)}
            if job is not None:
                child["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints the traceback that the launching rank prints
            environments.append(child)
        run.gang = Gang([command] * len(environments), environments, cwd, self._ends_together)
        _run = run
        atexit.register(finish)
        run.gang.start()
        if job is not None:
            job.at_end(lambda failed: finish(failed=failed))

    def _choose_interface(self) -> None:
        """Tell gloo which interface leads to the other ranks: the host's own name may lead elsewhere, or nowhere."""
        environment = self.cluster_environment
        if self.num_nodes > 1 and type(environment) is LightningEnvironment and "MASTER_ADDR" not in os.environ:
            raise MisconfigurationException(
                f"num_nodes={self.num_nodes}, and nobody has said where rank 0 is. Set the environment variables"
                " MASTER_ADDR (an address of rank 0's host) and MASTER_PORT on every host, alike, and NODE_RANK to 0"
                f" on that host, and up to {self.num_nodes - 1} on the others."
            )
        name = facing(environment.main_address if self.num_nodes > 1 else "127.0.0.1")
        if name:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)

    def let_others_end(self) -> None:
        """Wait for the other ranks at the end, though this one has failed: they write down what was learned."""
        if _run is not None:
            _run.gang.is_waited_for = True

    def kill(self, signum: int | signal.Signals) -> None:
        """Hand a signal on to the other ranks.

        One that asks this process to end is not handed on where they end by themselves: they notice that it is gone.
        (What all ranks do in one process group, they end together all the same.)

        Args:
            signum: Which.

        """
        all_in_one = (
            distributed.is_initialized() and distributed.get_world_size() == self.num_processes * self.num_nodes
        )
        if self._ends_together or signum != signal.SIGTERM or all_in_one:
            super().kill(signum)

    @staticmethod
    def _call_as_member(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        atexit.unregister(_destroy_process_group)
        atexit.register(_destroy_process_group)  # gloo's threads don't survive the end of the interpreter
        try:
            return function(*args, **kwargs)
        except Exception as error:
            membership.report(error)
            raise

    @staticmethod
    def _call_with_gang(gang: Gang, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        message = gang.first_failure() if gang.ends_together else None
        if message is not None:
            raise RankFailedError(message)
        try:
            with gang.busy():
                return function(*args, **kwargs)
        except Exception as error:
            if not gang.ends_together:
                raise
            about_a_peer = any(word in str(error).lower() for word in _CONNECTION_WORDS)
            message = gang.first_failure(own_error_at=time.time(), patience=3.0 if about_a_peer else 0.2)
            if message is not None:
                raise RankFailedError(message) from None
            raise
        except BaseException:  # Ctrl-C: Lightning ends the ranks its own way, and there is nothing to blame them for
            gang.interrupted = True
            raise


def finish(failed: bool = False, timeout: float = 30.0) -> None:
    """End what a launch began: wait for the other ranks, destroy the process group, restore environment and threads.

    Called by itself at the end of a Hydra job and at the end of the program; calling it without a launch does nothing.

    Args:
        failed: Whether this rank failed, in which case nobody is waited for, unless the others were left something to
            do (:meth:`HydraAwareLauncher.let_others_end`).
        timeout: Seconds that the other ranks get to come to their own end. Whoever takes longer is ended.

    Raises:
        RankFailedError: If a rank failed after the last work it shared with this one.

    """
    global _run
    run, _run = _run, None
    if run is None:
        return
    atexit.unregister(finish)
    failed = failed or run.gang.interrupted or hasattr(sys, "last_value")
    # NCCL's communicators are destroyed together; with gloo the store of this rank serves the others to their end.
    nccl = distributed.is_initialized() and distributed.get_backend() == "nccl"
    try:
        if nccl:
            distributed.destroy_process_group()
        if (run.gang.is_waited_for or not failed) and not run.gang.wait(timeout):
            sys.stderr.write(f"Some ranks were still at work {timeout:g} s after rank 0 had ended, and were ended.\n")
            failed = True
        message = None if failed else run.gang.first_failure()
    finally:
        run.gang.kill()
        _destroy_process_group()
        run.restore()
    if message is not None and run.gang.ends_together:
        raise RankFailedError(message)
    if message is not None:
        sys.stderr.write(f"{message.replace('; the run ends with it', '; the run went on without it')}\n")


def _destroy_process_group() -> None:
    if distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a peer that is gone
            distributed.destroy_process_group()


def _share_threads(num_processes: int) -> None:
    """Give this process and those it starts their share of the cores, unless the user has."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = max(1, num_cores // num_processes)
    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Put every environment variable back, at the end of the block, to what it was at its start."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class DDPStrategy(_LightningDDPStrategy):
    """Lightning's DDP, started by :class:`HydraAwareLauncher`; all else, and every argument, is Lightning's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=DDPStrategy(), devices=2, accelerator="cpu", logger=False)

    """

    def _configure_launcher(self) -> None:
        if self._start_method != "popen":
            super()._configure_launcher()
            return
        assert self.cluster_environment is not None
        self._launcher = HydraAwareLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
