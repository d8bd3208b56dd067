"""Another Hydra application sees Squall's groups, after its own, and pays nothing for it."""

import hydra_plugins.squall_search_path as plugin_module
import pytest
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

from tests.conf import programs

APP = """
import sys
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    print(cfg.strategy, "torch" in sys.modules, flush=True)

main()
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "app.yaml").write_text("defaults:\n  - strategy: column_parallel\n")
    (tmp_path / "conf" / "strategy" / "single.yaml").write_text("mine: true\n")
    (tmp_path / "app.py").write_text(APP)
    # What an installed wheel has: a folder in the namespace package that Hydra searches.
    package = tmp_path / "installed" / "hydra_plugins" / "squall_search_path"
    package.mkdir(parents=True)
    with open(plugin_module.__file__, encoding="utf-8") as source:
        (package / "__init__.py").write_text(source.read())
    return tmp_path


def test_the_applications_own_files_come_first_and_nothing_heavy_is_imported(app):
    path = str(app / "installed")
    returncode, output = programs.run([programs.PYTHON, "app.py"], app, PYTHONPATH=path)
    assert returncode == 0, output
    assert "'num_columns': 2" in output
    assert output.strip().endswith("False")
    returncode, output = programs.run([programs.PYTHON, "app.py", "strategy=single"], app, PYTHONPATH=path)
    assert (returncode, output.strip()) == (0, "{'mine': True} False")


def test_squalls_own_command_does_not_see_its_folder_twice():
    search_path = ConfigSearchPathImpl()
    search_path.append("main", "pkg://squall.conf")
    plugin_module.SquallSearchPathPlugin().manipulate_search_path(search_path)
    assert len(search_path.get_path()) == 1
