"""Make Squall's configuration groups known to every Hydra application in the environment.

Hydra finds this package by its name, ``hydra_plugins.squall_search_path``. With it another application may say
``strategy: column_parallel`` in its defaults list. Squall's folder is appended: a file of the application comes first.
"""

import sys
from importlib.machinery import ModuleSpec

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SquallSearchPathPlugin(SearchPathPlugin):
    """Append the folder of ``squall.conf`` to where Hydra looks for configuration files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append Squall's folder, unless it is there as the application's own.

        Args:
            search_path: Hydra's search path, changed in place.

        """
        if any(element.path == "pkg://squall.conf" for element in search_path.get_path()):
            return
        # As pkg://squall.conf Hydra would import squall, and with it torch, in every Hydra application there is.
        package = _find_spec("squall", None)
        spec = package and _find_spec("squall.conf", package)
        if spec is not None and spec.submodule_search_locations:
            search_path.append("squall", f"file://{next(iter(spec.submodule_search_locations))}")


def _find_spec(name: str, parent: ModuleSpec | None) -> ModuleSpec | None:
    """Find a package without importing its parent, as `importlib.util.find_spec` would."""
    path = None if parent is None else list(parent.submodule_search_locations or [])
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, path) if find is not None else None
        if spec is not None:
            return spec
    return None
