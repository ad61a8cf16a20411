"""The charts' READMEs list every value, as ``values.yaml`` describes it."""

import re
import tarfile
from pathlib import Path

import pytest
import yaml

from k8s import readme
from tests.k8s.charts import CHARTS, ROOT, helm, render

FENCED = re.DOTALL | re.MULTILINE
VALUES = """\
# What this file is.

# The federation's name,
# a DNS label.
federation: ""
image:
  # Its tag | version, <x> or `<y>`.
  tag: null
  # Where it may run. For example:
  #   - key: nvidia.com/gpu
  #     operator: Exists
  # Empty: anywhere.
  tolerations: []

# How it is kept.
#
# It outlives the release.
persistence:
  # How much.
  size: 10Gi
# What it may use.
resources:
  limits:
    memory: 2Gi
    cpu: [1, 2]
"""
TABLE = """\
| value | default | what it is |
|---|---|---|
| `federation` | `""` | The federation's name, a DNS label. |
| `image.tag` | `null` | Its tag \\| version, &lt;x> or `<y>`. |
| `image.tolerations` | `[]` | Where it may run. For example:\
<br>`- key: nvidia.com/gpu`<br>`  operator: Exists`<br>Empty: anywhere. |
| `persistence` |  | How it is kept.<br><br>It outlives the release. |
| `persistence.size` | `"10Gi"` | How much. |
| `resources` | `{limits: {memory: 2Gi, cpu: [1, 2]}}` | What it may use. |
"""


def test_comments_become_a_table() -> None:
    assert readme.table(VALUES) == TABLE


@pytest.mark.parametrize(
    ("values", "silent"),
    [
        ("a: 1\n# That.\nb: 2\nc:\n  d: 3\n", "a, c.d"),
        # One line of these is described: the others have to be.
        ("# A map.\na:\n  # This.\n  b: 1\n  c: {}\n", "a.c"),
        # It stands apart, or elsewhere.
        ("# The file.\n\na: 1\n", "a"),
        ("a:\n# Of the margin.\n  b: 1 # trailing\n", "a.b"),
    ],
)
def test_a_value_without_a_comment_is_named(values: str, silent: str) -> None:
    with pytest.raises(ValueError, match=f"^no comment stands above {silent}$"):
        readme.table(values)


def test_a_readme_keeps_what_stands_above_its_table(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(VALUES)
    (tmp_path / "README.md").write_text("# Chart\n\nBy hand.\n\n## Values\n\nold\n")
    assert readme.readme(tmp_path) == f"# Chart\n\nBy hand.\n\n## Values\n\n{TABLE}"
    (tmp_path / "README.md").write_text("# Chart\n")
    with pytest.raises(ValueError, match="no line '## Values'"):
        readme.readme(tmp_path)


@pytest.mark.parametrize("chart", CHARTS)
def test_every_value_of_a_chart_is_described(chart: str) -> None:
    """The table is current, and no value of the chart is missing from it."""
    directory = ROOT / "k8s" / chart
    assert (directory / "README.md").read_text() == readme.readme(directory), "run 'make docs'"
    text = (directory / "values.yaml").read_text()
    listed = {value.path for value in readme.values(text)}
    for path in _leaves(yaml.safe_load(text)):
        parts = path.split(".")
        assert listed & {".".join(parts[:end]) for end in range(1, len(parts) + 1)}, path


GUIDES = ("docs/kubernetes.md", "k8s/superlink/README.md", "k8s/site/README.md")
FILES = {"federation.yaml": "superlink", "lab-7.yaml": "site"}


@pytest.mark.parametrize("guide", GUIDES)
def test_the_values_of_a_guide_are_a_charts(guide: str) -> None:
    """A file of values renders; what a guide shows of it later on stands in place of what it had before."""
    blocks = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", (ROOT / guide).read_text(), FENCED)
    assert blocks
    first: dict[str, dict[str, object]] = {}
    for file, text in blocks:
        values = first.setdefault(file, yaml.safe_load(text)) | yaml.safe_load(text)
        assert render(FILES[file], values), text


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("k8s/*/README.md")]
    lost = []
    for page in pages:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" not in link and not (
                target.exists() and (not anchor or anchor in _anchors(target))
            ):
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert pages
    assert lost == []


def test_the_archives_of_the_charts_hold_what_their_links_point_to(tmp_path: Path) -> None:
    for chart in CHARTS:
        done = helm("package", f"k8s/{chart}", "--destination", str(tmp_path))
        assert done.returncode == 0, done.stderr
        (archive,) = tmp_path.glob(f"{chart}-*.tgz")
        directory = ROOT / "k8s" / chart
        links = [file for file in directory.rglob("*") if file.is_symlink()]
        assert links
        with tarfile.open(archive) as opened:
            packed = {member.name: member for member in opened}
            assert all(member.isfile() for member in packed.values())
            for link in links:
                for file in [link] if link.is_file() else sorted(link.iterdir()):
                    held = opened.extractfile(f"{chart}/{file.relative_to(directory)}")
                    assert held is not None
                    assert held.read() == file.read_bytes(), file


def _anchors(page: Path) -> set[str]:
    """Return what a page's headings are linked by."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=FENCED)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _leaves(values: object, path: str = "") -> list[str]:
    if not isinstance(values, dict) or not values:
        return [path]
    return [
        leaf
        for key, value in values.items()
        for leaf in _leaves(value, f"{path}.{key}" if path else str(key))
    ]
