"""Memory a process needs for one update of the real model, through Flower's own messages; README.md says how to run it.

Sending and receiving run in a process of their own each. Between them lies a folder, one file for
each of Flower's objects, in place of the network.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.task_identity import TaskIdentity

from app import payload
from app.codec import CODECS
from benchmarks.payload.updates import Array, update
from benchmarks.shapes import SHAPES, VALUES

HASH = "0" * 64
# What the decoded update takes, and the most that a process may need for it.
DECODED = 4 * VALUES
LIMIT = 2.5


def tensors() -> Iterator[tuple[str, Array]]:
    """The update, a tensor at a time."""
    for name, shape in SHAPES.items():
        yield name, update(name, shape, 0, 0)


def send(folder: Path, codec: str) -> None:
    """What a site does after training: encode with error feedback, pack, and hand Flower the message."""
    parts = (
        (name, array.shape, payload.encode_feedback(array, None, codec)[0])
        for name, array in tensors()
    )
    packed = payload.pack_encoded(
        parts, kind="update", codec=codec, base=HASH, target=None, frozen=HASH
    )
    # What Flower sets in a ClientApp's process.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(payload.to_records(packed), dst_node_id=1, message_type="train")

    def push(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)

    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        (folder / "order.json").write_text(json.dumps(list(objects)))
        push_objects(objects, push)


def receive(folder: Path) -> None:
    """What the SuperLink does with a reply: take it from Flower, check it, and decode each tensor."""
    order = json.loads((folder / "order.json").read_text())
    contents = pull_objects(order, lambda name: (folder / name).read_bytes())
    message = inflate_object_from_contents(order[-1], contents)
    assert isinstance(message, Message)
    assert isinstance(message.content, RecordDict)
    update_ = payload.from_records(message.content, kind="update")
    payload.check_tensors(update_.shapes, SHAPES)
    update_.write(folder / "update")
    squares = sum(float(np.vdot(array, array)) for _, array in update_.items())
    assert squares > 0


def memory(field: str) -> int:
    """Bytes this process holds (VmRSS), or has held at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel names no {field}")


def grown(leg: str, folder: Path, codec: str) -> None:
    """Print the bytes by which this process grew, at most, while it did ``leg``."""
    # What is imported on first use would count as the update's.
    payload.to_records(
        payload.pack([], kind="update", codec=codec, base=HASH, target=None, frozen=HASH)
    )
    before = memory("VmRSS")
    if leg == "send":
        send(folder, codec)
    else:
        receive(folder)
    print(memory("VmHWM") - before)


def measure(leg: str, folder: str, codec: str) -> float:
    """The growth of a fresh process, in decoded updates."""
    command = [sys.executable, "-m", "benchmarks.payload.memory", "--leg", leg]
    command += ["--folder", folder, "--codec", codec]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout) / DECODED


def main() -> None:
    """Print the peak of both legs in each codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each codec")
    # Given to the processes that are measured.
    for name in ("--leg", "--folder", "--codec"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.leg:
        grown(options.leg, Path(options.folder), options.codec)
        return
    peaks: dict[tuple[str, str], list[float]] = {
        (codec, leg): [] for codec in CODECS for leg in ("send", "receive")
    }
    for _ in range(options.repeat):
        for codec in CODECS:
            with tempfile.TemporaryDirectory() as folder:
                for leg in ("send", "receive"):
                    peaks[codec, leg].append(measure(leg, folder, codec))
    print("| codec | sending MB | of decoded | receiving MB | of decoded |")
    print("|---|---|---|---|---|")
    for codec in CODECS:
        sending, receiving = max(peaks[codec, "send"]), max(peaks[codec, "receive"])
        print(
            f"| {codec} | {sending * DECODED / 1e6:.0f} | {sending:.2f} | "
            f"{receiving * DECODED / 1e6:.0f} | {receiving:.2f} |"
        )
        if codec in {"int8", "int4"}:
            assert max(sending, receiving) < LIMIT
    print(json.dumps({" ".join(key): values for key, values in peaks.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
