"""``vlafleet superexec``."""

from typing import Annotated

import typer

from certs.cli import IdentityOption
from certs.identity import Identity
from certs.roles import Role


def superexec(
    identity: IdentityOption,
    address: Annotated[str, typer.Option(help="The Runtime API, host:port.")],
) -> None:
    """Run a SuperExec: it starts the ServerApp (at the SuperLink) or the ClientApp (at a site)."""
    from app.superexec import serve

    serve(Identity.load(identity, Role.SUPEREXEC), address)
