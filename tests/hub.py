"""A Hugging Face Hub on loopback, over folders on disk: what huggingface_hub's client needs to fetch and to publish."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

# The token that may write, as HF_TOKEN carries it.
TOKEN = "hf_0123456789abcdefABCDEF"


@dataclass
class Hub:
    """Its repositories, and what it was asked."""

    # Where repositories that are created come to lie.
    root: Path
    repositories: dict[str, Path] = field(default_factory=dict)  # "models/owner/name" -> folder
    revisions: dict[str, set[str]] = field(
        default_factory=dict
    )  # names a repository knows, default {"main"}
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    # Status codes that requests beginning so ("PUT /lfs/") are answered with, before any is served.
    failures: dict[str, list[int]] = field(default_factory=dict)
    # Contents of large files by their sha256, and the messages of commits.
    large: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    address: str = ""
    commit: str = "0123456789abcdef0123456789abcdef01234567"

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        return {
            **{key: value for key, value in os.environ.items() if key != "HF_TOKEN"},
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def run(self, code: str, cache: Path, token: str | None = None) -> str:
        """Run ``code`` in a process that talks to this hub; its last line of output."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment(cache, token),
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
        key = "/".join(parts[:3]).removesuffix(".git")
        return (key, self.repositories[key], parts[3:]) if key in self.repositories else None

    def create(self, asked: dict[str, Any]) -> tuple[int, object]:
        name = f"{asked['organization']}/{asked['name']}"
        key = f"{asked.get('type', 'model')}s/{name}"
        answer = {"url": f"{self.address}/{name}", "name": name}
        if key in self.repositories:
            return 409, answer
        self.repositories[key] = self.root / key
        self.repositories[key].mkdir(parents=True)
        if asked.get("visibility") == "private":
            self.private.add(key)
        return 200, answer

    def batch(self, objects: list[dict[str, Any]]) -> object:
        """Where to put large files: a signed address each, none for what is there already."""
        for one in objects:
            if one["oid"] not in self.large:
                href = f"{self.address}/lfs/{one['oid']}?X-Amz-Signature=s3cret"
                one["actions"] = {"upload": {"href": href, "header": {}}}
        return {"transfer": "basic", "objects": objects}

    def take(self, key: str, lines: list[dict[str, Any]]) -> object:
        """Make a commit of its ndjson lines; a large file must have been put before."""
        folder = self.repositories[key]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            else:
                assert line["key"] == "lfsFile"
                content = self.large[value["oid"]]
                assert len(content) == value["size"]
                (folder / value["path"]).write_bytes(content)
        self.commit = sha1(json.dumps(lines).encode()).hexdigest()  # noqa: S324 - what git uses
        url = f"{self.address}/{key.split('/', 1)[1]}/commit/{self.commit}"
        return {"commitUrl": url, "commitOid": self.commit}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, status: int, answer: object) -> None:
            self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def refused(self) -> bool:
            """Answer, and return True, where this request was told to fail."""
            hub.requests.append(f"{self.command} {self.path}")
            for prefix, codes in hub.failures.items():
                if codes and hub.requests[-1].startswith(prefix):
                    self.send(codes.pop(0), b"", {})
                    return True
            return False

        def permitted(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self.send(401, b"{}", said)
            return False

        def read(self) -> bytes:
            """The request's body, by its length or in chunks."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def do_POST(self) -> None:
            body = self.read()
            if self.refused() or not self.permitted():
                return
            path = unquote(urlsplit(self.path).path)
            if path == "/api/repos/create":
                self.json(*hub.create(json.loads(body)))
                return
            if path == "/api/validate-yaml":
                content = json.loads(body)["content"]
                assert "license" in yaml.safe_load(content.split("---\n")[1])
                self.json(200, {})
                return
            found = hub.find(path)
            assert found is not None, path
            key, _, (verb, *_) = found
            if verb == "commit":
                self.json(200, hub.take(key, [json.loads(line) for line in body.splitlines()]))
            elif verb == "preupload":
                files = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                self.json(200, {"files": files})
            else:
                assert path.endswith(".git/info/lfs/objects/batch"), path
                self.json(200, hub.batch(json.loads(body)["objects"]))

        def do_PUT(self) -> None:
            body = self.read()
            if self.refused():
                return
            digest = urlsplit(self.path).path.removeprefix("/lfs/")
            assert sha256(body).hexdigest() == digest
            # The address is signed: a token has no place here.
            assert "Authorization" not in self.headers
            hub.large[digest] = body
            self.send(200, b"", {"ETag": f'"{digest}"'})

        def answer(self) -> None:
            if self.refused():
                return
            found = hub.find(unquote(urlsplit(self.path).path))
            if found is None:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            key, folder, (verb, revision, *rest) = (
                *found[:2],
                found[2] or ["revision", hub.commit],
            )
            if key in hub.private and not self.permitted():
                return
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
                    "private": key in hub.private,
                    "siblings": [{"rfilename": name} for name in files],
                }
            self.json(200, answer)

        do_GET = answer  # noqa: N815
        do_HEAD = answer  # noqa: N815

    return Handler


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub that answers at its ``address``; what is published to it comes to lie below ``root``."""
    server = Hub(root)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    http.shutdown()
    thread.join()
    http.server_close()
