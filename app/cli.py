"""``vlafleet superexec``, ``exporter``, ``trainer`` and ``data check``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from certs.cli import EnrolmentOption, IdentityOption, SuperLinkOption
from certs.errors import DatasetError
from certs.identity import Identity
from certs.roles import Role


def superexec(
    identity: IdentityOption,
    address: Annotated[str, typer.Option(help="The Runtime API, host:port.")],
    enrolment: EnrolmentOption = None,
    kubernetes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Run each ClientApp as a pod, by Flower's Kubernetes executor with this file.",
        ),
    ] = None,
) -> None:
    """Run a SuperExec: it starts the ServerApp (at the SuperLink) or the ClientApp (at a site)."""
    from app.superexec import serve

    serve(Identity.load(identity, Role.SUPEREXEC), address, enrolment, kubernetes)


def exporter(
    identity: IdentityOption,
    superlink: SuperLinkOption,
    runs: Annotated[
        Path, typer.Option(envvar="VLAFLEET_RUNS", help="Where the ServerApp writes the runs.")
    ] = Path("runs"),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 9095,
    enrolment: EnrolmentOption = None,
) -> None:
    """Run the exporter: what the runs are doing, for Prometheus and ``vlafleet status``."""
    from app.exporter import serve

    serve(Identity.load(identity, Role.EXPORTER), superlink, runs, host, port, enrolment)


def trainer(
    socket: Annotated[Path, typer.Argument(help="Its socket, which the SuperExec's log names.")],
) -> None:
    """Print what a site's trainer is doing, as metrics in Prometheus's text format."""
    from app.trainer_client import metrics

    print(metrics(socket), end="")


def check(
    uri: Annotated[str, typer.Argument(help="A directory or hf:owner/name, each #episodes=A:B.")],
    held_out: Annotated[
        float | None,
        typer.Option(
            help="The share of episodes that a run holds out; by default the run config's."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The run's seed; by default the run config's.")
    ] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option("--run-config", "-c", help="The run's settings, 'key=value key=value'."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the site would train: cpu, cuda, cuda:0.")
    ] = "cpu",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, with what a run would take here."),
    ] = False,
) -> None:
    """Look for all that would stop or spoil training on a dataset."""
    given = {"held-out": held_out, "seed": seed}
    if as_json:
        from app.check import report

        found = report(uri, run_config or [], given, device)
        print(json.dumps(found))
        raise typer.Exit(found["exit_code"])
    from app.check import findings_of, settings, summary

    dataset, findings = findings_of(uri, settings(run_config or [], given))
    for finding in findings:
        print(finding)
    if findings:
        raise DatasetError(f"dataset {uri} is not fit for training: see the {len(findings)} above.")
    found = summary(dataset)
    print(
        f"{uri} is fit for training: {len(dataset.train_episodes)} episodes to train on and "
        f"{found['held_out_episodes']} held out, {found['frames']} frames at {found['fps']} a second, "
        f"cameras {', '.join(found['cameras'])}."
    )
