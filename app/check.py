"""What ``vlafleet data check`` finds: whether a dataset is fit, its numbers, and what a run would take on it here."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from app.config import RunConfig
from app.dataset import SiteDataset, open_dataset
from app.preflight import check
from certs.errors import ConfigError, DatasetError, FleetError, first_line

_log = logging.getLogger("vlafleet.data")


def settings(run_config: Sequence[str], given: Mapping[str, float | None]) -> RunConfig:
    """The run config of ``'key=value key=value'`` overrides and of the options that were ``given``.

    Raises ConfigError.
    """
    overrides: dict[str, Any] = {}
    if run_config:
        import typer
        from flwr.common.config import parse_config_args

        try:
            overrides = dict(parse_config_args(list(run_config)))
        except (ValueError, OSError, typer.Exit) as error:
            raise ConfigError(
                f"the run config cannot be read ({first_line(error)}): write 'key=value key=value'"
            ) from error
    return RunConfig.parse(
        overrides | {key: value for key, value in given.items() if value is not None}
    )


def findings_of(uri: str, config: RunConfig) -> tuple[SiteDataset, list[str]]:
    """The dataset, and one sentence for each thing that makes it unfit. Raises DatasetError for what is no dataset."""
    dataset = open_dataset(uri, held_out=config.held_out, seed=config.seed)
    return dataset, check(dataset)


def summary(dataset: SiteDataset) -> dict[str, Any]:
    """A dataset in numbers; ``bytes`` are those of the chosen episodes' files."""
    files = dataset.meta.files(dataset.episodes)
    return {
        "episodes": len(dataset.episodes),
        "held_out_episodes": len(dataset.held_out_episodes),
        "frames": dataset.frames(dataset.episodes),
        "fps": dataset.fps,
        "cameras": [camera.rsplit(".", 1)[-1] for camera in dataset.cameras],
        "bytes": sum((dataset.root / file).stat().st_size for file in files),
    }


def report(
    uri: str, run_config: Sequence[str], given: Mapping[str, float | None], device: str
) -> dict[str, Any]:
    """All of it as JSON values; an expected failure is a finding, and its class's exit code in ``exit_code``.

    ``estimate`` is None for a dataset that is not fit, and where the model is not on this machine.
    """
    findings, code, numbers, estimated = list[str](), 0, None, None
    try:
        config = settings(run_config, given)
        dataset, findings = findings_of(uri, config)
        numbers = summary(dataset)
        if findings:
            code = DatasetError.exit_code
        else:
            estimated = _estimate(dataset, config, device)
    except FleetError as error:
        findings, code = [str(error)], error.exit_code
    return {
        "uri": uri,
        "fit": not findings,
        "findings": findings,
        "exit_code": code,
        "dataset": numbers,
        "estimate": estimated,
    }


def _estimate(dataset: SiteDataset, config: RunConfig, device: str) -> dict[str, Any] | None:
    from app.estimate import estimate

    try:
        return asdict(estimate(dataset, config, device))
    except FleetError as error:
        # A model that the site has still to fetch says nothing against the dataset.
        _log.warning("no estimate: %s", error)
        return None
