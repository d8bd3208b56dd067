"""Workers that are several ranks, scripted: who is let in when, and whose end is the worker's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from squall.consistency.packing import Part, cut_pieces, find_pieces
from squall.consistency.plan import ParameterInfo, make_plan

from .scripted import Asked, ScriptedRun


def mate(run: ScriptedRun, rank: int, column: int, peer: str) -> Asked:
    number = len(run._asked)
    asked = run._asked[number] = Asked()
    header: dict[str, Any] = {"op": "hello", "id": number, "rank": rank, "run": 1, "column": column}
    run.coordinator.handle(peer, header, b"", run.now)
    return asked


def speaker(run: ScriptedRun, rank: int, port: int) -> Asked:
    run._num_hellos += 1
    run.peers[rank] = f"{rank}#{run._num_hellos}"
    return run.ask(rank, "hello", rank=rank, run=1, rendezvous=port)


def test_the_others_are_told_where_to_meet_once_the_first_is_there() -> None:
    run = ScriptedRun(2)
    early = mate(run, 1, 1, "early")
    assert early.waits
    speaker(run, 0, 7000)
    assert early.waits
    first = speaker(run, 1, 7001)
    late = mate(run, 1, 2, "late")
    assert early["rendezvous"] == late["rendezvous"] == 7001
    assert early["generation"] == first["generation"] == 0
    assert run.report["num_live"] == 2, "they are no workers of their own"


def test_who_waits_for_the_first_in_vain_is_told_so() -> None:
    run = ScriptedRun(2, options={"join_timeout": 5.0})
    early = mate(run, 1, 1, "early")
    run.coordinator.tick(4.0)
    assert early.waits
    run.coordinator.tick(6.0)
    assert "replica 1 has not come" in early["failed"]
    speaker(run, 1, 7001)
    assert mate(run, 1, 1, "again")["rendezvous"] == 7001


@pytest.mark.parametrize("how", ["gone", "silent", "replaced"])
def test_one_of_them_lost_is_the_worker_lost(how: str) -> None:
    run = ScriptedRun(2, options={"lease_timeout": 10.0})
    for rank in (0, 1):
        speaker(run, rank, 7000 + rank)
        mate(run, rank, 1, f"mate-{rank}")
    run.coordinator.start()
    for rank in (0, 1):
        run.join(rank)
    run.open(0, 1, 1)
    ticket = run.lease(1)["ticket"]
    if how == "gone":
        run.coordinator.lost("mate-1", run.now)
    elif how == "silent":
        run.now = 9.0
        for peer in (run.peers[0], run.peers[1], "mate-0"):
            run.coordinator.handle(peer, {"op": "alive"}, b"", run.now)
        run.now = 11.0
        run.coordinator.tick(run.now)
    else:
        newcomer = mate(run, 1, 1, "another")
        assert newcomer.waits
    assert run.report["num_live"] == 1
    assert "revoked" in run.commit(1, 0, ticket)
    assert {tuple(run.lease(0)["ticket"]) for _ in range(2)} == {(0, 0), (0, 1)}, "its batch is dealt out again"
    again = speaker(run, 1, 7009)
    assert again["generation"] == 1
    if how == "replaced":
        assert newcomer["rendezvous"] == 7009
    else:
        assert mate(run, 1, 1, "mate-1")["generation"] == 1
    run.coordinator.lost("mate-0", run.now)
    assert run.coordinator.leader_lost


def test_pieces_are_cut_to_parts_that_make_the_whole() -> None:
    infos = [ParameterInfo((4, 6), torch.float64, 0, 0), ParameterInfo((3,), torch.float64, 0, 0)]
    plan = make_plan(infos, [True], 2, lambda num, dtype: num * dtype.itemsize)
    pieces = find_pieces(plan, lambda unit: unit.code_offset)
    values = [torch.arange(24.0, dtype=torch.float64), torch.arange(3.0, dtype=torch.float64)]
    columns = [torch.arange(24).view(4, 6)[:, part].reshape(-1) for part in (slice(0, 2), slice(2, 6))]
    memory = [torch.full((slice_.num_code_bytes // 8,), -1.0, dtype=torch.float64) for slice_ in plan.slices]
    for index, width, begin in ((columns[0], 2, 0), (columns[1], 4, 2)):
        runs = [(6 * row + begin, 6 * row + begin + width, width * row) for row in range(4)]
        part = Part((runs, None), (runs, None if begin == 0 else ()))
        for piece in cut_pieces(plan, pieces, part.pushed):
            local = values[0][index] if piece.parameter == 0 else values[1]
            piece.of(memory[piece.shard].view(torch.uint8), torch.float64).copy_(local[piece.start : piece.stop])
    for piece in pieces:
        found = piece.of(memory[piece.shard].view(torch.uint8), torch.float64)
        assert torch.equal(found, values[piece.parameter][piece.start : piece.stop])
