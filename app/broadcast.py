"""The round's model as it goes out: whole, as the change since the last round, or not at all.

What a site holds it told with its description and with every reply since. A site that turns out not
to hold it asks for the whole model, once, within the same round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from app import payload
from app.job import REQUEST, WANT
from app.manifest import Form
from app.payload import Payload, Tensors


class Broadcast:
    """A committed model in the forms that sites can take.

    ``update`` is the payload that leads here from the round before; null when there is none.
    """

    def __init__(self, tensors: Tensors, model: str, frozen: str, update: Payload | None) -> None:
        self._tensors, self.model, self._frozen, self._update = tensors, model, frozen, update
        self._records: dict[Form, RecordDict] = {}

    def form(self, held: str | None) -> Form:
        """How this model goes to a site that holds the model ``held``."""
        if held == self.model:
            return "held"
        if self._update and held == self._update.base:
            return "delta"
        return "full"

    def content(self, form: Form, request: Mapping[str, Any]) -> RecordDict:
        """The content of one site's message; the tensors' bytes are shared between sites."""
        if form not in self._records:
            self._records[form] = payload.to_records(self._payload(form))
        content = RecordDict(dict(self._records[form].items()))
        content[REQUEST] = ConfigRecord(dict(request))
        return content

    def release(self) -> None:
        """Let go of the encoded bytes between two exchanges."""
        self._records.clear()

    def _payload(self, form: Form) -> Payload:
        if form == "delta" and self._update:
            return self._update
        return payload.pack(
            # Never in fewer bits: a site's model must be the server's, to the bit.
            ()
            if form == "held"
            else ((name, self._tensors[name]) for name in sorted(self._tensors)),
            kind="model",
            codec="fp32",
            base=self.model if form == "held" else None,
            target=self.model,
            frozen=self._frozen,
        )


def wanted(reply: RecordDict) -> bool:
    """Whether a site asks for the whole model in place of an answer."""
    return WANT in reply
