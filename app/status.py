"""How the federation stands, as one JSON document: the exporter's ``/v1/status``, which the terminal shows.

Times are seconds since 1970; what is not known or was not measured is null. The document describes the newest run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from app.series import COMPLETED, Record

if TYPE_CHECKING:
    from app.runs_view import View
    from app.standing import SiteStanding

type Document = dict[str, Any]

# Where the exporter serves it.
PATH = "/v1/status"

# The rounds that a document lists: what a screen holds.
_ROUNDS = 10
# What reading a damaged record raises; it must not take the view of the sites away.
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError)
_WORKING = "working"
# What a site's last completed training said of its machine.
_MACHINE = (
    "samples_per_second",
    "data_wait",
    "gpu_memory_bytes",
    "gpu_memory_total_bytes",
    "disk_free_bytes",
    "trainer_restarts",
)
# How it ended when it was last asked.
_END = ("state", "reason", "round", "since")
# Of a site that no run has asked yet.
_NOTHING: Record = {
    **dict.fromkeys(("doing", *_END, "train_loss", "loss", "base_loss")),
    "drops": {},
    **dict.fromkeys(_MACHINE),
}  # fmt: skip


def document(federation: str, view: View, nodes: Sequence[Record] | None, now: float) -> Document:
    """Describe the federation, its newest run and every site.

    ``nodes`` are the SuperLink's (``GET /v1/sites``), None when it does not answer. A run whose record is damaged
    counts as unreadable and as none.
    """
    unreadable = view.unreadable
    try:
        run, sites, rounds = _run(view), _sites(view), _last_rounds(view)
    except _DAMAGED:
        run, sites, rounds, unreadable = None, {}, [], unreadable + 1
    known = _known(nodes or ())
    names = {*sites, *(name for name, node in known.items() if node["status"] != "unregistered")}
    nobody = {"status": "unknown", "last_heartbeat": None, "offline_since": None}
    return {
        "time": now,
        "federation": federation,
        "superlink": "unreachable" if nodes is None else "online",
        "run": run,
        "sites": [
            {
                "name": name,
                **{key: known.get(name, nobody).get(key) for key in nobody},
                **sites.get(name, _NOTHING),
            }
            for name in sorted(names)
        ],
        "rounds": rounds,
        "unreadable": unreadable,
    }


def _known(nodes: Iterable[Record]) -> dict[str, Record]:
    """Each site's SuperNode: a site that left and came back has one that is unregistered, too."""
    known: dict[str, Record] = {}
    for node in nodes:
        if node["status"] != "unregistered" or node["name"] not in known:
            known[node["name"]] = node
    return known


def _run(view: View) -> Document | None:
    if view.config is None:
        return None
    config, rounds, standing, progress = view.config, view.rounds, view.standing, _progress(view)
    ended, settings = config["ended"], config["config"]
    return {
        "name": config["run"],
        "model": (config["model"] or {}).get("name", settings["model"]),
        "started_at": _seconds(config["started_at"]),
        "ended": ended and {"at": _seconds(ended["at"]), "reason": ended["reason"]},
        "round": progress.get("round", rounds[-1]["round"] if rounds else 0),
        "rounds": settings["rounds"],
        "round_timeout": settings["round-timeout"],
        "phase": "done" if ended else progress.get("phase"),
        "phase_since": _seconds(ended["at"]) if ended else progress.get("since"),
        "committed": standing.committed,
        "best_round": standing.best_round,
        "loss": standing.loss,
        "base_loss": standing.base_loss,
        "best_loss": standing.best_loss,
        "last_checkpoint_at": standing.checkpoint_at,
    }


def _sites(view: View) -> dict[str, Document]:
    """What the newest run says of each of its sites."""
    if view.config is None:
        return {}
    progress = _progress(view)
    asked = {} if view.config["ended"] else progress.get("sites", {})
    sites: dict[str, Document] = {}
    for name, standing in view.standing.sites.items():
        completed = standing.completed or {}
        sites[name] = {
            "doing": None,
            **_end(name, standing, view.rounds),
            "train_loss": completed.get("loss"),
            "loss": standing.loss,
            "base_loss": standing.base_loss,
            "drops": {
                reason: count for reason, count in view.totals.drops.get(name, {}).items() if count
            },
            # Older records lack them.
            **{key: completed.get(key) for key in _MACHINE},
        }
    for name, entry in asked.items():
        over = view.rounds[-1]["round"] if view.rounds else -1
        sites[name] = {**sites.get(name, _NOTHING), **_present(entry, progress["round"], over)}
    return sites


def _end(name: str, standing: SiteStanding, rounds: Sequence[Record]) -> Document:
    """How the site last ended: in its evaluation, where its training was well."""
    end, number = standing.train, standing.round
    if standing.evaluate and (
        end is None or (end["state"] == COMPLETED != standing.evaluate["state"])
    ):
        end = standing.evaluate
        number = next(
            (
                record["round"]
                for record in reversed(rounds)
                if (record["sites"].get(name) or {}).get("evaluate")
            ),
            None,
        )
    if end is None:
        return dict.fromkeys(_END)
    since = next((_over_at(record) for record in rounds if record["round"] == number), None)
    return {"state": end["state"], "reason": end["reason"], "round": number, "since": since}


def _present(asked: Record, number: int, over: int) -> Document:
    """What the exchange under way adds; the record of a round that is over says more."""
    if asked["state"] == _WORKING:
        return {"doing": {"kind": asked["kind"], "since": asked["since"]}}
    told = {
        "train": number > over,
        # That a site was described, or evaluated, does not say that it trains well.
        "describe": asked["state"] != COMPLETED,
    }
    if not told.get(asked["kind"]):
        return {}
    return {key: asked[key] for key in ("state", "reason", "since")} | {"round": number}


def _last_rounds(view: View) -> list[Document]:
    return [
        {
            "round": record["round"],
            "result": ("degraded" if record["degraded"] else "committed")
            if record["committed"]
            else "failed",
            "reason": record["reason"],
            "participation": record["aggregate"]["participation"],
            "loss": view.standing.losses.get(record["round"]),
            "seconds": sum(record["seconds"].values()),
            "bytes_down": record["bytes"]["down"],
            "bytes_up": record["bytes"]["up"],
        }
        for record in view.rounds[-_ROUNDS:]
    ]


def _progress(view: View) -> Record:
    """Where the newest run is; empty where nothing says so, as in a run of an older release."""
    progress: Record = view.progress or {}
    return progress if view.config and progress.get("run") == view.config["run"] else {}


def _over_at(record: Record) -> float:
    """When a round was over; older records say when it began and how long its phases took."""
    if record.get("ended_at"):
        return _seconds(record["ended_at"])
    spent: float = sum(record["seconds"].values())
    return _seconds(record["started_at"]) + spent


def _seconds(moment: Any) -> float:
    return datetime.fromisoformat(moment).timestamp()
