"""Suites of ``squall-bench``, at a size that takes seconds: they measure what they say, and clean up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from squall import models
from squall.conf.suites import (
    compression,
    deep_compression,
    kernel_cases,
    kernels,
    shards,
    sparse_training,
    staleness,
    stragglers,
    wires,
)
from squall.conf.suites.columns import _ratio, measure
from squall.conf.suites.links import _burst, shaped_hosts, why_not
from squall.conf.suites.programs import programs
from tests.conf.conftest import Left
from tests.required import needs

TINY = {"num_classes": 10, "image_size": 28, "in_channels": 1, "num_columns": 2, "width": 0.1}
FASHION = Path("/usr/share/datasets/fashion-mnist")


def test_columns_suite_takes_turns(left: Left) -> None:
    result = measure(TINY, batch_size=8, num_rounds=1, num_steps=1, links=["loopback"])
    assert [row["strategy"] for row in result.rows] == ["single", "ddp", "column_parallel"]
    assert all(row["images/s"] > 0 for row in result.rows)
    assert result.rows[2]["columns are faster by"] == 1.0
    assert result.figure is not None
    assert not left("squall.conf.suites.ranks")


def test_ratio_is_of_rounds_not_of_medians() -> None:
    seconds = {"column_parallel": [1.0, 2.0, 4.0], "ddp": [2.0, 6.0, 8.0]}
    assert _ratio(seconds, "ddp") == 2.0


@needs("namespaces", why_not())
def test_a_shaped_link_joins_two_hosts_and_is_gone_afterwards() -> None:
    with shaped_hosts("100mbit") as link:
        listener = "import socket; s = socket.create_server(('', 7777)); s.settimeout(10); s.accept(); print('met')"
        host = subprocess.Popen([*link.prefixes[0], sys.executable, "-c", listener], stdout=subprocess.PIPE, text=True)
        caller = f"""
import socket, time
for _ in range(100):
    try:
        socket.create_connection(({link.main_address!r}, 7777), 1); break
    except OSError:
        time.sleep(0.05)
"""
        subprocess.run([*link.prefixes[1], sys.executable, "-c", caller], check=True, timeout=15)
        assert host.communicate(timeout=15)[0] == "met\n"
        shown = subprocess.run(
            [*link.prefixes[0], "tc", "qdisc", "show", "dev", "eth0"], capture_output=True, text=True
        )
        assert "tbf" in shown.stdout
        assert "100Mbit" in shown.stdout
        names = {prefix[3] for prefix in link.prefixes}
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in listed for name in names)


def test_what_programs_print_is_shown_only_of_one_that_ended(capfd: pytest.CaptureFixture[str]) -> None:
    with programs("tests.conf.talking", 2) as talking:
        assert talking.ask({0: {"say": "hello"}, 1: {"say": "hello"}}) == {0: "said", 1: "said"}
        with pytest.raises(RuntimeError, match=r"(?s)rank 1 ended while .*line 59\n.*ValueError: I have had enough"):
            talking.ask({1: {"say": "end"}})
        with pytest.raises(RuntimeError, match="rank 1 ended"):
            talking.ask({1: {"say": "hello"}})
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


def test_no_link_carries_more_than_two_milliseconds_at_once() -> None:
    assert [_burst(rate) for rate in ("1gbit", "100mbit", "2.5mbit")] == [250_000, 25_000, 16_384]
    with pytest.raises(RuntimeError, match="not '1 Gb/s'"):
        _burst("1 Gb/s")


@pytest.mark.asynchronous
def test_stragglers_suite_compares_with_what_each_does_alone(left: Left) -> None:
    result = stragglers.measure(
        TINY, batch_size=8, slowdown=4.0, num_oversubscribed=3, num_rounds=1, num_steps=30, downpour={}
    )
    assert [row["strategy"] for row in result.rows] == ["sum of each alone", "downpour", "ddp"] * 2
    assert all(row["images/s"] > 0 for row in result.rows)
    assert [row["share of alone"] for row in result.rows if row["strategy"] == "sum of each alone"] == [1.0, 1.0]
    assert result.figure is not None
    assert not left("squall.conf.suites.stragglers", "squall.consistency.host")


def test_speeds_add_up_over_the_time_that_all_ranks_train() -> None:
    fast = [float(tick) for tick in range(20)]
    slow = [4.0, 8.0, 12.0]
    assert stragglers.steps_per_second([fast, slow]) == 1.0 + 0.25
    # What a rank does before the others have begun, or when they have ended, is nobody's sum.
    hurried = [0.0, 0.1, 0.2, 0.3, *(4.0 + tick for tick in range(9)), 12.1, 12.2]
    assert stragglers.steps_per_second([hurried, slow]) == pytest.approx(1.0 + 0.25, rel=0.2)
    with pytest.raises(RuntimeError, match="num_steps"):
        stragglers.steps_per_second([fast, [30.0, 31.0]])


def test_shards_suite_applies_what_it_times(left: Left) -> None:
    result = shards.measure(TINY, num_rounds=2)
    assert [row["round trip"][:4] for row in result.rows] == ["bare", "push"]
    assert all(0 < row["fastest"] <= row["ms"] <= row["slowest"] for row in result.rows)
    assert len(result.extra["seconds"]) == 2
    assert result.extra["error"] < 1e-5
    assert not [failure for failure in result.failures if "Adagrad" in failure]
    assert not left("squall.conf.suites.shards", "squall.consistency.host")


def test_shards_suite_fails_below_half_the_speed_and_off_the_weights() -> None:
    fast = {"gloo": 1.0, "shard": 1.9, "push": 0.5, "wait": 1.4}
    assert not shards._result(8, [fast], error=0.0).failures
    assert len(shards._result(8, [fast | {"shard": 2.1}], error=float("nan")).failures) == 2


def _row(net: str, setting: str, rate: float, lost: float) -> dict[str, Any]:
    return {"net": net, "setting": setting, "rate": rate, "points lost": lost}


def test_deep_compression_that_falls_short_is_said() -> None:
    rows = [
        _row("a", "dense", 1.0, 0.0),
        _row("a", "x", 30.0, 0.1),
        _row("a", "y", 45.0, 0.3),
        _row("b", "x", 9.0, 0.0),
    ]
    assert deep_compression.largest_rate(rows, "a", 0.1) == 30.0
    assert deep_compression.largest_rate(rows[1:], "a", 0.05) == 1.0
    assert deep_compression._failures(rows, {"a": {"rate": 40, "points": 0.3}}) == []
    (failure,) = deep_compression._failures(rows, {"a": {"rate": 40, "points": 0.2}})
    assert failure == "a: the largest rate that loses at most 0.2 points is 30.0, not 40."


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_deep_compression_suite_tests_the_file_and_resumes(tmp_path: Path) -> None:
    paper = {"density": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26}, "bits": {"*": 4}}
    arguments: dict[str, Any] = {
        "nets": {"LeNet300": {"paper": paper, "whole": {"density": None, "bits": {"*": 8, "fc3": None}}}}, "seeds": [0],
        "epochs": {"LeNet300": 3}, "batch_size": 50, "lr": {"LeNet300": 0.05}, "training": {"schedule": "cosine"},
        "phases": {"retrain": 1, "share": 1, "num_rounds": 1, "retrain_lr": 1.0, "share_lr": 1.0},
        "data": {"val_size": 59_000}, "claims": {"LeNet300": {"rate": 1000, "points": 50}}, "num_processes": 2,
        "results": str(tmp_path / "cells.jsonl"),
    }  # fmt: skip
    result = deep_compression.measure(**arguments)
    rows = {row["setting"]: row for row in result.rows}
    assert list(rows) == ["dense", "paper", "whole"]
    assert rows["dense"]["rate"] == 1.0
    assert rows["paper"]["rate"] == pytest.approx(4 * 266_610 / rows["paper"]["file bytes"])
    assert 40 < rows["paper"]["rate"] < 80
    assert 4 < rows["whole"]["rate"] < 6
    assert abs(rows["whole"]["points lost"]) < 4
    assert all(row["points lost"] == pytest.approx(rows["dense"]["test accuracy, %"] - row["test accuracy, %"])
               for row in result.rows)  # fmt: skip
    assert len(result.failures) == 1
    assert result.figure is not None
    result.figure.savefig(tmp_path / "x.png")
    before = Path(arguments["results"]).read_text()
    assert deep_compression.measure(**arguments).rows == result.rows
    assert Path(arguments["results"]).read_text() == before, "nothing was trained again"


@pytest.mark.asynchronous
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_staleness_suite_holds_all_but_staleness_equal_and_resumes(tmp_path: Path, left: Left) -> None:
    arguments = {
        "net": TINY | {"dropout": 0.0}, "data": {"max_shift": 0, "flip": False}, "num_samples": 160, "batch_size": 16,
        "training": {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine"},
        "downpour": {"warm_start_steps": 4}, "workers": [1, 2], "rules": ["none", "inverse"], "seeds": [0],
        "results": str(tmp_path / "cells.jsonl"),
    }  # fmt: skip
    result = staleness.measure(**arguments)
    rows = {(row["workers"], row["rule"]): row for row in result.rows}
    assert list(rows) == [(1, "DDP"), (1, "any"), (2, "DDP"), (2, "none"), (2, "inverse")]
    assert all(row["updates"] == 10 for row in rows.values())
    # Without staleness and random augmentation, a worker and DDP make the same net.
    assert rows[1, "any"]["test accuracy, %"] == pytest.approx(rows[1, "DDP"]["test accuracy, %"], abs=0.05)
    assert rows[2, "DDP"]["test accuracy, %"] == pytest.approx(rows[1, "DDP"]["test accuracy, %"], abs=0.05)
    assert rows[1, "any"]["mean staleness"] == 0 < rows[2, "none"]["mean staleness"]
    assert result.figure is not None
    assert not left("squall.conf.suites.staleness", "squall.consistency.host")

    path = Path(arguments["results"])
    written = path.read_text().splitlines()
    assert len(written) == 5
    path.write_text("\n".join(written[:4]) + "\n" + written[4][:30] + "\n")  # ended while it wrote
    again = staleness.measure(**arguments)
    assert [cell["seconds"] for cell in again.extra["cells"]][:4] == [
        json.loads(line)["seconds"] for line in written[:4]
    ]
    assert len(path.read_text().splitlines()) == 6
    assert [row["rule"] for row in again.rows] == [row["rule"] for row in result.rows]


def test_staleness_suite_asks_for_the_best_rule_within_half_a_point() -> None:
    def cells(best: float) -> list[dict[str, Any]]:
        common = {"seed": 0, "workers": 4, "updates": 1, "seconds": 1.0, "mean_staleness": 3.0, "max_staleness": 5}
        shares = {"ddp": 0.9, "none": best - 0.1, "inverse": best}
        return [common | {"rule": rule, "accuracy": share} for rule, share in shares.items()]

    settings = {"net": {}, "num_samples": 1, "batch_size": 1, "training": {}, "downpour": {}}
    assert not staleness._result(cells(0.896), settings, [0]).failures
    assert "4 workers" in staleness._result(cells(0.894), settings, [0]).failures[0]


def test_staleness_suite_refuses_what_cant_be_held_equal() -> None:
    with pytest.raises(ValueError, match="evenly"):
        staleness._check(num_samples=64, batch_size=64, workers=[3], seeds=[0])
    with pytest.raises(ValueError, match="multiple"):
        staleness._check(num_samples=100, batch_size=64, workers=[2], seeds=[0])


@pytest.mark.asynchronous
@needs("namespaces", why_not())
def test_links_suite_measures_both_speed_and_bytes(left: Left) -> None:
    result = wires.measure(
        TINY, rate="200mbit", batch_sizes=[4], num_rounds=1, num_steps=20, claims={"ddp": {4: 1e9}},
        alternatives={
            "alone": {"strategy": "alone", "num_steps": 150},
            "ddp": {"strategy": "ddp"},
            "ddp int8": {"strategy": "ddp", "hook": "int8"},
            "ddp PowerSGD": {"strategy": "ddp", "hook": "powersgd"},
            # Many: the one that begins first must not be through before the other has begun.
            "downpour int8": {"strategy": "downpour", "num_steps": 300, "options": {"codec": "int8", "overlap": True}},
        },
    )  # fmt: skip
    rows = {row["alternative"]: row for row in result.rows}
    assert list(rows) == ["alone", "ddp", "ddp int8", "ddp PowerSGD", "downpour int8"]
    assert all(row["images/s"] > 0 for row in rows.values())
    sent = {name: row["MB sent a step"] for name, row in rows.items()}
    assert sent["alone"] < 0.01 * sent["ddp"]
    assert 0.2 < sent["ddp int8"] / sent["ddp"] < 0.35  # a quarter of the bytes, and headers
    assert sent["downpour int8"] < 0.5 * sent["ddp"]
    assert len(result.failures) == 1
    assert result.figure is not None
    assert not left("squall.conf.suites.wires", "squall.consistency.host")


def test_compressed_files_come_near_to_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet as the claim is about it: 61 million weights, and both coders; how fast is for a benchmark to say."""
    monkeypatch.setattr(compression, "_SECONDS", 1e3)
    result = compression.measure(["alexnet_2012"], ["ans", "huffman"], num_rounds=1)
    assert not result.failures
    assert [row["coder"] for row in result.rows] == ["ans", "huffman"]
    assert all(row["exact"] for row in result.rows)
    assert 36 < result.rows[1]["rate"] < result.rows[0]["rate"] < result.rows[0]["bound"] < 37.5
    table = result.extra["tables"]["alexnet_2012 ans"]
    densities = {row["layer"]: round(row["dens. %"]) for row in table if row["weights"] > 5000}
    assert densities == dict(conv1=84, conv2=38, conv3=35, conv4=37, conv5=37, fc6=9, fc7=9, fc8=25, total=11)


def test_the_bound_by_hand() -> None:
    """Two of eight weights, of two values: 8 H(1/4) bits of positions, two of codes, and a bias."""
    weight = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    assert compression.bound({"w": weight, "b": torch.zeros(3)}) == pytest.approx(8 * 0.8112781 + 2 + 96)


def test_compression_that_falls_short_is_said() -> None:
    good = {"net": "alexnet_2012", "coder": "ans", "above it %": 1.9, "decode s": 1.1, "read s": 0.2, "exact": True}
    assert compression._judge([good]) == []
    for change in ({"above it %": 2.1}, {"decode s": 1.3}, {"exact": False}):
        assert len(compression._judge([good | change])) == 1
    assert compression._judge([good | {"coder": "huffman", "above it %": 5.9}]) == []
    assert compression._judge([good | {"net": "vgg16", "decode s": 3.0}]) == []


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_sparse_training_suite_compares_with_dense_and_resumes(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "nets": ["LeNet300"], "densities": [0.05, 0.01], "seeds": [0], "epochs": {"LeNet300": 2}, "batch_size": 50,
        "lr": {"LeNet300": 0.05}, "algorithms": {
            "sparse_momentum": {"kind": "SparseMomentum"}, "rigl": {"kind": "RigL", "update_every": 10},
            "static": {"kind": "Static"},
        },
        "training": {"momentum": 0.9, "weight_decay": 5e-4}, "drop_every": 0.5,
        "data": {"val_size": 59_000}, "claims": {"LeNet300": {"0.05": 1e-3, "0.01": 1e3}}, "num_processes": 2,
        "results": str(tmp_path / "cells.jsonl"),
    }  # fmt: skip
    result = sparse_training.measure(**arguments)
    rows = {(row["density"], row["algorithm"]): row for row in result.rows}
    assert list(rows) == [
        (1.0, "dense"), *((density, name) for density in (0.05, 0.01) for name in arguments["algorithms"])
    ]  # fmt: skip
    for (density, _), row in rows.items():
        assert row["live weights"] == pytest.approx(density * 266_200, abs=2 + 0.001 * 266_200 * density)
        assert 10 < row["test error, %"] < 90
        assert row["x dense"] == pytest.approx(row["test error, %"] / rows[1.0, "dense"]["test error, %"])
    assert any("LeNet300 at 5%" in failure and "not 0.001" in failure for failure in result.failures)
    assert not any("not 1000" in failure for failure in result.failures)
    assert result.figure is not None

    path = Path(arguments["results"])
    written = path.read_text().splitlines()
    assert len(written) == 7
    path.write_text("\n".join(written[:6]) + "\n" + written[6][:30] + "\n")  # ended while it wrote
    again = sparse_training.measure(**arguments)
    assert len(path.read_text().splitlines()) == 8
    times = {json.dumps(cell) for cell in again.extra["cells"]}
    assert len(times & {json.dumps(cell) for cell in result.extra["cells"]}) == 6
    errors = [[cell["error"] for cell in run.extra["cells"]] for run in (result, again)]
    assert errors[0] == errors[1], "a cell is what its seed says"


def test_kernels_suite_compares_ways_and_says_what_falls_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def case() -> Iterator[kernels.Ways]:
        x = torch.ones(200, 200)
        yield kernels.Ways({"a": lambda: x @ x @ x, "b": lambda: x @ x}, lambda: x + 1, {"bf16": lambda: x}, repeats=3)

    monkeypatch.setattr(kernels, "CASES", {"one": case, "two": case})
    result = kernels.measure(["o"], {"one": 1e6}, num_rounds=3, num_threads=[1, 2])
    assert [(row["work"], row["threads"]) for row in result.rows] == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]
    assert result.rows[0]["ratio"] > 1
    assert result.rows[0]["against 1 thread"] is None
    assert result.rows[2]["against 1 thread"] > 0
    assert len(result.failures) == 1
    assert "one: " in result.failures[0]
    assert "not 1000000.0" in result.failures[0]
    assert result.figure is not None
    result.figure.savefig(tmp_path / "x.png")
    with pytest.raises(ValueError, match="there is no 'three'"):
        kernels.measure(["three"], {}, 1, [1])


@pytest.mark.parametrize("name", kernels.CASES)
def test_every_kernel_case_has_ways_of_one_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith(("AlexNet", "VGG")):
        pytest.skip("takes gigabytes, and what it compares is tested by itself")
    with kernels.CASES[name]() as ways:
        results = [work() for work in (*ways.dense.values(), ways.ours)]
        assert all(result is None or result.shape == results[0].shape for result in results)


@pytest.mark.parametrize("name", [name for name in kernels.CASES if name.startswith(("AlexNet at", "VGG-16 at"))])
def test_first_layers_of_networks_stay_whole(name: str) -> None:
    net, density, _, whole = kernels.CASES[name].args
    with torch.device("meta"):
        module = getattr(models, net)()
    left = [key for key, parameter in module.named_parameters() if parameter.ndim >= 2 and key.startswith(whole)]
    assert left == [next(key for key, parameter in module.named_parameters() if parameter.ndim >= 2)]
    small = kernel_cases.prune(torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 9)), density, "0.")
    assert bool(small[0].weight.all())
    assert not bool(small[1].weight.all())
    with pytest.raises(ValueError, match=r"conv0.*Sequential has no such layer"):
        kernel_cases.prune(small, density, "conv0.")
