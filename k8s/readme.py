"""Make the table of values in the charts' READMEs from the comments in ``values.yaml``: ``python -m k8s.readme``.

The lines of comment right above a key describe it; lines indented further are an example. What stands in a README above
its heading "Values" is written by hand.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

DIRECTORY: Final = Path(__file__).parent
CHARTS: Final = ("superlink", "site")
HEADING: Final = "## Values\n"


@dataclass(frozen=True)
class Value:
    """A value of a chart: where it is (``superlink.image.tag``), its default as YAML, the lines of its comment.

    A map that introduces the values in it has no default of its own.
    """

    path: str
    default: str
    comment: tuple[str, ...]


def values(text: str) -> list[Value]:
    """Return the values of a ``values.yaml`` in its order; a map that is described as a whole is one.

    Raises ``ValueError`` that names every value without a comment.
    """
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("the values are not a map")
    found = list(_walk(root, text.splitlines(), ""))
    silent = [value.path for value in found if not value.comment]
    if silent:
        raise ValueError(f"no comment stands above {', '.join(silent)}")
    return found


def table(text: str) -> str:
    """Return the Markdown table of a ``values.yaml``."""
    return "| value | default | what it is |\n|---|---|---|\n" + "".join(
        f"| {_code(value.path)} | {_code(value.default)} | {_described(value.comment)} |\n"
        for value in values(text)
    )


def readme(chart: Path) -> str:
    """Return the README of the chart in a directory, with the table of its values as they are now."""
    path = chart / "README.md"
    above, heading, _ = path.read_text().partition(HEADING)
    if not heading:
        raise ValueError(f"{path} has no line {HEADING.strip()!r}")
    return f"{above}{heading}\n{table((chart / 'values.yaml').read_text())}"


def _walk(node: yaml.MappingNode, lines: list[str], path: str) -> Iterator[Value]:
    for key, value in node.value:
        here = f"{path}{key.value}"
        comment = _above(lines, key.start_mark.line, key.start_mark.column)
        inside: list[Value] = []
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            inside = list(_walk(value, lines, f"{here}."))
        if any(one.comment for one in inside) or (inside and not comment):
            if comment:
                yield Value(here, "", comment)
            yield from inside
        else:
            yield Value(here, _default(value), comment)


def _above(lines: list[str], number: int, column: int) -> tuple[str, ...]:
    """Return the lines of comment right above a line, at its indentation."""
    start = number
    while start and lines[start - 1].startswith(f"{' ' * column}#"):
        start -= 1
    return tuple(line[column + 1 :].removeprefix(" ").rstrip() for line in lines[start:number])


def _default(node: yaml.Node) -> str:
    value = yaml.SafeLoader("").construct_document(node)
    if not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=9999)).strip()


def _described(comment: tuple[str, ...]) -> str:
    """Return a comment as one line: sentences joined, paragraphs apart, an example's lines as code below each other."""
    text, broken = "", True
    for line in comment:
        example = line.startswith("  ")
        if example or not line:
            text += f"<br>{_code(line.removeprefix('  '))}"
        else:
            text += ("<br>" if broken and text else " " if text else "") + _escaped(line)
        broken = example or not line
    return text


def _escaped(line: str) -> str:
    """Return a line of Markdown whose ``|`` ends no cell and whose ``<`` outside of code begins no tag."""
    parts = line.replace("|", r"\|").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


if __name__ == "__main__":
    for name in CHARTS:
        (DIRECTORY / name / "README.md").write_text(readme(DIRECTORY / name))
