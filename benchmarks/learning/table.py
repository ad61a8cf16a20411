"""The learning check's results as tables: a row for each model, a column for each seed."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from app.aggregation import mean_loss, mean_rmse

type Results = list[dict[str, Any]]

# How the models of sites trained alone are called, before the site.
ALONE = "alone "
# What names a difference of two models.
LESS = " less fp32"


def loss(results: Results) -> float:
    """Mean over held-out frames, in normalised units."""
    return mean_loss(results) or math.nan


def degrees(results: Results) -> float:
    """RMSE over the five arm joints and all held-out frames; the gripper's is in per cent."""
    joints = (mean_rmse(results) or [math.nan])[:5]
    return math.sqrt(statistics.fmean(joint**2 for joint in joints))


def rows(results: Results, measure: Callable[[Results], float]) -> dict[str, float]:
    """What one seed's models come to, on all sites' held-out frames where nothing else is said."""
    found: dict[str, float] = {}
    models = {line["model"]: line["model"].removeprefix(ALONE) for line in results}
    of = {model: [line for line in results if line["model"] == model] for model in models}
    alone = {model: site for model, site in models.items() if model != site}
    for model in models:
        found[model] = measure(of[model])
    for codec in ("int8", "int4"):
        if codec in found and "fp32" in found:
            found[codec + LESS] = found[codec] - found["fp32"]
    if alone:
        own = [line for model, site in alone.items() for line in of[model] if line["site"] == site]
        found["alone, mean"] = statistics.fmean(found[model] for model in alone)
        found["alone, each on its own frames"] = measure(own)
    return found


def show(results: Results) -> None:
    """Print a table for each measure; spread is the standard deviation over seeds."""
    trials = sorted({(line["seed"], line["split"]) for line in results})
    for what, measure in (("held-out loss", loss), ("RMSE, degrees", degrees)):
        seeds = [
            rows([line for line in results if (line["seed"], line["split"]) == trial], measure)
            for trial in trials
        ]
        heads = [
            f"seed {seed}" + ("" if seed == split else f", split {split}") for seed, split in trials
        ]
        print(f"| {what} | " + " | ".join(heads) + " | mean ± std |")
        print("|---|" + "---|" * (len(heads) + 1))
        for name in dict.fromkeys(name for found in seeds for name in found):
            values = [found[name] for found in seeds if name in found]
            # Codecs differ in the fifth place.
            digits = "+.5f" if LESS in name else ".3f"
            cells = [f"{found[name]:{digits}}" if name in found else "" for found in seeds]
            spread = f" ± {statistics.stdev(values):{digits.strip('+')}}" if values[1:] else ""
            mean = f"{statistics.fmean(values):{digits}}"
            print(f"| {name} | {' | '.join(cells)} | {mean}{spread} |")
        print()
