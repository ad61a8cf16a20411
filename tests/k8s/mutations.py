"""Faults to put into rendered objects, so that a check can be shown to see them."""

import copy
from dataclasses import dataclass
from typing import Any, Final

from tests.k8s.charts import Manifest


class _Missing:
    """In place of a value: the key is taken out."""

    def __repr__(self) -> str:
        return "GONE"


GONE: Final = _Missing()


@dataclass(frozen=True)
class Fault:
    """One change: of an object ("Kind/name"), at a path into it ("spec.ports.0.port"), to a value, or GONE.

    A list's element is a number or a name in it. A path that ends in ``+`` appends; an empty one is the object itself.
    """

    target: str
    path: str
    value: Any = GONE

    def put_into(self, manifests: list[Manifest]) -> list[Manifest]:
        """Return the objects with the fault; raise LookupError where there is nothing to change."""
        changed = copy.deepcopy(manifests)
        for index, manifest in enumerate(changed):
            if f"{manifest['kind']}/{manifest['metadata']['name']}" == self.target:
                if not self.path:
                    changed[index : index + 1] = [] if self.value is GONE else [self.value]
                else:
                    self._change(manifest)
                return changed
        raise LookupError(f"no object {self.target}")

    def _change(self, manifest: Manifest) -> None:
        *way, last = _steps(self.path)
        place: Any = manifest
        for step in way:
            place = place[_index(place, step)]
        if last == "+":
            place.append(self.value)
        elif self.value is GONE:
            del place[_index(place, last)]
        else:
            place[_index(place, last)] = self.value


def _index(place: Any, step: str) -> int | str:
    """Return the key of a map, or the index of the element with a number, a name or a mount path in a list."""
    if not isinstance(place, list):
        return step
    if step.isdigit():
        return int(step)
    return next(index for index, one in enumerate(place) if one["name"] == step)


def _steps(path: str) -> list[str]:
    """Return the keys of a path; one with a slash (nvidia.com/gpu, helm.sh/chart) keeps its dots."""
    keys = path.split(".")
    for index, key in enumerate(keys):
        if "/" in key:
            return [*keys[: index - 1], f"{keys[index - 1]}.{key}", *keys[index + 1 :]]
    return keys
