"""Jobs that are killed, stopped and interrupted: a user's script, its ranks as real processes, and what they leave.

Ranks are started as an external launcher starts them. To save each of them seconds of imports, they are forked from
one process that has done the importing and nothing else; :meth:`Job.launch` runs ``python script.py`` instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Each sample has a weight of its own, whose gradient is -1 whenever the sample is trained on; each element of
# `updates` has one of -1 in every update. With a learning rate of 1 they end up as exact counts of what was applied.
SCRIPT = '''
import os, signal, sys, time
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
import squall
from squall import DownpourStrategy, EventInjector
from squall.consistency.hosting import get_host


class Model(LightningModule):
    def __init__(self, num, width):
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(num))
        self.updates = nn.Parameter(torch.zeros(width))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def training_step(self, batch, batch_idx):
        index, x = batch
        hook(self.trainer, Steps.own)
        return F.mse_loss(self.net(x), x[:, :1] * x[:, 1:2]) - self.seen[index].sum() - self.updates.sum()

    def configure_optimizers(self):
        counts = {"params": [self.seen, self.updates], "lr": 1.0}
        return torch.optim.SGD([counts, {"params": list(self.net.parameters()), "lr": 0.05}])


class Steps(Callback):
    own = 0

    def on_train_batch_end(self, *args):
        Steps.own += 1


class Present(Callback):
    """Says that this rank trains, and which processes belong to the run."""

    generation, frozen = 0, None

    def on_train_epoch_start(self, trainer, module):
        if Steps.own > 0:
            return
        Present.frozen = module.frozen.clone()
        rank = trainer.global_rank
        if rank == 0:
            say("host", get_host().process.pid)
            say("shards", *get_host().request({"op": "shards"})["pids"])
        say(f"training-{rank}", os.getpid())

    def on_train_batch_end(self, trainer, *args):
        Present.generation = trainer.strategy.client.generation

    def on_exception(self, trainer, module, exception):
        say(f"exception-{trainer.global_rank}", type(exception).__name__)


def say(name, *words):
    with open(name + ".part", "w") as file:
        file.write(" ".join(map(str, words)))
    os.rename(name + ".part", name)


def until(name):
    while not os.path.exists(name):
        time.sleep(0.005)


def shards():
    return get_host().request({"op": "shards"})["pids"]


def hook(trainer, step):
    pass


def main(num=64, batch=4, epochs=2, width=3, injector=None, ckpt=None, callbacks=(), name="result",
         devices=None, seed=0, trainer=None, **strategy):
    torch.manual_seed(seed)
    Steps.own = 0
    data = TensorDataset(torch.arange(num), torch.randn(num, 4))
    model = Model(num, width)
    single = strategy.pop("single", False)
    options = dict(
        strategy="auto" if single else DownpourStrategy(**{"num_shards": 2, "lease_timeout": 20, **strategy}),
        devices=1 if single else devices or int(os.environ["WORLD_SIZE"]), accelerator="cpu", logger=False,
        max_epochs=epochs, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=".",
        callbacks=[Steps(), *([] if single else [Present()]), *([injector] if injector else []), *callbacks],
    )
    fitter = Trainer(**{**options, **(trainer or {})})
    fitter.fit(model, DataLoader(data, batch_size=batch, shuffle=True), ckpt_path=ckpt, weights_only=False)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    result = dict(weights=weights, step=fitter.global_step, own=Steps.own)
    if not single:
        result.update(report=dict(fitter.strategy.report), events=fitter.strategy.events)
        result.update(generation=Present.generation, frozen=Present.frozen)
    path = f"{name}-{fitter.global_rank}"
    torch.save(result, path + ".part")
    os.rename(path + ".part", path)


if __name__ == "__main__":
    exec(sys.argv[1])
'''


PATIENCE = 150.0  # seconds: ranks that a launcher starts import for a minute each where much else is tested beside them


class Nursery:
    """The process that ranks are forked from."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _RENDEZVOUS}
        environment.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.alive: set[int] = set()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "PL_GLOBAL_SEED")


def _nurse() -> None:
    import torch

    import squall  # noqa: F401

    torch.set_num_threads(1)
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if children[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if ended else None
            answer: Any = children[pid]
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
                return
            children[answer] = None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid, code in children.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any]) -> None:
    """In the forked process: be ``python script.py statement``."""
    import runpy

    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # it may have been looked up
    sys.argv = ["script.py", request["statement"]]
    sys.path[0] = request["folder"]
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for here, there in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(here, there)
    sys.stdin = open(0)  # noqa: SIM115
    try:
        runpy.run_path("script.py", run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.last_value = None  # type: ignore[assignment]
        sys.exit(1)


def poll(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Wait for something that other processes bring about."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.01)


class Job:
    """The processes of one run.

    Args:
        folder: An empty one.
        nursery: Where ranks come from.
        num_ranks: World size.
        statement: What each rank does.

    """

    def __init__(self, folder: Path, nursery: Nursery, num_ranks: int, statement: str) -> None:
        self.folder = folder
        self.statement = statement
        self.num_ranks = num_ranks
        self.tag = uuid.uuid4().hex
        self.pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}  # by pid
        self.launcher: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._nursery = nursery
        self._hosts: set[int] = set()
        (folder / "script.py").write_text(SCRIPT)
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._master_port = probe.getsockname()[1]

    def _environment(self) -> dict[str, str]:
        return {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._master_port), "TMPDIR": str(self.temporary),
            "SQUALL_TEST_JOB": self.tag, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip

    def start(self, *ranks: int, statement: str = "") -> Job:
        """Start ranks as an external launcher does; without any, all of them."""
        for rank in ranks or range(self.num_ranks):
            environment = {
                **self._environment(), "WORLD_SIZE": str(self.num_ranks), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
            }  # fmt: skip
            self.pids[rank] = self._nursery.ask(
                folder=str(self.folder), environment=environment, statement=statement or self.statement
            )
        return self

    def launch(self) -> Job:
        """Run ``python script.py`` and have it start its ranks itself."""
        environment = {key: value for key, value in os.environ.items() if key not in _RENDEZVOUS}
        with (self.folder / "output.txt").open("w") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, "script.py", self.statement], cwd=self.folder, stdout=output, stderr=output,
                env={**environment, **self._environment()}, start_new_session=True,
                # What runs in a shell's background ignores Ctrl-C, and so does all that it starts.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
        return self

    # ------------------------------------------------------------------ while it runs

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def words(self, name: str, timeout: float = PATIENCE) -> list[str]:
        """What a rank says in a file of this name, as soon as it does."""
        path = self.folder / name
        poll(lambda: path.exists() or self._all_ended(), f"{name}\n{self._log()}", timeout)
        assert path.exists(), f"{name} was never said\n{self._log()}"
        if not self.port:
            records = list(self.temporary.glob("squall-*.json"))
            self.port = json.loads(records[0].read_text())["port"] if records else 0
        return path.read_text().split()

    def say(self, name: str) -> None:
        (self.folder / name).touch()

    def trains(self, rank: int) -> int:
        """Wait until a rank trains; returns its process."""
        pid = int(self.words(f"training-{rank}")[0])
        (self.folder / f"training-{rank}").unlink()
        return pid

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def ended(self, rank: int) -> int | None:
        """Exit code of a rank."""
        code: int | None = self._nursery.ask(poll=self.pids[rank])
        return code

    def _all_ended(self) -> bool:
        if self.launcher is not None:
            return self.launcher.poll() is not None
        return bool(self.pids) and all(self.ended(rank) is not None for rank in self.pids)

    def _log(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text()[-6000:] if path.exists() else ""

    # ------------------------------------------------------------------ at its end

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Wait until it has ended by itself, and find nothing left; returns exit codes, by rank."""
        poll(self._all_ended, f"the end of {sorted(self.pids)}\n{self._log() if self.folder else ''}", timeout)
        poll(lambda: not self.processes(), "the end of the processes beside the ranks", 10)
        self.nothing_is_left()
        if self.launcher is not None:
            return [self.launcher.returncode]
        return [int(self.ended(rank) or 0) for rank in sorted(self.pids)]

    def processes(self) -> list[int]:
        """Processes of the run, other than ranks that an external launcher started."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if f"SQUALL_TEST_JOB={self.tag}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def nothing_is_left(self) -> None:
        host = self.folder / "host"
        if host.exists():
            assert not list(Path("/dev/shm").glob(f"squall-{host.read_text()}-*"))
        assert not list(self.temporary.glob("squall-*"))
        if self.port:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", self.port)) != 0

    def result(self, rank: int, name: str = "result") -> dict[str, Any]:
        """What a rank ended with."""
        import torch

        path = self.folder / f"{name}-{rank}"
        assert path.exists(), f"rank {rank} has no result\n{self._log()}"
        found: dict[str, Any] = torch.load(path, weights_only=False)
        return found

    def end(self) -> None:
        """Leave nothing, whatever went wrong."""
        for pid in [*self.processes(), *(pid for rank, pid in self.pids.items() if self.ended(rank) is None)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        host = self.folder / "host"
        for path in Path("/dev/shm").glob(f"squall-{host.read_text()}-*") if host.exists() else ():
            path.unlink(missing_ok=True)
        if self.launcher is not None:
            self.launcher.wait(10)


if __name__ == "__main__":
    _nurse()


Start = Callable[..., Job]  # as the fixture `job` is one
