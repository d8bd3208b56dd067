"""Every Strategy on hosts that are joined by a wire, and told of nothing but rank 0's address and their own number."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

from squall.conf.suites.links import shaped_hosts, why_not
from squall.consistency import addresses
from squall.launching import HydraAwareLauncher
from tests.cluster.program import EPOCHS, NUM_SAMPLES
from tests.cluster.slurm import ROOT
from tests.ranks import free_port
from tests.required import needs

WORDS = ("SLURM_", "MASTER_", "PL_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "GLOO_", "RANK", "SQUALL_")


def fit_on_hosts(folder: Path, num_hosts: int, strategies: str) -> list[list[dict[str, Any]]]:
    """A rank a host, started by hand."""
    (folder / "home").mkdir()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(WORDS)}
    with shaped_hosts("1gbit", num_hosts) as link:
        command = [sys.executable, "-m", "tests.cluster.program", str(folder), strategies]
        ranks = [
            subprocess.Popen(
                [*prefix, *command, json.dumps({"num_nodes": num_hosts})],
                env=plain | {
                    "MASTER_ADDR": link.main_address, "MASTER_PORT": "29500", "NODE_RANK": str(rank),
                    "OMP_NUM_THREADS": "1", "HOME": str(folder / "home"),
                },
                cwd=ROOT,
            )
            for rank, prefix in enumerate(link.prefixes)
        ]  # fmt: skip
        try:
            assert [rank.wait(200) for rank in ranks] == [0] * num_hosts
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(num_hosts)]


@pytest.mark.asynchronous
@needs("namespaces", why_not())
@pytest.mark.parametrize(
    ("num_hosts", "strategies"),
    [(2, "column_parallel,spatial_parallel,hybrid_parallel,ddp,downpour"), (3, "ddp,downpour")],
    ids=["a wire", "a switch"],
)
def test_every_strategy_crosses_a_link(tmp_path: Path, num_hosts: int, strategies: str) -> None:
    ends = fit_on_hosts(tmp_path, num_hosts, strategies)
    for end in zip(*ends, strict=True):
        assert {one["interface"] for one in end} == {"eth0"}
        assert {one["world_size"] for one in end} == {num_hosts}
        assert all(one["weights"] == end[0]["weights"] for one in end)
        if end[0]["strategy"] in ("column_parallel", "spatial_parallel"):
            assert end[0]["seen"] == EPOCHS * NUM_SAMPLES
        elif end[0]["strategy"] == "downpour":
            assert end[0]["samples"] == EPOCHS * NUM_SAMPLES


def test_the_interface_is_the_one_that_leads_to_rank_0() -> None:
    assert addresses.facing("127.0.0.1") == addresses.facing("localhost") == "lo"
    with pytest.raises(MisconfigurationException, match="variable MASTER_ADDR"):
        addresses.facing("no-such-host.invalid")


def test_a_host_that_has_no_way_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoWay(socket.socket):
        def connect(self, address: Any) -> None:
            raise OSError("Network is unreachable")

    monkeypatch.setattr(addresses.socket, "socket", NoWay)
    with pytest.raises(MisconfigurationException, match=r"no route to rank 0's host, 10\.1\.2\.3"):
        addresses.facing("10.1.2.3")


def test_hosts_that_are_told_of_no_other_say_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    launcher = HydraAwareLauncher(LightningEnvironment(), num_processes=1, num_nodes=2)
    with pytest.raises(MisconfigurationException, match=r"MASTER_ADDR .* MASTER_PORT .* NODE_RANK"):
        launcher.launch(lambda: "not reached")


@pytest.mark.asynchronous
def test_torchrun_starts_the_ranks_of_two_hosts(tmp_path: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(WORDS)}
    run = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
    ]
    program = ["-m", "tests.cluster.program", str(tmp_path), "column_parallel"]
    hosts = [
        subprocess.Popen([*run, f"--node-rank={rank}", *program], env=plain | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
        for rank in range(2)
    ]
    assert [host.wait(200) for host in hosts] == [0, 0]
    for rank in range(2):
        (end,) = json.loads((tmp_path / f"end-{rank}.json").read_text())
        assert (end["rank"], end["world_size"], end["seen"]) == (rank, 2, EPOCHS * NUM_SAMPLES)
