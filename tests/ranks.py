"""Run a test's function on several real processes, with a real process group, and bring back what each returned.

Starting a process costs seconds of imports (a minute of them on a busy machine), so the processes are kept between
tests, and no call's time begins before they are there; each call gets a process group of its own. A call that hangs,
dies or raises takes its processes with it, and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from squall.conf.suites.programs import free_port as free_port

_START_SECONDS = 250
_LATEST_SECONDS = 60  # that a rank may answer after another


class RankError(AssertionError):
    """A function failed on one of the ranks."""


def _serve(rank: int, num_ranks: int, connection: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Left by a test that called Lightning's seed_everything; ranks would start from it, where one device does not.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    devnull = open(os.devnull, "w")  # noqa: SIM115  (lives as long as the process)
    os.dup2(devnull.fileno(), 1)
    import squall  # noqa: F401

    # A data worker that collected a process group of an earlier fit would join threads that it has not got.
    os.register_at_fork(after_in_child=gc.freeze)
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        if task is None:
            return
        function, args, kwargs, rendezvous, environment = task
        before = dict(os.environ)
        try:
            if rendezvous is not None:
                torch.distributed.init_process_group(
                    "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks,
                    timeout=timedelta(seconds=60),
                )  # fmt: skip
            else:
                os.environ.update(environment)
                os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), NODE_RANK="0")
            result = function(*args, **kwargs)
            reply = ("ok", result)
        except pytest.skip.Exception as skip:
            reply = ("skip", str(skip))
        except BaseException as error:
            reply = ("error", f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            os.environ.clear()
            os.environ.update(before)
        connection.send(reply)


class _Pool:
    def __init__(self, num_ranks: int) -> None:
        context = mp.get_context("spawn")
        pairs = [context.Pipe() for _ in range(num_ranks)]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, num_ranks, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for connection in self.connections:
            if not connection.poll(_START_SECONDS):
                self.stop()
                raise RankError(f"{num_ranks} processes have not started within {_START_SECONDS} s")
            connection.recv()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


_pools: dict[int, _Pool] = {}


def stop_all() -> None:
    """End the processes that are kept: they have some hundred megabytes each."""
    while _pools:
        _pools.popitem()[1].stop()


atexit.register(stop_all)


def run(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    lightning: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on ``num_ranks`` processes.

    Args:
        num_ranks: Number of processes.
        function: A module-level function; it may use ``torch.distributed`` on gloo.
        args: Its arguments, pickled.
        timeout: Seconds after which the processes are killed and the call fails.
        lightning: Leave the process group to a Trainer: set the environment of an external launcher instead.
        kwargs: Its keyword arguments.

    Returns:
        What each rank returned.
    """
    pool = _pools.get(num_ranks)
    if pool is None or not all(process.is_alive() for process in pool.processes):
        pool = _pools[num_ranks] = _Pool(num_ranks)
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = None if lightning else os.path.join(folder, "rendezvous")
        for connection in pool.connections:
            connection.send((function, args, kwargs, rendezvous, environment))
        replies: dict[int, tuple[str, Any]] = {}
        pending = dict(enumerate(pool.connections))
        while pending:
            ready = wait(list(pending.values()), timeout=timeout if not replies else _LATEST_SECONDS)
            if not ready:
                break
            for rank, connection in list(pending.items()):
                if connection in ready:
                    try:
                        replies[rank] = connection.recv()
                    except EOFError:
                        replies[rank] = ("error", f"rank {rank} died")
                    del pending[rank]
            if any(kind == "error" for kind, _ in replies.values()):
                wait(list(pending.values()), timeout=2)  # others often say more
                break
    errors = [value for kind, value in replies.values() if kind == "error"]
    if errors or pending:
        _pools.pop(num_ranks).stop()
        raise RankError("\n".join(errors) or f"ranks {sorted(pending)} did not answer within {timeout} s")
    for kind, value in replies.values():
        if kind == "skip":
            pytest.skip(value)
    return [replies[rank][1] for rank in range(num_ranks)]
