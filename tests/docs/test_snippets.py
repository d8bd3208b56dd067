"""Every block of Python and every command in the README and the site is run, in short, or says why it can't be."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.strategies import Strategy

from squall.conf import compress, plan
from squall.conf.planner.clusters import HERE, sizes_of
from tests.conf import programs
from tests.ranks import free_port, run

from . import running
from .pages import PAGES, ROOT, Block, blocks, inline, read_blocks

_COMMANDS = ("squall", "squall-bench", "squall-compress", "squall-plan", "python", "torchrun", "pytest")


def _cases(*languages: str) -> list[Any]:
    cases = [block for block in blocks(*languages) if block.says("not run") is None and not _elsewhere(block)]
    return [pytest.param(block, id=block.name) for block in cases]


def _elsewhere(block: Block) -> bool:
    return any(block.says(word) is not None for word in ("command", "tested by", "file"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    running.write_files(folder)
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    for path in files.iterdir():
        shutil.copy(path, tmp_path)  # what a block writes is not the next one's
    return tmp_path


# ---------------------------------------------------------------------- the pages


def test_every_block_says_what_it_is() -> None:
    for block in blocks():
        assert block.language, f"{block.name}: name the block's language (text, if it is none)"
        if (reason := block.says("not run")) is not None:
            assert len(reason) > 10, f"{block.name}: say why it can't be run"
        if (name := block.says("command")) is not None:
            assert f"command_of {name}" in (ROOT / ".ci" / "run").read_text(), f"{block.name}: .ci/run does not run it"
        if (name := block.says("file")) is not None:
            used = any(name in line for other in read_blocks(block.page) for line in _lines(other))
            assert used, f"{block.name}: no command of this page uses {name}"
        if (said := block.says("tested by")) is not None:
            test = said.partition(":")[0]
            assert (ROOT / test).is_file(), f"{block.name}: there is no {test}"
            assert block.page.name in (ROOT / test).read_text(), f"{block.name}: {test} does not read this page"


def test_yaml_is_yaml() -> None:
    for block in blocks("yaml"):
        assert yaml.safe_load(block.code), block.name


# ---------------------------------------------------------------------- Python


@pytest.mark.parametrize("block", _cases("python"))
def test_python(block: Block, folder: Path) -> None:
    num_ranks, num_hosts = running.world(block.code)
    arguments = block.code, block.name, str(folder), num_hosts, free_port()
    run(num_ranks, running.execute, *arguments, timeout=120, lightning=True)


# ---------------------------------------------------------------------- commands


def _words(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True) if not re.match(r"^[A-Z_]+=", word)]


def _lines(block: Block) -> list[list[str]]:
    if block.language != "bash":
        return []
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := _words(line))]


def _compose(name: str, arguments: list[str]) -> list[Any]:
    """What a command's configuration would be; of a sweep, each."""
    overrides = OverridesParser.create().parse_overrides([word for word in arguments if word != "-m"])
    with initialize_config_module("squall.conf", version_base="1.3"):
        return [compose(name, list(job)) for job in BasicSweeper.split_arguments(overrides, None)[0]]


def _check_squall(arguments: list[str]) -> None:
    for cfg in _compose("squall", arguments):
        assert isinstance(hydra.utils.instantiate(cfg.strategy), Strategy | str)
        for group in ("model", "data"):
            assert callable(hydra.utils.get_class(cfg[group]._target_))


def _check_bench(arguments: list[str]) -> None:
    for cfg in _compose("bench", arguments):
        options = {key: value for key, value in cfg.suite.items() if not key.startswith("_")}
        inspect.signature(hydra.utils.get_method(cfg.suite._target_)).bind(**options)


def _check_plan(arguments: list[str]) -> None:
    """Plan, unless that would measure for a minute, on few machines."""
    if arguments[:1] == ["simulate"]:
        return
    for cfg in _compose("plan", arguments):
        plan.task_of(cfg.model, cfg.images)
        if cfg.cluster.name != HERE:
            cfg.cluster.num_nodes = min(sizes_of(cfg.cluster.num_nodes)[-1], 2)
            plan.plan(cfg)


def _check_compress(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "compressed.safetensors" if "--decode" in arguments else "weights.ckpt"
    given = next(word for word in arguments if not word.startswith("-") and "=" not in word)
    if not (folder / given).exists():
        (folder / given).symlink_to(folder / source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["squall-compress", *arguments])
    compress.main()


def _check_module(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert callable(importlib.import_module(arguments[1]).main)
    else:
        assert (ROOT / arguments[0]).is_file()


def _page_files(page: Path) -> dict[str, str]:
    return {name: block.code for block in read_blocks(page) if (name := block.says("file")) is not None}


def _run_programs(block: Block, folder: Path) -> None:
    """Run the page's own program with the page's own commands."""
    for name, code in _page_files(block.page).items():
        (folder / name).write_text(code)
    port = str(free_port())
    started = []
    for line in block.code.replace("\\\n", " ").splitlines():
        line = re.sub(r"\b(MASTER_ADDR|master-addr)=\S+", r"\1=127.0.0.1", line)
        line = re.sub(r"\b(MASTER_PORT|master-port)=\S+", rf"\1={port}", line)
        if not _words(line):
            continue
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        started.append(programs.start(["bash", "-c", line], folder, PATH=path, OMP_NUM_THREADS="1"))
        if block.says("run together") is None:
            code, output = programs.finish(started.pop())
            assert code == 0, output
    for process in started:
        code, output = programs.finish(process)
        assert code == 0, output


@pytest.mark.parametrize("block", _cases("bash"))
def test_commands(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = _page_files(block.page)
    if any(name in words for words in _lines(block) for name in own):
        _run_programs(block, folder)
        return
    for command, *arguments in _lines(block):
        assert command in _COMMANDS, f"{block.name}: {command} is not run here: say so in a marker, and why"
        if command == "squall":
            _check_squall(arguments)
        elif command == "squall-bench":
            _check_bench(arguments)
        elif command == "squall-plan":
            _check_plan(arguments)
        elif command == "squall-compress":
            _check_compress(arguments, folder, monkeypatch)
        elif command == "python":
            _check_module(arguments)
        else:
            assert command == "pytest", f"{block.name}: {command} of no program of this page"
            for path in (word for word in arguments if word.startswith("tests/")):
                assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_commands_within_sentences(page: Path) -> None:
    for text in inline(page):
        command, *arguments = text.split(" ")
        if not arguments:
            continue
        if command == "squall":
            _check_squall(arguments)
        elif command == "squall-bench":
            _check_bench(arguments)
        elif command == "squall-plan":
            _check_plan(arguments)
        elif command == "python":
            _check_module(arguments)
