"""Sites in Flower's simulation runtime: no SuperNode names one there, so its number does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from app.config import home
from certs.errors import ConfigError


def site_of(
    node_config: Mapping[str, object], run_config: Mapping[str, object]
) -> tuple[str, str] | None:
    """A simulated site's name and dataset URI; None for a SuperNode's own node config.

    The runtime gives each node the ``partition-id`` and ``num-partitions``, counted from 0. The datasets that
    ``simulation-dataset`` names, separated by blanks, take turns over the nodes, and the nodes of one dataset share its
    episodes. Raises ``ConfigError``.
    """
    number, sites = node_config.get("partition-id"), node_config.get("num-partitions")
    if not isinstance(number, int) or not isinstance(sites, int):
        return None
    datasets = str(run_config.get("simulation-dataset", "")).split()
    if not 1 <= len(datasets) <= sites:
        raise ConfigError(
            f"The run config's simulation-dataset names {len(datasets)} datasets for {sites} "
            "simulated sites: name at least one, and no more than there are sites."
        )
    turn, first = divmod(number, len(datasets))
    sharing = len(range(first, sites, len(datasets)))
    mark = "&" if "#" in datasets[first] else "#"
    return f"site-{number:04d}", f"{datasets[first]}{mark}part={turn}/{sharing}"


def is_simulated(node_config: Mapping[str, object]) -> bool:
    """Whether a node is the simulation runtime's."""
    return "partition-id" in node_config


def forget(lineage: str) -> None:
    """Remove what the simulated sites of this machine keep for a run that is complete.

    Up to 2.8 GB a site (SmolVLA), and as many sites as the machine simulates.
    """
    for state in (home() / "sites").glob(f"site-*/{lineage}"):
        shutil.rmtree(state, ignore_errors=True)
