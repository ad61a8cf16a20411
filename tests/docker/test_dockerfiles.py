"""The Dockerfiles as text, and what is in the images built from them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from certs.errors import ToolError
from tests.docker.compose_project import ROOT, docker

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
IMAGES = ["superlink", "supernode", "app"]


def test_there_is_one_dockerfile_for_each_image() -> None:
    assert [path.name for path in DOCKERFILES] == sorted(f"{name}.Dockerfile" for name in IMAGES)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_image_builds_on_the_same_pinned_base() -> None:
    bases = set()
    for path in DOCKERFILES:
        text = path.read_text()
        bases |= set(re.findall(r"^ARG BASE_IMAGE=(.*)$", text, re.MULTILINE))
        # Every stage comes from the base or from a stage before it; no frontend is fetched.
        stages = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
        for source in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            assert source in {"${BASE_IMAGE}", *stages}
        assert "syntax=" not in text
        # The last user is the one the container runs as.
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "10001:10001"
    assert len(bases) == 1
    assert re.fullmatch(r"\S+:[\w.-]+@sha256:[0-9a-f]{64}", bases.pop())


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("script", ["build-images.sh", "base-image.sh"])
def test_no_engine_is_one_sentence_and_the_exit_code_of_a_missing_tool(script: str) -> None:
    # mmdebstrap is looked for before the engine; `true` stands for it where it is not installed.
    result = subprocess.run(
        ["bash", "-c", f"mmdebstrap() {{ :; }}; export -f mmdebstrap; bash docker/{script}"],
        cwd=ROOT,
        env={**os.environ, "DOCKER_HOST": "unix:///nowhere/docker.sock"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == ToolError.exit_code
    (sentence,) = result.stderr.splitlines()
    assert "docker/install-engine.sh" in sentence


@pytest.mark.docker
def test_installing_the_engine_again_does_nothing(engine: None) -> None:
    started = time.monotonic()
    installed = subprocess.run(
        ["bash", "docker/install-engine.sh"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0
    assert installed.stderr.startswith("install-engine: Docker ")
    assert time.monotonic() - started < 10  # it asks for versions; an installation takes longer


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_images_run_as_their_own_user_and_hold_no_secret(images: None) -> None:
    for name in IMAGES:
        (image,) = json.loads(docker("image", "inspect", f"vlafleet-{name}:0.1.0"))
        assert image["Config"]["User"] == "10001:10001"
        assert image["Config"]["Entrypoint"] == ["vlafleet"]
        # Built from an allow-list: no key, no checkout, no virtual environment of the builder.
        places = [
            "/app",
            "/fetched",
            "/home",
            "/identity",
            "/opt",
            "/pki",
            "/root",
            "/runs",
            "/src",
            "/state",
        ]
        wanted = ["(", "-name", "*.key", "-o", "-name", ".git", "-o", "-name", "data", ")"]
        find = ["find", *places, "-not", "-path", "*/site-packages/*", *wanted]
        run = ["run", "--rm", "--network", "none", "--user", "0:0", "--entrypoint"]
        # Some of the places are in one image only, and find complains.
        found = docker(*run, find[0], f"vlafleet-{name}:0.1.0", *find[1:], check=False)
        assert found == ""


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["superlink", "supernode"])
def test_torch_is_in_the_app_image_only(images: None, name: str) -> None:
    listed = "import importlib.util as u; print([m for m in ('torch', 'lerobot', 'flwr') if u.find_spec(m)])"
    run = ["run", "--rm", "--network", "none", "--read-only", "--entrypoint", "python"]
    assert docker(*run, f"vlafleet-{name}:0.1.0", "-c", listed) == "['flwr']\n"
    assert docker(*run, "vlafleet-app:0.1.0", "-c", listed) == "['torch', 'lerobot', 'flwr']\n"


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_app_image_loads_its_model_without_network_and_without_writing(images: None) -> None:
    script = (
        "import os; from pathlib import Path; from app.policy import load_policy, resolve_model;"
        "base = resolve_model('tiny', Path(os.environ['VLAFLEET_HOME']) / 'models');"
        "print(type(load_policy(base, 'cpu')).__name__)"
    )
    printed = docker(
        "run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL",
        "--tmpfs", "/tmp", "--tmpfs", "/home/vlafleet:uid=10001,gid=10001",
        "--entrypoint", "python", "vlafleet-app:0.1.0", "-c", script,
        timeout=180,
    )  # fmt: skip
    assert printed.splitlines()[-1] == "SmolVLAPolicy"
