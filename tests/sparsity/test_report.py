"""The paper's table: its own arithmetic, from its own figures."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from squall.sparsity import CompressionReport, TensorStatistics, save_compressed


def test_one_layer_of_the_paper():
    """LeNet-300-100's ip1 (table 2): 8 % of weights, 6 + 5 bits before coding and 4.4 + 3.7 after it."""
    figures = TensorStatistics("ip1.weight", 235_200, 18_816, 940_800, 21_826, 29_165, 6, 4.4, 5, 3.7)
    row, total = CompressionReport([figures], 22_000).rows()
    assert row["layer"] == "ip1"
    assert row["dens. %"] == pytest.approx(8)
    assert row["P+Q %"] == pytest.approx(3.1, abs=0.01)
    assert row["P+Q+H %"] == pytest.approx(2.32, abs=0.01)
    assert row["rate"] == pytest.approx(43.1, abs=0.05)
    assert total["rate"] == pytest.approx(940_800 / 22_000)


def test_totals_are_weighted():
    one = TensorStatistics("a.weight", 100, 10, 400, 20, 30, 4, 3.0, 5, 4.0)
    two = TensorStatistics("b.weight", 1000, 30, 4000, 100, 200, 8, 7.0, 5, 2.0)
    total = CompressionReport([one, two], 150).rows()[-1]
    expected = [
        1100, 100 * 40 / 1100, (40 + 240) / 40, (30 + 210) / 40, 5.0, (40 + 60) / 40, 100 * 230 / 4400,
        100 * 150 / 4400, 4400 / 150,
    ]  # fmt: skip
    assert total.pop("layer") == "total"
    assert list(total.values()) == pytest.approx(expected)


def test_of_a_file(tmp_path):
    weight = torch.randint(1, 33, (300, 500), generator=torch.Generator().manual_seed(0)).float()
    weight[torch.rand(300, 500, generator=torch.Generator().manual_seed(1)) > 0.09] = 0
    state_dict = {"fc.weight": weight, "fc.bias": torch.randn(300), "none": torch.empty(0)}
    report = save_compressed(state_dict, tmp_path / "x.safetensors")
    row, bias, none, total = report.rows()
    assert row["w bits"] == row["idx"] == 5
    assert row["P+Q+H %"] < row["P+Q %"]
    bits = (row["w bits H"] + row["idx H"]) * int(weight.count_nonzero()) / 8
    assert row["P+Q+H %"] * weight.nbytes / 100 == pytest.approx(bits + 4 * 32, abs=12)  # the codebook, and a head
    assert (bias["rate"], none["weights"], none["dens. %"]) == (1.0, 0, 100.0)
    assert total["P+Q+H %"] == pytest.approx(100 * report.num_file_bytes / report.num_dense_bytes)
    assert total["weights"] == 150_300


def test_it_fits_a_console(tmp_path):
    state_dict = {"model.conv1_1.weight": torch.zeros(300, 500), "b": torch.ones(3)}
    report = save_compressed(state_dict, tmp_path / "x.safetensors")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "model.conv1_1 " in text
    assert "150K" in text
    assert "…" not in text


def test_of_nothing(tmp_path):
    report = save_compressed({}, tmp_path / "x.safetensors")
    assert [row["layer"] for row in report.rows()] == ["total"]
    assert report.rate == 0
