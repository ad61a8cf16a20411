"""A trainer process whose worker does what its request says: what tests of the real process run."""

import os
import sys
import time
from pathlib import Path

import app.trainer
from app.job import Answer, Job, Progress
from app.payload import PayloadError
from certs.errors import DatasetError


class AcceleratorError(RuntimeError):
    """By the name of torch's own."""


class StandIn:
    """Answers with what it was given and who it is."""

    def __init__(self) -> None:
        self.jobs = 0
        self.mark = ""

    def handle(self, job: Job, progress: Progress) -> Answer:
        self.jobs += 1
        self.mark = str(job.request.get("mark", ""))
        progress(round=1, step=3, loss=0.5, samples_per_second=8.0, cache_tier="memory")
        match job.request["do"]:
            case "wait":
                self._wait(job, progress)
            case "sleep":
                Path(job.request["begun"]).touch()
                time.sleep(600)
            case "dataset":
                raise DatasetError("The dataset is empty.")
            case "payload":
                raise PayloadError("finite", "It is not finite.")
            case "unsayable":
                return Answer(metrics={"who": {"pid": 1j}})
            case "broken":
                raise AcceleratorError("CUDA error: an illegal memory access was encountered")
            case "crash":
                raise ZeroDivisionError("division by zero\nand more")
        return Answer(
            configs={"request": job.request, "node": job.node},
            metrics={"who": {"pid": os.getpid(), "jobs": self.jobs}},
            payload=job.payload,
        )

    def close(self) -> None:
        """Leave a mark where the job before asked for one."""
        if self.mark:
            Path(self.mark).touch()

    def _wait(self, job: Job, progress: Progress) -> None:
        """Until the file ``go`` is there; ``begun`` and ``cancelled`` tell how far it came."""
        Path(job.request["begun"]).touch()
        try:
            while not Path(job.request["go"]).exists():
                progress()
                time.sleep(0.01)
        except BaseException:
            Path(job.request["cancelled"]).touch()
            raise


if __name__ == "__main__":
    if len(sys.argv) > 2:
        app.trainer._CANCEL_S = float(sys.argv.pop(1))
    app.trainer.main(StandIn)
