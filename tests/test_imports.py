"""Imports run one way, and light processes stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "certs": {"certs"},
    "superlink": {"certs", "superlink"},
    "supernode": {"certs", "supernode"},
    "app": {"certs", "app"},
}
HEAVY = {"torch", "lerobot", "transformers", "datasets", "mujoco"}


def imported(path: Path) -> set[str]:
    """Every top-level package a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    ours = {*MAY_IMPORT, "vlafleet", "tests"}
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) & ours <= MAY_IMPORT[package], file
        if package != "app":
            assert not imported(file) & HEAVY, file


@pytest.mark.parametrize(
    "module",
    ["vlafleet", "superlink.control", "superlink.server", "supernode.node", "app.superexec", "app.client_app",
     "app.server_app", "app.payload", "app.codec", "app.aggregation", "app.statistics", "app.rounds", "app.schedule",
     "app.site_state", "app.simulation", "app.preflight", "app.report", "app.anomalies", "app.model_card", "app.page",
     "app.charts", "app.frames", "app.worker", "app.trainer_client"],
)  # fmt: skip
def test_light_modules_load_neither_torch_nor_lerobot(module: str) -> None:
    """The process Flower starts for every message imports these; torch costs it 3 s and lerobot 14."""
    code = f"import {module}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_command_starts_without_flower() -> None:
    """'vlafleet health' runs every few seconds; importing Flower would cost it 3 s each time."""
    code = "import vlafleet, certs.health, sys; print('flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_command_starts_without_the_apps_packages() -> None:
    """The SuperLink's and the SuperNode's images hold no numpy and no pyarrow."""
    code = "import vlafleet, sys; print(*sorted({'numpy', 'pyarrow', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
