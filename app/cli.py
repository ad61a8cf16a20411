"""``vlafleet superexec``, ``vlafleet trainer`` and ``vlafleet data check``."""

from pathlib import Path
from typing import Annotated

import typer

from app.config import RunConfig
from certs.cli import IdentityOption
from certs.errors import DatasetError
from certs.identity import Identity
from certs.roles import Role


def superexec(
    identity: IdentityOption,
    address: Annotated[str, typer.Option(help="The Runtime API, host:port.")],
) -> None:
    """Run a SuperExec: it starts the ServerApp (at the SuperLink) or the ClientApp (at a site)."""
    from app.superexec import serve

    serve(Identity.load(identity, Role.SUPEREXEC), address)


def trainer(
    socket: Annotated[Path, typer.Argument(help="Its socket, which the SuperExec's log names.")],
) -> None:
    """Print what a site's trainer is doing, as metrics in Prometheus's text format."""
    from app.trainer_client import metrics

    print(metrics(socket), end="")


def check(
    uri: Annotated[str, typer.Argument(help="A directory or hf:owner/name, each #episodes=A:B.")],
    held_out: Annotated[
        float, typer.Option(help="The share of episodes that a run holds out.")
    ] = RunConfig.held_out,
    seed: Annotated[int, typer.Option(help="The run's seed.")] = RunConfig.seed,
) -> None:
    """Look for all that would stop or spoil training on a dataset."""
    from app.dataset import open_dataset
    from app.preflight import check as findings_of

    config = RunConfig.parse({"held-out": held_out, "seed": seed})
    dataset = open_dataset(uri, held_out=config.held_out, seed=config.seed)
    findings = findings_of(dataset)
    for finding in findings:
        print(finding)
    if findings:
        raise DatasetError(f"dataset {uri} is not fit for training: see the {len(findings)} above.")
    train, held = len(dataset.train_episodes), len(dataset.held_out_episodes)
    print(
        f"{uri} is fit for training: {train} episodes to train on and {held} held out, "
        f"{dataset.frames(dataset.episodes)} frames at {dataset.fps} a second, "
        f"cameras {', '.join(camera.rsplit('.', 1)[-1] for camera in dataset.cameras)}."
    )
