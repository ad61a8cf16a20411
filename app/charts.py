"""The pictures of a run's report, as SVG: the same record gives the same bytes."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from app.series import Record, Run, Series, ends, losses, mean_losses, phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

# Ten colours that colour-blind readers tell apart (Petroff 2021, arXiv:2107.02270). More sites are
# drawn alike: ten of a hundred lines in colour would say nothing.
_COLOURS, _SITES = "petroff10", 10
_EACH, _MEAN = "#999999", "#000000"
# Inches; two pictures stand side by side on a page.
_SIZE = (6.4, 3.2)


def loss_chart(run: Run, baseline: Run | None = None) -> str:
    """Held-out loss of each site and their mean, the base model's as a level; ``baseline`` dashed."""
    names = sorted({*losses(*run), *(losses(*baseline) if baseline else ())})

    def draw(axes: Axes) -> None:
        _curves(axes, run, names, "-", "")
        if baseline:
            _curves(axes, baseline, names, "--", f", run {baseline[0]['run']}")
        base = mean_losses(*run)[:1]
        if base and base[0] is not None:
            axes.axhline(base[0], color=_MEAN, linewidth=0.8, linestyle=":", label="base model")
        axes.set_ylabel("held-out loss")
        # How far the loss is from 0 is part of the picture.
        axes.set_ylim(bottom=0)

    return _picture(draw)


def participation_chart(rounds: Sequence[Record]) -> str:
    """Sites asked to train in each round, by how they ended."""
    counts = ends(rounds)
    # Most frequent first: the rare ends lie on top, where they are seen.
    total = sum(counts, start=Counter[str]())
    heights = {state: [float(count[state]) for count in counts] for state, _ in total.most_common()}

    def draw(axes: Axes) -> None:
        _stacks(axes, rounds, heights)
        axes.set_ylabel("sites asked to train")
        axes.yaxis.set_major_locator(_whole_numbers())

    return _picture(draw)


def bytes_chart(rounds: Sequence[Record]) -> str:
    """Megabytes to and from all sites in each round."""

    def draw(axes: Axes) -> None:
        for shift, way, label in ((-0.2, "down", "to sites"), (0.2, "up", "from sites")):
            axes.bar(
                [record["round"] + shift for record in rounds],
                [record["bytes"][way] / 1e6 for record in rounds],
                width=0.4,
                label=label,
            )
        axes.set_ylabel("MB")

    return _picture(draw)


def phase_chart(rounds: Sequence[Record]) -> str:
    """Seconds of each phase in each round."""
    heights = {
        phase: [record["seconds"].get(phase) or 0.0 for record in rounds]
        for phase in phases(rounds)
    }

    def draw(axes: Axes) -> None:
        _stacks(axes, rounds, heights)
        axes.set_ylabel("seconds")

    return _picture(draw)


def _curves(axes: Axes, run: Run, names: Sequence[str], line: str, whose: str) -> None:
    from matplotlib import color_sequences

    numbers = [record["round"] for record in run[1]]
    alike = len(names) > _SITES
    for index, (site, series) in enumerate(losses(*run).items()):
        colour = _EACH if alike else color_sequences[_COLOURS][names.index(site)]
        label = ("" if index else f"each site{whose}") if alike else f"{site}{whose}"
        axes.plot(
            numbers,
            _gaps(series),
            line,
            color=colour,
            linewidth=1,
            marker=".",
            # matplotlib's word for none in the legend.
            label=label or "_nolegend_",
        )
    axes.plot(
        numbers,
        _gaps(mean_losses(*run)),
        line,
        color=_MEAN,
        linewidth=2,
        marker=".",
        label=f"all sites{whose}",
    )


def _stacks(axes: Axes, rounds: Sequence[Record], heights: Mapping[str, Sequence[float]]) -> None:
    numbers = [record["round"] for record in rounds]
    bottom = [0.0] * len(rounds)
    for label, values in heights.items():
        axes.bar(numbers, values, width=0.8, bottom=bottom, label=label)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]


def _gaps(series: Series) -> list[float]:
    """What was not measured is a gap in the line."""
    return [math.nan if value is None else value for value in series]


def _whole_numbers() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _picture(draw: Callable[[Axes], None]) -> str:
    """An SVG document of one pair of axes over rounds."""
    from cycler import cycler
    from matplotlib import color_sequences, rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        # In place of the random part of the names of elements.
        "svg.hashsalt": "vlafleet",
        # Text stays text, in a font of the reader's, and a dollar sign is no formula.
        "svg.fonttype": "none",
        "text.parse_math": False,
        "axes.prop_cycle": cycler(color=color_sequences[_COLOURS]),
    }
    with rc_context(settings):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[1]:
            # Beside the axes: inside, it would hide a curve.
            figure.legend(loc="outside right upper", frameon=False, fontsize="small")
        target = io.BytesIO()
        # Neither the time of day nor matplotlib's version.
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return target.getvalue().decode()
