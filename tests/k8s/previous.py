"""What the released versions of the charts rendered: upgrades from them are held to lose nothing.

    python -m tests.k8s.previous      # when a version is released: writes its files, once

A file holds the values that were given and the objects that came of them; it is never written again.
"""

from pathlib import Path
from typing import Any, Final

import yaml

from tests.k8s.charts import CHARTS, ROOT, Manifest, render
from tests.k8s.upgrades import COMPARED

DIRECTORY: Final = Path(__file__).parent / "previous"
# One of each way to come by certificates, and the executor, whose objects are in a second namespace.
SHOWN: Final = {
    "superlink": ("defaults", "existing-secrets"),
    "site": ("invitation", "existing", "executor"),
}


def releases(chart: str) -> list[Path]:
    """Return the files of a chart's released versions."""
    return sorted(DIRECTORY.glob(f"{chart}-*.yaml"))


def read(path: Path) -> tuple[dict[str, Any], list[Manifest]]:
    """Return the values of a released version's file, and what they rendered to."""
    values, *manifests = yaml.safe_load_all(path.read_text())
    return values, manifests


def write() -> None:
    """Write the files of the charts' present versions, where they are not there yet."""
    DIRECTORY.mkdir(exist_ok=True)
    for chart in CHARTS:
        directory = ROOT / "k8s" / chart
        version = yaml.safe_load((directory / "Chart.yaml").read_text())["version"]
        for name in SHOWN[chart]:
            path = DIRECTORY / f"{chart}-{version}-{name}.yaml"
            values = yaml.safe_load((directory / "ci" / f"{name}-values.yaml").read_text())
            compared = [one for one in render(chart, values) if one["kind"] in COMPARED]
            if not path.exists():
                path.write_text(yaml.safe_dump_all([values, *compared], width=120))


if __name__ == "__main__":
    write()
