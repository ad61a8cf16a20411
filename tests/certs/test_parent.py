"""Processes that end with the one that started them."""

import subprocess
import sys
from pathlib import Path

# The shell ends at once and leaves two sleeps behind, one the child of the other's shell.
_LEAVES_ORPHANS = """
import subprocess
from certs.parent import adopt_orphans, end_children
adopt_orphans()
found = subprocess.run(
    ["sh", "-c", "sleep 300 >&2 & echo $!; sh -c 'sleep 300 >&2 & echo $!; exec >&2; wait' &"],
    stdout=subprocess.PIPE, text=True, check=True,
)
print(found.stdout, flush=True)
end_children()
"""


def test_orphans_end_with_the_command_they_came_of() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LEAVES_ORPHANS],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    orphans = [int(pid) for pid in done.stdout.split()]
    assert len(orphans) == 2
    assert not [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
