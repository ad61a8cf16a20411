"""A real Prometheus watches a federation: a run shows in every panel, and each fault fires its alert and no other."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from app.journal import read_rounds
from certs.authority import Authority
from certs.files import pem_certificate
from certs.identity import authority_directory, identity_directory, store_identity
from certs.processes import Processes
from certs.roles import EXPORTER_NAME, Role
from superlink.control import Control, run_request
from superlink.demo import federation
from tests.chaos.test_trainer import Trainer
from tests.monitoring.processes import Alert, Monitoring, watching
from tests.monitoring.queries import queries
from tests.recorder import record
from tests.wire import ask, context

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Steps for some seconds, as a site reports every five.
RUN = "rounds=2 local-steps=100 batch-size=2 eval-batches=1"
# What a loaded machine may take for a wait that must end; an alert's own bound is counted from its fault.
LONG = 400.0
# What a scrape, an evaluation, a report of the site's and a loaded machine add to an alert's own time.
SLACK = 30.0
# Of a certificate that is not renewed: a quarter of it is long enough to mend that.
LIFETIME_S = 100.0

# Alertmanager's own wait before it tells of a new alert.
GROUP_WAIT_S = 10.0

OFFLINE = Alert.make("SiteOffline", job="superlink", site="site-b")
TRAINER = Alert.make("TrainerRestarting", site="site-a")
NOT_FINITE = Alert.make("LossNotFinite", site="site-b")
CERTIFICATE = Alert.make("CertificateExpiring", name="exporter", role="exporter")
REFUSALS = Alert.make("RefusalsSurging", job="superlink")
ALL = {OFFLINE, TRAINER, NOT_FINITE, CERTIFICATE, REFUSALS}


def until[T](look: Callable[[], T], what: str, seen: Callable[[], object] = str) -> T:
    """What ``look`` finds; after too long, ``what`` is wrong, and what is ``seen`` instead."""
    deadline = time.monotonic() + LONG
    while not (found := look()):
        assert time.monotonic() < deadline, (what, seen())
        time.sleep(0.2)
    return found


@dataclass(frozen=True)
class Fleet:
    """A federation that is watched, and when each fault began."""

    directory: Path
    port: int
    control: Control
    processes: Processes
    monitoring: Monitoring
    faults: dict[Alert, float] = field(default_factory=dict)

    @property
    def pki(self) -> Path:
        return self.directory / "federation" / "pki"

    def identity(self, role: Role, name: str) -> Path:
        return identity_directory(self.pki, role, name)

    def start(self, config: str = RUN) -> int:
        return self.control.start(run_request(ROOT, [config]))

    def finished(self, run: int) -> str:
        until(lambda: self.control.status(run).status == "finished", f"run {run} did not end")
        return str(self.control.status(run).sub_status)

    def fault(self, alert: Alert) -> None:
        """Note that what is to fire this alert begins now."""
        self.faults[alert] = time.time()

    def fires(self, alert: Alert, *, within: float, after: float = 0.0) -> None:
        """Return once the alert fires; it must so many seconds after its fault."""
        until(
            lambda: alert in self.monitoring.fired(),
            f"{alert} does not fire",
            self.monitoring.values,
        )
        assert after <= self.seconds(alert) <= within, f"{alert} after {self.seconds(alert):.0f} s"

    def seconds(self, alert: Alert) -> float:
        """The seconds from the fault to its alert."""
        return self.monitoring.fired()[alert] - self.faults[alert]


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    datasets = {name: str(record(directory / "data" / name)) for name in ("site-a", "site-b")}
    real = Processes.start

    def start(self: Processes, name: str, *arguments: str, **environment: str) -> None:
        if name == "superexec-site-b":
            environment |= {
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT / "tests" / "chaos" / "standin"), os.environ.get("PYTHONPATH", "")]
                ),
                "VLAFLEET_STANDINS": f"app.worker={HERE / 'nan_worker.py'}",
                "VLAFLEET_TEST_NAN": str(directory / "nan"),
            }
        real(self, name, *arguments, **environment)

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(Processes, "start", start)
        patch.setenv("VLAFLEET_HOME", str(directory / "home"))
        port, runs = free_port(), directory / "runs"
        control, processes = stack.enter_context(
            federation(directory / "federation", datasets, runs, port, enrolment=True, watched=True)
        )
        # In the order of superlink.demo.
        superlink, site_a, site_b, enrolment, exporter = (
            f"localhost:{port + above}" for above in range(5)
        )
        monitoring = stack.enter_context(
            watching(
                directory / "monitoring",
                {"superlink": superlink, "enrolment": enrolment, "exporter": exporter},
                {"site-a": site_a, "site-b": site_b},
                identity_directory(directory / "federation" / "pki", Role.MONITOR, "prometheus"),
                (free_port(), free_port()),
            )
        )
        yield Fleet(directory, port, control, processes, monitoring)


def test_after_a_run_every_panel_shows_something_and_nothing_fires(fleet: Fleet) -> None:
    began = time.time()
    assert fleet.finished(fleet.start()) == "completed"
    # What the run's end told is scraped by then.
    time.sleep(2)
    empty = [
        f"{query.dashboard}, {query.panel}: {query.expr}"
        for query in queries()
        if not query.needs_gpu and not fleet.monitoring.shows(query.expr, since=began)
    ]
    assert not empty, "\n".join(empty)
    assert fleet.monitoring.fired() == {}, fleet.monitoring.values()
    assert fleet.monitoring.webhook.received == []


def test_each_fault_fires_its_alert_and_no_other(fleet: Fleet) -> None:
    """Faults overlap where one has to ripen while the next is there; each alert says whose it is."""
    monitoring = fleet.monitoring
    let_the_certificate_run_out(fleet)
    ask_as_another_role(fleet)
    with ThreadPoolExecutor() as pool:
        mended = pool.submit(put_the_certificate_right, fleet)
        # Site-b's next update has NaN in it.
        (fleet.directory / "nan").touch()
        run = fleet.start()
        fleet.fires(REFUSALS, within=SLACK)
        assert fleet.finished(run) == "completed"
        _, diverged, sound = read_rounds(fleet.directory / "runs" / str(run))
        told = diverged["sites"]["site-b"]["train"]
        assert (told["state"], told["cause"]) == ("invalid", "finite")
        assert sound["sites"]["site-b"]["train"]["state"] == "completed"
        fleet.faults[NOT_FINITE] = datetime.fromisoformat(diverged["ended_at"]).timestamp()
        fleet.fires(NOT_FINITE, within=SLACK)

        kill_the_site(fleet)
        kill_the_trainer(fleet)
        fleet.fires(TRAINER, within=SLACK)
        # Flower waits a minute for a heartbeat, and the alert another one for the site to come back.
        fleet.fires(OFFLINE, within=120 + SLACK, after=60)
        mended.result()

    # Each was told of once it fired; of what the lost site did before, nobody is told again.
    until(lambda: OFFLINE in monitoring.webhook.told(), "nobody is told", monitoring.routed)
    fired, sent = monitoring.fired(), monitoring.webhook.told()
    assert fired.keys() == sent.keys() == ALL, (fired, sent)
    for alert, moment in fired.items():
        assert sent[alert] - moment < GROUP_WAIT_S + SLACK, alert
        print(f"{alert}: {fleet.seconds(alert):.1f} s, sent {sent[alert] - moment:.1f} s later")
    until(lambda: NOT_FINITE in monitoring.routed("suppressed"), "nothing is inhibited")
    until(lambda: CERTIFICATE in monitoring.webhook.told("resolved"), "nobody is told of the end")


def let_the_certificate_run_out(fleet: Fleet) -> None:
    """The exporter works on with a certificate that nobody renews."""
    exporter = fleet.processes.running["exporter"]
    assert isinstance(exporter.args, list)
    arguments = list(map(str, exporter.args[3:]))
    where = arguments.index("--enrolment")
    del arguments[where : where + 2]
    exporter.terminate()
    exporter.wait(30)
    certify(fleet, timedelta(seconds=LIFETIME_S))
    fleet.fault(CERTIFICATE)
    fleet.processes.start("exporter", *arguments)


def put_the_certificate_right(fleet: Fleet) -> None:
    """Once somebody was told: the process takes the new certificate over while it runs."""
    monitoring = fleet.monitoring
    # A certificate ends at a full second.
    fleet.fires(CERTIFICATE, within=0.75 * LIFETIME_S + SLACK, after=0.75 * LIFETIME_S - 2)
    until(lambda: CERTIFICATE in monitoring.webhook.told(), "nobody is told", monitoring.routed)
    certify(fleet)
    until(lambda: CERTIFICATE not in monitoring.alerts(), "the alert stays", monitoring.values)


def certify(fleet: Fleet, lifetime: timedelta | None = None) -> None:
    """Issue the exporter's certificate again; a running one takes it over."""
    authority = Authority.load(authority_directory(fleet.pki))
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue(
        key.public_key(), Role.EXPORTER, EXPORTER_NAME, hosts=["localhost"], lifetime=lifetime
    )
    store_identity(
        fleet.identity(Role.EXPORTER, EXPORTER_NAME),
        key,
        pem_certificate(certificate).decode(),
        authority.bundle.decode(),
    )


def ask_as_another_role(fleet: Fleet) -> None:
    """A site's SuperExec asks the SuperLink for what only an operator may."""
    own = context(
        authority_directory(fleet.pki) / "ca.crt", fleet.identity(Role.SUPEREXEC, "site-a")
    )
    fleet.fault(REFUSALS)
    for _ in range(30):
        assert ask(fleet.port, "/v1/control/list-runs", own).refused_by_guard


def kill_the_trainer(fleet: Fleet) -> None:
    """Three times, as when memory runs out."""
    trainer = Trainer(fleet.processes.logs / "superexec-site-a.log")
    killed: set[int] = set()

    def kill() -> bool:
        # The one that was killed may still take the connection, and end with it.
        with suppress(EOFError, OSError):
            if (pid := trainer.pid()) not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return len(killed) == 3

    until(kill, "the trainer does not come back")
    fleet.fault(TRAINER)


def kill_the_site(fleet: Fleet) -> None:
    """As a power cut would."""
    for name in ("supernode-site-b", "superexec-site-b"):
        fleet.processes.running[name].kill()
        fleet.processes.running[name].wait()
    fleet.fault(OFFLINE)
