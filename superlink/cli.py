"""The federation operator's commands: ``superlink``, ``enrolment``, ``site``, ``run``, ``simulate``, ``flwr``."""

import json
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from certs.cli import EnrolmentOption, IdentityOption, SuperLinkOption
from certs.errors import ConfigError
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

SiteArgument = Annotated[str, typer.Argument(help="The site's name.")]
# Where the operator's commands go; a process that is only renewed there may do without (EnrolmentOption).
ServiceOption = Annotated[
    str,
    typer.Option(
        "--enrolment", envvar="VLAFLEET_ENROLMENT", help="The enrolment service, host:port."
    ),
]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

site = typer.Typer(no_args_is_help=True, help="The federation's sites.")


def duration(text: str) -> timedelta:
    """Read ``90s``, ``15m``, ``1h`` or ``2d``; raise ``ConfigError`` for anything else."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([smhd])", text)
    if match is None:
        raise ConfigError(
            f"{text!r} is not a duration: write a number and s, m, h or d, as in '1h'"
        )
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def superlink(
    identity: IdentityOption,
    state: Annotated[Path, typer.Option(help="Where Flower's database lies.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 9092,
    enrolment: EnrolmentOption = None,
    audit: Annotated[
        Path | None, typer.Option(help="The audit log; by default STATE/audit.jsonl.")
    ] = None,
    simulation: Annotated[
        bool, typer.Option("--simulation", help="Simulate the sites of every run.")
    ] = False,
) -> None:
    """Run the SuperLink: every API over mutual TLS, guarded by role."""
    from superlink.server import serve

    serve(
        Identity.load(identity, Role.SUPERLINK),
        host,
        port,
        state,
        enrolment=enrolment,
        audit=audit or state / "audit.jsonl",
        simulation=simulation,
    )


def enrolment(
    identity: IdentityOption,
    authority: Annotated[Path, typer.Option(help="The authority's directory, PKI/ca.")],
    state: Annotated[Path, typer.Option(help="Where invitations and what sites report lie.")],
    superlink: SuperLinkOption,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 9093,
    advertise: Annotated[
        str | None,
        typer.Option(
            help="Where sites reach this service (host:port), if not at --host and --port."
        ),
    ] = None,
    advertise_superlink: Annotated[
        str | None,
        typer.Option(help="Where sites reach the SuperLink (host:port), if not at --superlink."),
    ] = None,
    site_lifetime: Annotated[
        str, typer.Option(help="How long a site's certificate lives: 90m, 12h, 7d ...")
    ] = "7d",
    audit: Annotated[
        Path | None, typer.Option(help="The audit log; by default STATE/audit.jsonl.")
    ] = None,
) -> None:
    """Run the enrolment service: it alone holds the authority's key, admits, renews and evicts."""
    from superlink.enrolment import serve

    lifetime = duration(site_lifetime)
    serve(
        Identity.load(identity, Role.ENROLMENT),
        authority,
        state,
        host,
        port,
        superlink,
        advertise,
        advertise_superlink,
        lifetime,
        audit or state / "audit.jsonl",
    )


@site.command()
def invite(
    name: SiteArgument,
    identity: IdentityOption,
    enrolment: ServiceOption,
    valid: Annotated[str, typer.Option(help="How long it can be used: 15m, 1h, 2d ...")] = "1h",
) -> None:
    """Invite a site: print a string that lets one machine join under this name, once."""
    from superlink.operator import Enrolment

    lifetime = duration(valid)
    with Enrolment.connect(identity, enrolment) as service:
        invited = service.invite(name, lifetime)
    typer.echo(
        f"invitation of site {name} to {invited.invitation.federation}, to be used once, before "
        f"{invited.invitation.expires_at:%Y-%m-%d %H:%M} UTC. The site's operator runs:\n"
        "  vlafleet site join INVITATION --dataset URI",
        err=True,
    )
    if invited.member:
        typer.echo(
            f"{name} is a member already: unless it is to join again with the keys it has, "
            f"run 'vlafleet site revoke {name}' first",
            err=True,
        )
    typer.echo(invited.invitation.encode())


@site.command()
def cancel(name: SiteArgument, identity: IdentityOption, enrolment: ServiceOption) -> None:
    """Cancel a site's open invitations."""
    from superlink.operator import Enrolment

    with Enrolment.connect(identity, enrolment) as service:
        typer.echo(f"cancelled {service.cancel(name)} invitation(s) of site {name}")


@site.command("list")
def list_(
    identity: IdentityOption,
    enrolment: ServiceOption,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, times as Unix time.")
    ] = False,
) -> None:
    """Show the members and who is invited: state, last heartbeat, certificate expiry, dataset."""
    from superlink.operator import Enrolment, table

    with Enrolment.connect(identity, enrolment) as service:
        members = service.sites()
    if as_json:
        typer.echo(json.dumps({"sites": members}, indent=2))
    else:
        typer.echo(table(members, time.time()))


@site.command()
def revoke(name: SiteArgument, identity: IdentityOption, enrolment: ServiceOption) -> None:
    """Evict a site: its certificates, its SuperNode and its invitations are worth nothing from now on."""
    from superlink.operator import Enrolment

    with Enrolment.connect(identity, enrolment) as service:
        evicted = service.revoke(name)
    node = "its SuperNode unregistered" if evicted.unregistered else "no SuperNode registered"
    typer.echo(
        f"revoked site {name}: {evicted.certificates} certificate(s), {node}, "
        f"{evicted.invitations} open invitation(s) cancelled"
    )


@site.command()
def approve(
    request: Annotated[Path, typer.Argument(help="What 'vlafleet site request' wrote.")],
    identity: IdentityOption,
    enrolment: ServiceOption,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the membership goes; by default SITE-membership.json here."),
    ] = None,
) -> None:
    """Admit a site whose application came as a file: write the file that 'vlafleet site accept' takes."""
    from superlink.operator import Enrolment, read_application, write_membership

    application, fingerprint = read_application(request)
    typer.echo(f"site        {application.site} of {application.federation}")
    typer.echo(f"keys        {fingerprint}")
    out = out or Path(f"{application.site}-membership.json")
    with Enrolment.connect(identity, enrolment) as service:
        membership = service.approve(application)
    authority = write_membership(membership, out)
    typer.echo(f"membership  {out}: bring it to the site, it holds no secret")
    typer.echo(f"authority   {authority}: say this to the site's operator yourself")


@site.command()
def register(
    name: SiteArgument,
    identity: IdentityOption,
    superlink: SuperLinkOption,
    key: Annotated[Path, typer.Option(help="The site's SuperNode public key (node.pub).")],
) -> None:
    """Register a site's SuperNode key under its name; do nothing when it is. Joining does it by itself."""
    from superlink.control import Control

    with Control.connect(Identity.load(identity, Role.OPERATOR), superlink) as control:
        typer.echo(f"{control.register(name, key)}: site {name}")


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
