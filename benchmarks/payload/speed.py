"""Bytes and processor seconds of one update of the real model in each codec; README.md says how to run it."""

import argparse
import json
import statistics
import sys
import time

from app import payload
from app.codec import CODECS
from app.payload import Payload
from benchmarks.payload.updates import Array, update
from benchmarks.shapes import SHAPES

HASH = "0" * 64


def write(tensors: dict[str, Array], codec: str) -> Payload:
    """Encode, gather and checksum an update, as a site does before it sends."""
    return payload.pack(
        tensors.items(), kind="update", codec=codec, base=HASH, target=None, frozen=HASH
    )


def read(text: str, flat: bytes) -> None:
    """Check an update and decode each tensor, as the SuperLink does when it combines."""
    for _ in payload.parse(text, flat, kind="update").items():
        pass


def main() -> None:
    """Alternate the codecs, print bytes, median seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7, help="measurements of each codec")
    options = parser.parse_args()
    tensors = {name: update(name, shape, 0, 0) for name, shape in SHAPES.items()}
    sizes: dict[str, tuple[int, int]] = {}
    seconds: dict[str, dict[str, list[float]]] = {
        leg: {codec: [] for codec in CODECS} for leg in ("write", "read")
    }
    for _ in range(options.repeat):
        for codec in CODECS:
            started = time.process_time()
            packed = write(tensors, codec)
            seconds["write"][codec].append(time.process_time() - started)
            records = payload.to_records(packed)
            text = str(records.config_records[payload.MANIFEST]["json"])
            sizes[codec] = payload.wire_bytes(records), len(text)
            started = time.process_time()
            read(text, packed.flat())
            seconds["read"][codec].append(time.process_time() - started)
    print("| codec | MB | of fp32 | write s | of fp32 | read s | of fp32 |")
    print("|---|---|---|---|---|---|---|")
    for codec, (flat, text_size) in sizes.items():
        cells = [codec, f"{(flat + text_size) / 1e6:.2f}", f"{flat / sizes['fp32'][0]:.3f}"]
        for leg in seconds.values():
            values = leg[codec]
            ratio = statistics.median(values) / statistics.median(leg["fp32"])
            cells.append(
                f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            )
            cells.append(f"{ratio:.2f}")
        print("| " + " | ".join(cells) + " |")
    print(json.dumps({"bytes": sizes, "seconds": seconds}), file=sys.stderr)


if __name__ == "__main__":
    main()
