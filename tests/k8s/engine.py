"""Docker as the tests of the charts use it: everything is labelled with the test's own id and removed by it."""

import ipaddress
import json
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """The Docker engine, for what carries one label."""

    identifier: str

    def __call__(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        check: bool = True,
        timeout: float = 180,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run docker; where ``check`` is set, a failure's message is in the assertion."""
        done = subprocess.run(
            ["docker", *arguments], input=stdin, capture_output=True, check=False, timeout=timeout
        )
        assert not check or done.returncode == 0, (
            f"docker {' '.join(arguments[:2])}: {done.stderr.decode()}{done.stdout.decode()}"
        )
        return done

    def output(self, *arguments: str, timeout: float = 180) -> str:
        """Return what a command printed that must succeed."""
        return self(*arguments, timeout=timeout).stdout.decode()

    def name(self, part: str) -> str:
        """Return the name of something of this test's."""
        return f"{self.identifier}-{part}"

    @property
    def label(self) -> tuple[str, str]:
        """The options that label what is made."""
        return "--label", f"vlafleet.test={self.identifier}"

    def free_block(self) -> ipaddress.IPv4Network:
        """Return a block of addresses, 256 subnets of eight, that no network of the engine's has."""
        every = self.output("network", "ls", "--quiet").split()
        taken = [
            ipaddress.ip_network(config["Subnet"])
            for network in json.loads(self.output("network", "inspect", *every))
            for config in network["IPAM"]["Config"] or []
        ]
        candidates = ipaddress.IPv4Network("10.192.0.0/10").subnets(new_prefix=21)
        return next(block for block in candidates if not any(map(block.overlaps, taken)))

    def leftovers(self) -> dict[str, list[str]]:
        """Return what carries the label: containers, volumes and networks."""
        chosen = "--quiet", "--filter", f"label=vlafleet.test={self.identifier}"
        return {
            "container": self.output("ps", "--all", *chosen).split(),
            "volume": self.output("volume", "ls", *chosen).split(),
            "network": self.output("network", "ls", *chosen).split(),
        }

    def clear(self) -> None:
        """Remove what carries the label."""
        for kind, names in self.leftovers().items():
            if names:
                force = () if kind == "network" else ("--force",)
                self(kind, "rm", *force, *names, check=False)
