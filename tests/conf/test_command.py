"""The commands as users call them: what they say when they can't, and what they leave when they can."""

import json
import sys
from pathlib import Path

import pytest

from squall.conf import bench
from squall.conf import main as command
from squall.conf.suites.headlines import HEADLINES, put_into, table
from squall.sparsity import load_compressed, save_compressed
from squall.sparsity.coding import is_compressed
from tests.conf import programs

SMALL = ["model=lenet300", "model.model.width=0.1", "trainer.max_epochs=1", "+trainer.limit_train_batches=8"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call a command in this process; return its exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def called(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["squall", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.err, captured.out

    return called


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["strategy=nope"], "Could not find 'strategy/nope'"),
        (["trainer.nope=1"], "nope"),
        (["data=image_folder"], "data.root=<path>"),
        (["mode=sing"], "fit, validate, test"),
        (["mode=test"], "ckpt_path="),
        (["ckpt_path=nowhere.ckpt"], "there is no such file"),
        (["strategy=single", "trainer.devices=2"], "strategy=ddp"),
        (["data.batch_sise=2"], "batch_sise"),
        (["strategy=sparse_momentum", "strategy.sparsity.density=1.5"], "above 0 and at most 1"),
        (["strategy=sparse_momentum", "strategy.sparsity.dense=[nope]"], "no layer is called 'nope'"),
        (["model.model._target_=squall.models.Nope"], "Nope"),
    ],
)
def test_what_is_wrong_is_one_clear_message(call, arguments, words):
    code, error, _ = call(command.main, *arguments)
    assert code == 1
    assert words in error
    assert "Traceback" not in error
    assert error.count("squall: ") == 1


def test_bench_names_its_suites(call):
    code, error, _ = call(bench.main)
    assert code == 1
    for name in bench.suites():
        assert name in error
    assert "suite=NAME" in error


def measured(number):
    return bench.SuiteResult(
        "Title", [{"what": "a", "ratio": number}], notes="Note.", failures=["Too slow."] * (number < 1)
    )


def test_bench_writes_what_a_suite_returns(call, tmp_path):
    target = "+suite._target_=tests.conf.test_command.measured"
    code, error, _ = call(bench.main, target, "+suite.number=1.25", "hydra.run.dir=there")
    assert code == 0, error
    report = (tmp_path / "there" / "suite.md").read_text()
    assert report.startswith("# Title\n\n| what | ratio |\n|:--|--:|\n| a | 1.25 |\n\nNote.\n")
    record = json.loads((tmp_path / "there" / "suite.json").read_text())
    assert record["rows"] == [{"what": "a", "ratio": 1.25}]
    assert record["machine"]["versions"]["torch"]
    code, error, _ = call(bench.main, target, "+suite.number=0.5", "hydra.run.dir=there")
    assert (code, "Too slow." in error) == (1, True)


def test_a_table_is_printed_whole_where_there_is_no_terminal(call, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    numbers = {f"a heading of words, number {n}": 123_456 + n for n in range(12)}
    bench.write(bench.SuiteResult("Title", [{"net": "one as wide", **numbers}], notes="Note."), tmp_path / "table")
    printed = capsys.readouterr().out
    assert all(f"{number:,}" in printed for number in numbers.values())
    assert all(text in printed for text in [*numbers, "one as wide", "Note.", "table.md"])
    assert "…" not in printed


def test_a_narrow_terminal_cuts_no_number(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    numbers = {f"a heading of words, number {n}": 123_456 + n for n in range(12)}
    bench.write(bench.SuiteResult("Title", [numbers]), tmp_path / "table")
    printed = capsys.readouterr().out
    assert all(f"{number:,}" in printed for number in numbers.values())


def test_bench_runs_all_suites_whatever_becomes_of_each(call, tmp_path, monkeypatch):
    seen = []

    def round_trips(net, num_rounds):
        seen.append(num_rounds)
        rows = [{"MB each way": 2.0, "speed against gloo": ratio} for ratio in (1.0, 0.75)]
        return bench.SuiteResult("Shards", rows, failures=["Too slow."])

    monkeypatch.setattr("squall.conf.suites.shards.measure", round_trips)
    settings = "suite.settings={shards: ['num_rounds=3'], compression: ['nets=[nothing]']}"
    code, error, _ = call(bench.main, "suite=all", "suite.names=[compression,shards]", settings, "hydra.run.dir=there")
    assert (code, seen) == (1, [3])
    assert "compression: was not measured: " in error
    assert "shards: Too slow." in error
    assert json.loads((tmp_path / "there" / "shards.json").read_text())["failures"] == ["Too slow."]
    failed, ran = json.loads((tmp_path / "there" / "all.json").read_text())["rows"]
    assert failed["suite"] == "compression"
    assert ran["comes to"].endswith("Adagrad included, against bare gloo: 0.75 x")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("suite.names=[shrads]", "no suite shrads. There are: columns, compression"),
        ("suite.settings={shards: ['rounds=1']}", "Could not override 'suite.rounds'"),
        ("suite.settings={shards: num_rounds}", "must be a list of what is to be otherwise"),
    ],
)
def test_bench_names_what_is_no_suite(call, override, words):
    code, error, _ = call(bench.main, "suite=all", override, *["suite.names=[shards]"] * ("settings" in override))
    assert code == 1
    assert words in error


def test_the_figures_in_the_readme_are_those_on_record():
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    assert put_into(text, table(root / "benchmarks")) == text, (
        "python -m squall.conf.suites.headlines benchmarks README.md"
    )


def test_each_suite_has_a_headline():
    assert {*HEADLINES, "all"} == {*bench.suites()}


@pytest.mark.parametrize("main", [command.main, bench.main])
def test_help(call, main):
    code, _, output = call(main, "--help")
    assert code == 0
    assert "Configuration groups" in output


def test_a_sweep_leaves_a_folder_a_job_and_a_comparison(tmp_path):
    squall = [programs.PYTHON, "-m", "squall.conf.main"]
    returncode, output = programs.run([*squall, "-m", "strategy=single,ddp", *SMALL], tmp_path, timeout=120)
    assert returncode == 0, output
    folders = programs.job_folders(tmp_path)
    assert [folder.name for folder in folders] == ["0", "1"]
    for folder in folders:
        left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert left >= {
            *("csv/metrics.csv", "learning_curve.png", "summary.md", "summary.json", "squall.log"),
            "checkpoints/last.ckpt",
        }
        assert any(name.startswith("tensorboard/events") for name in left)
        assert sum(name.startswith("checkpoints/best") for name in left) == 1
        summary = json.loads((folder / "summary.json").read_text())["summary"]
        assert 0.05 < summary["test_accuracy"] <= 1
        assert summary["images_per_second"] > 0
    sweep = folders[0].parent
    rows = json.loads((sweep / "comparison.json").read_text())["rows"]
    assert [(row["job"], row["strategy"]) for row in rows] == [("0", "single"), ("1", "ddp")]
    assert rows[0]["bytes per image"] == 0 < rows[1]["bytes per image"]
    assert rows[0]["weights per rank"] == rows[1]["weights per rank"] > 0
    assert (sweep / "comparison.png").stat().st_size > 5000
    assert (sweep / "comparison.md").read_text().startswith("# Comparison")
    assert "Comparison of the jobs" in output
    assert "Traceback" not in output


def test_a_checkpoint_is_resumed_and_tested(call, tmp_path):
    alone = ["strategy=single", *SMALL, "callbacks.progress=null", "model.schedule=cosine"]
    assert call(command.main, *alone, "hydra.run.dir=first")[0] == 0
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    code, error, output = call(command.main, *alone, "mode=test", f"ckpt_path={last}", "hydra.run.dir=tested")
    assert code == 0, error
    accuracies = [
        json.loads((tmp_path / name / "summary.json").read_text())["summary"]["test_accuracy"]
        for name in ("first", "tested")
    ]
    assert accuracies[0] == accuracies[1]
    assert "test accuracy" in output
    more = [*alone, "trainer.max_epochs=2", f"ckpt_path={last}", "hydra.run.dir=second"]
    assert call(command.main, *more)[0] == 0
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["summary"]["epochs"] == 2


def test_compressed_files_are_written_resumed_tested_and_begun_with(call, tmp_path):
    alone = [*SMALL, "callbacks.progress=null", "callbacks.learning_rate=null", "logger=none"]
    assert call(command.main, "strategy=single", *alone, "hydra.run.dir=first", "trainer/plugins=compressed")[0] == 0
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert is_compressed(last)
    weights = tmp_path / "weights.safetensors"
    save_compressed(load_compressed(last), weights)
    accuracies = []
    for number, (path, strategy) in enumerate([(last, "single"), (weights, "single"), (weights, "deep_compression")]):
        where = [f"ckpt_path={path}", f"strategy={strategy}", f"hydra.run.dir=tested{number}"]
        code, error, _ = call(command.main, *alone, "mode=test", *where)
        assert code == 0, error
        summary = json.loads((tmp_path / f"tested{number}" / "summary.json").read_text())["summary"]
        accuracies.append(summary["test_accuracy"])
    assert len(set(accuracies)) == 1
    code, error, _ = call(command.main, "strategy=single", *alone, f"ckpt_path={weights}")
    assert code == 1
    assert "weights.safetensors is a compressed file" in error
    assert call(command.main, "strategy=sparse_momentum", *alone, f"ckpt_path={weights}")[0] == 0
    more = ["trainer.max_epochs=2", f"ckpt_path={last}", "hydra.run.dir=second", "trainer/plugins=compressed"]
    assert call(command.main, "strategy=single", *alone, *more)[0] == 0
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["summary"]["epochs"] == 2
