"""Everything that would keep a site from working, looked for before it starts and whenever somebody asks.

Independent checks do not hide each other: the network is looked at with a dataset that is unfit, the disk without a
network. What cannot be looked at because of another failure is said where that failure is.
"""

import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from certs.contexts import anonymous_context, client_context, enrolment_server
from certs.enrolment import AUTHORITY_PATH, SITES_PATH
from certs.errors import CertificateError, FleetError, first_line
from certs.files import load_certificate, load_certificates, pem_certificate
from certs.identity import Identity
from certs.lifetime import renew_at
from certs.roles import Role
from supernode import capacity, clock, dataset, gpu, link, proxy
from supernode.findings import Finding, Report, fail, ok, size, span, warning
from supernode.network import Server, reached
from supernode.site import Site

__all__ = ["Finding", "Report", "check"]

# The run config's default for a round; an operator may set another (docs/run-config.md).
_ROUND_TIMEOUT_SECONDS = 600.0


def check(site: Site, run_config: Sequence[str] = ()) -> Report:
    """Look at everything; takes seconds, and the time that the app needs for the dataset.

    What a round takes is estimated for a run of ``run_config`` (``'key=value key=value'``), by default the app's own.
    """
    identities, identity = _identities(site)
    look = dataset.look(site, run_config)
    network, measured = _network(site, identity)
    here: list[Finding] = []
    if site.mode == "helm":
        here.append(
            warning(
                "hardware",
                "disk, memory and GPU of the cluster's nodes cannot be seen from here; the network was looked at from "
                "this machine",
                "Compare the nodes with what the estimate says, where there is one.",
            )
        )
    else:
        here += capacity.disk(site, look.estimate)
        here.append(capacity.host(look.estimate))
        here += gpu.check(site.device, look.estimate, inherited=site.mode == "native")
    findings = [
        *identities,
        *network,
        *([_link(measured, look.estimate)] if measured else []),
        *here,
        *look.findings,
        *([_cache(look.estimate), _round(look.estimate, measured)] if look.estimate else []),
    ]
    return Report(site.name, findings, look.dataset, look.estimate)


def _identities(site: Site) -> tuple[list[Finding], Identity | None]:
    """Judge the identities of SuperNode and SuperExec; return the SuperNode's where it can be used."""
    findings, loaded = [], {}
    for name, directory, role in (
        ("identity", site.identity, Role.SITE),
        ("superexec", site.superexec, Role.SUPEREXEC),
    ):
        if (key := _open_key(directory, 0o007)) is not None:
            # Such a key is not loaded.
            findings.append(
                fail(name, f"{key} is open to every user", f"Run 'chmod 600 {key}'.", CertificateError)
            )  # fmt: skip
            continue
        try:
            loaded[role] = identity = Identity.load(directory, role)
            findings.append(_identity(name, site, identity))
        except CertificateError as error:
            findings.append(
                fail(
                    name,
                    str(error),
                    "Ask the federation's operator for a new invitation and join again.",
                    CertificateError,
                )
            )
    return findings, loaded.get(Role.SITE)


def _identity(name: str, site: Site, identity: Identity) -> Finding:
    peer = identity.peer
    if (peer.federation, peer.name) != (site.federation, site.name):
        return fail(
            name,
            f"{identity.directory} is the identity {peer.uri}, and the site is {site.name!r} of {site.federation!r}",
            "Join again, into another --directory.",
            CertificateError,
        )
    needed = (identity.node_key, identity.node_public_key) if peer.role is Role.SITE else ()
    for path in needed:
        if not path.exists():
            return fail(
                name,
                f"{path} is missing, by which the SuperLink knows this site",
                "Ask the federation's operator for a new invitation and join again.",
                CertificateError,
            )
    if (key := _open_key(identity.directory, 0o077)) is not None:
        mode = stat.S_IMODE(key.stat().st_mode)
        return warning(
            name,
            f"{key} has the mode {mode:04o}: others on this machine may read the site's key",
            f"Run 'chmod 600 {key}'.",
        )
    now = datetime.now(UTC)
    certificate = load_certificate(identity.certificate)
    left = f"{peer.role} certificate good for {span((identity.not_after - now).total_seconds())}"
    due = (renew_at(certificate) - now).total_seconds()
    if due < 0:
        return warning(
            name,
            f"{left}, and its renewal is due for {span(-due)}",
            "It renews while the site runs and reaches the enrolment service: start the site, or look at its log.",
        )
    return ok(name, f"{left}, renewed in {span(due)}")


def _open_key(directory: Path, mask: int) -> Path | None:
    """Return a private key of an identity that more than its owner may read, by these bits of its mode."""
    for name in ("tls.key", "node.key"):
        path = directory / name
        with suppress(OSError):  # what cannot be read is not loaded either, which is said then
            if path.stat().st_mode & mask:
                return path
    return None


def _network(site: Site, identity: Identity | None) -> tuple[list[Finding], link.Link | None]:
    """Take the way to both servers; compare clocks and measure the link where they answer."""
    # Helm and compose run the site in containers, which do not get this environment.
    route = proxy.check([site.enrolment, site.superlink], inherited=site.mode == "native")
    if route.level == "fail":
        sentence = f"{route.sentence}; nothing of the network was checked"
        return [replace(route, sentence=sentence)], None
    authorities = _authorities(site)
    member = client_context(identity, enrolment_server(site.federation)) if identity else None
    if member is None and authorities:
        # Who enrols also answers those without a certificate.
        member = anonymous_context(authorities, site.federation)
    enrolment = Server("enrolment", "the enrolment service", site.enrolment, AUTHORITY_PATH)
    superlink = Server("superlink", "the SuperLink", site.superlink, SITES_PATH)
    with ExitStack() as stack:
        first, first_client = stack.enter_context(
            reached(enrolment, member, proxy.proxy_for(site.enrolment), authorities)
        )
        second, second_client = stack.enter_context(
            reached(
                superlink,
                client_context(identity) if identity else None,
                proxy.proxy_for(site.superlink),
                authorities,
            )
        )
        time = _clock((superlink, second_client), (enrolment, first_client))
        measured, why = _measured(site, identity if second_client else None)
    unknown = [
        *([] if time or first_client else ["the clock"]),
        *([] if measured else ["the link's speed"]),
    ]
    if unknown and second.level != "ok":
        second = replace(second, sentence=f"{second.sentence}; {' and '.join(unknown)} not checked")
    findings = [route, first, second, *([time] if time else [])]
    if time is None and (first_client or second_client):
        findings.append(
            warning("clock", "the clock was not compared: no server told the time", "Check again later.")
        )  # fmt: skip
    if why:
        findings.append(
            warning("link", f"the link to {site.superlink} was not measured: {why}", "Check again later.")
        )  # fmt: skip
    return findings, measured


def _authorities(site: Site) -> str:
    """The federation's bundle, PEM; empty where it cannot be used, which the identity's finding says."""
    try:
        found = load_certificates(site.identity / "ca.crt", "authority certificate")
    except CertificateError:
        return ""
    return b"".join(map(pem_certificate, found)).decode()


def _clock(*servers: tuple[Server, httpx.Client | None]) -> Finding | None:
    """Compare clocks with the first server that tells the time."""
    for server, client in servers:
        if client is None:
            continue
        try:
            return clock.check(clock.measure(client, server.path), f"{server.what}'s")
        except (httpx.HTTPError, ValueError):
            continue
    return None


def _measured(site: Site, identity: Identity | None) -> tuple[link.Link | None, str]:
    """Measure the link of a site that the SuperLink answers; else say why not, "" where the cause was said."""
    if identity is None:
        return None, ""
    try:
        return link.measure(identity, site.superlink), ""
    except (httpx.HTTPError, FleetError) as error:
        return None, first_line(error)


def _link(measured: link.Link, estimate: dict[str, Any] | None) -> Finding:
    sentence = (
        f"{size(measured.up)}/s up, {size(measured.down)}/s down, {span(measured.round_trip)} round trip; "
        f"messages go in {link.transfer(measured)}"
    )
    if estimate is None:
        return ok("link", sentence)
    seconds = _transfer(estimate, measured)
    sentence += f", a round's in {span(seconds)}"
    third = _ROUND_TIMEOUT_SECONDS / 3
    if seconds > third:
        return warning(
            "link",
            f"{sentence}, more than a third of a round's {span(_ROUND_TIMEOUT_SECONDS)}",
            "Ask the federation's operator for exchange=lora, codec=int4 or a longer round-timeout, or find a faster "
            "link.",
        )
    return ok("link", sentence)


def _transfer(estimate: dict[str, Any], measured: link.Link) -> float:
    up, down = max(measured.up, 1.0), max(measured.down, 1.0)
    return float(estimate["bytes_up"] / up + estimate["bytes_down"] / down)


def _round(estimate: dict[str, Any], measured: link.Link | None) -> Finding:
    """What a round costs this site, with the run config's defaults."""
    work = estimate["seconds_per_round"]
    transfer = None if measured is None else _transfer(estimate, measured)
    seconds = (work or 0.0) + (transfer or 0.0)
    parts = [
        "no time for work, for the device is not there"
        if work is None
        else f"{span(work)} of work on {estimate['device']}",
        "no time for transfer, which was not measured"
        if transfer is None
        else f"{span(transfer)} of transfer",
    ]
    sentence = (
        f"a round takes about {span(seconds)}: {' and '.join(parts)}; {size(estimate['bytes_down'])} down (the first "
        f"time {size(estimate['first_bytes_down'])}) and {size(estimate['bytes_up'])} up"
    )
    if seconds > _ROUND_TIMEOUT_SECONDS:
        return warning(
            "round",
            f"{sentence}; that is longer than the {span(_ROUND_TIMEOUT_SECONDS)} a round has by default",
            "Train on a GPU, or ask the federation's operator for fewer local-steps or a longer round-timeout.",
        )
    return ok("round", sentence)


def _cache(estimate: dict[str, Any]) -> Finding:
    """Where what the frozen model makes of each frame is kept, which spares most of a step's work."""
    tier = estimate["cache_tier"]
    if tier == "none":
        return warning(
            "cache",
            "there is no room for a cache of what the frozen model makes of the frames: each step computes it again, "
            "which takes many times as long",
            "Give the site more memory, or free space on its disk.",
        )
    sentence = f"the cache of what the frozen model makes of the frames takes {size(estimate['cache_bytes'])}"
    if (seconds := estimate["cache_seconds"]) is not None:
        sentence += f" and {span(seconds)} to fill once"
    if tier == "embeddings":
        return warning(
            "cache",
            f"{sentence}; there is room for image embeddings only, and steps take four to five times as long",
            "Give the site more memory, or free space on its disk.",
        )
    places = {"gpu": "in the GPU's memory", "memory": "in memory", "disk": "on the disk"}
    return ok("cache", f"{sentence}, {places[tier]}")
