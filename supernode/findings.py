"""What a preflight found: one sentence each, with what to do about it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from certs import errors
from certs.errors import FleetError

Level = Literal["ok", "warning", "fail"]

_LEVELS: tuple[Level, ...] = ("ok", "warning", "fail")
_ERRORS = {
    each.exit_code: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, FleetError) and each is not FleetError
}
_MARKS: dict[Level, str] = {"ok": "✓", "warning": "!", "fail": "✗"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``name`` is stable, for programs. ``remedy`` is None when all is well. ``exit_code`` is that of the
    ``FleetError`` a ``fail`` stands for, 0 otherwise.
    """

    name: str
    level: Level
    sentence: str
    remedy: str | None = None
    exit_code: int = 0


def ok(name: str, sentence: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", sentence)


def warning(name: str, sentence: str, remedy: str) -> Finding:
    """The site works, but worse than it could, or was not looked at in full."""
    return Finding(name, "warning", sentence, remedy)


def fail(name: str, sentence: str, remedy: str, error: type[FleetError]) -> Finding:
    """The site would not work; ``error`` is what a command ends with."""
    return Finding(name, "fail", sentence, remedy, error.exit_code)


@dataclass(frozen=True)
class Report:
    """All findings of a site, and what ``vlafleet data check --json`` said of its dataset and of a round."""

    site: str
    findings: list[Finding]
    dataset: dict[str, Any] | None
    estimate: dict[str, Any] | None

    @property
    def level(self) -> Level:
        """The worst finding's."""
        return max((each.level for each in self.findings), key=_LEVELS.index, default="ok")

    @property
    def exit_code(self) -> int:
        """The first fail's, 0 without one."""
        return next((each.exit_code for each in self.findings if each.level == "fail"), 0)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "site": self.site,
            "level": self.level,
            "exit_code": self.exit_code,
            "findings": [asdict(each) for each in self.findings],
            "dataset": self.dataset,
            "estimate": self.estimate,
        }

    def text(self) -> str:
        """Return it for a terminal: a line a finding, its remedy below."""
        width = max((len(each.name) for each in self.findings), default=0)
        lines = []
        for each in self.findings:
            lines.append(f"{_MARKS[each.level]} {each.name:{width}}  {each.sentence}")
            if each.remedy is not None:
                lines.append(f"  {'':{width}}  → {each.remedy}")
        return "\n".join(lines)

    def require(self) -> None:
        """Raise the first fail's ``FleetError``."""
        for each in self.findings:
            if each.level == "fail":
                raise (error_of(each.exit_code) or FleetError)(_said(each))


def _said(finding: Finding) -> str:
    """Return sentence and remedy in one; the app's own sentences end with what to do, and a full stop."""
    if finding.remedy is None or finding.sentence.endswith("."):
        return finding.sentence
    return f"{finding.sentence}: {finding.remedy[0].lower()}{finding.remedy[1:]}"


def error_of(code: int) -> type[FleetError] | None:
    """Return the ``FleetError`` class with an exit code of its own, None when there is none."""
    return _ERRORS.get(code)


def size(count: float) -> str:
    """Return bytes for people: ``1.2 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return (
                f"{count / scale:.1f} {unit}"
                if count < 10 * scale
                else f"{count / scale:.0f} {unit}"
            )
    return f"{count:.0f} bytes"


def span(seconds: float) -> str:
    """Return a duration for people: ``35 ms``, ``4.2 s``, ``12 min``, ``3.5 h``, ``6.9 days``."""
    if seconds < 1:
        return f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f} ms"
    for unit, scale, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * scale:
            return f"{seconds / scale:.1f} {unit}".replace(".0 ", " ")
    return f"{seconds / 86400:.1f} days"
