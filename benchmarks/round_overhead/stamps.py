"""When a job's first step began and its last one ended, written to a file: the process with the worker says so."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app import evaluation, training

# The file that a job's stamps go to.
FILE = "ROUND_OVERHEAD_STAMPS"

type Function = Callable[..., Any]


def install() -> None:
    """Let training and evaluation note their stamps: seconds of the clock that all processes share."""
    setattr(training, "train", _train(training.train))  # noqa: B010 - another type to mypy
    setattr(evaluation, "evaluate", _evaluate(evaluation.evaluate))  # noqa: B010


def _train(train: Function) -> Function:
    def stamped(policy: Any, loader: Any, **options: Any) -> Any:
        stamps: list[float] = []

        def note(call: Function) -> Function:
            def noted(*arguments: Any) -> Any:
                stamps.append(time.monotonic())
                return call(*arguments)

            return noted

        # The rate is asked for at the beginning of each step, and the end of the last one is told.
        watched = {name: note(options[name]) for name in ("learning_rate", "progress")}
        result = train(policy, loader, **{**options, **watched})
        _write(stamps[0], stamps[-1])
        return result

    return stamped


def _evaluate(evaluate: Function) -> Function:
    def stamped(*arguments: Any, **options: Any) -> Any:
        first = time.monotonic()
        result = evaluate(*arguments, **options)
        _write(first, time.monotonic())
        return result

    return stamped


def _write(first: float, last: float) -> None:
    Path(os.environ[FILE]).write_text(json.dumps([first, last]))
