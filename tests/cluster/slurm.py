"""A real SLURM on one host: a controller, and two nodes that are daemons of their own ports."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
TASKS_PER_NODE = 4
# Deaths are noticed, and jobs are queued again, within seconds: SLURM's defaults are minutes.
CONFIG = """
ClusterName=squall
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=10
KillWait=5
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port0} CPUs={tasks}
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port1} CPUs={tasks}
PartitionName=all Nodes=node0,node1 Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why SLURM can't be run here; empty if it can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"SLURM lacks {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else ""


def eventually(what: Callable[[], Any], message: Callable[[], str], seconds: float = 150.0) -> Any:
    """Wait until something holds; return it. Or else fail with a message that is made then."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, message()
        time.sleep(0.1)
    return found


class Slurm:
    """The daemons, and commands for them.

    Args:
        folder: Of all that they write; its path must be short, as it holds a socket.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = {"controller_port": free_port(), "port0": free_port(), "port1": free_port()}

    def start(self) -> None:
        """Start all daemons; return when both nodes are there."""
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, tasks=TASKS_PER_NODE, **self.ports))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{name}={self.folder}/munge.{end}" for name, end in (
            ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"), ("key-file", "key"),
        )]  # fmt: skip
        self._spawn("munged", "--foreground", "--force", "--num-threads=2", *files)
        eventually((self.folder / "munge.socket").exists, self.logs)
        self._spawn("slurmctld", "-D")
        for node in ("node0", "node1"):
            self.start_node(node)
        eventually(lambda: self.states() == ["idle", "idle"], self.logs)

    def start_node(self, node: str) -> None:
        """Start one node's daemon."""
        self._spawn(node, "-D", "-N", node, program="slurmd")

    def _spawn(self, name: str, *arguments: str, program: str = "") -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [program or name, *arguments], env=self.environment(), stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def environment(self, **more: str) -> dict[str, str]:
        """What finds this SLURM, and nothing that says which rank a process is."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "MASTER_", "PL_"))
            and name not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
        }
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", **more}

    def call(self, *command: str, check: bool = True, timeout: float = 120.0, cwd: Path = ROOT, **env: str) -> str:
        """Run a command; return what it says on both channels."""
        done = subprocess.run(
            command, env=self.environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout, cwd=cwd,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def states(self) -> list[str]:
        """Of the two nodes."""
        return self.call("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()

    def submit(self, script: str, folder: Path, **env: str) -> str:
        """Submit a batch script, in a folder; return the number of its job."""
        path = folder / "job.sbatch"
        path.write_text(script)
        said = self.call("sbatch", "--parsable", "--output=%j.out", "--open-mode=append", str(path), cwd=folder, **env)
        return said.strip().splitlines()[-1]

    def job(self, number: str) -> Mapping[str, str]:
        """All that is known of a job, by SLURM's own names."""
        said = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def wait(self, number: str, state: str = "COMPLETED", seconds: float = 200.0) -> Mapping[str, str]:
        """Wait until a job is over, or in a state; return what is known of it."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", state}
        eventually(
            lambda: self.job(number)["JobState"] in final,
            lambda: f"job {number}: {self.job(number)}\n{self.logs()}",
            seconds,
        )
        return self.job(number)

    def kill_node(self, node: str) -> None:
        """What a node's sudden death is: its daemon and all that it has started are gone, without a word."""
        daemon = psutil.Process(self.daemons.pop(node).pid)
        daemon.kill()
        daemon.wait()
        for process in self.processes():
            with suppress(psutil.Error):
                if process.name().startswith("slurmstepd"):
                    is_there = any(file.path.endswith(f"slurmd-{node}.log") for file in process.open_files())
                else:
                    is_there = process.environ().get("SLURMD_NODENAME") == node
                if is_there:
                    process.kill()

    def processes(self) -> list[psutil.Process]:
        """All that belongs to this SLURM: daemons, their steps, and what jobs have started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and self._has_started(process):
                    found.append(process)
        return found

    def _has_started(self, process: psutil.Process) -> bool:
        if process.name().startswith("slurmstepd"):  # which writes its title where its environment was
            return any(file.path.startswith(str(self.folder)) for file in process.open_files())
        return process.environ().get("SLURM_CONF") == str(self.folder / "slurm.conf")

    def logs(self) -> str:
        """The last of what the daemons wrote."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.[lo][ou][gt]"))
        )

    def stop(self) -> None:
        """End everything, jobs included."""
        with suppress(Exception):
            self.call("scancel", "--signal=KILL", "--user=root", check=False, timeout=10)
        for name in ("node0", "node1", "slurmctld", "munged"):
            if name in self.daemons:
                self.daemons[name].send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        for daemon in self.daemons.values():
            daemon.wait()
        self.daemons.clear()


@contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """A SLURM of which nothing is left afterwards."""
    made = Slurm(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
