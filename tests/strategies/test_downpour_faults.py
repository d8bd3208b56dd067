"""Downpour survives its machines: real processes, really killed, stopped and interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .fault_programs import Job, Start, poll

pytestmark = pytest.mark.asynchronous


def check(job: Job, survivors: list[int], num: int = 64, epochs: int = 2, **expected: Any) -> dict[str, Any]:
    """The accounts are exact, and all who survived have the same weights."""
    first = job.result(survivors[0])
    for rank in survivors:
        result = job.result(rank)
        report, weights = result["report"], result["weights"]
        assert report["num_samples"] == num * epochs
        assert report["version"] == result["step"] == sum(count for _, count in report["staleness"])
        # Not what the coordinator says, but what the weights have been through.
        assert weights["seen"].eq(epochs).all(), weights["seen"]
        assert weights["updates"].eq(report["version"]).all()
        assert all(value.isfinite().all() for value in weights.values())
        assert all(value.equal(first["weights"][key]) for key, value in weights.items())
    for key, value in expected.items():
        assert first["report"][key] == value, (key, first["report"])
    return first


def lockstep(num_ranks: int, num_steps: int) -> str:
    """A script by which every rank comes to its first steps, however the cores are shared."""
    ranks = list(range(num_ranks))
    return "EventInjector()" + "".join(f".barrier_at({ranks}, {step})" for step in range(num_steps + 1))


# ------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("seed", [1, 2])
def test_a_worker_is_killed_at_a_random_step(job: Start, seed: int) -> None:
    step = random.Random(seed).randrange(7)
    started = job(3, f"main(injector={lockstep(3, step)}.fail_at({1 + seed % 2}, {step}))").start()
    codes = started.wait()
    victim = 1 + seed % 2
    assert codes[victim] == -signal.SIGKILL
    assert [code for rank, code in enumerate(codes) if rank != victim] == [0, 0]
    result = check(started, [rank for rank in range(3) if rank != victim], num_live=2, num_lost=0)
    assert result["report"]["num_reissued"] >= 1
    assert result["report"]["version"] == 32


def test_every_worker_but_rank_0_is_killed(job: Start) -> None:
    started = job(3, f"main(devices=3, injector={lockstep(3, 4)}.fail_at(1, 2).fail_at(2, 4))").launch()
    assert started.wait() == [0]
    check(started, [0], num_live=1, num_lost=0, num_joined=3, version=32)
    assert "was killed by SIGKILL; the run went on without it" in started.output


@pytest.mark.parametrize("overlap", [False, True])
def test_shards_are_killed_while_pushes_are_in_flight(job: Start, overlap: bool) -> None:
    kill = """
def hook(trainer, step):
    if trainer.is_global_zero and step % 3 == 1:
        pid = shards()[step // 3 % 2]
        if pid:
            os.kill(pid, signal.SIGKILL)
            say(f"killed-{step}")
"""
    started = job(2, f"{kill}\nmain(width=1 << 19, overlap={overlap}, injector={lockstep(2, 8)})").start()
    assert started.wait() == [0, 0]
    check(started, [0, 1], num_live=2, num_lost=0, num_reissued=0, version=32)
    num_killed = len(list(started.folder.glob("killed-*")))
    assert num_killed >= 3
    assert started.output.count("was lost; another takes its memory over") == num_killed


# ------------------------------------------------------------------ stopped, late, and back again


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.parametrize("where", ["in its batch", "waiting"])
def test_a_worker_is_stopped_for_longer_than_its_lease(job: Start, where: str) -> None:
    program = """
def hook(trainer, step):
    client = trainer.strategy.client
    if trainer.global_rank == 1:
        if step == 2 and client.generation == 0:
            STOP
        if client.generation == 1:
            say("back")
    elif step == 4:
        until("stopped")
        while client.call({"op": "report"})[0]["num_live"] > 1:
            time.sleep(0.01)
        say("given-up")
    elif step == 6:
        until("back")
"""
    stop = {
        "in its batch": "os.kill(os.getpid(), signal.SIGSTOP)",
        "waiting": "say('waits'); trainer.strategy.wait_for_version(8)",
    }[where]
    # 8 updates: 2 of its own, and the 6 that rank 0 makes before it waits for this rank to be back.
    events = "EventInjector().barrier_at([0, 1], 0).barrier_at([0, 1], 2)"
    started = job(2, f"{program.replace('STOP', stop)}\nmain(lease_timeout=1, injector={events})").start()
    if where == "waiting":
        started.words("waits")
        started.kill(1, signal.SIGSTOP)
    poll(lambda: is_stopped(started.pids[1]), "rank 1 stopped")
    started.say("stopped")
    started.words("given-up")
    started.kill(1, signal.SIGCONT)
    assert started.wait() == [0, 0]
    result = check(started, [0, 1], num_live=2, num_joined=3, version=32)
    # The batch that it was in, and the one that it had in hand already.
    assert result["report"]["num_lost"] == 2
    assert result["report"]["num_reissued"] >= 1
    returned = started.result(1)
    assert returned["generation"] == 1
    assert returned["own"] > 4


def test_a_worker_joins_late(job: Start) -> None:
    program = """
def hook(trainer, step):
    if trainer.global_rank == 0 and step == 5:
        say("halfway", trainer.global_step)
        until("joined")
        trainer.strategy.wait_for_version(8)
"""
    started = job(2, f"{program}\nmain(join_timeout=0.01)").start(0)
    assert int(started.words("halfway")[0]) == 5
    started.start(1, statement="main(seed=1)").trains(1)  # its own weights, the frozen ones included, are others
    started.say("joined")
    assert started.wait() == [0, 0]
    check(started, [0, 1], num_live=2, num_joined=2, num_lost=0, num_reissued=0, version=32)
    assert started.result(1)["own"] > 2
    assert started.result(1)["frozen"].equal(started.result(0)["frozen"])


def test_a_killed_worker_is_started_again(job: Start) -> None:
    program = """
def hook(trainer, step):
    if trainer.global_rank == 0 and step == 5:
        until("joined")
        trainer.strategy.wait_for_version(11)
"""
    started = job(2, f"{program}\nmain(injector={lockstep(2, 3)}.fail_at(1, 3))").start()
    started.trains(1)
    poll(lambda: started.ended(1) is not None, "the death of rank 1")
    started.start(1, statement="main()").trains(1)
    started.say("joined")
    assert started.wait() == [0, 0]
    check(started, [0, 1], num_live=2, num_joined=3, num_lost=0, num_reissued=2, version=32)
    again = started.result(1)
    assert again["generation"] == 1
    assert again["own"] > 2


# ------------------------------------------------------------------ the end of it all


def test_ctrl_c_ends_everything(job: Start) -> None:
    started = job(2, "main(devices=2, epochs=1000000)").launch()
    for rank in range(2):
        started.trains(rank)
    assert started.launcher is not None
    os.killpg(started.launcher.pid, signal.SIGINT)
    assert started.wait(60) == [1]
    assert not list(started.folder.glob("result-*"))
    assert "Detected KeyboardInterrupt" in started.output


@pytest.mark.parametrize(("launched", "step"), [(True, 5), (False, 9)])
def test_rank_0_is_lost(job: Start, launched: bool, step: int) -> None:
    # The others stand still until then: they wait for more updates than rank 0 makes.
    held = "".join(f".delay_at({rank}, 3, until_version=1000)" for rank in (1, 2))
    started = job(3, f"main(devices=3, injector={lockstep(3, 2)}{held}.fail_at(0, {step}))")
    codes = started.launch().wait() if launched else started.start().wait()
    assert codes == ([-signal.SIGKILL] if launched else [-signal.SIGKILL, 1, 1])
    assert "All that it had learned is in " in started.output
    assert not list(started.folder.glob("result-*"))
    assert {(started.folder / f"exception-{rank}").read_text() for rank in (1, 2)} == {"LeaderLostError"}

    (path,) = started.folder.glob("rank0-lost-step=*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    updates = checkpoint["global_step"]
    assert path.name == f"rank0-lost-step={updates}.ckpt"
    assert updates >= step
    assert checkpoint["state_dict"]["updates"].eq(updates).all()
    assert checkpoint["state_dict"]["seen"].sum() == 4 * updates

    resume = f"main(ckpt={str(path)!r}, devices=DEVICES)"
    if launched:
        # One device knows nothing of queues: it does what Lightning does with a checkpoint of any step.
        alone = job(1, resume.replace("DEVICES", "1, single=True")).start()
        assert alone.wait() == [0]
        trained = alone.result(0)
        assert trained["step"] > updates
        assert trained["weights"]["updates"].eq(trained["step"]).all()
    else:
        resumed = job(2, resume.replace("DEVICES", "2")).start()
        assert resumed.wait() == [0, 0]
        for rank in range(2):
            result = resumed.result(rank)
            assert result["step"] == result["report"]["version"] == 32
            assert result["weights"]["seen"].eq(2).all()
            assert result["weights"]["updates"].eq(32).all()
            assert result["report"]["num_samples"] == 128 - 4 * updates


@pytest.mark.parametrize(
    ("end", "launched", "code"),
    [
        ("raise ValueError('boom')", True, 1),
        ("raise ValueError('boom')", False, 1),
        ("sys.exit(3)", True, 3),
        ("os.kill(os.getpid(), signal.SIGTERM)", True, 0),  # Lightning's own exception, and its exit code
    ],
)
def test_rank_0_fails(job: Start, end: str, launched: bool, code: int) -> None:
    program = f"""
def hook(trainer, step):
    if trainer.is_global_zero and step == 5:
        {end}
"""
    started = job(2, f"{program}\nmain(devices=2, epochs=20)")
    codes = started.launch().wait() if launched else started.start().wait()
    assert codes == ([code] if launched else [code, 1])
    assert not list(started.folder.glob("result-*"))
    (path,) = started.folder.glob("rank0-lost-step=*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"]["updates"].eq(checkpoint["global_step"]).all()
    assert checkpoint["global_step"] >= 5
    assert (started.folder / "exception-1").read_text() == "LeaderLostError"


# ------------------------------------------------------------------ interleavings as scripts


def test_a_recorded_interleaving_with_a_death_in_it_is_replayed(job: Start) -> None:
    events = "EventInjector().barrier_at([0, 1, 2, 3], 0).barrier_at([0, 1, 3], 2)"
    events += ".delay_at(2, 1, until_version=9).fail_at(1, 2)"
    recorded = job(4, f"main(injector={events})").start()
    recorded.wait()
    check(recorded, [0, 2, 3])
    assert ["lost", 1] in recorded.result(0)["events"]
    path = str(recorded.folder / "result-0")
    schedule = f"torch.load({path!r}, weights_only=False)['events']"
    replayed = job(4, f"main(injector={events}, schedule={schedule})").start()
    replayed.wait()
    check(replayed, [0, 2, 3])
    assert same(recorded.result(0), replayed.result(0))


def test_a_script_that_orders_everything_needs_no_record(job: Start) -> None:
    # Rank r does its step s once all have done their steps before, and all ranks below it this one.
    delays = "".join(f".delay_at({s % 2}, {s // 2}, until_version={s})" for s in range(1, 16))
    run = f"main(devices=2, epochs=1, name=NAME, injector=EventInjector().barrier_at([0, 1], 0){delays})"
    started = job(2, "\n".join(run.replace("NAME", repr(name)) for name in ("first", "second"))).start()
    assert started.wait() == [0, 0]
    first, second = (started.result(0, name) for name in ("first", "second"))
    # Before its very last batch, rank 0 waits for what the other may leave behind.
    assert [rank for kind, rank in first["events"] if kind == "commit"] == [0, 1] * 7 + [1, 0]
    assert same(first, second, "leave")  # which no script orders: rank 1 does so before or after rank 0's last step


def same(one: dict[str, Any], other: dict[str, Any], *in_any_order: str) -> bool:
    apart = {"fetch", *in_any_order}  # weights are fetched before the first update and after the last, in any order
    made = [[event for event in result["events"] if event[0] not in apart] for result in (one, other)]
    assert made[0] == made[1]
    for kind in in_any_order:
        ranks = [sorted(rank for name, rank in result["events"] if name == kind) for result in (one, other)]
        assert ranks[0] == ranks[1]
    return all(value.equal(other["weights"][key]) for key, value in one["weights"].items())


# ------------------------------------------------------------------ for a while


@pytest.mark.timeout(240)
def test_a_soak_ends_with_exact_accounts() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    command = [sys.executable, str(path), "--minutes", "0.75", "--period", "5"]
    before = set(Path("/dev/shm").glob("squall-*"))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    row = next(line for line in ended.stdout.splitlines() if line.startswith("│ ") and "killed" not in line)
    num_workers, num_shards, *_ = (int(word) for word in row.replace("│", " ").split())
    assert num_workers >= 1, ended.stdout
    assert num_shards >= 1, ended.stdout
    assert "DIFFERS" not in ended.stdout
    mine = {path for path in set(Path("/dev/shm").glob("squall-*")) - before if not _host_lives(path)}
    assert not mine


def _host_lives(path: Path) -> bool:
    return Path(f"/proc/{path.name.split('-')[1]}").exists()
