"""Joining by files, where no network reaches the federation's operator: an application out, a membership in.

Neither file holds a secret. What tells the federation's answer from an impostor's is the authority's fingerprint, which
the operator says by another way.
"""

import json
import re
from pathlib import Path

from certs.enrolment import keys_fingerprint
from certs.errors import CertificateError, ConfigError
from certs.files import write_atomic
from supernode.join import Say, become, bring_up, is_member, with_addresses
from supernode.membership import Keys, read_membership
from supernode.site import Site, default_directory, locked


def request(site: Site, out: Path, say: Say) -> None:
    """Make the keys of ``site``, which has no addresses yet, and write its application to ``out``."""
    known = Site.find(site.directory)
    if known is not None:
        known.require(site.federation, site.name)
        site = with_addresses(site, known)
    with locked(site.directory):
        keys = Keys.ensure(site)
        site.save()
        say(f"keys        in {site.identity} and {site.superexec}, for their owner only")
        application = keys.application(site)
        write_atomic(out, json.dumps(application.to_json(), indent=2).encode() + b"\n")
    say(f"request     {out}: bring it to the federation's operator, it holds no secret")
    say(
        f"keys        {keys_fingerprint(*application.keys())}, what 'site approve' has to show as well"
    )
    say(
        "next        vlafleet site accept MEMBERSHIP --fingerprint HEX, with the operator's file, and the fingerprint "
        "as the operator tells it by another way"
    )


def accept(path: Path, fingerprint: str, directory: Path | None, say: Say) -> None:
    """Store the membership in ``path``, start the site, and return once it is online.

    ``fingerprint`` is the SHA-256 of the authority's certificate, hex; colons and white space aside.
    """
    fingerprint = _normal(fingerprint)
    membership = read_membership(path)
    site = Site.find(directory or default_directory(membership.site))
    if site is None:
        raise ConfigError(
            f"no site has applied in {directory or default_directory(membership.site)}: "
            "run 'vlafleet site request' first, or correct --directory"
        )
    site.require(membership.federation, membership.site)
    with locked(site.directory):
        if not is_member(site, say):
            site = become(site, membership, Keys.ensure(site), fingerprint, say)
        bring_up(site, say, stop_first=site)


def _normal(fingerprint: str) -> str:
    digits = re.sub(r"[\s:]", "", fingerprint).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise CertificateError(
            f"the fingerprint {fingerprint!r} is not a SHA-256: 64 hexadecimal digits, "
            "as 'vlafleet site approve' prints them to the operator"
        )
    return digits
