"""The closing table of a run: held-out loss per site and round, against the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.journal import read_config, read_rounds
from certs.errors import RunFailedError

# Columns of rounds beside round 0: with the names they fill a terminal of 80 characters.
_COLUMNS = 4

cli = typer.Typer()


@cli.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A directory below runs/.")],
) -> None:
    """Print a run's table; exit 16 when it has fewer rounds than it was asked for."""
    config, rounds = read_config(run), read_rounds(run)
    try:
        print_report(Console(), run, config, rounds)
        asked = int(config["config"]["rounds"])
        committed = sum(bool(record["committed"]) for record in rounds if record["round"] > 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFailedError(
            f"The record in {run} is damaged ({type(error).__name__}: {error})."
        ) from error
    if committed < asked:
        raise RunFailedError(f"{run} has {committed} of the {asked} rounds it was asked for.")


def print_report(
    console: Console, run: Path, config: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> None:
    """The table, then every end that was not ``completed``, then where the model lies."""
    console.print(loss_table(config, rounds))
    for line in incidents(rounds):
        console.print(line, markup=False, highlight=False)
    committed = [record for record in rounds if record["checkpoint"]]
    if committed:
        last = committed[-1]
        # The path on a line of its own, unbroken: it is there to be copied.
        console.print(f"Model of round {last['round']}:", highlight=False)
        console.print(str(run / last["checkpoint"]), soft_wrap=True, markup=False, highlight=False)


def loss_table(config: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> Table:
    """Rows: sites and their mean; columns: rounds, and the last one's change against round 0."""
    shown = [*rounds[:1], *rounds[1:][-_COLUMNS:]]
    table = Table(title=f"Held-out loss, run {config['run']}", title_justify="left")
    table.add_column("site")
    for record in shown:
        table.add_column(f"round {record['round']}", justify="right")
    table.add_column("change", justify="right")
    sites = list(config["sites"] or {})
    rows = {site: [_site_loss(record, site) for record in shown] for site in sites}
    # A mean over fewer sites than another round's says nothing against it.
    rows["all sites"] = [
        record["aggregate"]["loss"] if all(rows[site][n] is not None for site in sites) else None
        for n, record in enumerate(shown)
    ]
    for name, losses in rows.items():
        if name == "all sites":
            table.add_section()
        table.add_row(name, *(_loss(loss) for loss in losses), _change(losses))
    return table


def incidents(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every site that did not complete what it was asked, and every failed round."""
    lines = []
    for record in rounds:
        if record["reason"]:
            lines.append(f"round {record['round']}: {record['reason']}")
        for site, kinds in record["sites"].items():
            for kind, result in kinds.items():
                if result and result["state"] != "completed":
                    lines.append(
                        f"round {record['round']} {kind}: {site} {result['state']}, "
                        f"{result['reason']}"
                    )
    return lines


def _site_loss(record: Mapping[str, Any], site: str) -> float | None:
    result = (record["sites"].get(site) or {}).get("evaluate") or {}
    loss: float | None = result.get("loss")
    return loss


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _change(losses: Sequence[float | None]) -> str:
    """The last measured round against round 0, in per cent."""
    first, later = losses[0] if losses else None, [loss for loss in losses[1:] if loss is not None]
    if not first or not later:
        return "-"
    return f"{100 * (later[-1] / first - 1):+.1f} %"
