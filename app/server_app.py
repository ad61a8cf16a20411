"""The ServerApp: one run from waiting for sites to the last round's checkpoint.

Needs neither torch nor lerobot. Its log lines, which ``flwr log`` shows, keep one form:
``round 1/3 train: site-a completed, loss 0.812, 240 frames, 12.3 s``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from app import payload, statistics, tensorfile
from app.aggregation import Accumulator, mean_loss, mean_rmse
from app.checkpoint import write_checkpoint
from app.client_app import METRICS, REQUEST
from app.config import RunConfig, models_directory
from app.dataset_meta import JOINTS
from app.description import Description
from app.journal import Journal, runs_root
from app.payload import PayloadError
from app.policy import frozen_hash, resolve_model, trainable_names
from app.rounds import (
    Exchange,
    Outcome,
    Phase,
    Round,
    Site,
    State,
    one_line,
    wait_for_sites,
)
from app.tensorfile import WEIGHTS
from certs.errors import DatasetError, FleetError, RunFailedError
from certs.roles import checked_name

_log = logging.getLogger("flwr")
app = ServerApp()

# Every metric a site may report, and null where it did not.
_SECONDS = {"work_seconds": float, "ready_seconds": float}
_TRAIN = {"loss": float, "last_loss": float, "frames": int, "grad_norm": float, **_SECONDS}
_EVALUATE = {"loss": float, "frames": int, "rmse_deg": list, **_SECONDS}


class _OneSentence(logging.Filter):
    """Leaves out the traceback that Flower logs with an expected failure."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FleetError):
            record.msg, record.args = f"{record.getMessage()}: {error}", ()
            record.exc_info = record.exc_text = None
        return True


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation; ``FleetError`` ends the run as failed, with its sentence as the reason."""
    _log.addFilter(_OneSentence())
    # Flower has a handler of its own; a library that sets one at the root would double each line.
    _log.propagate = False
    Run(grid, str(context.run_id), RunConfig.parse(context.run_config)).execute()


class Run:
    """One run's state between its rounds."""

    def __init__(self, grid: Grid, run_id: str, config: RunConfig) -> None:
        self._grid, self._id, self._config = grid, run_id, config
        self._journal = Journal(runs_root(), run_id)
        self._about: dict[str, Any] = {
            "run": run_id,
            "started_at": _now(),
            "config": config.as_dict(),
            "model": None,
            "sites": None,
            "statistics": None,
        }
        self._journal.describe(self._about)
        self._sites: list[Site] = []
        self._committed = 0
        self._base_loss: float | None = None

    def execute(self) -> None:
        """Wait, describe, then rounds 0 to the last; ``RunFailedError`` unless all were committed."""
        config = self._config
        self._load()
        self._describe()
        for number in range(config.rounds + 1):
            self._round(number)
        where = self._journal.directory
        if self._committed < config.rounds:
            raise RunFailedError(
                f"{self._committed} of {config.rounds} rounds were committed: see the sites' "
                f"reasons in {where / 'rounds.jsonl'}."
            )
        _log.info(
            "run %s finished: %d of %d rounds committed, model in %s",
            *(self._id, self._committed, config.rounds, where / "checkpoints" / "latest"),
        )

    def _load(self) -> None:
        self._base = resolve_model(self._config.model, models_directory())
        self._frozen = frozen_hash(self._base)
        self._tensors = tensorfile.read(self._base / WEIGHTS, trainable_names(self._base))
        self._hash = payload.canonical_hash(self._tensors)
        values = sum(array.size for array in self._tensors.values())
        self._about["model"] = {
            "name": self._config.model,
            "hash": self._hash,
            "frozen": self._frozen,
            "trainable_tensors": len(self._tensors),
            "trainable_values": values,
        }
        _log.info(
            "run %s: model %s, %d trainable values, %d rounds of %d steps",
            *(self._id, self._config.model, values, self._config.rounds, self._config.local_steps),
        )

    def _describe(self) -> None:
        """Learn who takes part and pool their statistics, which then stay as they are."""
        config = self._config
        _log.info("waiting up to %g s for %d sites", *(config.round_timeout, config.min_sites))
        nodes = wait_for_sites(self._grid, config.min_sites, config.round_timeout)
        asked = [Site(one_line(n.name) or f"node-{n.node_id}", n.node_id) for n in nodes]
        registered = {node.node_id for node in nodes if node.name}
        found: dict[Site, Description] = {}

        def fold(site: Site, content: RecordDict) -> None:
            described = Description.from_records(content)
            # The SuperLink's registry says who a SuperNode is. Only without one does its own word.
            name = (
                site.name if site.node in registered else checked_name(described.site, "site name")
            )
            if any(name == other.name for other in found):
                raise DatasetError(f"Another site is called {name} already: rename one of them.")
            found[Site(name, site.node)] = described

        def tell(outcome: Outcome) -> None:
            detail = ""
            for site, described in found.items():
                if site.node == outcome.site.node:
                    outcome = replace(outcome, site=site)
                    episodes = described.train_episodes + described.held_out_episodes
                    detail = (
                        f", {episodes} episodes ({described.held_out_episodes} held out), "
                        f"{described.train_frames} training frames"
                    )
            self._tell("describe", outcome, detail)

        exchange = Exchange(self._grid, fold, tell, seconds=config.round_timeout)
        exchange.dispatch({s: self._message(MessageType.QUERY, s, RecordDict()) for s in asked})
        outcomes = exchange.collect()
        if len(found) < config.min_sites:
            reasons = "; ".join(f"{o.site.name}: {o.reason}" for o in outcomes if o.reason)
            raise RunFailedError(
                f"{len(found)} of the {config.min_sites} sites this run needs can take part "
                f"({reasons})."
            )
        self._sites = sorted(found, key=lambda site: site.name)
        if len({described.fps for described in found.values()}) > 1:
            rates = ", ".join(f"{site.name} {found[site].fps}" for site in self._sites)
            raise RunFailedError(
                f"The sites record different frames a second ({rates}): run with sites of one rate."
            )
        pooled = statistics.merge([found[site].moments for site in self._sites])
        self._statistics = statistics.to_bytes(pooled)
        self._normalisation = statistics.normalisation(pooled)
        self._about["sites"] = {site.name: found[site].summary() for site in self._sites}
        self._about["statistics"] = {
            feature: {name: values.tolist() for name, values in kinds.items()}
            for feature, kinds in self._normalisation.items()
        }
        self._journal.describe(self._about)

    def _round(self, number: int) -> None:
        state, started = Round(number), _now()
        trained: dict[str, dict[str, Any]] = {}
        evaluated: dict[str, dict[str, Any]] = {}
        participants: list[dict[str, Any]] = []
        reason = None
        if number:
            total = Accumulator(self._tensors, base_hash=self._hash, frozen_hash=self._frozen)
            trained = self._train(state, total)
            if total.updates:
                self._tensors = total.model()
                self._hash = payload.canonical_hash(self._tensors)
                participants = [
                    {"site": name, "frames": site["frames"]}
                    for name, site in trained.items()
                    if site["state"] == State.COMPLETED
                ]
            else:
                reason = "no valid update: the last model stays"
        checkpoint = None
        if reason is None:
            state.enter(Phase.COMMIT)
            checkpoint = self._commit(number, participants)
            state.enter(Phase.EVALUATE)
            evaluated = self._evaluate(number)
        else:
            state.enter(Phase.FAIL)
            _log.warning("round %d/%d fail: %s", number, self._config.rounds, reason)
        state.enter(Phase.DONE)
        loss = mean_loss(evaluated.values())
        whole = all(site["state"] == State.COMPLETED for site in evaluated.values())
        self._tell_loss(number, loss, whole=whole)
        asked = [*trained.values(), *evaluated.values()]
        self._journal.append(
            {
                "round": number,
                "committed": reason is None,
                "reason": reason,
                "started_at": started,
                "model": self._hash,
                "checkpoint": checkpoint,
                "sites": {
                    site.name: {
                        "train": trained.get(site.name),
                        "evaluate": evaluated.get(site.name),
                    }
                    for site in self._sites
                },
                "aggregate": {
                    "train_loss": mean_loss(trained.values()),
                    "frames": sum(site["frames"] for site in participants) if number else None,
                    "loss": loss,
                    "rmse_deg": mean_rmse(evaluated.values()),
                },
                "bytes": {
                    way: sum(site[f"bytes_{way}"] or 0 for site in asked) for way in ("down", "up")
                },
                "seconds": state.seconds,
            }
        )

    def _train(self, state: Round, total: Accumulator) -> dict[str, dict[str, Any]]:
        def fold(content: RecordDict, metrics: Mapping[str, Any]) -> None:
            total.add(payload.from_records(content, kind="delta"), metrics["frames"] or 0)

        state.enter(Phase.DISPATCH)
        return self._ask(
            state.number,
            MessageType.TRAIN,
            _TRAIN,
            fold,
            dispatched=lambda: state.enter(Phase.COLLECT),
        )

    def _evaluate(self, number: int) -> dict[str, dict[str, Any]]:
        return self._ask(number, MessageType.EVALUATE, _EVALUATE, lambda *_: None)

    def _ask(
        self,
        number: int,
        kind: str,
        kinds: Mapping[str, type],
        fold: Callable[[RecordDict, Mapping[str, Any]], None],
        dispatched: Callable[[], None] = lambda: None,
    ) -> dict[str, dict[str, Any]]:
        """Send the model to every site; each site's record, by name."""
        manifest, flat = payload.pack(
            self._tensors, kind="model", base=self._hash, frozen=self._frozen
        )
        # One content for all: Flower stores its objects once.
        content = payload.to_records(manifest, flat)
        content[REQUEST] = ConfigRecord({"round": number, "statistics": self._statistics})
        del flat
        reported: dict[str, dict[str, Any]] = {}
        came: dict[str, int] = {}

        def take(site: Site, reply: RecordDict) -> None:
            metrics = _metrics(reply, kinds)
            fold(reply, metrics)
            reported[site.name] = metrics
            came[site.name] = payload.wire_bytes(reply)

        def tell(outcome: Outcome) -> None:
            found = reported.get(outcome.site.name)
            detail = ""
            if found:
                detail = f", loss {_number(found['loss'])}, {found['frames']} frames"
            self._tell(f"round {number}/{self._config.rounds} {kind}", outcome, detail)

        exchange = Exchange(self._grid, take, tell, seconds=self._config.round_timeout)
        down = payload.wire_bytes(content)
        exchange.dispatch({site: self._message(kind, site, content) for site in self._sites})
        del content
        dispatched()
        return {
            outcome.site.name: {
                "state": outcome.state.value,
                "reason": outcome.reason,
                "seconds": outcome.seconds,
                "bytes_down": down if outcome.sent else 0,
                "bytes_up": came.get(outcome.site.name),
                **(reported.get(outcome.site.name) or dict.fromkeys(kinds)),
            }
            for outcome in exchange.collect()
        }

    def _commit(self, number: int, participants: list[dict[str, Any]]) -> str:
        started = time.monotonic()
        path = write_checkpoint(
            self._journal.directory / "checkpoints",
            number,
            base=self._base,
            tensors=self._tensors,
            normalisation=self._normalisation,
            federation={
                "run": self._id,
                "round": number,
                "model": self._hash,
                "base": self._about["model"],
                "participants": participants,
            },
        )
        if number:
            self._committed += 1
            _log.info(
                "round %d/%d commit: %d of %d sites, %d frames, model %s, %.1f s",
                *(number, self._config.rounds, len(participants), len(self._sites)),
                *(sum(site["frames"] for site in participants), self._hash[:12]),
                time.monotonic() - started,
            )
        return str(path.relative_to(self._journal.directory))

    def _message(self, kind: str, site: Site, content: RecordDict) -> Message:
        # Once the round is over, a site that was away must not start on it.
        return Message(content, site.node, kind, ttl=self._config.round_timeout)

    def _tell(self, what: str, outcome: Outcome, detail: str) -> None:
        reason = f", {outcome.reason}" if outcome.reason else ""
        level = logging.INFO if outcome.state is State.COMPLETED else logging.WARNING
        _log.log(
            level,
            "%s: %s %s%s%s, %.1f s",
            *(what, outcome.site.name, outcome.state.value, reason, detail, outcome.seconds),
        )

    def _tell_loss(self, number: int, loss: float | None, *, whole: bool) -> None:
        if loss is None:
            return
        change = ""
        # Means over different sites do not compare.
        if not whole:
            change = ", not of all sites"
        elif number == 0:
            self._base_loss = loss
        elif self._base_loss:
            change = f", {100 * (loss / self._base_loss - 1):+.1f} % against round 0"
        _log.info(
            "round %d/%d: held-out loss %s%s", *(number, self._config.rounds, _number(loss), change)
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "unknown"


def _metrics(reply: RecordDict, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The metrics in a site's reply, null where there is none; ``PayloadError`` on a wrong type."""
    found = dict(reply.metric_records.get(METRICS, {}))
    metrics = {name: found.get(name) for name in kinds}
    for name, value in metrics.items():
        sound = value is None or type(value) is kinds[name]
        if isinstance(value, list):
            sound = len(value) == len(JOINTS) and all(type(joint) is float for joint in value)
        if not sound:
            raise PayloadError("metrics", f"The site reports {name} as {one_line(value)}.")
    return metrics
