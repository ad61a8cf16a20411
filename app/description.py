"""What a site says of itself before a run: counts and pooled moments, never a frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    train_episodes: int
    held_out_episodes: int
    # Frames of the training episodes, and of the held-out ones.
    train_frames: int
    held_out_frames: int
    fps: int
    cameras: tuple[str, ...]
    tasks: tuple[str, ...]
    moments: dict[str, Moments]

    @classmethod
    def of(cls, site: str, dataset: SiteDataset, moments: dict[str, Moments]) -> Description:
        """Describe ``dataset``."""
        return cls(
            site=site,
            train_episodes=len(dataset.train_episodes),
            held_out_episodes=len(dataset.held_out_episodes),
            train_frames=dataset.frames(dataset.train_episodes),
            held_out_frames=dataset.frames(dataset.held_out_episodes),
            fps=dataset.fps,
            cameras=tuple(camera.rsplit(".", 1)[-1] for camera in dataset.cameras),
            tasks=dataset.tasks,
            moments=moments,
        )

    def summary(self) -> dict[str, Any]:
        """All but the moments, for the record of the run."""
        return {
            "train_episodes": self.train_episodes,
            "held_out_episodes": self.held_out_episodes,
            "train_frames": self.train_frames,
            "held_out_frames": self.held_out_frames,
            "fps": self.fps,
            "cameras": list(self.cameras),
            "tasks": list(self.tasks),
        }

    def to_records(self) -> RecordDict:
        """The Flower records that carry it."""
        from flwr.app import ConfigRecord, RecordDict

        record = ConfigRecord(
            {"site": self.site, **self.summary(), "moments": to_bytes(self.moments)}
        )
        return RecordDict({RECORD: record})

    @classmethod
    def from_records(cls, records: RecordDict) -> Description:
        """Read a site's reply; ``DatasetError`` when it is not a description."""
        try:
            record: dict[str, Any] = dict(records.config_records[RECORD])
            described = cls(
                site=str(record["site"]),
                **{key: int(record[key]) for key in _COUNTS},
                cameras=tuple(map(str, record["cameras"])),
                tasks=tuple(map(str, record["tasks"])),
                moments=from_bytes(record["moments"]),
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
