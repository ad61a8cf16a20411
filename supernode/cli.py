"""``vlafleet supernode``: the site operator's command."""

from typing import Annotated

import typer

from certs.cli import IdentityOption, SuperLinkOption
from certs.identity import Identity
from certs.roles import Role


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
) -> None:
    """Run a site's SuperNode."""
    from supernode.node import serve

    loaded = Identity.load(identity, Role.SITE)
    config = {"site": loaded.peer.name, "dataset": dataset, "device": device}
    serve(loaded, superlink, host, port, config)
