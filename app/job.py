"""What a message asks of a site's trainer, and what comes back: plain values and one payload; no Flower, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from app.payload import Payload

if TYPE_CHECKING:
    from flwr.app import RecordDict

type Kind = Literal["describe", "train", "evaluate"]
type Record = Mapping[str, Any]
"""Numbers, texts, booleans, and lists of numbers or texts, by name: what JSON and Flower's records both hold."""

# The records of a message beside its payload: what a site is told, the metrics it answers with, and
# the wish for the whole model.
REQUEST = "request"
METRICS = "metrics"
WANT = "want"


class Progress(Protocol):
    """Told how far a job is, by name; what it raises ends the job."""

    def __call__(self, **values: float | int | str) -> None: ...


@dataclass(frozen=True)
class Job:
    """One message: its kind, the SuperNode's node config, the request record and the round's model."""

    kind: Kind
    node: Record
    request: Record
    payload: Payload | None = None


@dataclass(frozen=True)
class Answer:
    """The records of a reply by name, and an update."""

    configs: Mapping[str, Record] = field(default_factory=dict)
    metrics: Mapping[str, Record] = field(default_factory=dict)
    payload: Payload | None = None

    def to_records(self) -> RecordDict:
        """The content of a Flower reply."""
        from flwr.app import ConfigRecord, MetricRecord, RecordDict

        from app import payload

        records = payload.to_records(self.payload) if self.payload else RecordDict()
        for name, config in self.configs.items():
            records[name] = ConfigRecord(dict(config))
        for name, metric in self.metrics.items():
            records[name] = MetricRecord(dict(metric))
        return records


# The answer of a site that cannot build the round's model from what it holds.
WANT_FULL = Answer(configs={WANT: {"form": "full"}})
