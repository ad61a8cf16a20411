"""Ask sites to train or evaluate the round's model: what each is sent, and what it reports.

A reply's metrics are checked by name and type: they come from another machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message, MessageType, MetricRecord, RecordDict

from app import payload
from app.broadcast import Broadcast, wanted
from app.config import RunConfig
from app.dataset_meta import JOINTS
from app.exchange import Exchange, Outcome
from app.job import METRICS
from app.manifest import PayloadError, Reason
from app.rounds import Deadlines, Grid, Site, State, one_line
from app.run_progress import RunProgress
from certs.errors import StorageError

_log = logging.getLogger("flwr")

# Every metric a site may report, and null where it did not.
_SECONDS = {"work_seconds": float, "ready_seconds": float}
# Of the site's machine while it trained (app.machine); the last is how often the site's trainer was started again.
_MACHINE = {
    "samples_per_second": float,
    "data_wait": float,
    "gpu_memory_bytes": int,
    "gpu_memory_total_bytes": int,
    "gpu_utilization": float,
    "disk_free_bytes": int,
    "disk_size_bytes": int,
    "trainer_restarts": int,
}
_SHARES = {"data_wait", "gpu_utilization"}
# Frames weigh the site's loss.
_COUNTS = {"frames", *_MACHINE}
_KINDS: dict[str, dict[str, type]] = {
    MessageType.TRAIN: {
        "loss": float,
        "last_loss": float,
        "proximal_loss": float,
        "frames": int,
        "grad_norm": float,
        **_SECONDS,
        **_MACHINE,
    },
    MessageType.EVALUATE: {"loss": float, "frames": int, "rmse_deg": list, **_SECONDS},
}

type Fold = Callable[[Site, RecordDict, Mapping[str, Any]], None]
"""Takes a site's reply and its checked metrics; ``FleetError`` makes the site ``invalid``."""


def ask(
    grid: Grid,
    config: RunConfig,
    broadcast: Broadcast,
    kind: str,
    requests: Mapping[Site, Mapping[str, Any]],
    held: dict[str, str],
    progress: RunProgress,
    *,
    fold: Fold = lambda *_: None,
    dispatched: Callable[[], None] = lambda: None,
    enough: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Send the model and its request to each site; each site's entry of the record, by name.

    ``requests`` say which ``round`` it is, and the rest of what the site is told. ``held`` says
    which model each site holds and is brought up to date. The exchange closes when ``enough`` sites
    completed, and at the config's deadlines. ``progress`` is told who is asked, and of each end.
    ``StorageError`` when this side cannot keep a reply.
    """
    forms = {site: broadcast.form(held.get(site.name)) for site in requests}
    reported: dict[str, dict[str, Any]] = {}
    down: dict[str, list[int]] = {site.name: [] for site in requests}
    up: dict[str, int] = {}
    broken: list[StorageError] = []

    def message(site: Site, seconds: float) -> Message:
        content = broadcast.content(forms[site], requests[site])
        down[site.name].append(payload.wire_bytes(content))
        # Once the round is over, a site that was away must not start on it.
        return Message(content, site.node, kind, ttl=seconds)

    def take(site: Site, reply: RecordDict) -> Message | None:
        if wanted(reply):
            forms[site] = "full"
            return message(site, exchange.left())
        metrics = _metrics(reply, _KINDS[kind])
        try:
            fold(site, reply, metrics)
        except StorageError as error:
            # A full disk here is no fault of the site's.
            broken.append(error)
            raise
        reported[site.name] = metrics
        up[site.name] = payload.wire_bytes(reply)
        return None

    def ended(outcome: Outcome) -> None:
        found = reported.get(outcome.site.name)
        detail = f", loss {number(found['loss'])}, {found['frames']} frames" if found else ""
        what = f"round {requests[outcome.site]['round']}/{config.rounds} {kind}"
        tell(what, outcome, detail)
        progress.ended(outcome.site.name, outcome.state.value, outcome.reason)

    progress.asked(kind, down)
    exchange = Exchange(
        grid,
        take,
        ended,
        deadlines=Deadlines(config.round_timeout, config.soft_deadline, config.grace),
        quorum=config.quorum,
        enough=enough,
    )
    exchange.dispatch({site: message(site, config.round_timeout) for site in requests})
    dispatched()
    outcomes = exchange.collect()
    broadcast.release()
    if broken:
        raise broken[0]
    entries = {}
    for outcome in outcomes:
        name, completed = outcome.site.name, outcome.state is State.COMPLETED
        if completed:
            held[name] = broadcast.model
        entries[name] = {
            "state": outcome.state.value,
            "reason": outcome.reason,
            "cause": outcome.cause,
            "seconds": outcome.seconds,
            "form": forms[outcome.site] if outcome.sent else None,
            "bytes_down": sum(down[name][: outcome.sent + outcome.resent]),
            "bytes_up": up[name] if completed else None,
            **(reported[name] if completed else dict.fromkeys(_KINDS[kind])),
        }
    return entries


def tell(what: str, outcome: Outcome, detail: str) -> None:
    """Log how a site ended; whatever is not ``completed`` is a warning."""
    reason = f", {outcome.reason}" if outcome.reason else ""
    level = logging.INFO if outcome.state is State.COMPLETED else logging.WARNING
    _log.log(
        level,
        "%s: %s %s%s%s, %.1f s",
        *(what, outcome.site.name, outcome.state.value, reason, detail, outcome.seconds),
    )


def number(value: object) -> str:
    """A metric for a log line."""
    return f"{value:.3f}" if isinstance(value, int | float) else "unknown"


def _metrics(reply: RecordDict, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The metrics in a site's reply, null where there is none; ``PayloadError`` on what is no metric."""
    record = reply.get(METRICS)
    found = dict(record) if isinstance(record, MetricRecord) else {}
    metrics = {name: found.get(name) for name in kinds}
    for name, value in metrics.items():
        items = value if isinstance(value, list) else [value]
        # What is not finite was not measured, and must not steer the schedule.
        finite = all(math.isfinite(item) for item in items if isinstance(item, float))
        if not finite or not (
            value is None or (type(value) is kinds[name] and _sound(name, value))
        ):
            reason: Reason = "metrics" if finite else "finite"
            raise PayloadError(reason, f"The site reports {name} as {one_line(value)}.")
    return metrics


def _sound(name: str, value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == len(JOINTS) and all(type(joint) is float for joint in value)
    if name in _SHARES:
        return bool(0 <= value <= 1)
    return bool(value >= 0) or name not in _COUNTS
