"""Who takes part in a run: the sites that described themselves, and their pooled statistics.

The statistics are pooled once, over the sites the run began with, and then stay as they are. A site
that comes later is described before its first round and trains with the statistics of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from app import statistics
from app.config import RunConfig
from app.description import Description
from app.exchange import Exchange, Outcome
from app.job import REQUEST
from app.requests import tell
from app.rounds import Deadlines, Grid, Node, Site, State, one_line, wait_for_sites
from app.run_progress import DESCRIBE, RunProgress
from app.statistics import Moments
from certs.errors import DatasetError, RunFailedError
from certs.roles import checked_name

# Seconds a site that joins a running run may take to describe itself: ten times what Flower and
# reading a dataset's metadata need, and not so long that everyone else's round waits for it.
JOIN_S = 60.0


class Participants:
    """The sites of a run, by name, and what each said of itself.

    ``request`` is the record that goes with the question.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        request: ConfigRecord,
        progress: RunProgress,
    ) -> None:
        self._grid, self._config, self._request = grid, config, request
        self._progress = progress
        self._described: dict[str, Description] = {}
        self._sites: dict[str, Site] = {}
        # Nodes whose description was refused: not asked again until they went away and came back.
        self._refused: set[int] = set()
        self.moments: dict[str, Moments] = {}

    @property
    def sites(self) -> list[Site]:
        """The sites of the run, by name."""
        return [self._sites[name] for name in sorted(self._sites)]

    @property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """What the record of the run says of each site."""
        return {site.name: self._described[site.name].summary() for site in self.sites}

    @property
    def held(self) -> dict[str, str]:
        """The hash of the model that each site said it holds."""
        return {name: described.held for name, described in self._described.items()}

    @property
    def chunk_bytes(self) -> int:
        """The smallest chunk that a site's link asks for; 0 where no site measured its link."""
        return min((d.chunk_bytes for d in self._described.values() if d.chunk_bytes), default=0)

    def gather(self, moments: Mapping[str, Moments] | None) -> None:
        """Wait for ``min-sites``, describe everyone online and pool their statistics.

        A resumed run hands in the ``moments`` it began with. ``RunFailedError`` when too few sites
        can take part.
        """
        config = self._config
        nodes = wait_for_sites(self._grid, config.min_sites, config.round_timeout)
        self._progress.enter(DESCRIBE)
        outcomes = self._describe(nodes, config.round_timeout)
        if len(self._sites) < config.min_sites:
            reasons = "; ".join(f"{o.site.name}: {o.reason}" for o in outcomes if o.reason)
            raise RunFailedError(
                f"{len(self._sites)} of the {config.min_sites} sites this run needs can take part "
                f"({reasons})."
            )
        described = [self._described[site.name] for site in self.sites]
        if len({site.fps for site in described}) > 1:
            rates = ", ".join(f"{s.name} {self._described[s.name].fps}" for s in self.sites)
            raise RunFailedError(
                f"The sites record different frames a second ({rates}): run with sites of one rate."
            )
        # In order of name: float64 sums, too, depend on their order.
        self.moments = dict(moments or statistics.merge(site.moments for site in described))

    def admit(self, online: Iterable[Node]) -> list[str]:
        """Describe the nodes that are new; the names of the sites that joined, or came back anew."""
        nodes = {node.node_id: node for node in online}
        self._refused &= nodes.keys()
        known = {site.node for site in self._sites.values()} | self._refused
        fresh = [node for node_id, node in nodes.items() if node_id not in known]
        if not fresh:
            return []
        self._describe(fresh, min(JOIN_S, self._config.round_timeout), present=set(nodes))
        joined = {node.node_id for node in fresh}
        return [site.name for site in self.sites if site.node in joined]

    def _describe(
        self, nodes: list[Node], seconds: float, *, present: Collection[int] = ()
    ) -> list[Outcome]:
        asked = [Site(one_line(n.name) or f"node-{n.node_id}", n.node_id) for n in nodes]
        registered = {node.node_id for node in nodes if node.name}
        # A site that came back under another SuperNode key keeps its name and its place.
        taken = {name for name, site in self._sites.items() if site.node in present}
        found: dict[str, tuple[Site, Description]] = {}

        def fold(site: Site, content: RecordDict) -> None:
            described = Description.from_records(content)
            # The SuperLink's registry says who a SuperNode is. Only without one does its own word.
            name = (
                site.name if site.node in registered else checked_name(described.site, "site name")
            )
            if name in found or name in taken:
                raise DatasetError(f"Another site is called {name} already: rename one of them.")
            rate = next((d.fps for d in self._described.values()), described.fps)
            if described.fps != rate:
                raise DatasetError(
                    f"It records {described.fps} frames a second and the run's sites {rate}: a run "
                    "has one rate."
                )
            found[name] = Site(name, site.node), described

        def ended(outcome: Outcome) -> None:
            detail, name = "", outcome.site.name
            for site, described in found.values():
                if site.node == outcome.site.node:
                    outcome = replace(outcome, site=site)
                    episodes = described.train_episodes + described.held_out_episodes
                    detail = (
                        f", {episodes} episodes ({described.held_out_episodes} held out), "
                        f"{described.train_frames} training frames"
                    )
            tell("describe", outcome, detail)
            self._progress.ended(name, outcome.state.value, outcome.reason, name=outcome.site.name)

        self._progress.asked(DESCRIBE, [site.name for site in asked])
        exchange = Exchange(
            self._grid, fold, ended, deadlines=Deadlines(seconds, grace=self._config.grace)
        )
        exchange.dispatch(
            {
                site: Message(
                    RecordDict({REQUEST: self._request}),
                    site.node,
                    MessageType.QUERY,
                    ttl=seconds,
                )
                for site in asked
            }
        )
        outcomes = exchange.collect()
        for name, (site, described) in found.items():
            self._sites[name], self._described[name] = site, described
        answered = {o.site.node for o in outcomes if o.state in (State.ERROR, State.INVALID)}
        self._refused |= answered
        return outcomes
