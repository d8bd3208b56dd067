"""Sandblaster: torch's L-BFGS, whoever computes what, and whoever dies."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from squall import SandblasterStrategy
from squall._line_search import warn_of_random_data
from tests.conf.programs import environment as launched_anew
from tests.ranks import run

from . import sandblaster_programs as programs

pytestmark = pytest.mark.asynchronous


def fit(num_ranks: int, function: Any, *args: Any, **options: Any) -> list[Any]:
    return run(num_ranks, function, *args, lightning=True, timeout=240, **options)


def check(results: list[dict[str, Any]], weights: torch.Tensor, tolerance: float = 1e-8) -> None:
    for found in results:
        torch.testing.assert_close(found["weights"], weights, rtol=0, atol=tolerance)
        assert found["weights"].equal(results[0]["weights"])


# ------------------------------------------------------------------ the same steps as on one device


@pytest.mark.parametrize(("num_ranks", "num_shards"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("net", ["logistic", "mlp"])
def test_iterates_are_torchs(tmp_path: Path, net: str, num_ranks: int, num_shards: int) -> None:
    results = fit(num_ranks, programs.fit, str(tmp_path), net, num_iterations=30, num_shards=num_shards)
    weights, num_evaluations = programs.torch_weights(30, net)
    check(results, weights)
    report = results[0]["report"]
    assert report["point"]["num_evaluations"] == num_evaluations
    assert all(found["step"] == report["version"] == report["point"]["iteration"] <= 30 for found in results)


def test_lenet_300_is_torchs(tmp_path: Path) -> None:
    results = fit(2, programs.fit, str(tmp_path), "lenet300", num_iterations=30, num_shards=2, batch_size=20)
    weights, _ = programs.torch_weights(30, "lenet300")
    check(results, weights)


def test_a_parameter_may_have_no_elements(tmp_path: Path) -> None:
    check(fit(1, programs.fit, str(tmp_path), "nothing"), programs.torch_weights(8, "nothing")[0])


def test_a_curved_valley_is_followed(tmp_path: Path) -> None:
    results = fit(2, programs.fit, str(tmp_path), "valley", num_iterations=60, num_shards=3)
    check(results, programs.torch_weights(60, "valley")[0])
    torch.testing.assert_close(results[0]["weights"], torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-4)


def test_every_portion_counts_once(tmp_path: Path) -> None:
    report = fit(4, programs.fit, str(tmp_path), num_iterations=6, batch_size=2)[0]["report"]
    assert report["num_samples"] == programs.NUM * report["point"]["num_evaluations"]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_weight_decay_is_a_part_of_the_loss(tmp_path: Path, optimizer: str) -> None:
    module = programs.Module(weight_decay=0.02, optimizer=optimizer)
    results = fit(2, programs.fit, str(tmp_path), num_iterations=10, module=module)
    check(results, programs.torch_weights(10, weight_decay=0.02)[0])


def test_a_sample_of_the_data_can_be_the_batch(tmp_path: Path) -> None:
    found = fit(2, programs.fit_sample, str(tmp_path), 20)[0]
    assert found["report"]["num_samples"] == 21 * found["report"]["point"]["num_evaluations"]


@pytest.mark.parametrize("push_every", [1, 3, 1000])
def test_gradients_of_several_portions_are_handed_in_together(tmp_path: Path, push_every: int) -> None:
    results = fit(2, programs.fit, str(tmp_path), num_iterations=8, push_every=push_every)
    check(results, programs.torch_weights(8)[0])


# ------------------------------------------------------------------ epochs, validation, checkpoints


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_validation_sees_what_the_evaluation_has_led_to(tmp_path: Path, num_ranks: int) -> None:
    results = fit(num_ranks, programs.fit_with_validation, str(tmp_path), 6)
    seen = results[0]["seen"]
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2, 3, 4, 5]
    losses = [loss for _, _, loss in seen]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(results[0]["loss"], rel=1e-12)
    assert len({found["metrics"]["val_loss"] for found in results}) == 1
    steps = [step for _, step, _ in seen]
    saved = [epoch for epoch, step in enumerate(steps) if step > ([0, *steps])[epoch]]  # where there was something new
    assert {path.stem for path in tmp_path.glob("epoch=*.ckpt")} == {f"epoch={epoch}" for epoch in saved}
    plain = programs.Module()
    checkpoint = torch.load(tmp_path / f"epoch={saved[-1]}.ckpt", weights_only=False)
    plain.load_state_dict(checkpoint["state_dict"])
    assert programs.flat(plain).equal(results[0]["weights"])
    assert checkpoint["global_step"] == results[0]["step"] == steps[-1]


@pytest.mark.parametrize(("num_ranks", "num_shards", "num_workers"), [(1, 1, 0), (2, 3, 0), (2, 1, 1)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, num_ranks: int, num_shards: int, num_workers: int
) -> None:
    first, last = (3, 5) if num_workers else (6, 14)  # each evaluation starts processes that load
    results = fit(num_ranks, programs.fit_in_two, str(tmp_path), first, last, num_shards, num_workers)
    assert 0 < results[0]["interrupted"] < last
    check(results, programs.torch_weights(last)[0])


def test_batches_of_workers_processes_are_portions_too(tmp_path: Path) -> None:
    results = fit(2, programs.fit_with_data_workers, str(tmp_path))
    check(results, programs.torch_weights(3)[0])


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize("at", [2, 25])
@pytest.mark.parametrize("fault", ["shard", "coordinator"])
def test_a_lost_process_changes_nothing(tmp_path: Path, fault: str, at: int) -> None:
    results = fit(2, programs.fit_with_fault, str(tmp_path), fault, at, num_shards=2)
    check(results, programs.torch_weights(10)[0])
    report = results[0]["report"]
    if fault == "shard":
        assert report["num_samples"] == programs.NUM * report["point"]["num_evaluations"]


def run_with_a_killed_rank(path: Path, rank: int, backup_portions: bool = True) -> int:
    script = path / "script.py"
    script.write_text(
        "from tests.strategies.sandblaster_programs import fit_with_a_killed_rank\n"
        f"if __name__ == '__main__':\n    fit_with_a_killed_rank({str(path)!r}, {rank}, {backup_portions})\n"
    )
    root = Path(__file__).parents[2]
    environment = launched_anew(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, str(script)], cwd=path, env=environment, capture_output=True, timeout=200)
    return done.returncode


@pytest.mark.parametrize("backup_portions", [True, False])
def test_a_killed_rank_changes_nothing(tmp_path: Path, backup_portions: bool) -> None:
    assert run_with_a_killed_rank(tmp_path, 2, backup_portions) == 0
    found = torch.load(tmp_path / "result.pt", weights_only=False)
    torch.testing.assert_close(found["weights"], programs.torch_weights(20)[0], rtol=0, atol=1e-8)
    report = found["report"]
    assert report["num_live"] == 2
    if backup_portions:  # others may have had the portion already when its rank was missed
        assert report["num_reissued"] + report["num_again"] > 0
    else:
        assert report["num_reissued"] > 0 == report["num_again"]
    assert report["num_samples"] == programs.NUM * report["point"]["num_evaluations"]


def test_a_killed_leader_leaves_what_was_learned(tmp_path: Path) -> None:
    assert run_with_a_killed_rank(tmp_path, 0) != 0
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("rank0-lost-step=*.ckpt"))) and time.monotonic() < deadline:
        time.sleep(0.2)
    checkpoint = torch.load(found[0], weights_only=False)
    module = programs.Module()
    module.load_state_dict(checkpoint["state_dict"])
    expected, _ = programs.torch_weights(checkpoint["global_step"])
    torch.testing.assert_close(programs.flat(module), expected, rtol=0, atol=1e-8)
    assert checkpoint["squall_asynchronous"]["lbfgs"]["point"]["iteration"] == checkpoint["global_step"] > 0


@pytest.mark.parametrize("at", [10, 11])
def test_a_coordinator_is_lost_where_weights_are_fetched_or_a_report_is_asked_for(tmp_path: Path, at: int) -> None:
    """The portion in hand is given up with its evaluation. Nine portions are one: the tenth is another's first."""
    results = fit(1, programs.fit_with_fault, str(tmp_path), "coordinator", at, push_every=1, log_every_n_steps=1)
    check(results, programs.torch_weights(10)[0])


def test_a_slow_rank_is_not_waited_for(tmp_path: Path) -> None:
    """Its portions are computed by others, and count once: by what is counted, not by a clock."""
    results = fit(2, programs.fit_slowly, str(tmp_path), {1: 0.4}, 6)
    check(results, programs.torch_weights(6)[0])
    report = results[0]["report"]
    assert report["num_again"] > 0
    assert report["num_samples"] == programs.NUM * report["point"]["num_evaluations"]
    without = fit(2, programs.fit_slowly, str(tmp_path), {1: 0.05}, 3, backup_portions=False)
    assert without[0]["report"]["num_again"] == 0
    check(without, programs.torch_weights(3)[0])


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("manual", "automatic_optimization=False"),
        ("no optimizer", "configure_optimizers has to return one optimizer"),
        ("half", "of torch.float16, in which differences"),
        ("clip", "gradient_clip_val=1.0"),
        ("accumulate", "accumulate_grad_batches=2"),
        ("reload", "reload_dataloaders_every_n_epochs=1"),
        ("maximize", r"SGD\(maximize=True\)"),
        ("stream", "has no samples that could be dealt out as portions"),
        ("two loaders", "has no samples that could be dealt out as portions"),
        ("edits", "weights were edited"),
    ],
)
def test_what_a_line_search_cannot_do_with_is_refused(tmp_path: Path, what: str, message: str) -> None:
    assert re.search(message, fit(1, programs.error_of, programs.fit_wrong, str(tmp_path), what)[0])


def test_a_loss_that_is_no_number_ends_the_run_with_its_name(tmp_path: Path) -> None:
    said = fit(1, programs.error_of, programs.nan_at_first, str(tmp_path))[0]
    assert "At the first weights the loss of the whole batch is nan" in said


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("dropout", "draws anew at each evaluation"),
        ("batchnorm", "normalises each portion by itself"),
        ("shifted", "makes something else of a sample"),
        ("torch's own", "not LBFGS(lr=0.1, history_size=100)"),
    ],
)
def test_noise_is_warned_of(tmp_path: Path, net: str, message: str) -> None:
    assert any(message in warning for warning in fit(1, programs.warnings_of, str(tmp_path), net)[0])


@pytest.mark.parametrize(
    "sample",
    [
        torch.tensor([0.0, torch.nan]), torch.eye(3).to_sparse(), np.array([0.0, np.nan]), np.array(["text"]), "text",
    ],
    ids=["missing value", "sparse", "array", "texts", "text"],
)  # fmt: skip
def test_data_that_stays_as_it_is_is_not_warned_of(sample: Any, recwarn: pytest.WarningsRecorder) -> None:
    warn_of_random_data([(sample, 0)], [0])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("history_size", 0), ("batch_size", 0), ("push_every", 0.5), ("num_shards", -1), ("lr", 0.0), ("lr", "fast"),
        ("tolerance_grad", -1.0), ("tolerance_change", float("nan")), ("max_line_search", 0), ("backup_portions", 1),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=argument):
        SandblasterStrategy(**{argument: value})
