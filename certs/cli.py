"""``vlafleet certs`` and ``health``, and the options that every process's command shares."""

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from certs.authority import Authority
from certs.files import load_certificate
from certs.identity import (
    Identity,
    authority_directory,
    ensure_federation,
    ensure_identity,
    identity_directory,
    publish_crl,
)
from certs.lifetime import renew_at
from certs.roles import Peer, Role

cli = typer.Typer(no_args_is_help=True, help="The federation's authority and identities.")

# What every command that runs or probes a process takes.
IdentityOption = Annotated[
    Path,
    typer.Option(envvar="VLAFLEET_IDENTITY", help="The identity directory of the process."),
]
SuperLinkOption = Annotated[
    str, typer.Option(envvar="VLAFLEET_SUPERLINK", help="The SuperLink, host:port.")
]
# Declare with the default None: a federation may issue every certificate by hand.
EnrolmentOption = Annotated[
    str | None,
    typer.Option(envvar="VLAFLEET_ENROLMENT", help="The enrolment service, host:port."),
]
Pki = Annotated[
    Path, typer.Argument(help="The PKI directory; the authority lies in its folder 'ca'.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="A DNS name or IP address the server answers at; may be repeated."),
]


@cli.command()
def init(
    pki: Pki,
    federation: Annotated[str, typer.Option(help="The federation's name, a DNS label.")],
) -> None:
    """Make the federation's authority; do nothing when it is there."""
    authority = Authority.init(authority_directory(pki), federation)
    typer.echo(f"authority of {authority.federation} in {authority.directory}")


@cli.command()
def issue(
    pki: Pki,
    role: Role,
    name: str,
    host: Hosts = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the identity goes; by default PKI/ROLE/NAME.")
    ] = None,
) -> None:
    """Issue an identity (key, certificate, authority) for a role; keep the one that is there while it is good."""
    authority = Authority.load(authority_directory(pki))
    directory = out or identity_directory(pki, role, name)
    outcome = ensure_identity(authority, directory, role, name, host or [])
    typer.echo(f"{outcome}: {role} {name} in {directory}")


@cli.command()
def revoke(pki: Pki, role: Role, name: str) -> None:
    """Revoke every certificate of a holder; a running SuperLink beside this PKI refuses it within seconds."""
    authority = Authority.load(authority_directory(pki))
    revoked = authority.revoke(role, name)
    publish_crl(pki, authority)
    typer.echo(f"revoked {len(revoked)} certificate(s) of {role} {name}; list: {authority.crl}")


class RotationStep(StrEnum):
    """A step of replacing the authority."""

    STATUS = "status"
    BEGIN = "begin"
    SWITCH = "switch"
    FINISH = "finish"


@cli.command()
def rotate(pki: Pki, step: RotationStep) -> None:
    """Replace the authority while the federation runs: begin, switch, finish; 'status' says who is waited for."""
    from certs import rotation

    authority = Authority.load(authority_directory(pki))
    steps = {
        RotationStep.STATUS: rotation.status,
        RotationStep.BEGIN: rotation.begin,
        RotationStep.SWITCH: rotation.switch,
        RotationStep.FINISH: rotation.finish,
    }
    now = steps[step](authority)
    if step in (RotationStep.SWITCH, RotationStep.FINISH):
        publish_crl(pki, authority)
    for line in rotation.describe(now):
        typer.echo(line)


@cli.command()
def renew(
    directory: Annotated[Path, typer.Argument(help="The identity directory.")],
    enrolment: Annotated[
        str,
        typer.Option(
            envvar="VLAFLEET_ENROLMENT",
            help="The enrolment service, or for a site's SuperExec its SuperNode, host:port.",
        ),
    ],
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Keep it renewed until this command is ended."),
    ] = False,
) -> None:
    """Renew an identity that is past two thirds of its life, under a new key; processes that use it follow."""
    from certs import renewal

    identity = Identity.load(directory, *Role)
    if follow:
        # For a process that cannot renew its own, Prometheus say.
        renewal.follow(identity, enrolment).join()
        return
    due = renew_at(load_certificate(identity.certificate))
    if datetime.now(UTC) < due:
        typer.echo(f"kept: {identity.peer.uri} is not due before {due:%Y-%m-%d %H:%M} UTC")
        return
    renewed = renewal.renew(identity, enrolment)
    typer.echo(f"renewed: {renewed.peer.uri} until {renewed.not_after:%Y-%m-%d %H:%M} UTC")


@cli.command()
def take(
    source: Annotated[
        Path, typer.Argument(help="Where the identity comes from: a mounted Secret.")
    ],
    identity: Annotated[Path, typer.Argument(help="The identity directory; made where it is not.")],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="What the certificate has to be good for; may be repeated."),
    ] = None,
) -> None:
    """Take an identity out of a mounted Secret, unless the one that is there is as new; then it is renewed there."""
    from certs.take import take as run_take

    outcome = run_take(source, identity, host or [])
    loaded = Identity.load(identity, *Role)
    typer.echo(f"{outcome}: {loaded.peer.uri} until {loaded.not_after:%Y-%m-%d %H:%M} UTC")


@cli.command()
def store(
    identity: Annotated[Path, typer.Argument(help="The identity directory.")],
    secret: Annotated[str, typer.Argument(help="The Secret's name.")],
    namespace: Annotated[
        str | None, typer.Option(help="The Secret's namespace; by default this pod's.")
    ] = None,
) -> None:
    """Store an identity as a Secret of the cluster that this pod runs in, unless the Secret's is as new."""
    from certs.cluster import Cluster
    from certs.cluster_pki import store_directory

    outcome = store_directory(Cluster.here(), identity, secret, namespace)
    typer.echo(f"{outcome}: Secret {secret}")


@cli.command()
def cluster(
    pki: Pki,
    federation: Annotated[str, typer.Option(help="The federation's name, a DNS label.")],
    secret: Annotated[
        list[str],
        typer.Option(metavar="ROLE/NAME=SECRET", help="A holder and its Secret; may be repeated."),
    ],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=HOST", help="A name a server is reached at; may be repeated."),
    ] = None,
) -> None:
    """Make a federation's authority and identities here, and Secrets of them in the cluster; keep what is good."""
    from certs.cluster import Cluster
    from certs.cluster_pki import ensure

    hosts: dict[Role, list[str]] = {}
    for given in host or []:
        role, name = _pair(given, "ROLE=HOST", "--host")
        hosts.setdefault(_role(role, "--host"), []).append(name)
    secrets: dict[tuple[Role, str], str] = {}
    for given in secret:
        holder, name = _pair(given, "ROLE/NAME=SECRET", "--secret")
        role, mark, holder_name = holder.partition("/")
        if not mark:
            raise typer.BadParameter(f"{given!r} is not ROLE/NAME=SECRET", param_hint="--secret")
        key = _role(role, "--secret"), holder_name
        if key in secrets:
            raise typer.BadParameter(f"{holder} has two Secrets", param_hint="--secret")
        secrets[key] = name
    for outcome, what in ensure(Cluster.here(), pki, federation, hosts, secrets):
        typer.echo(f"{outcome}: {what}")


def _pair(text: str, form: str, option: str) -> tuple[str, str]:
    left, _, right = text.partition("=")
    if not left or not right:
        raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
    return left, right


def _role(text: str, option: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a role: {', '.join(Role)}", param_hint=option
        ) from None


@cli.command("list")
def list_(pki: Pki) -> None:
    """Show what was issued, and sign the revocation list anew."""
    authority = Authority.load(authority_directory(pki))
    authority.renew_crl()
    publish_crl(pki, authority)
    now = datetime.now(UTC)
    typer.echo(
        f"{'ROLE':<10} {'NAME':<20} {'STATE':<8} {'EXPIRES (UTC)':<17} {'AUTHORITY':<9} SERIAL"
    )
    for line in authority.issued():
        typer.echo(
            f"{line.role:<10} {line.name:<20} {line.state(now):<8} "
            f"{line.not_after:%Y-%m-%d %H:%M}  {line.authorities[0]:<9} {line.serial:x}"
        )


@cli.command()
def inspect(certificate: Annotated[Path, typer.Argument(help="A PEM certificate.")]) -> None:
    """Show whom a certificate speaks for, and until when."""
    loaded = load_certificate(certificate)
    peer = Peer.of(loaded)
    typer.echo(f"{peer.uri}\nserial  {peer.serial:x}")
    typer.echo(f"valid   {loaded.not_valid_before_utc} to {loaded.not_valid_after_utc}")


@cli.command()
def demo(
    pki: Pki,
    site: Annotated[list[str], typer.Option("--site", help="A site's name; may be repeated.")],
    federation: Annotated[str, typer.Option(help="The federation's name.")] = "demo",
    host: Hosts = None,
) -> None:
    """Make every identity of a federation on one machine: 'init' and all of 'issue' in one step."""
    for outcome, directory in ensure_federation(pki, federation, site, host or []):
        typer.echo(f"{outcome}: {directory}")


def health(
    identity: IdentityOption,
    address: Annotated[
        str, typer.Option(help="Where the SuperLink listens (host:port), for its probe.")
    ] = "localhost:9092",
) -> None:
    """Say whether the process with this identity does its work; exit 15 when it does not."""
    from certs.health import check

    typer.echo(check(identity, address))
