"""Write the dashboards that Grafana is provisioned with.

In the repository's root: ``python -m docker.grafana.build``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from docker.grafana import federation, round_detail, runbook, security, site_detail

DASHBOARDS: Final = Path(__file__).parent / "dashboards"
_BUILDERS: Final = {
    "federation": federation.build,
    "round": round_detail.build,
    "site": site_detail.build,
    "security": security.build,
    "runbook": runbook.build,
}


def built() -> dict[str, str]:
    """Return every dashboard's file, by name."""
    return {
        f"{name}.json": json.dumps(
            build().build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False
        )
        + "\n"
        for name, build in _BUILDERS.items()
    }


def main() -> None:
    """Write the files, and take away those that nobody builds any more."""
    files = built()
    for path in DASHBOARDS.glob("*.json"):
        if path.name not in files:
            path.unlink()
    for name, text in files.items():
        (DASHBOARDS / name).write_text(text)


if __name__ == "__main__":
    main()
