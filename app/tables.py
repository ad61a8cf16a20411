"""The tables of a run's report, as text: what was not measured is a dash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.series import (
    COMPLETED,
    Record,
    Run,
    Series,
    best,
    change,
    committed,
    ends,
    losses,
    mean_losses,
    phases,
    sites,
)

DASH = "-"
ALL = "all sites"


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns (or none), and rows of cells; the first cell names its row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def shown(value: float | None, form: str = ".3f") -> str:
    """A measured number, or a dash."""
    return DASH if value is None else format(value, form)


def percent(share: float | None) -> str:
    """A change, with its sign."""
    return DASH if share is None else f"{100 * share:+.1f} %"


def megabytes(count: float | None) -> str:
    """Bytes in MB, as disks and links count them."""
    return DASH if count is None else f"{count / 1e6:.2f}"


def facts(run: Run) -> Table:
    """What the run was and how it ended."""
    config, rounds = run
    ended, model = config["ended"], config["model"] or {}
    lowest = best(*run)
    rows = [
        ("run", str(config["run"])),
        ("started", str(config["started_at"])),
        ("ended", f"{ended['at']}, {ended['reason']}" if ended else "not yet"),
        ("rounds committed", f"{committed(rounds)} of {config['config']['rounds']}"),
        ("best round", str(lowest["round"]) if lowest else DASH),
        ("base model", str(model.get("name", DASH))),
        ("trainable values", shown(model.get("trainable_values"), ",")),
        ("model hash", str(rounds[-1]["model"]) if rounds else DASH),
    ]
    return Table("Run", (), rows)


def site_table(run: Run) -> Table:
    """Each site's data, and its held-out loss against round 0."""
    config, rounds = run
    head = (
        *("site", "dataset", "episodes", "frames", "held-out frames", "fps", "cameras", "tasks"),
        *("loss, round 0", "best", "last", "change"),
    )
    rows = []
    for site, series in losses(config, rounds).items():
        about = config["sites"][site]
        rows.append(
            (
                site,
                str(about["dataset"]),
                *(str(about[key]) for key in ("train_episodes", "train_frames")),
                *(str(about[key]) for key in ("held_out_frames", "fps")),
                ", ".join(about["cameras"]),
                "; ".join(about["tasks"]),
                *_summary(series),
            )
        )
    rows.append((ALL, *[""] * 7, *_summary(mean_losses(config, rounds))))
    return Table("Sites", head, rows)


def round_table(run: Run) -> Table:
    """One row for each round."""
    config, rounds = run
    means = mean_losses(config, rounds)
    head = ("round", "end", "sites", "frames", "training loss", "held-out loss", "change")
    rows = []
    for index, (record, ended) in enumerate(zip(rounds, ends(rounds), strict=True)):
        end = "degraded" if record["degraded"] else "committed"
        rows.append(
            (
                str(record["round"]),
                end if record["committed"] else "failed",
                f"{ended[COMPLETED]} of {ended.total()}" if ended else DASH,
                shown(record["aggregate"]["frames"], ",") if ended else DASH,
                shown(record["aggregate"]["train_loss"]),
                shown(means[index]),
                percent(change([means[0], means[index]])) if index else DASH,
                *(megabytes(record["bytes"][way]) for way in ("down", "up")),
                *(shown(record["seconds"].get(phase), ".1f") for phase in phases(rounds)),
            )
        )
    seconds = (f"{phase}, s" for phase in phases(rounds))
    return Table("Rounds", (*head, "MB to sites", "MB from sites", *seconds), rows)


def joint_table(rounds: Sequence[Record], joints: Sequence[str]) -> Table:
    """Error of the predicted actions of each joint, over all sites that were evaluated."""
    rows = [
        (str(record["round"]), *(shown(value, ".2f") for value in record["aggregate"]["rmse_deg"]))
        for record in rounds
        if record["aggregate"]["rmse_deg"]
    ]
    return Table("RMSE of each joint, in degrees (gripper: 0 to 100)", ("round", *joints), rows)


def server_table(rounds: Sequence[Record]) -> Table:
    """Datasets on the SuperLink's side that no site trains on."""
    rows = [
        (uri, str(record["round"]), shown(result["loss"]), str(result["reason"] or ""))
        for record in rounds
        for uri, result in record["server"].items()
    ]
    head = ("dataset", "round", "loss", "not measured because")
    return Table("Datasets no site trains on", head, sorted(rows, key=lambda row: row[0]))


def round_details(record: Record) -> Table:
    """Every site's metrics in one round."""
    head = (
        *("site", "training", "form", "loss", "last loss", "gradient norm", "update norm"),
        *(
            "frames",
            "MB down",
            "MB up",
            "seconds",
            "evaluation",
            "held-out loss",
            "held-out frames",
        ),
    )
    rows = [
        (
            site,
            *_train(kinds["train"] or {}),
            *_evaluate(kinds["evaluate"] or {}),
        )
        for site, kinds in sorted(record["sites"].items())
    ]
    return Table(f"Round {record['round']}", head, rows)


def settings_table(config: Record) -> Table:
    """The run config."""
    return Table(
        "Run config", ("key", "value"), [(k, str(v)) for k, v in sorted(config["config"].items())]
    )


def comparison(run: Run, baseline: Run) -> Table:
    """Both runs side by side: the settings in which they differ, then what came of them."""
    here, there = run[0]["config"], baseline[0]["config"]
    rows = [
        (key, str(here.get(key, DASH)), str(there.get(key, DASH)), "")
        for key in sorted({*here, *there})
        if here.get(key) != there.get(key)
    ]
    for (name, form, mine), (_, _, theirs) in zip(
        _outcomes(run, _names(run, baseline)),
        _outcomes(baseline, _names(run, baseline)),
        strict=True,
    ):
        difference = mine / theirs - 1 if mine is not None and theirs else None
        rows.append((name, shown(mine, form), shown(theirs, form), percent(difference)))
    head = ("", f"run {run[0]['run']}", f"run {baseline[0]['run']}", "difference")
    return Table(f"Against run {baseline[0]['run']}", head, rows)


def _names(*runs: Run) -> list[str]:
    return sorted({site for run in runs for site in sites(run[0])})


def _outcomes(run: Run, names: Sequence[str]) -> Iterator[tuple[str, str, float | None]]:
    """Name, number format and value of what a run is judged by."""
    config, rounds = run
    means, lowest = mean_losses(config, rounds), best(config, rounds)
    counts = sum(ends(rounds), start=Counter[str]())
    yield "rounds committed", ".0f", committed(rounds)
    yield "held-out loss, round 0", ".3f", means[0] if means else None
    yield "held-out loss, best round", ".3f", lowest["aggregate"]["loss"] if lowest else None
    yield f"held-out loss, last round, {ALL}", ".3f", _last(means)
    found = losses(config, rounds)
    for site in names:
        yield f"held-out loss, last round, {site}", ".3f", _last(found.get(site, []))
    asked = counts.total()
    yield (
        "sites that completed, of those asked",
        ".3f",
        counts[COMPLETED] / asked if asked else None,
    )
    yield "MB to sites", ".2f", sum(record["bytes"]["down"] for record in rounds) / 1e6
    yield "MB from sites", ".2f", sum(record["bytes"]["up"] for record in rounds) / 1e6
    yield "seconds", ".1f", sum(sum(record["seconds"].values()) for record in rounds)


def _summary(series: Series) -> tuple[str, str, str, str]:
    """Of a loss: round 0, the lowest, the last measured, and that one's change."""
    lowest = min((value for value in series if value is not None), default=None)
    first = series[0] if series else None
    return shown(first), shown(lowest), shown(_last(series)), percent(change(series))


def _last(series: Series) -> float | None:
    return next((value for value in reversed(series) if value is not None), None)


def _train(result: Record) -> tuple[str, ...]:
    return (
        _end(result),
        str(result.get("form") or DASH),
        *(shown(result.get(key)) for key in ("loss", "last_loss")),
        *(shown(result.get(key), ".3g") for key in ("grad_norm", "update_norm")),
        shown(result.get("frames"), ","),
        *(megabytes(result.get(key)) for key in ("bytes_down", "bytes_up")),
        shown(result.get("seconds"), ".1f"),
    )


def _evaluate(result: Record) -> tuple[str, ...]:
    return _end(result), shown(result.get("loss")), shown(result.get("frames"), ",")


def _end(result: Record) -> str:
    """A state and its reason; a dash for a site that was not asked."""
    if not result:
        return DASH
    return f"{result['state']}: {result['reason']}" if result["reason"] else str(result["state"])
