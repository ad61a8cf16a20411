"""Replaces modules of the project in the processes of a test; Python imports this file at start when it is on the path.

``VLAFLEET_STANDINS`` holds ``module=file`` pairs with ``:`` between. Everything else of a process stays the real one.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_FILES = dict(pair.split("=", 1) for pair in os.environ.get("VLAFLEET_STANDINS", "").split(":"))


class _StandIns(MetaPathFinder):
    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = _FILES.get(fullname)
        return importlib.util.spec_from_file_location(fullname, file) if file else None


sys.meta_path.insert(0, _StandIns())
