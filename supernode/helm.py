"""A site on Kubernetes: the values of the chart ``k8s/site``, and what its operator runs. Nothing is started here."""

import json
import re
import shlex
from pathlib import Path
from typing import Final

from certs.errors import ConfigError
from certs.files import write_atomic
from supernode.site import Site

CHART: Final = "k8s/site"
# What each identity consists of; the keys of its Secret.
_SUPEREXEC: Final = ("tls.key", "tls.crt", "ca.crt")
_IDENTITY: Final = (*_SUPEREXEC, "node.key", "node.pub")
# The longest name that Helm takes for a release.
_LONGEST: Final = 53


def write(site: Site) -> Path:
    """Write the chart's ``values.yaml`` for the site; return its path.

    Raises ``ConfigError`` for a part of the dataset that the chart cannot name.
    """
    path = site.directory / "values.yaml"
    release = _release(site)
    location, _, part = site.dataset.partition("#")
    hub = location.removeprefix("hf:") if location.startswith("hf:") else ""
    names = {
        "site": site.name,
        "federation": site.federation,
        "superlink": site.superlink,
        "enrolment": site.enrolment,
        "identity": f"{release}-identity",
        "superexec": f"{release}-superexec",
        "claim": "" if hub else f"{release}-data",
        "hub": hub,
        "episodes": _episodes(site, part),
        # In a pod a GPU is the first one, whichever it is in the node.
        "gpus": 0 if site.device == "cpu" else 1,
        "cores": "2" if site.device == "cpu" else "4",
        "memory": "6Gi" if site.device == "cpu" else "24Gi",
    }
    # What is JSON is YAML, too.
    values = {name: json.dumps(value) for name, value in names.items()}
    write_atomic(path, _VALUES.format(release=release, chart=CHART, **values).encode())
    return path


def next_steps(site: Site) -> list[str]:
    """Return the commands that put the site's identities into the cluster and install the chart.

    They work in the namespace of the current context. Secrets that are there are replaced.
    """
    release, values = _release(site), shlex.quote(str(site.directory / "values.yaml"))
    return [
        _secret(f"{release}-identity", site.identity, _IDENTITY),
        _secret(f"{release}-superexec", site.superexec, _SUPEREXEC),
        f"helm upgrade --install {release} {CHART} --values {values}",
    ]


def _release(site: Site) -> str:
    return f"vlafleet-{site.name}"[:_LONGEST].rstrip("-")


def _episodes(site: Site, part: str) -> str:
    match = re.fullmatch(r"(?:episodes=([0-9]+:[0-9]+))?", part)
    if match is None:
        raise ConfigError(
            f"{site.dataset}: on Kubernetes a site trains on a whole dataset or on #episodes=A:B of it"
        )
    return match[1] or ""


def _secret(name: str, directory: Path, files: tuple[str, ...]) -> str:
    keys = " ".join(f"--from-file={shlex.quote(str(directory / file))}" for file in files)
    create = f"kubectl create secret generic {name} {keys} --dry-run=client --output=yaml"
    return f"{create} | kubectl apply --server-side --filename=-"


_VALUES: Final = """\
# Values of the chart k8s/site, written by 'vlafleet site join --helm', which writes them again: keep changes of your
# own in a second file. The chart's values.yaml describes every value.
#   helm upgrade --install {release} {chart} --values values.yaml --values mine.yaml

# The site's certificates bear both names: to change one, join again.
site: {site}
federation: {federation}

# Where the federation answers. The SuperNode's pod gets out to both and to nothing else; the app's pod gets out to its
# SuperNode alone.
superlink: {superlink}
enrolment: {enrolment}

# The Secrets with the site's identities, made before the chart is installed. Certificates renew themselves on volumes
# that are filled from the Secrets; a Secret made anew after another invitation is taken again.
identity:
  existingSecret: {identity}
  superexecSecret: {superexec}

# A claim with the recordings has to exist. For a directory of the node, let existingClaim be empty, name the directory
# as hostPath, and the node in app.nodeSelector.
dataset:
  existingClaim: {claim}
  hub: {hub}
  episodes: {episodes}

# A run of another model than the tiny one needs it fetched: models: [lerobot/smolvla_base].
app:
  gpu:
    count: {gpus}
  # The trainer measures what is free of its memory before it keeps a cache there.
  resources:
    requests: {{cpu: {cores}, memory: {memory}}}
    limits: {{memory: {memory}}}
"""
