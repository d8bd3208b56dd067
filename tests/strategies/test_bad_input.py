"""What can't work ends soon, with one clear message, and leaves no process behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import squall

from .programs import Ended, run_script


def _check(ended: Ended, message: str) -> None:
    assert ended.code != 0, ended.output
    assert message in ended.output, ended.output
    assert ended.output.count("Traceback (most recent call last)") == 1, ended.output  # from one rank
    assert "finished" not in ended.output
    assert ended.left_behind == []
    assert ended.seconds < 30, ended.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_columns": 0}, "num_columns=0 must be"),
        ({"num_columns": 1.5}, "num_columns=1.5 must be"),
        ({"data_parallel_size": -1}, "data_parallel_size=-1 must be"),
        ({"sparsity": 0.5}, "must be an algorithm"),
        ({"batches": "seeds"}, "'auto' or 'broadcast'"),
        ({"layout": "no/such/file.yaml"}, "Write 'auto'"),
        ({"layout": {"net": "rows"}}, "'columns' or kept 'whole'"),
    ],
)
def test_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        squall.ColumnParallelStrategy(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("columns", "replicas", "devices"), [(2, 1, 3), (3, 1, 2), (2, 2, 2), (4, 1, 6)])
def test_devices_that_columns_do_not_divide(columns: int, replicas: int, devices: int) -> None:
    strategy = squall.ColumnParallelStrategy(num_columns=columns, data_parallel_size=replicas)
    with pytest.raises(MisconfigurationException, match=r"Set Trainer\(devices=...\) to a multiple of num_columns"):
        Trainer(strategy=strategy, devices=devices, accelerator="cpu", logger=False)


def test_devices_that_columns_do_not_divide_in_a_script(tmp_path: Path) -> None:
    _check(run_script(tmp_path, "main(devices=3)"), "MisconfigurationException: num_columns=2 x data_parallel_size=1")


def test_a_layout_that_names_no_layer(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "main(ColumnParallelStrategy(layout={'net.7': 'whole'}))")
    _check(ended, "MisconfigurationException: layout names 'net.7', which is no layer of the module")
    assert "net.0, net.3, net.4" in ended.output


def test_a_data_set_smaller_than_the_replicas(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "main(ColumnParallelStrategy(num_columns=1), num=1)")
    _check(ended, "MisconfigurationException: A data set of 1 samples can't be dealt out to data_parallel_size=2")


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    statement = (
        "other = Model(); other.net[3] = nn.Linear(144, 9); other.net[4] = nn.Linear(9, 2); "
        "t = Trainer(logger=False, accelerator='cpu', enable_model_summary=False); t.strategy.connect(other); "
        "t.save_checkpoint('other.ckpt') if not __import__('os').environ.get('LOCAL_RANK') else None; "
        "CKPT = 'other.ckpt'; main()"
    )
    _check(run_script(tmp_path, statement), "size mismatch for net.3.weight")


def test_a_rank_that_raises(tmp_path: Path) -> None:
    statement = (
        "exec('def hook(model, batch_idx):\\n"
        '    if model.global_rank == 1 and batch_idx == 2: raise ArithmeticError("a bad batch")\'); main()'
    )
    ended = run_script(tmp_path, statement)
    _check(ended, "Rank 1 raised ArithmeticError: a bad batch")
    assert "closed by peer" not in ended.output.lower()


def test_a_script_that_is_well(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "main()")
    assert ended.code == 0, ended.output
    assert ended.output.count("finished on rank") == 2
    assert ended.left_behind == []
