"""The updates of a round alone, without Flower: processor seconds to check and keep each, and to combine them."""

import argparse
import json
import sys
import time
from pathlib import Path

from app.aggregation import Updates
from app.payload import Payload


def main() -> None:
    """Add every update in turn until there are enough sites, then combine them; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("updates", nargs="+", type=Path)
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--robust", required=True)
    options = parser.parse_args()
    updates = [Payload.open(path) for path in options.updates]
    first = updates[0]
    started = time.process_time()
    with Updates(
        options.folder, first.shapes, base_hash=str(first.base), frozen_hash=first.frozen
    ) as kept:
        for site in range(options.sites):
            kept.add(f"site-{site:02d}", updates[site % len(updates)], 3000 + site)
        added = time.process_time()
        for name in first.shapes:
            kept.mean(name, robust=options.robust)
        combined = time.process_time()
    json.dump({"add": added - started, "combine": combined - added}, sys.stdout)


if __name__ == "__main__":
    main()
