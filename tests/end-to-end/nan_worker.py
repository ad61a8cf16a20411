"""Stands in for ``app.worker`` in one site's trainer: the real one, but for a single update whose first value is NaN.

The update to spoil is the next one after the file ``VLAFLEET_TEST_NAN`` has appeared, which is then gone.
"""

import importlib.util
import os
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

import app
from app.job import Answer, Job, Progress
from app.payload import Payload

_spec = importlib.util.spec_from_file_location(
    "app.real_worker", Path(app.__path__[0]) / "worker.py"
)
assert _spec
assert _spec.loader
_real = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_real)


class Worker(_real.Worker):  # type: ignore[misc, name-defined]  # mypy does not know a module made here
    """The real worker."""

    def handle(self, job: Job, progress: Progress) -> Answer:
        """Do the job; spoil what goes up when that is wanted."""
        answer: Answer = super().handle(job, progress)
        wanted = Path(os.environ["VLAFLEET_TEST_NAN"])
        if answer.payload is None or not wanted.exists():
            return answer
        wanted.unlink()
        return replace(answer, payload=spoilt(answer.payload))


def spoilt(update: Payload) -> Payload:
    """The update with NaN where its first tensor's bytes begin: a value, or an int8 row's scale."""
    data = np.array([np.nan], "<f4").tobytes() + update.flat()[4:]
    return replace(update, sha256=sha256(data).hexdigest(), _source=data)
