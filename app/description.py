"""What a site says of itself before a run: counts and pooled moments, never a frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.job import Record
from app.statistics import Moments, from_bytes, to_bytes
from certs.errors import DatasetError

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from app.dataset import SiteDataset

RECORD = "description"
_COUNTS = ("train_episodes", "held_out_episodes", "train_frames", "held_out_frames", "fps")


@dataclass(frozen=True)
class Description:
    """A site's dataset in numbers; ``moments`` cover its training episodes alone."""

    site: str
    # The dataset's name, without its directory: where it lies is the site's own business.
    dataset: str
    train_episodes: int
    held_out_episodes: int
    # Frames of the training episodes, and of the held-out ones.
    train_frames: int
    held_out_frames: int
    fps: int
    cameras: tuple[str, ...]
    tasks: tuple[str, ...]
    moments: dict[str, Moments]
    # Canonical hash of the trainable tensors it holds.
    held: str
    # Bytes its link takes in one request; 0 where it was not measured.
    chunk_bytes: int

    @classmethod
    def of(
        cls,
        site: str,
        dataset: SiteDataset,
        moments: dict[str, Moments],
        *,
        held: str,
        chunk_bytes: int,
    ) -> Description:
        """Describe ``dataset``."""
        # A fragment may hold a slash.
        location, mark, fragment = dataset.uri.partition("#")
        name = location if location.startswith("hf:") else Path(location).name
        return cls(
            site=site,
            dataset=f"{name}{mark}{fragment}",
            train_episodes=len(dataset.train_episodes),
            held_out_episodes=len(dataset.held_out_episodes),
            train_frames=dataset.frames(dataset.train_episodes),
            held_out_frames=dataset.frames(dataset.held_out_episodes),
            fps=dataset.fps,
            cameras=tuple(camera.rsplit(".", 1)[-1] for camera in dataset.cameras),
            tasks=dataset.tasks,
            moments=moments,
            held=held,
            chunk_bytes=chunk_bytes,
        )

    def summary(self) -> dict[str, Any]:
        """What the record of the run keeps of it."""
        return {
            "dataset": self.dataset,
            "train_episodes": self.train_episodes,
            "held_out_episodes": self.held_out_episodes,
            "train_frames": self.train_frames,
            "held_out_frames": self.held_out_frames,
            "fps": self.fps,
            "cameras": list(self.cameras),
            "tasks": list(self.tasks),
        }

    def record(self) -> Record:
        """The record of a reply that carries it, under the name ``RECORD``."""
        return {
            "site": self.site,
            **self.summary(),
            "moments": to_bytes(self.moments).decode(),
            "held": self.held,
            "chunk_bytes": self.chunk_bytes,
        }

    def to_records(self) -> RecordDict:
        """The Flower records that carry it."""
        from flwr.app import ConfigRecord, RecordDict

        return RecordDict({RECORD: ConfigRecord(dict(self.record()))})

    @classmethod
    def from_records(cls, records: RecordDict) -> Description:
        """Read a site's reply; ``DatasetError`` when it is not a description."""
        try:
            record: dict[str, Any] = dict(records.config_records[RECORD])
            described = cls(
                site=str(record["site"]),
                dataset=str(record["dataset"]),
                **{key: int(record[key]) for key in _COUNTS},
                cameras=tuple(map(str, record["cameras"])),
                tasks=tuple(map(str, record["tasks"])),
                moments=from_bytes(record["moments"].encode()),
                held=str(record["held"]),
                chunk_bytes=int(record["chunk_bytes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(
                f"The site's description cannot be read ({type(error).__name__}: {error}): the "
                "site must run the same version."
            ) from error
        for key in _COUNTS:
            if getattr(described, key) < 1:
                raise DatasetError(f"The site's description has {key} below 1.")
        return described
