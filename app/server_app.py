"""The ServerApp: one run from waiting for sites to the last round's checkpoint.

Needs neither torch nor lerobot. Its log lines, which ``flwr log`` shows, keep one form:
``round 1/3 train: site-a completed, loss 0.812, 240 frames, 12.3 s``.

A run is resumed from its directory alone: ``config.json`` says what it was asked for,
``rounds.jsonl`` which rounds are over, the newest checkpoint where the model stands.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from app import hub, payload, schedule, server_evaluation, simulation, statistics
from app.aggregation import Updates
from app.checkpoint import BEST, LATEST, newest, read_federation, round_directory
from app.config import RunConfig
from app.durable import point
from app.journal import ROUNDS, Journal, read_config, read_rounds, runs_root, unfinished
from app.model import Model
from app.model_card import write_model_card
from app.participants import Participants
from app.publish import publish
from app.record import begin, complete, history, now
from app.report import write_report
from app.requests import ask
from app.requests import number as shown
from app.rounds import Phase, Round, Site, State, one_line, select, wait_for_sites
from app.run_progress import RunProgress
from app.schedule import Past
from app.series import EARLY_STOPPING
from certs import logs
from certs.errors import ConfigError, FleetError, RunFailedError
from certs.flower import set_chunk_size

_log = logging.getLogger("flwr")
app = ServerApp()

# How a run ends that took all its rounds.
COMPLETED = "completed"


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
    config = RunConfig.parse(context.run_config)
    if config.push_to and not hub.is_repository(config.push_to):
        raise ConfigError(f"The run config sets push-to={config.push_to!r}: it takes 'owner/name'.")
    Run(grid, str(context.run_id), config).execute()


class Run:
    """One run's state between its rounds."""

    def __init__(self, grid: Grid, run_id: str, config: RunConfig) -> None:
        self._grid = grid
        # A resumed run keeps its directory, its name and its settings.
        name = unfinished(runs_root()) if config.resume else run_id
        logs.bind(run=name)
        self._journal = Journal(runs_root(), name)
        directory = self._journal.directory
        self._about: dict[str, Any] = {
            "run": name,
            "runs": [],
            "started_at": now(),
            "ended": None,
            "config": config.as_dict(),
            "model": None,
            "sites": None,
            "statistics": None,
        }
        if config.resume:
            self._about = read_config(directory)
            config = _recorded(config, self._about)
        self._config = config
        self._records = read_rounds(directory)
        ended = (self._about["ended"] or {}).get("reason")
        if ended and (len(self._records) > config.rounds or ended == EARLY_STOPPING):
            raise RunFailedError(
                f"Run {name} has ended ({ended}): start a new run, without resume."
            )
        self._about |= {"runs": [*self._about["runs"], run_id], "ended": None}
        self._journal.describe(self._about)
        self._checkpoints = directory / "checkpoints"
        self._progress = RunProgress(directory, name, config.rounds, len(self._records))

    def execute(self) -> None:
        """Wait, describe, then the rounds that are left.

        ``RunFailedError`` when the run cannot go on, or fewer rounds than asked were committed.
        """
        config = self._config
        try:
            self._load()
            self._gather()
            self._take_up()
            ended = self._rounds()
            self._end(ended)
            if config.simulation_dataset:
                simulation.forget(self._about["run"])
            committed = sum(bool(record["committed"]) for record in self._records[1:])
            if committed < len(self._records) - 1:
                raise RunFailedError(
                    f"{committed} of {config.rounds} rounds were committed: see the sites' reasons "
                    f"in {self._journal.directory / ROUNDS}."
                )
        except FleetError as error:
            self._end(str(error))
            raise
        finally:
            self._progress.close()
            self._journal.close()
        _log.info(
            "run %s finished%s: %d of %d rounds committed, model in %s",
            *(self._about["run"], "" if ended == COMPLETED else f" by {ended}", committed),
            *(config.rounds, self._checkpoints / LATEST),
        )

    def _load(self) -> None:
        """The base model; a resumed run must find the one it began with."""
        self._model = Model(self._config, self._checkpoints)
        about = self._model.describe()
        if self._about["model"] not in (None, about):
            raise ConfigError(
                f"Model {self._config.model!r} is not the one that run {self._about['run']} began "
                "with: restore it, or start a new run."
            )
        self._about["model"] = about
        _log.info(
            "run %s: model %s, %d trainable values, %d rounds of %d steps",
            *(self._about["run"], self._config.model, about["trainable_values"]),
            *(self._config.rounds, self._config.local_steps),
        )

    def _gather(self) -> None:
        """Learn who takes part and pool their statistics, which then stay as they are."""
        config = self._config
        # What every request says: whose run it is, and its settings.
        self._terms = {"lineage": self._about["run"], "config": json.dumps(config.as_dict())}
        _log.info("waiting up to %g s for %d sites", *(config.round_timeout, config.min_sites))
        request = ConfigRecord({**self._terms})
        self._participants = Participants(self._grid, config, request, self._progress)
        recorded = self._about["statistics"]
        self._participants.gather(
            statistics.from_bytes(json.dumps(recorded).encode()) if recorded else None
        )
        self._held = self._participants.held
        pooled = statistics.to_bytes(self._participants.moments)
        self._terms |= {"statistics": pooled.decode()}
        self._normalisation = statistics.normalisation(self._participants.moments)
        self._about["statistics"] = json.loads(pooled)
        self._describe()

    def _describe(self) -> None:
        """Put the sites into the record of the run; cut messages as the slowest link asks."""
        self._about["sites"] = {**(self._about["sites"] or {}), **self._participants.summaries}
        self._journal.describe(self._about)
        if chunk := self._participants.chunk_bytes:
            set_chunk_size(chunk)

    def _take_up(self) -> None:
        """Go on from the newest checkpoint; a run without one begins with round 0."""
        checkpoint = newest(self._checkpoints)
        if checkpoint is None:
            return
        federation = read_federation(checkpoint)
        self._model.take_up(checkpoint, federation["model"])
        number = federation["round"]
        _log.info("round %d/%d: resumed from %s", number, self._config.rounds, checkpoint.name)
        if number == len(self._records):
            # The ServerApp died between the commit and the end of the round.
            self._finish(self._begin(number), federation["record"], checkpoint)

    def _rounds(self) -> str:
        """Run the rounds that are left; how the run ended."""
        config, ended = self._config, COMPLETED
        while len(self._records) <= config.rounds:
            if schedule.stop(config, self._history()):
                ended = EARLY_STOPPING
                break
            self._round(len(self._records))
        number = len(self._records) - 1
        if ended == EARLY_STOPPING:
            _log.info(
                "round %d/%d: no better held-out loss for %d rounds, the best is round %s",
                *(number, config.rounds, config.patience, self._records[-1]["best"]),
            )
        if config.push_to:
            best = self._checkpoints / BEST
            self._push(best if best.exists() else self._checkpoints / LATEST)
        return ended

    def _begin(self, number: int) -> Round:
        logs.bind(round=number)
        return Round(number, told=self._progress.enter)

    def _round(self, number: int) -> None:
        state, aggregation = self._begin(number), None
        record = begin(number)
        checkpoint = None
        if number == 0:
            state.enter(Phase.COMMIT)
            checkpoint = self._commit(state, record, None)
        else:
            state.enter(Phase.SELECT)
            with self._model.updates(self._journal.directory / ".updates") as updates:
                try:
                    sites = self._select(number)
                    record["train"] = self._train(state, record, sites, updates)
                    if len(updates) < self._config.quorum:
                        raise RunFailedError(
                            f"{len(updates)} valid updates where the quorum is "
                            f"{self._config.quorum}: the last model stays"
                        )
                except RunFailedError as error:
                    state.enter(Phase.FAIL)
                    record["reason"] = str(error)
                    _log.warning("round %d/%d fail: %s", number, self._config.rounds, error)
                else:
                    # With over-sampling more are asked than are waited for.
                    wanted = min(self._config.sites_per_round or len(sites), len(sites))
                    state.enter(Phase.COMMIT if len(updates) >= wanted else Phase.DEGRADE)
                    checkpoint = self._commit(state, record, updates)
                    aggregation = round(updates.seconds, 6)
        self._finish(state, record, checkpoint, aggregation)

    def _select(self, number: int) -> list[Site]:
        """The sites of this round; ``RunFailedError`` when there is no quorum in time."""
        config = self._config
        online = wait_for_sites(self._grid, config.quorum, config.round_timeout)
        if joined := self._participants.admit(online):
            self._held |= {name: self._participants.held[name] for name in joined}
            self._describe()
            _log.info("round %d/%d: %s joined", number, config.rounds, ", ".join(joined))
        return select(
            self._participants.sites,
            {node.node_id for node in online},
            count=config.sites_per_round,
            over_sampling=config.over_sampling,
            seed=config.seed,
            number=number,
        )

    def _train(
        self, state: Round, record: dict[str, Any], sites: list[Site], updates: Updates
    ) -> dict[str, dict[str, Any]]:
        """Ask ``sites`` for updates; each site's entry of the record."""
        config, history = self._config, self._history()
        scale, mu = schedule.scale(config, history), schedule.mu(config, history)
        first = (state.number - 1) * config.local_steps
        rates = [
            scale * schedule.learning_rate(config, step)
            for step in (first, first + config.local_steps - 1)
        ]
        record["plan"] = {"learning_rate": rates, "scale": scale, "mu": mu}
        boosts = {site.name: schedule.boost(config, history, site.name) for site in sites}
        accepted: dict[str, dict[str, Any]] = {}

        def fold(site: Site, content: RecordDict, metrics: Mapping[str, Any]) -> None:
            with updates.timed():
                update = payload.from_records(content, kind="update")
                norm = updates.add(site.name, update, metrics["frames"] or 0)
            accepted[site.name] = {"update_norm": norm, "payload_sha256": update.sha256}

        state.enter(Phase.DISPATCH)
        entries = ask(
            self._grid,
            config,
            self._model.broadcast,
            MessageType.TRAIN,
            {
                site: self._request(state.number, scale=scale * boosts[site.name], mu=mu)
                for site in sites
            },
            self._held,
            self._progress,
            fold=fold,
            dispatched=lambda: state.enter(Phase.COLLECT),
            enough=config.sites_per_round or None,
        )
        for name, entry in entries.items():
            entry |= {
                "learning_rate": [rate * boosts[name] for rate in rates],
                **accepted.get(name, {"update_norm": None, "payload_sha256": None}),
            }
        return entries

    def _request(self, number: int, **told: float) -> dict[str, Any]:
        return {**self._terms, "round": number, **told}

    def _commit(self, state: Round, record: dict[str, Any], updates: Updates | None) -> Path:
        """Write the round's checkpoint, with what its record says up to here."""
        started, number, phase = time.monotonic(), state.number, state.phase
        record |= {"degraded": phase is Phase.DEGRADE, "seconds": dict(state.seconds)}
        participants = [
            {"site": name, "frames": entry["frames"]}
            for name, entry in record["train"].items()
            if entry["state"] == State.COMPLETED
        ]
        federation = {
            "run": self._about["run"],
            "round": number,
            "base": self._about["model"],
            "participants": participants,
            "record": record,
        }
        path = self._model.commit(number, updates, self._normalisation, federation)
        if updates:
            _log.info(
                "round %d/%d %s: %d of %d sites, %d frames, model %s, %.1f s",
                *(number, self._config.rounds, phase, len(updates), len(record["train"])),
                *(updates.frames, self._model.hash[:12], time.monotonic() - started),
            )
        return path

    def _finish(
        self,
        state: Round,
        record: dict[str, Any],
        checkpoint: Path | None,
        aggregation: float | None = None,
    ) -> None:
        """Evaluate what was committed and write the round's record: from then on it is over."""
        config, number = self._config, state.number
        evaluated: dict[str, dict[str, Any]] = {}
        server: dict[str, Any] = {}
        if checkpoint:
            state.enter(Phase.EVALUATE)
            # Beside the sites' own evaluation: this machine is idle meanwhile.
            uris = config.eval_datasets.split()
            own = server_evaluation.start(checkpoint, uris, config) if uris else None
            evaluated = ask(
                self._grid,
                config,
                self._model.broadcast,
                MessageType.EVALUATE,
                {site: self._request(number) for site in self._participants.sites},
                self._held,
                self._progress,
            )
            server = own.result(config.round_timeout) if own else {}
            for uri, result in server.items():
                if result["reason"]:
                    _log.warning("round %d evaluate %s: %s", number, uri, result["reason"])
        state.enter(Phase.DONE)
        line = complete(
            record,
            sites=self._about["sites"],
            evaluated=evaluated,
            server=server,
            model=self._model.hash,
            checkpoint=str(checkpoint.relative_to(self._journal.directory)) if checkpoint else None,
            seconds=state.seconds,
            aggregation=aggregation,
        )
        self._records.append(line)
        line["best"] = schedule.best(self._history())
        if line["best"] is not None:
            best = round_directory(self._checkpoints, line["best"])
            point(self._checkpoints / BEST, best.name)
        # After the link: a round that is over is not looked at again.
        self._journal.append(line)
        self._tell_loss(line)
        if checkpoint and config.push_every and number and number % config.push_every == 0:
            self._push(checkpoint)

    def _history(self) -> list[Past]:
        return history(self._records)

    def _end(self, reason: str) -> None:
        """Record how the run ended and write its report; neither may hide the reason itself."""
        self._about["ended"] = {"at": now(), "reason": reason}
        self._journal.describe(self._about)
        for write in (write_report, write_model_card) if self._records else ():
            try:
                write(self._journal.directory)
            except Exception as error:  # noqa: BLE001 - the model and the records are safe already
                _log.warning("%s: %s", write.__name__, one_line(error))

    def _push(self, checkpoint: Path) -> None:
        publish(checkpoint, self._journal.directory, self._about["run"], self._config)

    def _tell_loss(self, record: Mapping[str, Any]) -> None:
        number, loss = record["round"], record["aggregate"]["loss"]
        if loss is None:
            return
        asked = [site["evaluate"] for site in record["sites"].values() if site["evaluate"]]
        base = self._history()[0].loss
        change = ""
        if any(entry["loss"] is None for entry in asked):
            change = ", not of all sites"
        elif number and base:
            change = f", {100 * (loss / base - 1):+.1f} % against round 0"
        _log.info(
            "round %d/%d: held-out loss %s%s", *(number, self._config.rounds, shown(loss), change)
        )


def _recorded(given: RunConfig, about: Mapping[str, Any]) -> RunConfig:
    """The settings a resumed run was started with; ``ConfigError`` for others given beside them."""
    config = dataclasses.replace(RunConfig.parse(about["config"]), resume=True)
    defaults, recorded = RunConfig().as_dict(), config.as_dict()
    for key, value in given.as_dict().items():
        if value not in (recorded[key], defaults[key]):
            raise ConfigError(
                f"The run config sets {key}={value!r} beside resume=true, and run {about['run']} was "
                f"started with {recorded[key]!r}: a resumed run keeps its settings, leave it out."
            )
    return config
