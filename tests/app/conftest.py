"""Fixtures on real parts: the tiny SmolVLA, a LeRobot v3.0 dataset from lerobot's own recorder, a hub on loopback."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from app.dataset_meta import JOINTS

# Before anything imports torch or huggingface_hub: one thread (tiny models get slower with more), no hub, own caches.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vlafleet-test-hf-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

TASK = "Pick up the cube and place it in the box."
FPS = 30


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory that holds the tiny base."""
    from app.tiny_base import ensure_tiny_base

    folder = tmp_path_factory.mktemp("models")
    ensure_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(models: Path) -> Path:
    return models / "tiny" / "base"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of 30, 35, 40 and 45 frames, two h264 cameras of 96x128, joints that follow sines in degrees."""
    import numpy as np
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("data") / "site"
    names = [f"{joint}.pos" for joint in JOINTS]
    video = {"dtype": "video", "shape": (96, 128, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (6,), "names": names}
    dataset = LeRobotDataset.create(
        repo_id="test/site",
        fps=FPS,
        root=root,
        robot_type="so101",
        features={
            "observation.state": vector,
            "action": vector,
            "observation.images.top": video,
            "observation.images.wrist": video,
        },
        streaming_encoding=True,
        rgb_encoder=RGBEncoderConfig(vcodec="h264"),
    )
    # Amplitude and offset in degrees; the gripper runs from 0 to 100.
    amplitude = np.array([40, 30, 50, 35, 60, 45])
    offset = np.array([0, -20, 30, 10, 0, 50])
    for episode, frames in enumerate((30, 35, 40, 45)):
        for frame in range(frames):
            phase = 2 * np.pi * frame / FPS + episode
            state = amplitude * np.sin(phase + np.arange(6)) + offset
            action = amplitude * np.sin(phase + 0.2 + np.arange(6)) + offset
            images = {}
            for camera, shade in (("top", 60), ("wrist", 120)):
                image = np.full((96, 128, 3), shade, np.uint8)
                column = int(54 + 50 * np.sin(phase))
                image[40:56, column : column + 16] = (220, 40, 40)
                images[f"observation.images.{camera}"] = image
            dataset.add_frame(
                {
                    "observation.state": state.astype(np.float32),
                    "action": action.astype(np.float32),
                    "task": TASK,
                    **images,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


@dataclass
class Hub:
    """The endpoints of the Hugging Face Hub that ``snapshot_download`` needs, over folders on disk."""

    repositories: dict[str, Path] = field(default_factory=dict)  # "models/owner/name" -> folder
    revisions: dict[str, set[str]] = field(
        default_factory=dict
    )  # names a repository knows, default {"main"}
    requests: list[str] = field(default_factory=list)
    address: str = ""
    commit: str = "0123456789abcdef0123456789abcdef01234567"

    def environment(self, cache: Path) -> dict[str, str]:
        return {
            **os.environ,
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, code: str, cache: Path) -> str:
        """Run ``code`` in a process that talks to this hub; its last line of output."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment(cache),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    def find(self, path: str) -> tuple[str, Path, list[str]] | None:
        """Repository key, folder and the remaining path segments."""
        parts = path.strip("/").split("/")
        if parts[0] not in ("api", "datasets"):
            parts.insert(0, "models")
        if parts[0] == "api":
            parts = parts[1:]
        key = "/".join(parts[:3])
        return (key, self.repositories[key], parts[3:]) if key in self.repositories else None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            found = hub.find(unquote(urlsplit(self.path).path))
            if found is None:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            key, folder, (verb, revision, *rest) = found
            if revision not in {hub.commit, *hub.revisions.get(key, {"main"})}:
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            files = {
                path.relative_to(folder).as_posix(): path
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            if verb == "resolve":
                body = files["/".join(rest)].read_bytes()
                tag = f'"{sha256(body).hexdigest()}"'
                self.send(200, body, {"ETag": tag, "X-Repo-Commit": hub.commit})
                return
            if verb == "tree":
                answer: object = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                    for name, path in files.items()
                ]
            else:
                answer = {
                    "id": key.split("/", 1)[1],
                    "sha": hub.commit,
                    "siblings": [{"rfilename": name} for name in files],
                }
            self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        do_GET = answer  # noqa: N815
        do_HEAD = answer  # noqa: N815

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    http.shutdown()
    thread.join()
    http.server_close()
