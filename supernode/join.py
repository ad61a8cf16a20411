"""``vlafleet site join``: from an invitation to a site that the SuperLink sees online.

Every step leaves files that the next run of the same command takes up, so an interrupted join is simply run again; a
site that is a member spends no invitation.
"""

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from certs.enrolment import Membership
from certs.errors import (
    CertificateError,
    FleetError,
    InvitationError,
    RunFailedError,
    UnknownSiteError,
)
from certs.identity import Identity
from certs.invitation import Invitation
from certs.roles import Role
from supernode.enrol import RetiredKeyError, enrol, inviter, refuse_unfit, report_dataset
from supernode.membership import Keys, check, discard, forget, identities, keep, kept, store
from supernode.presence import Presence, is_refused, presence
from supernode.site import Mode, Site, locked

# One line for each step that is done.
Say = Callable[[str], None]

# Importing Flower takes seconds on a loaded machine, and a SuperNode that was killed is let in again after 60 s.
_ONLINE_SECONDS = 120.0
_POLL_SECONDS = 0.5
_ENGINE_SECONDS = 10.0


def join(site: Site, invitation: Invitation, say: Say) -> None:
    """Make ``site`` a member, start it, and return once it is online; ``site`` has no addresses yet.

    Raises ``FleetError``: before anything is written where the invitation or its federation is not what it says.
    """
    known = Site.find(site.directory)
    if known is not None:
        known.require(site.federation, site.name)
    member = known is not None and is_member(known, say)
    if not member and kept(site) is None:
        refuse_unfit(invitation, site.federation, site.name)
        inviter(invitation)
        say(
            f"authority   of {site.federation} at {invitation.address}, as the invitation says: "
            f"{invitation.fingerprint}"
        )
    existed = site.directory.exists()
    with locked(site.directory):
        if member and known is not None:
            site = with_addresses(site, known)
            forget(site)
        else:
            if known is not None and known.mode != site.mode:
                stop(known)
            site = become_member(site, invitation, existed, say)
        bring_up(site, say, stop_first=None if member and site == known else known or site)


def is_member(known: Site, say: Say) -> bool:
    """Whether a directory's site has all it needs and the SuperLink does not refuse it."""
    if not known.superlink or identities(known) is None:
        return False
    if is_refused(known):
        say(f"membership  the SuperLink no longer takes {known.name}'s certificate")
        return False
    say(f"membership  {known.name} is a member of {known.federation}; no invitation is needed")
    return True


def with_addresses(site: Site, source: Site | Membership) -> Site:
    """Return ``site`` with the addresses that a membership gave it."""
    return dataclasses.replace(site, superlink=source.superlink, enrolment=source.enrolment)


def become_member(site: Site, invitation: Invitation, existed: bool, say: Say) -> Site:
    """Apply, unless an interrupted join has already, and store what came back; return the site with its addresses."""
    fresh = not site.identity.exists()
    keys = Keys.ensure(site)
    say(f"keys        in {site.identity} and {site.superexec}, for their owner only")
    membership = _kept(site, keys, invitation.fingerprint)
    try:
        if membership is None:
            membership = enrol(invitation, keys.application(site))
    except RetiredKeyError:
        # What runs still holds the keys of the membership that was revoked.
        stop(site)
        discard(site)
        keys = Keys.ensure(site)
        say("keys        made anew: the former ones were revoked")
        membership = enrol(invitation, keys.application(site))
    except InvitationError:
        if fresh:
            _leave_nothing(site, existed)
        raise
    return become(site, membership, keys, invitation.fingerprint, say)


def _kept(site: Site, keys: Keys, fingerprint: str) -> Membership | None:
    """Return the membership that an interrupted join was given for these keys and did not get to store."""
    known = Site.find(site.directory)
    if known is not None and known.superlink and identities(site) is not None:
        forget(site)  # stored, and refused since
    membership = kept(site)
    with contextlib.suppress(CertificateError):
        if membership is not None:
            check(membership, site, keys, fingerprint)
            return membership
    return None


def become(site: Site, membership: Membership, keys: Keys, fingerprint: str, say: Say) -> Site:
    """Check a membership and make it the site's; return the site with its addresses."""
    check(membership, site, keys, fingerprint)
    keep(membership, site)
    store(membership, site, keys)
    site = with_addresses(site, membership)
    site.save()
    forget(site)
    identity = Identity.load(site.identity, Role.SITE)
    say(
        f"membership  {site.name} of {site.federation} until {identity.not_after:%Y-%m-%d %H:%M} UTC, "
        "renewed before"
    )
    return site


def _leave_nothing(site: Site, existed: bool) -> None:
    """Remove what a join made whose invitation was refused: keys that nobody has asked anything for."""
    discard(site)
    for directory in (site.identity, site.superexec, site.state, site.cache, site.logs):
        with contextlib.suppress(OSError):  # what holds something else stays
            directory.rmdir()
    if not existed:
        (site.directory / ".lock").unlink()
        with contextlib.suppress(OSError):
            site.directory.rmdir()


def bring_up(site: Site, say: Say, *, stop_first: Site | None) -> None:
    """Check a member's machine, start its processes, and return once the SuperLink sees it online.

    ``stop_first`` is what may run and is not as ``site`` is; None where nothing has changed.
    """
    dataset = preflight(site, say)
    _report(site, dataset, say)
    stopped = stop_first is not None and stop(stop_first)
    # Not before: what runs would never be started again with it, were this command interrupted in between.
    site.save()
    if site.mode == "helm":
        from supernode import helm

        say(f"files       {helm.write(site)}")
        for step in helm.next_steps(site):
            say(f"next        {step}")
        return
    before = _look(site)
    started = _start(site)
    if site.mode == "compose":
        say(f"files       {site.directory / 'compose.yaml'}")
    how = "docker compose" if site.mode == "compose" else "plain processes of this user"
    if started:
        say(f"start       {'again, ' if stopped else ''}with {how}")
    else:
        say("start       it runs already, and nothing has changed")
    seconds = _wait_online(site, before if started else None)
    say(f"online      seen by the SuperLink after {seconds:.0f} s")
    _summarise(site, say)


def preflight(site: Site, say: Say) -> Mapping[str, Any] | None:
    """Check machine, network and dataset, say each finding; raise the first fail, return the dataset's numbers."""
    from supernode import preflight as checks

    report = checks.check(site)
    say(report.text())
    report.require()
    return report.dataset


def _report(site: Site, dataset: Mapping[str, Any] | None, say: Say) -> None:
    if dataset is None:
        return
    numbers = {name: int(dataset[name]) for name in ("episodes", "frames", "bytes", "fps")}
    try:
        report_dataset(Identity.load(site.identity, Role.SITE), site.enrolment, numbers)
    except FleetError as error:
        # It is for the operator's list alone; nothing depends on it.
        say(f"warning     the dataset's size was not reported: {error}")
    else:
        say(f"dataset     {numbers['episodes']} episodes, {numbers['frames']} frames, reported")


def _start(site: Site) -> bool:
    """Start the site's processes; return whether they had to be started."""
    running = _running(site)
    if site.mode == "compose":
        from supernode import compose

        compose.write(site)
        # Also where it runs: compose replaces only what is not as the file says.
        compose.start(site)
    else:
        from supernode import native

        native.start(site)
    return not running


def stop(site: Site) -> bool:
    """Stop what runs of a site; return whether something did."""
    if not _running(site):
        return False
    if site.mode == "compose":
        from supernode import compose

        return compose.stop(site)
    from supernode import native

    return native.stop(site.directory)


def _running(site: Site) -> bool:
    if site.mode == "compose":
        from supernode import compose

        return compose.running(site)
    from supernode import native

    return native.running(site.directory)


def default_mode() -> Mode:
    """Return ``compose`` where a Docker engine answers, else ``native``."""
    command = ["docker", "compose", "ls", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_ENGINE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return "native"
    return "compose" if done.returncode == 0 else "native"


def _look(site: Site) -> Presence | None:
    try:
        return presence(site)
    except FleetError:
        return None


def _wait_online(site: Site, before: Presence | None) -> float:
    """Return the seconds until the SuperLink saw the site online, by another heartbeat than ``before``."""
    began = time.monotonic()
    said = "has not answered"
    while (spent := time.monotonic() - began) < _ONLINE_SECONDS:
        try:
            now = presence(site)
        except FleetError as error:
            said = f"could not be asked: {error}"
        else:
            if now.status == "online" and (
                before is None or now.last_heartbeat != before.last_heartbeat
            ):
                return spent
            said = f"says {now.status}"
        if not _running(site):
            raise RunFailedError(f"the processes of {site.name} have ended: {_log(site)} says why")
        time.sleep(_POLL_SECONDS)
    raise UnknownSiteError(
        f"{site.name} is not online after {_ONLINE_SECONDS:.0f} s (the SuperLink {said}): look at {_log(site)}, "
        "then run the same command again"
    )


def _log(site: Site) -> str:
    if site.mode == "compose":
        return f"'docker compose -f {site.directory / 'compose.yaml'} logs'"
    return str(site.logs)


def _summarise(site: Site, say: Say) -> None:
    say(
        f"\n{site.name} is online in {site.federation} and trains on {site.dataset} ({site.device}) when a run asks it "
        f"to.\nEverything lies in {site.directory}; the log is {_log(site)}.\n"
        f"Stop it with 'vlafleet site stop --directory {site.directory}'.\n"
        "Frames, videos, actions and private keys never leave this machine; changes of the model and the dataset's "
        "statistics do."
    )
