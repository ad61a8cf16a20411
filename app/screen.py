"""A status document (``app.status``) in a terminal: which site is out, why, since when, and how the model does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.series import COMPLETED, EARLY_STOPPING, Record
from app.tables import DASH, megabytes, percent, shown

# Where the height is given: the share of it that what is wrong may take, and the rounds that stay beside many sites.
_WRONG_SHARE = 1 / 3
_FEW_ROUNDS = 3
# What is left at least of a site's name where there is no room.
_NAME = 8
# Between columns.
_GAP = 2
# What these columns take at most, so that no column comes and goes with what stands in them.
_STEADY = {"status": 13, "doing": 13, "last round": 12}
_BARS = "▁▂▃▄▅▆▇█"
_GOOD, _ODD, _BAD, _FAINT = "green", "yellow", "bold red", "dim"
_STATUS = {"online": _GOOD, "registered": _ODD, "unknown": _FAINT}
_RESULT = {"committed": "", "degraded": _ODD, "failed": _BAD}
# How a site ends that no one need look at: late is what a soft deadline makes of the slow.
_WELL = {None, COMPLETED, "late"}


@dataclass(frozen=True)
class Screen:
    """Renders ``document`` as it stands at ``now``, by the exporter's clock.

    ``lost`` says why the document is not a new one. As tall as it gets without a height; else it leaves out what
    matters least.
    """

    document: Record
    now: float
    lost: str | None = None

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yield the lines of the screen."""
        unbounded = options.update(height=None)

        def lines(part: RenderableType) -> int:
            return len(console.render_lines(part, unbounded, pad=False))

        sites, rounds = self.document["sites"], self.document["rounds"]
        head = Group(*self._head(bars=not options.ascii_only))
        wrong = [Text(one, style=_BAD) for one in self._wrong()]
        few = rounds
        if options.height is not None:
            wrong = _fitting(wrong, int(options.height * _WRONG_SHARE), lines)
            # Beside the parts: two tables' headings, and the blank lines between them.
            left = options.height - lines(Group(head, *wrong)) - 2 - bool(wrong)
            kept = min(len(rounds), _FEW_ROUNDS)
            sites = self._first(left - kept - 2 * bool(rounds))
            left -= len(sites) + (len(sites) < len(self.document["sites"])) + 2
            few = rounds[-left:] if left > 0 else []
        yield head
        if wrong:
            yield Text()
            yield from wrong
        if sites:
            yield Text()
            yield self._sites(sites, options.max_width)
        if more := len(self.document["sites"]) - len(sites):
            yield Text(f"and {more} more sites", style=_FAINT)
        if few:
            yield Text()
            yield self._rounds(few, options.max_width)

    def _head(self, *, bars: bool) -> Iterator[Text]:
        document, run = self.document, self.document["run"]
        count = len(document["sites"])
        online = sum(site["status"] == "online" for site in document["sites"])
        known = document["superlink"] == "online"
        yield Text.assemble(
            (str(document["federation"]), "bold"),
            f"  SuperLink {document['superlink']}",
            f"  {online} of {count} sites online" if known else f"  {count} sites",
            (f"  {_moment(document['time'], self.now)}", _FAINT),
        )
        if run is None:
            yield Text("no run yet")
            return
        yield Text(f"run {_plain(run['name'])}  {_plain(run['model'])}  {self._stage(run)}")
        text, style = _verdict(run, document["rounds"])
        trend = _trend([one["loss"] for one in document["rounds"]]) if bars else ""
        yield Text.assemble(f"{trend}  " if trend else "", (text, style))

    def _stage(self, run: Record) -> str:
        if run["ended"]:
            how = run["ended"]["reason"]
            how = how if how in {COMPLETED, EARLY_STOPPING} else "ended"
            return (
                f"{_plain(how)} {self._age(run['ended']['at'])} ago, "
                f"{run['committed']} of {run['rounds']} rounds committed"
            )
        stage = f"round {run['round']} of {run['rounds']}"
        if run["phase"]:
            stage += f", {_plain(run['phase'])} for {self._age(run['phase_since'])}"
        return stage

    def _wrong(self) -> Iterator[str]:
        """What somebody should look at, a sentence each."""
        document, run, rounds = self.document, self.document["run"], self.document["rounds"]
        if self.lost:
            yield self.lost
        if document["superlink"] != "online":
            yield "The SuperLink does not answer the exporter: who is online is not known."
        for site in document["sites"]:
            if what := "; ".join(self._troubles(site)):
                yield f"{site['name']}: {what}"
        if rounds and rounds[-1]["result"] == "failed":
            yield f"round {rounds[-1]['round']} failed: {_plain(rounds[-1]['reason'])}"
        if run and run["ended"] and run["ended"]["reason"] not in {COMPLETED, EARLY_STOPPING}:
            yield f"the run ended early: {_plain(run['ended']['reason'])}"
        if run and _stalled(run, self.now):
            yield (
                f"nothing has changed for {self._age(run['phase_since'])}, and a round may take "
                f"{_span(run['round_timeout'])}: 'vlafleet flwr ls' says whether the run goes on"
            )
        if document["unreadable"]:
            yield (
                f"{document['unreadable']} of the runs cannot be read: the exporter's log names them"
            )

    def _troubles(self, site: Record) -> Iterator[str]:
        if out := site["offline_since"]:
            yield f"offline since {_moment(out, self.now)} ({self._age(out)})"
        elif site["status"] == "unregistered":
            yield "no member any more"
        if site["state"] not in _WELL:
            why = f": {_plain(site['reason'])}" if site["reason"] else ""
            when = f", {self._age(site['since'])} ago" if site["since"] else ""
            number = "" if site["round"] is None else f" in round {site['round']}"
            yield f"{site['state']}{number}{when}{why}"

    def _first(self, rows: int) -> Sequence[Record]:
        """As many sites as there is room for, those first that something is wrong with."""
        sites: Sequence[Record] = self.document["sites"]
        if len(sites) <= rows:
            return sites
        troubled = sorted(sites, key=lambda site: not any(self._troubles(site)))
        # A line says how many are left out.
        return troubled[: max(rows - 1, 1)]

    def _sites(self, sites: Sequence[Record], width: int) -> Table:
        columns = {
            "site": [Text(site["name"]) for site in sites],
            "status": [self._status(site) for site in sites],
            "doing": [self._doing(site) for site in sites],
            "last round": [_state(site) for site in sites],
            "loss": [Text(shown(site["loss"])) for site in sites],
            "change": [_change(site["loss"], site["base_loss"]) for site in sites],
            "drops": [Text(str(sum(site["drops"].values()) or DASH)) for site in sites],
        }
        needed = len(columns)
        columns |= {
            heading: [Text(cell) for cell in cells]
            for heading, cells in _details(sites).items()
            if set(cells) != {DASH}
        }
        return _table(columns, width, words=4, needed=needed)

    def _status(self, site: Record) -> Text:
        status = "never online" if site["status"] == "registered" else str(site["status"])
        if site["offline_since"]:
            status += f" {self._age(site['offline_since'])}"
        return Text(status, style=_STATUS.get(site["status"], _BAD))

    def _doing(self, site: Record) -> Text:
        doing = site["doing"]
        return Text(f"{doing['kind']} {self._age(doing['since'])}" if doing else DASH)

    def _rounds(self, rounds: Sequence[Record], width: int) -> Table:
        run = self.document["run"]
        columns = {
            "round": [Text(str(one["round"])) for one in rounds],
            "result": [Text(one["result"], style=_RESULT[one["result"]]) for one in rounds],
            "sites": [Text(_share(one["participation"])) for one in rounds],
            "loss": [Text(shown(one["loss"])) for one in rounds],
            # Round 0 is the base model.
            "change": [
                _change(one["loss"], run["base_loss"] if one["round"] else None) for one in rounds
            ],
            "seconds": [Text(shown(one["seconds"], ".1f")) for one in rounds],
            "MB to sites": [Text(megabytes(one["bytes_down"])) for one in rounds],
            "MB from sites": [Text(megabytes(one["bytes_up"])) for one in rounds],
        }
        return _table(columns, width, words=2, needed=len(columns))

    def _age(self, moment: float) -> str:
        return _span(self.now - moment)


def _verdict(run: Record, rounds: Sequence[Record]) -> tuple[str, str]:
    """Whether the model gets better, and the style that says it without a word."""
    loss, base, best = run["loss"], run["base_loss"], run["best_round"]
    if loss is None:
        return "held-out loss: not measured yet", _FAINT
    over = rounds[-1]["round"]
    against = f"held-out loss {loss:.3f}"
    if over == 0:
        return f"{against}, the base model's: no round is over yet", ""
    if base:
        against += f" (base model {base:.3f}, {percent(loss / base - 1)})"
    if best is None:
        return against, ""
    if best == over:
        return f"getting better: {against}, best in round {best}", _GOOD
    if best == 0:
        return f"no better than the base model: {against}", _BAD
    rounds_since = f"{over - best} round{'s' if over - best > 1 else ''}"
    return (
        f"no better for {rounds_since}: {against}, best {shown(run['best_loss'])} in round {best}",
        _ODD,
    )


def _stalled(run: Record, now: float) -> bool:
    since, ended = run["phase_since"], run["ended"]
    return not ended and since is not None and now - since > 2 * run["round_timeout"]


def _state(site: Record) -> Text:
    if site["state"] is None:
        return Text(DASH)
    number = "" if site["round"] is None else f"{site['round']} "
    style = {COMPLETED: "", "late": _ODD}.get(site["state"], _BAD)
    return Text(f"{number}{site['state']}", style=style)


def _change(loss: float | None, base: float | None) -> Text:
    change = loss / base - 1 if loss is not None and base else None
    return Text(percent(change), style=_ODD if change is not None and change > 0 else "")


def _details(sites: Sequence[Record]) -> dict[str, list[str]]:
    """What is shown where there is room, the first first."""
    return {
        "train loss": [shown(site["train_loss"]) for site in sites],
        "frames/s": [shown(site["samples_per_second"], ".1f") for site in sites],
        "waits": [_share(site["data_wait"]) for site in sites],
        "GPU GB": [
            f"{_gigabytes(site['gpu_memory_bytes'])} of {_gigabytes(site['gpu_memory_total_bytes'])}"
            if site["gpu_memory_total_bytes"]
            else DASH
            for site in sites
        ],
        "GB free": [_gigabytes(site["disk_free_bytes"]) for site in sites],
        "restarts": [shown(site["trainer_restarts"], ".0f") for site in sites],
        "drops by reason": [
            ", ".join(f"{count} {reason}" for reason, count in sorted(site["drops"].items()))
            or DASH
            for site in sites
        ],
    }


def _table(columns: Mapping[str, list[Text]], width: int, *, words: int, needed: int) -> Table:
    """Columns by heading, as many as fit beside each other.

    The first ``words`` hold words, all others numbers. The first is cut for the first ``needed``, not for more.
    """
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
    rows: list[list[Text]] = []
    cut = 0
    for index, (heading, cells) in enumerate(columns.items()):
        taken = max(cell_len(heading), *(cell.cell_len for cell in cells), _STEADY.get(heading, 0))
        if not rows:
            cut = max(taken - _NAME, 0)
        width -= taken + _GAP
        if rows and width + (cut if index < needed else 0) < 0:
            break
        table.add_column(
            Text(heading),
            justify="left" if index < words else "right",
            min_width=taken if rows else None,
            no_wrap=bool(rows),
        )
        rows.append(cells)
    for row in zip(*rows, strict=True):
        row[0].no_wrap, row[0].overflow = True, "ellipsis"
        table.add_row(*row)
    return table


def _fitting(parts: Sequence[Text], most: int, lines: Any) -> list[Text]:
    """The first of ``parts`` that take at most ``most`` lines; how many are left out takes one."""
    taken: list[Text] = []
    for index, part in enumerate(parts):
        used = lines(Group(*taken, part)) + (index + 1 < len(parts))
        if taken and used > most:
            return [*taken, Text(f"and {len(parts) - index} more", style=_BAD)]
        taken.append(part)
    return taken


def _trend(losses: Sequence[float | None]) -> str:
    """The losses as bars, the lowest to the highest; a blank where none was measured."""
    known = [loss for loss in losses if loss is not None]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    steps = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if x is None else _BARS[round((x - low) * steps)] for x in losses)


def _plain(text: object) -> str:
    """A text from elsewhere, without what a terminal would take as a command."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def _share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.0f} %"


def _gigabytes(count: float | None) -> str:
    return DASH if count is None else f"{count / 1e9:.1f}"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _moment(seconds: float, now: float) -> str:
    """A time of day, with its date unless that is today's."""
    moment, today = datetime.fromtimestamp(seconds, UTC), datetime.fromtimestamp(now, UTC)
    return (
        f"{moment:%H:%M:%S} UTC"
        if moment.date() == today.date()
        else f"{moment:%Y-%m-%d %H:%M} UTC"
    )
