"""What SLURM has given to a job: whether ranks fit into it, where rank 0 is, and whether its nodes live."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from contextlib import suppress

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

_DAEMON_PORT = 6818  # of a node's slurmd, where scontrol names none
_PATIENCE = 3.0  # seconds


def check_allocation(environment: ClusterEnvironment, num_devices: int, num_nodes: int, on_gpu: bool) -> None:
    """Refuse, before anything starts, an allocation that ranks would wait in for others that never come.

    What Lightning's ``SLURMEnvironment`` sees (``--ntasks`` without ``--ntasks-per-node``, another number of devices or
    of nodes than SLURM's) it says by itself.

    Args:
        environment: Who starts the processes.
        num_devices: Of the Trainer, on each node.
        num_nodes: Of the Trainer.
        on_gpu: Whether its devices are GPUs.

    Raises:
        MisconfigurationException: With the line to change.
        ValueError: As Lightning raises it.

    """
    in_slurm = isinstance(environment, SLURMEnvironment) and environment.job_id() is not None
    num_ranks = num_devices * num_nodes
    if in_slurm and num_ranks > 1 and "SLURM_STEP_ID" not in os.environ:
        raise MisconfigurationException(
            f"Of {num_ranks} ranks this is the only one: the batch script runs python itself. Put `srun` before the"
            " command in the batch script."
        )
    per_task, per_node = os.environ.get("SLURM_GPUS_PER_TASK", ""), os.environ.get("SLURM_NTASKS_PER_NODE", "1")
    if in_slurm and on_gpu and per_task and per_node != "1":
        raise MisconfigurationException(
            f"`--gpus-per-task={per_task}` hides from each task the GPUs of the others, and Lightning chooses among all"
            f" of a node's. Write `#SBATCH --gpus-per-node={per_node}` in its place."
        )
    environment.validate_settings(num_devices=num_devices, num_nodes=num_nodes)
    num_tasks = int(os.environ.get("SLURM_NTASKS", num_ranks))
    if in_slurm and num_tasks != num_ranks:
        raise MisconfigurationException(
            f"srun has started {num_tasks} tasks, and Trainer(devices={num_devices}, num_nodes={num_nodes}) makes"
            f" {num_ranks} ranks. Leave `--ntasks` out of the srun line, and write `#SBATCH --nodes={num_nodes}` and"
            f" `#SBATCH --ntasks-per-node={num_devices}`."
        )


def find_main_address(environment: ClusterEnvironment) -> None:
    """Let ranks find rank 0's node even where its name in SLURM is no name of a host: SLURM knows the address.

    Args:
        environment: Whose address is to be set; nothing happens to that of another launcher than SLURM.

    """
    if not isinstance(environment, SLURMEnvironment) or "MASTER_ADDR" in os.environ:
        return
    name = environment.resolve_root_node_address(os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        address, _ = _addresses(name).get(name, (name, 0))
        os.environ["MASTER_ADDR"] = address


def dead_nodes() -> list[str]:
    """The nodes of this job whose SLURM daemon doesn't answer, as far as that can be told."""
    found = []
    for name, place in _addresses(os.environ.get("SLURM_NODELIST", "")).items():
        try:
            socket.create_connection(place, _PATIENCE).close()
        except OSError:
            found.append(name)
    # If not even this node's answers, tasks can't ask: that says nothing of the others.
    return [] if os.environ.get("SLURMD_NODENAME") in found else found


def kill_wait() -> str:
    """The seconds that SLURM leaves a job between SIGTERM and SIGKILL; its own default if it doesn't say."""
    found = re.search(r"KillWait\s*=\s*(\d+)", _scontrol("show", "config") or "")
    return found[1] if found else "30"


def queue_again() -> bool:
    """Ask SLURM to put this job back into its queue; returns whether it will."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    return _scontrol("requeue", job) is not None


def _addresses(nodes: str) -> dict[str, tuple[str, int]]:
    said = _scontrol("--oneliner", "show", "node", nodes) if nodes else None
    found: dict[str, tuple[str, int]] = {}
    for line in (said or "").splitlines():
        fields: dict[str, str] = dict(re.findall(r"(NodeName|NodeAddr|Port)=(\S+)", line))
        if "NodeName" in fields:
            name = fields["NodeName"]
            found[name] = fields.get("NodeAddr", name), int(fields.get("Port", 0)) or _DAEMON_PORT
    return found


def _scontrol(*arguments: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=10 * _PATIENCE)
        if done.returncode == 0:
            return done.stdout
    return None
