"""Publish a run's checkpoint while it runs: a push that fails is said, and the run goes on."""

from __future__ import annotations

import logging
from pathlib import Path

from app import hub
from app.checkpoint import read_federation
from app.config import RunConfig
from app.model_card import write_model_card
from app.rounds import bounded, one_line

_log = logging.getLogger("flwr")


def publish(checkpoint: Path, directory: Path, run: str, config: RunConfig) -> None:
    """Push ``checkpoint`` of the run in ``directory`` where the config says, for at most its round-timeout."""
    number = read_federation(checkpoint)["round"]

    def push() -> str:
        return hub.push(
            checkpoint.resolve(),
            config.push_to,
            private=config.push_private,
            card=write_model_card(directory),
            message=f"Round {number} of run {run}",
        )

    try:
        url = bounded(push, config.round_timeout)
    except TimeoutError:
        _log.warning("round %d: the push took over %g s", number, config.round_timeout)
    except Exception as error:  # noqa: BLE001 - a failed push never fails the run
        _log.warning("round %d: not pushed: %s", number, one_line(error))
    else:
        _log.info("round %d/%d: pushed to %s", number, config.rounds, url)
