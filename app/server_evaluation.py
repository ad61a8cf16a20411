"""The round's model measured on the SuperLink's own datasets, which no site trains on.

It runs in a process of its own, ``python -m app.server_evaluation``, beside the sites' evaluation: the ServerApp stays
without torch, and neither a crash nor a slow dataset can hold up a run.
"""

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import tensorfile
from app.config import RunConfig
from app.dataset_meta import VECTORS
from certs.errors import FleetError, ModelError, first_line
from certs.parent import end_with_parent

if TYPE_CHECKING:
    from app.evaluation import EvalResult
    from app.frames import Frames

type Result = dict[str, Any]
"""``loss``, ``rmse_deg`` (six joints) and ``frames``, or null in each and why in ``reason``."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation under way; it ends with the thread that started it."""

    process: subprocess.Popen[bytes]
    uris: tuple[str, ...]

    def result(self, seconds: float) -> dict[str, Result]:
        """The result of each dataset, after at most ``seconds``; what is not done by then is ended."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
            code = self.process.returncode
            reason = (
                f"The evaluation ended early with exit code {code}: the ServerApp's log says why."
            )
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, _ = self.process.communicate()
            reason = f"The evaluation was not done within {seconds:g} s."
        results = {uri: _failed(reason) for uri in self.uris}
        # A process that was killed may leave half a line.
        for line in output.splitlines(keepends=True):
            if line.endswith(b"\n"):
                results.update(json.loads(line))
        return results


def start(checkpoint: Path, uris: Sequence[str], config: RunConfig) -> Evaluation:
    """Begin to evaluate a checkpoint, with its own statistics, on all episodes of these datasets.

    At most ``batch-size * eval-batches`` frames of each are looked at. Call it from a thread that outlives the result.
    """
    unique = tuple(dict.fromkeys(uris))
    process = subprocess.Popen(
        # -P: the code is the installed one, whatever lies in the working directory.
        [sys.executable, "-P", "-m", "app.server_evaluation",
         str(checkpoint), json.dumps(config.as_dict()), *unique],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return Evaluation(process, unique)


def main() -> None:
    """Evaluate as the arguments say; one line of JSON on stdout for each dataset as soon as it is known."""
    end_with_parent(signal.SIGKILL)
    checkpoint, settings, *uris = sys.argv[1:]
    # What libraries print goes where they log.
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        for uri, result in _evaluate(Path(checkpoint), uris, RunConfig.parse(json.loads(settings))):
            print(json.dumps({uri: result}), file=results, flush=True)


def _evaluate(
    checkpoint: Path, uris: Sequence[str], config: RunConfig
) -> Iterator[tuple[str, Result]]:
    opened: dict[str, Frames] = {}
    # Before torch and lerobot, which take ten seconds: most mistakes are a wrong path.
    for uri in uris:
        try:
            opened[uri] = _open(uri, config)
        except FleetError as error:
            yield uri, _failed(str(error))
    if not opened:
        return
    try:
        policy, processors = _load(checkpoint, config)
    except FleetError as error:
        yield from ((uri, _failed(str(error))) for uri in opened)
        return
    from app.evaluation import evaluate

    for uri, frames in opened.items():
        try:
            result = evaluate(
                policy,
                processors,
                frames,
                batch_size=config.batch_size,
                batches=config.eval_batches,
                seed=config.seed,
            )
        except FleetError as error:
            yield uri, _failed(str(error))
        else:
            yield uri, _measured(result)


def _open(uri: str, config: RunConfig) -> "Frames":
    """The frames of all of the dataset's episodes: nobody trains on them."""
    from app.dataset import open_dataset
    from app.frames import Frames

    dataset = open_dataset(uri, held_out=config.held_out, seed=config.seed)
    return Frames(dataset, dataset.episodes)


def _load(checkpoint: Path, config: RunConfig) -> tuple[Any, Any]:
    """Policy and processors of a checkpoint. Raises ModelError."""
    statistics = _statistics(checkpoint)
    # A page of tracebacks where FFmpeg's libraries are missing; PyAV decodes and brings its own.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    import torch

    from app.policy import load_policy, load_processors

    torch.set_num_threads(config.threads)
    policy = load_policy(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    return policy, load_processors(checkpoint, policy, statistics)


def _statistics(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each key, as the checkpoint's own preprocessor holds them."""
    path = checkpoint / "policy_preprocessor.json"
    try:
        (state,) = (
            step["state_file"]
            for step in json.loads(path.read_text())["steps"]
            if step["registry_name"] == "normalizer_processor"
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{path} does not name the statistics ({first_line(error)}): give the directory of a checkpoint."
        ) from error
    names = {(key, kind): f"{key}.{kind}" for key in VECTORS for kind in ("mean", "std")}
    found = tensorfile.read(checkpoint / state, names.values())
    return {key: {kind: found[names[key, kind]] for kind in ("mean", "std")} for key in VECTORS}


def _measured(result: "EvalResult") -> Result:
    if not math.isfinite(result.loss) or not all(map(math.isfinite, result.rmse_deg)):
        return _failed("The model's loss or error is not finite.")
    return {
        "loss": result.loss,
        "rmse_deg": result.rmse_deg,
        "frames": result.frames,
        "reason": None,
    }


def _failed(reason: str) -> Result:
    return {"loss": None, "rmse_deg": None, "frames": None, "reason": reason}


if __name__ == "__main__":
    main()
