"""``vlafleet supernode``, and a site's half of ``vlafleet site``: join, enrol, check, request, accept, run, stop."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from certs.cli import EnrolmentOption, IdentityOption, SuperLinkOption
from certs.errors import ConfigError
from certs.identity import Identity
from certs.roles import Role
from supernode.site import Mode, Site, absolute_dataset, default_directory, only_directory

_INVITATION = "VLAFLEET_INVITATION"

DatasetOption = Annotated[
    str, typer.Option(help="The site's recordings: a path or hf:owner/name, each #episodes=A:B.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Where the site trains: cpu, cuda, cuda:N; cpu unless it was set before."),
]
ComposeOption = Annotated[
    bool, typer.Option("--compose", help="Run in containers; the default where Docker answers.")
]
HelmOption = Annotated[
    bool, typer.Option("--helm", help="Write the values of the Helm chart; start nothing.")
]
NativeOption = Annotated[
    bool, typer.Option("--native", help="Run plain processes; the default where no Docker answers.")
]
DirectoryOption = Annotated[
    Path | None,
    typer.Option(help="The site's directory; by default the one named vlafleet-NAME here."),
]


def supernode(
    identity: IdentityOption,
    superlink: SuperLinkOption,
    dataset: Annotated[
        str,
        typer.Option(help="The dataset as the site's ClientApp sees it: a path or hf:owner/name."),
    ],
    device: Annotated[str, typer.Option(help="Where the site trains: cpu, cuda, cuda:0.")] = "cpu",
    host: Annotated[str, typer.Option(help="The Runtime API's address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The Runtime API's port.")] = 9094,
    enrolment: EnrolmentOption = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the site's metrics are shown without TLS, too; a monitor sees them at --port.",
        ),
    ] = None,
) -> None:
    """Run a site's SuperNode."""
    from certs.invitation import is_address
    from supernode.node import serve

    if metrics is not None and not is_address(metrics):
        raise typer.BadParameter(f"{metrics!r} is not HOST:PORT", param_hint="--metrics")

    loaded = Identity.load(identity, Role.SITE)
    config = {"site": loaded.peer.name, "dataset": dataset, "device": device}
    serve(loaded, superlink, host, port, config, enrolment, metrics)


def join(
    invitation: Annotated[
        str,
        typer.Argument(
            envvar=_INVITATION,
            help="What the federation's operator sent; - reads it from standard input.",
        ),
    ],
    dataset: DatasetOption,
    device: DeviceOption = None,
    compose: ComposeOption = False,
    helm: HelmOption = False,
    native: NativeOption = False,
    directory: DirectoryOption = None,
) -> None:
    """Join a federation: make keys, enrol, check this machine, start, wait until online. Interrupted, run it again."""
    # Nothing that is started from here needs it.
    os.environ.pop(_INVITATION, None)
    from certs.invitation import Invitation
    from supernode.join import join as run_join

    decoded = Invitation.decode(_typed() if invitation == "-" else invitation)
    mode = _mode(compose, helm, native)
    site = _planned(decoded.federation, decoded.site, directory, dataset, device, mode)
    run_join(site, decoded, typer.echo)


def enrol(
    superlink: SuperLinkOption,
    dataset: DatasetOption,
    secret: Annotated[str, typer.Option(help="The Secret for the SuperNode's identity.")],
    superexec_secret: Annotated[str, typer.Option(help="The Secret for the SuperExec's identity.")],
    invitation: Annotated[
        str | None,
        typer.Argument(
            envvar=_INVITATION,
            help="What the federation's operator sent; not needed any more by a member.",
        ),
    ] = None,
    superexec_namespace: Annotated[
        str | None, typer.Option(help="The namespace of the SuperExec's; by default this pod's.")
    ] = None,
    directory: DirectoryOption = None,
) -> None:
    """Join a federation from within a Kubernetes cluster: enrol, keep the identities as Secrets, start nothing."""
    # Nothing that is started from here needs it.
    os.environ.pop(_INVITATION, None)
    from certs.cluster import Cluster
    from certs.invitation import Invitation, is_address
    from supernode.cluster import Secrets
    from supernode.cluster import enrol as run_enrol

    if not is_address(superlink):
        raise typer.BadParameter(f"{superlink!r} is not HOST:PORT", param_hint="--superlink")
    given = (invitation or "").strip()
    decoded = Invitation.decode(_typed() if given == "-" else given) if given else None
    secrets = Secrets(secret, superexec_secret, superexec_namespace)
    run_enrol(Cluster.here(), secrets, decoded, superlink, dataset, directory, typer.echo)


def check(
    directory: DirectoryOption = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", "-c", help="Settings of the runs to come, 'key=value key=value'."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check machine, network and dataset of a site; exit as the first fail says."""
    from supernode.preflight import check as run_check

    report = run_check(Site.load(directory or only_directory()), run_config or [])
    typer.echo(json.dumps(report.to_json(), indent=2) if as_json else report.text())
    report.require()


def request(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    federation: Annotated[str, typer.Option(help="The federation's name.")],
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option(help="Where the application goes.")] = Path("request.json"),
    device: DeviceOption = None,
    compose: ComposeOption = False,
    helm: HelmOption = False,
    native: NativeOption = False,
    directory: DirectoryOption = None,
) -> None:
    """Apply on paper: make the keys, and a file for the federation's operator that holds no secret."""
    from supernode.paper import request as run_request

    mode = _mode(compose, helm, native)
    run_request(_planned(federation, name, directory, dataset, device, mode), out, typer.echo)


def accept(
    membership: Annotated[Path, typer.Argument(help="The operator's answer to the request.")],
    fingerprint: Annotated[
        str, typer.Option(help="The authority's SHA-256, as the operator said it.")
    ],
    directory: DirectoryOption = None,
) -> None:
    """Become a member by the operator's file: store it, check this machine, start, wait until online."""
    from supernode.paper import accept as run_accept

    run_accept(membership, fingerprint, directory, typer.echo)


def run(directory: DirectoryOption = None) -> None:
    """Run a site's processes in the foreground, until SIGTERM or Ctrl-C."""
    from supernode.native import run as run_site

    run_site((directory or only_directory()).absolute())


def stop(directory: DirectoryOption = None) -> None:
    """Stop what runs of a site."""
    from supernode.join import stop as stop_site

    site = Site.load(directory or only_directory())
    if site.mode == "helm":
        raise ConfigError(
            f"{site.name} is run by Helm: 'helm list' names its release, 'helm uninstall' ends it"
        )
    typer.echo(f"{site.name} {'stopped' if stop_site(site) else 'was not running'}")


def _typed() -> str:
    """Return a line that is typed, or all of a pipe: a mail program may have wrapped it."""
    return sys.stdin.readline() if sys.stdin.isatty() else sys.stdin.read(1 << 16)


def _mode(compose: bool, helm: bool, native: bool) -> Mode | None:
    chosen = [
        mode
        for mode, wanted in (("compose", compose), ("helm", helm), ("native", native))
        if wanted
    ]
    if len(chosen) > 1:
        raise typer.BadParameter(f"--{' and --'.join(chosen)} exclude each other")
    return cast(Mode, chosen[0]) if chosen else None


def _planned(
    federation: str,
    name: str,
    directory: Path | None,
    dataset: str,
    device: str | None,
    mode: Mode | None,
) -> Site:
    """Return the site as its operator wants it, without addresses; what is not said stays as it was."""
    from supernode.join import default_mode

    directory = (directory or default_directory(name)).absolute()
    known = Site.find(directory)
    return Site(
        directory,
        federation,
        name,
        superlink="",
        enrolment="",
        dataset=absolute_dataset(dataset),
        device=device or (known.device if known else "cpu"),
        mode=mode or (known.mode if known else default_mode()),
    )
