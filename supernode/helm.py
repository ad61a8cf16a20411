"""A site on Kubernetes: the values of the chart ``k8s/site``, and what its operator runs. Nothing is started here."""

import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Final

from certs.files import write_atomic
from supernode.site import Site

CHART: Final = "k8s/site"
# What each identity consists of; the keys of its Secret.
_SUPEREXEC: Final = ("tls.key", "tls.crt", "ca.crt")
_IDENTITY: Final = (*_SUPEREXEC, "node.key", "node.pub")


def write(site: Site) -> Path:
    """Write the chart's ``values.yaml`` for the site; return its path."""
    path = site.directory / "values.yaml"
    cpu = site.device == "cpu"
    location, mark, part = site.dataset.partition("#")
    hub = location.startswith("hf:")
    values = {
        "release": _release(site),
        "site": site.name,
        "federation": site.federation,
        "superlink": site.superlink,
        "enrolment": site.enrolment,
        "version": version("vlafleet"),
        "identity": f"{_release(site)}-identity",
        "superexec": f"{_release(site)}-superexec",
        "dataset": site.dataset if hub else f"/data{mark}{part}",
        "claim": "" if hub else f"{_release(site)}-data",
        # In a pod a GPU is the first one, whichever it is in the node.
        "device": site.device.partition(":")[0],
        "gpus": 0 if cpu else 1,
        "cores": 2 if cpu else 4,
        "memory": "6Gi" if cpu else "24Gi",
    }
    # What is JSON is YAML, too.
    text = _VALUES.format(**{name: json.dumps(value) for name, value in values.items()})
    write_atomic(path, text.encode())
    return path


def next_steps(site: Site) -> list[str]:
    """Return the commands that put the site's identities into the cluster and install the chart.

    They work in the namespace of the current context. Secrets that are there are replaced.
    """
    release, values = _release(site), shlex.quote(str(site.directory / "values.yaml"))
    return [
        _secret(f"{release}-identity", site.identity, _IDENTITY),
        _secret(f"{release}-superexec", site.superexec, _SUPEREXEC),
        f"helm upgrade --install {release} {CHART} --values {values} --wait",
    ]


def _release(site: Site) -> str:
    return f"vlafleet-{site.name}"


def _secret(name: str, directory: Path, files: tuple[str, ...]) -> str:
    keys = " ".join(f"--from-file={shlex.quote(str(directory / file))}" for file in files)
    create = f"kubectl create secret generic {name} {keys} --dry-run=client --output=yaml"
    return f"{create} | kubectl apply --server-side --filename=-"


_VALUES: Final = """\
# Values of the chart k8s/site, written by 'vlafleet site join --helm'.
#   helm upgrade --install {release} k8s/site --values values.yaml

# The site's name in the federation. Its certificates bear it: to change it, join again under the other name.
site: {site}
federation: {federation}

# Where the federation answers, host:port. The SuperNode's pod must get out to both and to nothing else; the app's pod
# gets out to its SuperNode alone.
superlink: {superlink}
enrolment: {enrolment}

image:
  # Registry and path before the images' names, with the slash. Empty where the nodes have the images already.
  registry: ""
  # All the images of one site have the same version.
  tag: {version}

# The Secrets with the site's identities, made before the chart is installed. Certificates renew themselves on a volume
# that is filled from the Secret at the first start; a Secret made anew after another invitation is taken again.
secrets:
  # The SuperNode's. Not mounted into the app's pod.
  identity: {identity}
  # The SuperExec's.
  superexec: {superexec}

dataset:
  # As the app sees it: /data is where the claim is mounted, read-only. An hf: dataset is fetched from the hub once.
  uri: {dataset}
  # The PersistentVolumeClaim that holds the recordings. Has to exist; leave it empty for an hf: dataset.
  existingClaim: {claim}

# What the site's ClientApp trains on: cpu or cuda. With cuda the app asks for the GPUs below.
device: {device}
gpus: {gpus}

# What is kept from round to round (the last model, AdamW's moments), and what can be made again (the cache of frames).
# A site that loses the first starts its next round from a full model.
persistence:
  storageClass: ""
  state: 10Gi
  cache: 50Gi

resources:
  supernode:
    requests: {{cpu: 100m, memory: 512Mi}}
    # A round's message of 400 MB takes 1.2 GB.
    limits: {{memory: 2Gi}}
  app:
    requests: {{cpu: {cores}, memory: {memory}}}
    # The trainer measures what is free of it before it keeps a cache in memory.
    limits: {{memory: {memory}}}
"""
