"""What the kubelet writes into the volumes of Secrets, ConfigMaps and projected sources: files, modes, links."""

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# A source's files by key, and None where there is no such object.
Find = Callable[[str, str], Mapping[str, bytes] | None]
# What a volume holds: mode and content by path.
Files = dict[str, tuple[int, bytes]]

_DEFAULT_MODE = 0o644


class MissingError(Exception):
    """An object that a pod needs is not there (yet): the kubelet waits for it."""


def files(volume: Mapping[str, Any], find: Find, token: str, fields: Mapping[str, str]) -> Files:
    """Return what a volume of the kinds secret, configMap, downwardAPI or projected holds.

    ``find`` looks objects up by kind and name, ``fields`` are the pod's own for the downward API.
    """
    if "projected" in volume:
        projected = volume["projected"]
        mode = projected.get("defaultMode", _DEFAULT_MODE)
        found: Files = {}
        for source in projected["sources"]:
            found |= _source(source, mode, find, token, fields)
        return found
    mode = next(iter(volume[kind] for kind in _KINDS if kind in volume)).get(
        "defaultMode", _DEFAULT_MODE
    )
    return _source(volume, mode, find, token, fields)


_KINDS = ("secret", "configMap", "downwardAPI")


def _source(
    source: Mapping[str, Any], mode: int, find: Find, token: str, fields: Mapping[str, str]
) -> Files:
    if "serviceAccountToken" in source:
        return {source["serviceAccountToken"]["path"]: (mode, token.encode())}
    if "downwardAPI" in source:
        return {
            item["path"]: (item.get("mode", mode), fields[item["fieldRef"]["fieldPath"]].encode())
            for item in source["downwardAPI"]["items"]
        }
    kind, wanted = ("Secret", source["secret"]) if "secret" in source else (
        "ConfigMap", source["configMap"],
    )  # fmt: skip
    # In a volume of its own a Secret has a secretName, projected a name.
    name = wanted.get("secretName") or wanted["name"]
    held = find(kind, name)
    if held is None:
        if wanted.get("optional"):
            return {}
        raise MissingError(f"{kind} {name}")
    if "items" not in wanted:
        return {key: (mode, content) for key, content in held.items()}
    absent = [item["key"] for item in wanted["items"] if item["key"] not in held]
    if absent and not wanted.get("optional"):
        raise MissingError(f"{absent} of {kind} {name}")
    return {
        item["path"]: (item.get("mode", mode), held[item["key"]])
        for item in wanted["items"]
        if item["key"] in held
    }


def archive(volumes: Mapping[str, Files], group: int | None) -> bytes:
    """Return a tar of volumes as the kubelet writes them: the files in a directory that ``..data`` leads to.

    They belong to root and, where the pod has an fsGroup, to that group, which may then read them whatever their mode.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:

        def add(name: str, kind: bytes, mode: int, content: bytes = b"", link: str = "") -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.gid, entry.linkname = kind, mode, group or 0, link
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

        for volume, held in volumes.items():
            for path in _directories(held):
                add(f"{volume}/..1/{path}", tarfile.DIRTYPE, 0o755)
            for path, (mode, content) in held.items():
                readable = mode | (0o440 if group else 0)
                add(f"{volume}/..1/{path}", tarfile.REGTYPE, readable, content)
            add(f"{volume}/..data", tarfile.SYMTYPE, 0o777, link="..1")
            for top in {path.split("/")[0] for path in held}:
                add(f"{volume}/{top}", tarfile.SYMTYPE, 0o777, link=f"..data/{top}")
    return packed.getvalue()


def _directories(paths: Iterable[str]) -> list[str]:
    """Return the directories that hold these paths, outer ones first."""
    found = {""}
    for path in paths:
        parts = path.split("/")[:-1]
        found |= {"/".join(parts[: length + 1]) for length in range(len(parts))}
    return sorted(found)
