"""``vlafleet report``: a run's closing table, what was odd in it, and the same at length in report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app import anomalies, tables
from app.run_directory import read_run, readable, write_text
from app.series import EARLY_STOPPING, Run, best, change, committed, losses, mean_losses
from certs.errors import RunFailedError, ToolError

PAGE = "report.html"
# Columns of rounds beside round 0: with the names they fill a terminal of 80 characters.
_COLUMNS = 4

cli = typer.Typer()


@cli.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A directory below runs/.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Another run to compare with.")
    ] = None,
) -> None:
    """Print a run's table and write its report.html; exit 16 when it has fewer rounds than it was asked for."""
    console, found = Console(), read_run(run)
    with readable(run):
        print_report(console, run, found)
        asked, done = int(found[0]["config"]["rounds"]), committed(found[1])
        early = (found[0]["ended"] or {}).get("reason") == EARLY_STOPPING
    if baseline:
        with readable(baseline):
            console.print(_rich(tables.comparison(found, read_run(baseline))))
    _print_path(console, "Report:", write_report(run, baseline))
    if done < asked and not early:
        raise RunFailedError(f"{run} has {done} of the {asked} rounds it was asked for.")


def write_report(directory: Path, baseline: Path | None = None) -> Path:
    """Write ``report.html`` into a run's directory; returns its path.

    Raises RunFailedError where a record is damaged, StorageError where the page cannot be written and ToolError where
    what draws it is not installed.
    """
    run, other = read_run(directory), read_run(baseline) if baseline else None
    path = directory / PAGE
    try:
        # What holds the joints' names imports pyarrow, and the pictures need matplotlib.
        from app.dataset_meta import JOINTS
        from app.page import render

        with readable(directory if other is None else f"{directory} or {baseline}"):
            page = render(run, JOINTS, other)
    except ModuleNotFoundError as error:
        raise ToolError(
            f"{path} was not written, {error.name} is missing: install vlafleet's extra 'app'."
        ) from error
    return write_text(path, page)


def print_report(console: Console, directory: Path, run: Run) -> None:
    """The table, then what was odd, then where the models lie."""
    config, rounds = run
    console.print(loss_table(run))
    for anomaly in anomalies.find(config, rounds):
        console.print(anomaly.sentence, markup=False, highlight=False)
    kept = [record for record in rounds if record["checkpoint"]]
    if kept:
        last, lowest = kept[-1], best(config, rounds)
        if lowest and lowest["round"] != last["round"]:
            where = directory / lowest["checkpoint"]
            _print_path(console, f"Best model, of round {lowest['round']}:", where)
        _print_path(console, f"Model of round {last['round']}:", directory / last["checkpoint"])


def loss_table(run: Run) -> Table:
    """Rows: sites and their mean; columns: rounds, and the last one's change against round 0."""
    config, rounds = run
    shown = [*rounds[:1], *rounds[1:][-_COLUMNS:]]
    rows = {**losses(config, shown), tables.ALL: mean_losses(config, shown)}
    return _rich(
        tables.Table(
            f"Held-out loss, run {config['run']}",
            ("site", *(f"round {record['round']}" for record in shown), "change"),
            [
                (name, *map(tables.shown, series), tables.percent(change(series)))
                for name, series in rows.items()
            ],
        )
    )


def _rich(content: tables.Table) -> Table:
    table = Table(title=Text(content.title), title_justify="left")
    for index, name in enumerate(content.head):
        table.add_column(name, justify="right" if index else "left")
    for row in content.rows:
        if row[0] == tables.ALL:
            table.add_section()
        # As text: what a record holds is no markup.
        table.add_row(*map(Text, row))
    return table


def _print_path(console: Console, label: str, path: Path) -> None:
    """A path on a line of its own, unbroken: it is there to be copied."""
    console.print(label, highlight=False)
    console.print(str(path), soft_wrap=True, markup=False, highlight=False)
