"""The model card of a run, from its record alone: what the Hugging Face Hub shows beside the weights.

It names no directory of any machine, and says of what was not measured that it was not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.config import RunConfig
from app.hub import is_repository
from app.run_directory import read_run, readable, write_text
from app.series import (
    COMPLETED,
    EARLY_STOPPING,
    Record,
    Run,
    Series,
    best,
    committed,
    losses,
    mean_losses,
    results,
    sites,
)
from app.tables import ALL, percent
from app.trainables import ALPHA

CARD = "model_card.md"
_MISSING = "not measured"
# What shaped the model. An allow-list: other keys hold paths and names of this machine and its owner.
_SETTINGS = (
    *("rounds", "seed", "sites-per-round", "over-sampling", "quorum", "local-steps", "batch-size"),
    *("exchange", "lora-rank", "image-augmentation"),
    *("held-out", "proximal-mu", "dynamic-mu", "reset-optimizer", "learning-rate", "warmup-steps"),
    *("schedule", "min-learning-rate", "cycle-rounds", "plateau-rounds", "plateau-factor"),
    *("hard-site-boost", "spike-factor", "patience", "codec", "strategy", "server-learning-rate"),
    *("server-momentum", "server-beta2", "server-tau", "robust", "trim", "norm-bound"),
    "eval-batches",
)
# What Markdown and HTML would take for their own.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&])")

_TEMPLATE = """\
---
{{ front_matter }}
---

# SmolVLA, trained by {{ names|length }} robot site{{ "" if names|length == 1 else "s" }} together

A [SmolVLA](https://arxiv.org/abs/2506.01844) policy for SO-100/SO-101 arms, fine-tuned by federated learning with
vlafleet: each site trained on its own machine and sent updates of the weights; no frame left a site. This card was
written from the record of run {{ run|text }}. `federation.json` beside the weights names the round they are of.

## Training data

- Sites: {{ names|length }}
- Episodes: {{ data.train_episodes|count }} trained on, {{ data.held_out_episodes|count }} held out
- Frames: {{ data.train_frames|count }} trained on, {{ data.held_out_frames|count }} held out
{% for name, values in facts if values -%}
- {{ name }}: {% for value in values %}{{ value|text }}{{ "" if loop.last else ", " }}{% endfor %}
{% endfor %}
## Training

- Rounds: {{ committed }} of {{ settings.rounds }} committed{{ ", then early stopping ended the run" if early }}
- Sites whose updates are in the model: {{ contributed }} of {{ names|length }}
- Trained: {{ values|count }} values {% if settings.exchange == "lora" -%}
of low-rank adapters ([LoRA](https://arxiv.org/abs/2106.09685)), merged into the weights; all else stayed
  frozen. `adapters.safetensors` holds them alone, under peft's names (rank {{ settings.lora_rank }}, alpha {{ alpha }})
{%- else %}outside the VLM, which stayed frozen{% endif %}
- Base model: {% if base %}[{{ base }}](https://huggingface.co/{{ base }}){% else %}not on the Hub{% endif %}

| setting | value |
|---|---|
{% for key, value in rows -%}
| `{{ key }}` | {{ value }} |
{% endfor %}
## Held-out loss

The flow-matching loss on each site's held-out episodes, computed at the site with fixed noise, so that the same
weights give the same number and rounds compare. Round 0 is the base model.

| |{% for column in columns %} {{ column }} |{% endfor %} change |
|---|{% for column in columns %}---:|{% endfor %}---:|
{% for name, cells in loss_rows -%}
| {{ name|text }} |{% for cell in cells %} {{ cell }} |{% endfor %}
{% endfor %}
Root mean square error of the predicted actions over all sites, in degrees (gripper: 0 to 100):

| |{% for column in columns %} {{ column }} |{% endfor %}
|---|{% for column in columns %}---:|{% endfor %}
{% for name, cells in joint_rows -%}
| {{ name|text }} |{% for cell in cells %} {{ cell }} |{% endfor %}
{% endfor %}
{%- if server_rows %}
Loss on datasets that no site trained on:

| |{% for column in columns %} {{ column }} |{% endfor %}
|---|{% for column in columns %}---:|{% endfor %}
{% for name, cells in server_rows -%}
| {{ name|text }} |{% for cell in cells %} {{ cell }} |{% endfor %}
{% endfor %}
{%- endif %}
## Limits

- It was not evaluated on a real robot. The losses above say how closely it follows recorded actions, not how often
  it completes a task.
{%- if not server_rows %}
- It was not measured on a dataset that no site trained on: the held-out episodes are of the same sites.
{%- endif %}
{%- if tiny %}
- The base model is vlafleet's tiny stand-in with random weights: this policy is for trying out a federation and cannot
  move a robot.
{%- endif %}
- It expects six joints in degrees (gripper: 0 to 100) and the cameras, frame rate and tasks above.
- Federated learning kept the frames at the sites, and that is no formal guarantee of privacy: differential privacy was
  not used, and weights can tell about the data they were trained on.

## How to load it

With [LeRobot](https://github.com/huggingface/lerobot) 0.6.1 (`pip install "lerobot[smolvla]"`):

```python
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

name = "{{ repository }}"
policy = SmolVLAPolicy.from_pretrained(name, strict=True)
preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=name)
```

`postprocess(policy.select_action(preprocess(observation)))` takes `observation.state`, one `observation.images.CAMERA`
for each camera above, and `task`, and gives the next action. The processors carry the normalisation statistics,
pooled over all sites.
{%- if not base %}

The base model is not on the Hub: `vlm_model_name` in `config.json` and `tokenizer_name` in
`policy_preprocessor.json` have to name the directory with the configuration and the tokenizer of its VLM first.
{%- endif %}
"""


def write_model_card(directory: Path) -> Path:
    """Write ``model_card.md`` into a run's directory; returns its path.

    Raises RunFailedError where the record is damaged and StorageError where the card cannot be written.
    """
    run = read_run(directory)
    with readable(directory):
        text = _render(run)
    return write_text(directory / CARD, text)


def _render(run: Run) -> str:
    from jinja2 import Environment, StrictUndefined

    from app.dataset_meta import JOINTS

    config, rounds = run
    settings = RunConfig.parse(config["config"])
    base, kept = _base(settings), _kept(run)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - Markdown: |text
    environment.filters |= {"text": _text, "count": "{:,}".format}
    return environment.from_string(_TEMPLATE).render(
        front_matter=_front_matter(config, base),
        names=sites(config),
        run=config["run"],
        data=_totals(config),
        facts=_facts(config),
        settings=settings,
        committed=committed(rounds),
        early=(config["ended"] or {}).get("reason") == EARLY_STOPPING,
        contributed=len(_contributed(rounds)),
        values=(config["model"] or {}).get("trainable_values", 0),
        alpha=ALPHA,
        base=base,
        rows=_settings(settings),
        columns=[label for label, _ in kept],
        loss_rows=_loss_rows(run, [index for _, index in kept]),
        joint_rows=_joint_rows(rounds, [index for _, index in kept], JOINTS),
        server_rows=_server_rows(rounds, [index for _, index in kept]),
        tiny=settings.model == "tiny",
        repository=settings.push_to if is_repository(settings.push_to) else "OWNER/NAME",
    )


def _front_matter(config: Record, base: str | None) -> str:
    """The metadata the Hub reads (https://huggingface.co/docs/hub/model-cards), as lerobot fills it in."""
    from huggingface_hub import ModelCardData

    card = ModelCardData(
        license="apache-2.0",
        library_name="lerobot",
        pipeline_tag="robotics",
        base_model=base,
        datasets=_hub_datasets(config) or None,
        tags=["robotics", "lerobot", "smolvla", "so101", "federated-learning", "vlafleet"],
    )
    return str(card.to_yaml()).rstrip()


def _base(settings: RunConfig) -> str | None:
    """The base model's name on the Hub; None for one that is on this machine alone."""
    if Path(settings.model).is_dir():
        return None
    name = settings.model.removeprefix("hf:")
    return name if is_repository(name) else None


def _hub_datasets(config: Record) -> list[str]:
    """Names of the sites' datasets that are on the Hub; others are the sites' own business."""
    uris = [str(about["dataset"]) for about in (config["sites"] or {}).values()]
    found = {uri.removeprefix("hf:").partition("#")[0] for uri in uris if uri.startswith("hf:")}
    return sorted(found)


def _totals(config: Record) -> dict[str, int]:
    keys = ("train_episodes", "train_frames", "held_out_episodes", "held_out_frames")
    return {key: sum(about[key] for about in (config["sites"] or {}).values()) for key in keys}


def _facts(config: Record) -> list[tuple[str, list[str]]]:
    abouts = (config["sites"] or {}).values()
    return [
        ("Cameras", sorted({camera for about in abouts for camera in about["cameras"]})),
        ("Frames per second", [str(fps) for fps in sorted({about["fps"] for about in abouts})]),
        ("Tasks", sorted({f'"{task}"' for about in abouts for task in about["tasks"]})),
        ("Datasets on the Hub", _hub_datasets(config)),
    ]


def _contributed(rounds: Sequence[Record]) -> set[str]:
    """The sites with an update in a round that was committed."""
    return {
        site
        for record in rounds
        if record["committed"]
        for site, kind, result in results(record)
        if kind == "train" and result["state"] == COMPLETED
    }


def _settings(settings: RunConfig) -> list[tuple[str, Any]]:
    """The settings that had an effect."""
    values = settings.as_dict()
    used = {
        field.name.replace("_", "-"): field.metadata["used"]
        for field in dataclasses.fields(settings)
    }
    return [(key, values[key]) for key in _SETTINGS if used[key] is None or used[key](settings)]


def _kept(run: Run) -> list[tuple[str, int]]:
    """The rounds the card shows: the base model, the best and the last with a model; label and index."""
    config, rounds = run
    indices = [index for index, record in enumerate(rounds) if record["checkpoint"]]
    lowest = best(config, rounds)
    label = {index: f"round {rounds[index]['round']}" for index in (*indices[:1], *indices[-1:])}
    if lowest:
        label[rounds.index(lowest)] = f"round {lowest['round']} (best)"
    return [(label[index], index) for index in sorted(label)]


def _loss_rows(run: Run, kept: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Each site, then all: the loss in the kept rounds and the last of them against the first."""

    def row(name: str, series: Series) -> tuple[str, list[str]]:
        shown = [series[index] for index in kept]
        first, last = (shown[0], shown[-1]) if len(shown) > 1 else (None, None)
        share = last / first - 1 if first and last is not None else None
        return name, [*map(_measured, shown), percent(share)]

    found = losses(*run)
    return [*(row(site, series) for site, series in found.items()), row(ALL, mean_losses(*run))]


def _joint_rows(
    rounds: Sequence[Record], kept: Sequence[int], joints: Sequence[str]
) -> list[tuple[str, list[str]]]:
    errors = [rounds[index]["aggregate"]["rmse_deg"] for index in kept]
    return [
        (joint, [_measured(error[n] if error else None) for error in errors])
        for n, joint in enumerate(joints)
    ]


def _server_rows(rounds: Sequence[Record], kept: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Datasets on the SuperLink's side; one of a directory goes by its last part."""
    uris = sorted({uri for index in kept for uri in rounds[index]["server"]})
    return [
        (
            uri if uri.startswith("hf:") else Path(uri).name,
            [_measured(rounds[i]["server"].get(uri, {}).get("loss")) for i in kept],
        )
        for uri in uris
    ]


def _measured(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _text(value: object) -> str:
    """``value`` as Markdown that shows it as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))
