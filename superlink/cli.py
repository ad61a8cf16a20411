"""``vlafleet superlink``, ``site``, ``run``, ``simulate`` and ``flwr``: the federation operator's commands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from certs.cli import IdentityOption, SuperLinkOption
from certs.identity import Identity
from certs.roles import Role

AppOption = Annotated[
    Path, typer.Option(envvar="VLAFLEET_APP", help="The directory of the app's pyproject.toml.")
]
RunsOption = Annotated[
    Path, typer.Option(envvar="VLAFLEET_RUNS", help="Where the run's results go.")
]
RunConfigOption = Annotated[
    list[str] | None,
    typer.Option("--run-config", "-c", help="Overrides, 'key=value key=value'."),
]

site = typer.Typer(no_args_is_help=True, help="The federation's sites.")


def superlink(
    identity: IdentityOption,
    state: Annotated[Path, typer.Option(help="Where Flower's database lies.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 9092,
    simulation: Annotated[
        bool, typer.Option("--simulation", help="Simulate the sites of every run.")
    ] = False,
) -> None:
    """Run the SuperLink: every API over mutual TLS, guarded by role."""
    from superlink.server import serve

    serve(Identity.load(identity, Role.SUPERLINK), host, port, state, simulation=simulation)


@site.command()
def register(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    identity: IdentityOption,
    superlink: SuperLinkOption,
    key: Annotated[Path, typer.Option(help="The site's SuperNode public key (node.pub).")],
) -> None:
    """Register a site's SuperNode key under its name; do nothing when it is."""
    from superlink.control import Control

    with Control.connect(Identity.load(identity, Role.OPERATOR), superlink) as control:
        typer.echo(f"{control.register(name, key)}: site {name}")


@site.command("list")
def list_(identity: IdentityOption, superlink: SuperLinkOption) -> None:
    """Show the registered sites and whether they are online."""
    from superlink.control import Control

    with Control.connect(Identity.load(identity, Role.OPERATOR), superlink) as control:
        typer.echo(f"{'SITE':<20} STATUS")
        for node in sorted(control.nodes(), key=lambda node: node.name):
            typer.echo(f"{node.name:<20} {node.status}")


def run(
    identity: IdentityOption,
    superlink: SuperLinkOption,
    app: AppOption = Path(),
    run_config: RunConfigOption = None,
    site: Annotated[
        list[str] | None,
        typer.Option("--site", help="Wait for this site; by default for every registered one."),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the sites to come online.")
    ] = 120.0,
) -> None:
    """Submit a run, follow its log, and end as it ends; Ctrl-C stops the run."""
    from superlink.control import Control, run_request

    loaded = Identity.load(identity, Role.OPERATOR)
    request = run_request(app, run_config or [])
    with Control.connect(loaded, superlink) as control:
        control.wait_online(site or [], wait)
        run_id = control.start(request)
        typer.echo(f"run {run_id} started")
        try:
            for text in control.follow(run_id):
                typer.echo(text, nl=False)
        except KeyboardInterrupt:
            control.stop(run_id)
            typer.echo(f"run {run_id} stopped")
            raise
        control.require_completed(run_id, "the log above says more")
        typer.echo(f"run {run_id} completed")


def demo(
    directory: Annotated[
        Path, typer.Option(help="Where identities, logs and Flower's state go.")
    ] = Path(".demo"),
    data: Annotated[Path, typer.Option(help="Where the demo data goes.")] = Path("data/demo"),
    runs: RunsOption = Path("runs"),
    port: Annotated[
        int, typer.Option(min=1, max=65000, help="The SuperLink's port; the sites use those above.")
    ] = 9092,
    run_config: Annotated[
        str, typer.Option("--run-config", "-c", help="Overrides, 'key=value key=value'.")
    ] = "",
) -> None:
    """Run a whole federation on this machine: two simulated sites, one run, a report."""
    from superlink.demo import demo as run_demo

    run_demo(directory, data, runs, port, run_config)


def simulate(
    dataset: Annotated[
        list[str],
        typer.Option(
            help="A dataset whose episodes the sites share; several take turns over the sites."
        ),
    ],
    sites: Annotated[int, typer.Option(min=1, max=10_000, help="How many sites to simulate.")] = 4,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="ClientApps that run at a time; by default one for each core."),
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=0, help="GPUs that these ClientApps share; 0 trains on the CPU.")
    ] = 0,
    app: AppOption = Path(),
    runs: RunsOption = Path("runs"),
    run_config: RunConfigOption = None,
) -> None:
    """Run the app in Flower's simulation runtime: many sites on this machine, one dataset."""
    from superlink.simulation import simulate as run_simulation

    at_once = parallel or len(os.sched_getaffinity(0))
    run_simulation(app, dataset, sites, at_once, gpus, runs, run_config or [])


def flwr(
    context: typer.Context,
    identity: IdentityOption,
    superlink: SuperLinkOption,
) -> None:
    """Run the stock flwr command with an operator's certificate: flwr run, ls, log, stop, supernode ..."""
    from superlink.control import flwr as stock

    stock(Identity.load(identity, Role.OPERATOR), superlink, context.args)
