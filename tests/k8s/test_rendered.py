"""The rendered objects held against every check, and every check shown to see what it is there for."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import access_checks, object_checks, pod_checks
from tests.k8s.charts import ROOT, Manifest
from tests.k8s.renders import EVERY_RENDER, Rendered, rendered

CHECKS = {
    check.__name__: check
    for module in (pod_checks, object_checks, access_checks)
    for check in module.CHECKS
}


@pytest.mark.parametrize("check", CHECKS)
@EVERY_RENDER
def test_what_a_chart_renders_is_sound(chart: str, path: Path, check: str) -> None:
    assert list(CHECKS[check](rendered(chart, path))) == []
