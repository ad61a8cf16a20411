"""What is on disk is the old content or the new, whole."""

import json
import os
from pathlib import Path

from app.durable import point, write_json


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_moved(tmp_path: Path) -> None:
    for name in ("one", "two"):
        point(tmp_path / "latest", name)
        assert os.readlink(tmp_path / "latest") == name
    assert [file.name for file in tmp_path.iterdir()] == ["latest"]
