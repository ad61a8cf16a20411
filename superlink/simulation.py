"""Many sites on this machine in Flower's simulation runtime: what ``vlafleet simulate`` runs.

A SuperLink in simulation mode and its SuperExec live for the time of one run, over mutual TLS like any federation's.
ray keeps one process for each ClientApp that runs at a time, which imports lerobot once and serves one site after
another.
"""

import contextlib
import importlib.util
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from certs.errors import ConfigError, FleetError, ToolError
from certs.identity import Identity, ensure_federation, identity_directory
from certs.parent import adopt_orphans, end_children
from certs.processes import Processes
from certs.roles import SUPERLINK_NAME, Role
from certs.server import bind
from superlink.control import Control, run_request
from superlink.demo import of_the_run, report_latest, wait_for_superlink

if TYPE_CHECKING:
    from flwr.proto.control_pb2 import StartRunRequest

# The finest share of a GPU that ray knows is a ten-thousandth.
_SHARES = 10_000


def simulate(
    app: Path, datasets: Sequence[str], sites: int, parallel: int, gpus: int, runs: Path, run_config: Sequence[str]
) -> None:  # fmt: skip
    """Run the app with simulated sites that share the datasets, and print the closing table.

    ``parallel`` ClientApps run at a time and share ``gpus``; without one they train on the CPU. Raises ``FleetError``
    when the run does not complete.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if importlib.util.find_spec("ray") is None:
        raise ToolError(
            "ray is not installed, on which sites are simulated: install vlafleet[simulation]."
        )
    parallel = min(parallel, sites)
    request = simulation_request(app, datasets, sites, parallel, gpus, run_config)
    typer.echo(f"Starting Flower's simulation runtime for {sites} sites, {parallel} at a time ...")
    with _superlink(runs.absolute()) as control:
        run_id = control.start(request)
        try:
            for text in control.follow(run_id):
                for line in text.splitlines():
                    if said := of_the_run(line):
                        typer.echo(said)
        except KeyboardInterrupt:
            with contextlib.suppress(FleetError):
                control.stop(run_id)
            raise
        control.require_completed(run_id, "the log above says why")
    report_latest(runs)


def simulation_request(
    app: Path, datasets: Sequence[str], sites: int, parallel: int, gpus: int, run_config: Sequence[str]
) -> "StartRunRequest":  # fmt: skip
    """Return the request for a run of ``sites`` simulated sites; the run waits for all unless ``min-sites`` is set.

    Raises ``ConfigError``.
    """
    request = run_request(app, run_config)
    from flwr.common.serde import user_config_to_proto
    from flwr.proto.federation_config_pb2 import SimulationConfig

    settings: dict[str, bool | float | int | str] = {
        "simulation-dataset": " ".join(_absolute(uri) for uri in datasets)
    }
    if "min-sites" not in request.override_config:
        settings["min-sites"] = sites
    for key, value in user_config_to_proto(settings).items():
        request.override_config[key].CopyFrom(value)
    # As many ray CPUs as ClientApps at a time, whatever the machine has: their number is what is asked for.
    request.override_federation_config.CopyFrom(
        SimulationConfig(
            num_supernodes=sites,
            init_args_num_cpus=parallel,
            client_resources_num_cpus=1,
            init_args_num_gpus=gpus,
            client_resources_num_gpus=gpu_share(gpus, parallel),
            # A site's failure comes back to the ServerApp, which says it once.
            init_args_log_to_driver=False,
        )
    )
    return request


def _absolute(uri: str) -> str:
    """Return a dataset URI that means the same in every working directory."""
    location, mark, fragment = uri.partition("#")
    if not location.startswith("hf:"):
        location = str(Path(location).expanduser().absolute())
    if len(f"{location}{mark}{fragment}".split()) != 1:
        raise ConfigError(
            f"dataset {uri!r} holds a blank, which parts datasets here: rename its directory."
        )
    return f"{location}{mark}{fragment}"


def gpu_share(gpus: int, parallel: int) -> float:
    """Return how much of a GPU each ClientApp takes so that ``parallel`` fit: a fraction, or whole GPUs."""
    return gpus // parallel if gpus >= parallel else gpus * _SHARES // parallel / _SHARES


@contextlib.contextmanager
def _superlink(runs: Path) -> Iterator[Control]:
    """Run a SuperLink in simulation mode and its SuperExec; all they keep, but for ``runs``, goes with them."""
    # ray's sockets lie some 75 characters below this directory, and a socket's path has at most 107.
    with tempfile.TemporaryDirectory(prefix="vlafleet-", dir="/tmp") as folder:
        directory = Path(folder)
        for _ in ensure_federation(directory / "pki", "simulation", []):
            pass
        with bind("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        address = f"localhost:{port}"

        def identity(role: Role, name: str) -> Path:
            return identity_directory(directory / "pki", role, name)

        own = identity(Role.SUPERLINK, SUPERLINK_NAME)
        processes = Processes(directory)
        # ray's processes outlive the one that started them by seconds, and write into the directory until then.
        adopt_orphans()
        try:
            processes.start(
                "superlink",
                *("superlink", "--simulation", "--identity", str(own), "--port", str(port)),
                *("--state", str(directory / "state")),
            )
            processes.start(
                "superexec",
                *("superexec", "--identity", str(identity(Role.SUPEREXEC, SUPERLINK_NAME))),
                *("--address", address),
                FLWR_HOME=str(directory / "flwr"),
                RAY_TMPDIR=str(directory),
                VLAFLEET_RUNS=str(runs),
            )
            wait_for_superlink(processes, own, address)
            operator = Identity.load(identity(Role.OPERATOR, "admin"), Role.OPERATOR)
            with Control.connect(operator, address) as control:
                yield control
        finally:
            processes.stop()
            end_children()
