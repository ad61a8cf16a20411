"""A run's report as one HTML file: no scripts, nothing fetched, whatever the record holds is text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from hashlib import sha256

from app import anomalies, charts, tables
from app.series import Run

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
.pictures { display: grid; gap: 1.5rem; margin-top: 2rem; }
@media (min-width: 70rem) { .pictures { grid-template-columns: 1fr 1fr; } }
figure { margin: 0; }
figure img { width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid #ddd; padding: 0.2rem 0.7rem; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
.facts td { text-align: left; }
summary { cursor: pointer; }
"""

# A picture is an image of its own, so that nothing in it can reach the page; the page's style is
# allowed by its hash, and nothing else is.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{{ digest }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{%- macro table(content) %}
<div class="scroll"><table{% if not content.head %} class="facts"{% endif %}>
{%- if content.head %}
<thead><tr>{% for cell in content.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
{%- endif %}
<tbody>
{%- for row in content.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}
<h1>{{ title }}</h1>
{{- table(facts) }}
<div class="pictures">
{%- for caption, picture in pictures %}
<figure><img src="data:image/svg+xml;base64,{{ picture }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{%- endfor %}
</div>
<h2>Anomalies</h2>
{%- if anomalies %}
<ul>
{%- for one in anomalies %}
<li>{{ one.kind.value }}: {{ one.sentence }}</li>
{%- endfor %}
</ul>
{%- else %}
<p>None.</p>
{%- endif %}
{%- for content in sections if content.rows %}
<h2>{{ content.title }}</h2>
{{- table(content) }}
{%- endfor %}
<h2>Sites in each round</h2>
{%- for content in details %}
<details><summary>{{ content.title }}</summary>{{ table(content) }}</details>
{%- endfor %}
</body>
</html>
"""  # noqa: E501 - HTML


def render(run: Run, joints: Sequence[str], baseline: Run | None = None) -> str:
    """The page of ``run``, beside ``baseline`` where one is given."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    config, rounds = run
    pictures = (
        ("Held-out loss of each round's model; round 0 is the base model", charts.loss_chart(run, baseline)),
        ("Sites asked to train, by how they ended", charts.participation_chart(rounds)),
        ("Bytes of each round, over all sites", charts.bytes_chart(rounds)),
        ("Time of each round, by phase", charts.phase_chart(rounds)),
    )  # fmt: skip
    sections = (
        *((tables.comparison(run, baseline),) if baseline else ()),
        tables.site_table(run),
        tables.round_table(run),
        tables.joint_table(rounds, joints),
        tables.server_table(rounds),
        tables.settings_table(config),
    )
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    return page.render(
        title=f"vlafleet run {config['run']}",
        # Ours, and what the policy's hash is of: it must stay as it is.
        style=Markup(_STYLE),  # noqa: S704
        digest=base64.b64encode(sha256(_STYLE.encode()).digest()).decode(),
        facts=tables.facts(run),
        anomalies=anomalies.find(config, rounds),
        pictures=[(text, base64.b64encode(svg.encode()).decode()) for text, svg in pictures],
        sections=sections,
        details=[tables.round_details(record) for record in rounds],
    )
