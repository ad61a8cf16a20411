"""SuperExec with a certificate, and the task processes it starts.

Flower starts a fresh process for every ServerApp and ClientApp task. Each presents the SuperExec's certificate, refuses
a bundle that carries code, and dies with its SuperExec: a ClientApp that ends gracefully in mid-task leaves its
SuperNode waiting for a reply for ever (measured on Flower 1.41). A site's SuperExec keeps a trainer beside them, which
stays from message to message. In Kubernetes a ClientApp may be a pod of its own instead, which does the work itself.
"""

import contextlib
import logging
import os
import secrets
import signal
import sys
import sysconfig
from pathlib import Path

from app.supervisor import SOCKET, supervised
from certs import logs
from certs.contact import recorder
from certs.errors import ConfigError, FleetError
from certs.flower import (
    CLIENTAPP_TASK,
    SERVERAPP_TASK,
    SIMULATION_TASK,
    install_bundle_check,
    install_client,
    install_commands,
    quiet,
)
from certs.identity import Identity
from certs.parent import end_with_parent
from certs.renewal import follow
from certs.roles import SUPERLINK_NAME, Role

_log = logging.getLogger("vlafleet.superexec")

# Hands the identity from SuperExec to the task processes it starts.
IDENTITY = "VLAFLEET_IDENTITY"
# Tells a ServerApp where the SuperLink listens, host:port.
RUNTIME = "VLAFLEET_RUNTIME"
# glibc hands blocks of a megabyte and more back to the system while this is fixed. Left alone it grows with the first
# update that is freed, and the ServerApp keeps holes of that size. Read when a process starts.
SERVERAPP_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def serve(
    identity: Identity, address: str, enrolment: str | None, kubernetes: Path | None = None
) -> None:
    """Run SuperExec against a Runtime API (``host:port``) until SIGTERM or SIGINT.

    A site's SuperExec renews its certificate through its SuperNode, the SuperLink's at ``enrolment``. Its tasks use
    the same files, and so the renewed ones. With ``kubernetes``, a file for Flower's executor (``app.task_pods``), a
    site's ClientApps are pods of their own, and there is no trainer.
    """
    os.environ[IDENTITY] = str(identity.directory.absolute())
    _bind(identity)
    quiet()
    install_client(identity, recorder(identity.peer))
    scripts = Path(sysconfig.get_path("scripts"))
    kinds = ("serverapp", "clientapp", "simulation")
    install_commands(*(str(scripts / f"vlafleet-{kind}") for kind in kinds))
    from flwr.supercore.constant import ExecutorType
    from flwr.supercore.superexec.run_superexec import run_superexec
    from flwr.supercore.utils import disable_process_dumping

    disable_process_dumping(strict=False)  # as flower-superexec does: its memory holds task tokens
    executor, config = ExecutorType.SUBPROCESS, None
    if kubernetes is not None:
        if identity.peer.name == SUPERLINK_NAME:
            raise ConfigError(
                "--kubernetes is for a site's SuperExec: the SuperLink's starts its ServerApps itself."
            )
        from app.task_pods import numeric, prepare

        address = numeric(address)
        executor, config = ExecutorType.KUBERNETES, prepare(kubernetes, address, identity.authority)

    with contextlib.ExitStack() as stack:
        if identity.peer.name == SUPERLINK_NAME:
            os.environ.update({**SERVERAPP_ENVIRONMENT, RUNTIME: address})
            follow(identity, enrolment)
        else:
            from app.site_report import Reporter

            trainer = None
            if kubernetes is None:
                # ClientApps inherit where it listens. It has no use for the identity.
                trainer = stack.enter_context(supervised(without=IDENTITY))
                os.environ[SOCKET] = str(trainer)
            follow(identity, address)
            Reporter(identity, address, trainer).start()
        _log.info("SuperExec %s polls %s", identity.peer.name, address)
        run_superexec(
            runtime_api_address=address,
            insecure=False,
            root_certificates_path=str(identity.authority),
            runtime_dependency_install=False,
            executor_type=executor,
            executor_config=config,
        )


def serverapp() -> None:
    """Run one ServerApp task (started by SuperExec)."""
    _prepare_task()
    install_bundle_check(SERVERAPP_TASK)
    from flwr.superlink.cli import flwr_serverapp

    flwr_serverapp()


def clientapp() -> None:
    """Run one ClientApp task (started by SuperExec)."""
    _prepare_task()
    install_bundle_check(CLIENTAPP_TASK)
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()


def simulation() -> None:
    """Run a ServerApp and many ClientApps in Flower's simulation runtime (started by SuperExec)."""
    _prepare_task()
    # Without a token ray runs what any user of this machine sends it.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    install_bundle_check(SIMULATION_TASK)
    from flwr.simulation.app import flwr_simulation

    flwr_simulation()


def _prepare_task() -> None:
    # In a pod of its own the parent is the container's runtime, outside of the pod's process numbers: one of its
    # threads may end at any time, and the image's stop signal is SIGKILL.
    if os.getppid():
        end_with_parent(signal.SIGKILL)
    # A SuperExec's children inherit these settings, a pod does not.
    quiet()
    try:
        logs.configure()
        identity = Identity.load(Path(os.environ[IDENTITY]), Role.SUPEREXEC)
        _bind(identity)
        install_client(identity)
    except FleetError as error:
        logs.say(str(error))
        sys.exit(1)


def _bind(identity: Identity) -> None:
    """Say in every line whose it is."""
    logs.bind(role=identity.peer.role)
    if identity.peer.name != SUPERLINK_NAME:
        logs.bind(site=identity.peer.name)
