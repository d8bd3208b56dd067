"""One run, one folder, one end: ranks started under Hydra, in a user's own application."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass

import psutil
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from squall import _hydra_job, launching
from squall._gang import Gang
from tests.conf import programs


@pytest.fixture
def app(tmp_path):
    programs.write_app(tmp_path)
    return tmp_path


def records(folder):
    path = folder / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_job_of_a_sweep_has_its_own_ranks_and_one_folder(app):
    command = [programs.PYTHON, "-m", "app", "-m", "x=3,4", f"log={app}"]
    returncode, output = programs.run(command, app, HYDRA_FULL_ERROR="1")
    assert returncode == 0, output
    folders = programs.job_folders(app)
    assert [folder.name for folder in folders] == ["0", "1"]
    assert sorted(path.name for path in folders[0].iterdir()) == [".hydra", "app.log"]
    found = sorted(records(app), key=lambda record: (record["x"], record["rank"]))
    told = [(r["x"], r["rank"], r["world_size"], r["num"]) for r in found]
    assert told == [(3, 0, 2, 0), (3, 1, 2, 0), (4, 0, 2, 1), (4, 1, 2, 1)]
    for job, folder in zip((found[:2], found[2:]), folders, strict=True):
        for key in ("out", "output_dir", "when", "text", "port"):
            assert job[0][key] == job[1][key]
        assert job[0]["out"] == str(folder)
        assert job[0]["found"] == {"LOCAL_RANK": None, "MASTER_PORT": None, "WORLD_SIZE": None}
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        assert {r["threads"] for r in job} == {int(os.environ.get("OMP_NUM_THREADS", share))}
    assert found[0]["port"] != found[2]["port"]


@pytest.mark.parametrize(
    ("fate", "words"),
    [("raise", "Rank 1 raised ArithmeticError: a bad batch"), ("kill", "Rank 1 (process")],
)
def test_a_rank_that_dies_ends_the_run_with_one_message(app, fate, words):
    began = time.monotonic()
    process = programs.start([programs.PYTHON, "app.py", "victim=1", f"fate={fate}", f"log={app}"], app)
    returncode, output = programs.finish(process, timeout=60)
    assert returncode == 1, output
    assert output.count(words) == 1, output
    assert output.count("Error executing job") == 1, output
    assert "Connection closed by peer" not in output
    assert (fate == "kill") == ("was killed by SIGKILL" in output)
    assert programs.survivors(process) == []
    assert time.monotonic() - began < 45  # the start included
    assert len(programs.job_folders(app)) == 1


def test_no_rank_outlives_a_launcher_that_is_killed(app):
    process = programs.start([programs.PYTHON, "app.py", "victim=0", "fate=asleep", f"log={app}"], app)
    returncode, output = programs.finish(process, timeout=60)
    assert returncode == -signal.SIGKILL, output
    assert programs.survivors(process) == []


def gang_of(*programs_text):
    return Gang(
        [[sys.executable, "-c", text] for text in programs_text], [dict(os.environ) for _ in programs_text], cwd=None
    )


def test_the_earliest_failure_is_the_cause():
    report = (
        "import os, json; os.write(int(os.environ['SQUALL_REPORT_FD']), json.dumps("
        "{'time': %f, 'summary': 'ValueError: %s', 'traceback': 'where'}).encode()); raise SystemExit(1)"
    )
    gang = gang_of(report % (200.0, "late"), report % (100.0, "early"))
    gang.start()
    assert gang.wait(20)
    message = gang.first_failure()
    assert message is not None
    assert message.startswith("Rank 2 raised ValueError: early")
    assert gang.first_failure(own_error_at=50.0) is None
    gang.kill()


def test_a_gang_that_ends_well_has_no_failure():
    gang = gang_of("pass")
    gang.start()
    assert gang.wait(20)
    assert gang.first_failure() is None
    gang.kill()


def test_kill_leaves_nobody():
    gang = gang_of("import time; time.sleep(1000)")
    gang.start()
    assert not gang.wait(0.1)
    gang.kill()
    assert not psutil.pid_exists(gang.procs[0].pid)


@pytest.mark.parametrize(
    "text", ["plain", "it's", 'say "so"', "a\\", "back\\'slash", "${x}", "a,b={c: [d]}", "é ü", ""]
)
def test_quoted_values_survive_hydras_grammar(text):
    override = OverridesParser.create().parse_override(f"key={_hydra_job._quote(text)}")
    value = override.value()
    assert OmegaConf.create({"key": value, "x": "wrong"}).key == text


def test_what_only_the_launching_process_knows_is_resolved():
    OmegaConf.register_new_resolver("hydra", lambda key: f"<{key}>", replace=True)
    config = OmegaConf.create({"a": "${hydra:job.num}", "b": ["${a}", {"c": "in ${hydra:x}"}], "d": "${a}", "e": "???"})
    _hydra_job._resolve_runtime(config)
    raw = OmegaConf.to_container(config, resolve=False)
    assert raw == {"a": "<job.num>", "b": ["${a}", {"c": "in <x>"}], "d": "${a}", "e": "???"}


def test_dataclasses_are_noticed():
    @dataclass
    class Model:
        width: int = 1

    assert _hydra_job._is_typed(OmegaConf.structured(Model))
    assert _hydra_job._is_typed(OmegaConf.create({"model": OmegaConf.structured(Model)}))
    assert not _hydra_job._is_typed(OmegaConf.create({"model": {"width": 1}, "hydra": OmegaConf.structured(Model)}))


@pytest.fixture
def launch_alone(monkeypatch):
    for name in launching._LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield lambda num: launching.HydraAwareLauncher(LightningEnvironment(), num_processes=num, num_nodes=1)
    launching.finish(failed=True)


def test_environment_and_threads_are_put_back(launch_alone):
    before, threads = dict(os.environ), torch.get_num_threads()
    assert launch_alone(1).launch(lambda: os.environ["LOCAL_RANK"]) == "0"
    launching.finish()
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads


def test_another_number_of_processes_in_the_same_program_is_refused(launch_alone, monkeypatch):
    monkeypatch.setattr(
        launching, "_basic_subprocess_cmd", lambda: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert launch_alone(2).launch(lambda: "done") == "done"
    with pytest.raises(MisconfigurationException, match="same `devices`"):
        launch_alone(3).launch(lambda: "not reached")


def test_without_a_launch_there_is_nothing_to_finish():
    launching.finish()


def test_a_launcher_that_waits_in_vain_says_so_and_ends(tmp_path):
    program = (
        "import os, sys, time\n"
        "from squall._gang import Gang\n"
        "gang = Gang([[sys.executable, '-c', 'raise SystemExit(3)']], [dict(os.environ)], None)\n"
        "gang.start()\n"
        "with gang.busy():\n"
        "    time.sleep(60)\n"
    )
    returncode, output = programs.run([programs.PYTHON, "-c", program], tmp_path, timeout=40)
    assert returncode == 1
    assert output.count("ended with exit code 3") == 1
