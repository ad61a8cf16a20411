"""A client that presents whatever a test wants: the attacker's side of the refusal tests."""

import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path

from certs.guard import _BODY


@dataclass(frozen=True)
class Answer:
    """What came back: ``status`` is None when the connection was refused below HTTP."""

    status: int | None
    body: bytes = b""
    error: str = ""

    @property
    def refused_by_guard(self) -> bool:
        return self.status == 404 and self.body == _BODY

    @property
    def refused_by_tls(self) -> bool:
        return self.status is None

    @property
    def refused(self) -> bool:
        return self.refused_by_guard or self.refused_by_tls


def context(authority: Path, identity: Path | None = None) -> ssl.SSLContext:
    """A stock client context; ``identity`` holds tls.crt and tls.key."""
    made = ssl.create_default_context(cafile=str(authority))
    if identity is not None:
        made.load_cert_chain(identity / "tls.crt", identity / "tls.key")
    return made


def ask(
    port: int,
    path: str,
    tls: ssl.SSLContext | None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> Answer:
    """Send one request; ``tls`` None speaks plain HTTP."""
    if tls is None:
        connection = http.client.HTTPConnection("localhost", port, timeout=20)
    else:
        connection = http.client.HTTPSConnection("localhost", port, timeout=20, context=tls)
    sent = {"content-type": "application/x-protobuf", **(headers or {})}
    try:
        connection.request(method, path, body=b"" if method == "POST" else None, headers=sent)
        response = connection.getresponse()
        return Answer(response.status, response.read())
    except (OSError, http.client.HTTPException) as error:
        return Answer(None, error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def decoded(answer: Answer) -> object:
    """The JSON of an answer."""
    return json.loads(answer.body)
