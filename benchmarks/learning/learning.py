"""Does the federation learn: its held-out loss beside round 0's and that of sites trained alone, in each codec.

In one process: Flower's are left out, the ServerApp and the ClientApp are not. README.md says how to run it.
"""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from app import client_app, dataset, rounds, schedule, server_app, statistics
from app.config import RunConfig, home, models_directory
from app.dataset import SiteDataset
from app.exchange import Exchange
from app.journal import read_config, read_rounds, runs_root
from app.policy import (
    frozen_hash,
    load_policy,
    load_processors,
    resolve_model,
    trainable_tensors,
)
from benchmarks.learning.table import show

SITES = ("site-a", "site-b")
# Round 0, the federation in three codecs, and each site by itself.
MODELS = ("base", "int8", "fp32", "alone", "int4")

type Result = dict[str, Any]


@dataclass
class Node:
    node_id: int
    name: str


@dataclass
class Sites:
    """Flower's Grid without its processes: each message goes to the ClientApp at once."""

    contexts: list[Context]
    replies: dict[str, Message] = field(default_factory=dict)

    def get_nodes(self) -> list[Node]:
        return [Node(n, str(c.node_config["site"])) for n, c in enumerate(self.contexts)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._answer(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies[message_id] for message_id in message_ids]

    def _answer(self, message: Message) -> str:
        message_id = message.metadata.__dict__["_message_id"] = f"m{len(self.replies)}"
        where = self.contexts[message.metadata.dst_node_id]
        self.replies[message_id] = client_app.app(message, where)
        return message_id


class Trial:
    """Everything that one seed compares: one split, one normalisation, the same held-out frames and noise for all."""

    def __init__(self, config: RunConfig, uris: Mapping[str, str], split: int) -> None:
        self.config, self._uris, self._split = config, uris, split
        self._base = resolve_model(config.model, models_directory())
        self._sites: dict[str, SiteDataset] = {
            name: dataset.open_dataset(uri, held_out=config.held_out, seed=split)
            for name, uri in uris.items()
        }
        # The loss is in normalised units: with a site's own statistics it would not compare with the federation's.
        self._moments = statistics.merge(map(statistics.moments_of, self._sites.values()))

    def base(self) -> list[Result]:
        """Round 0."""
        return self._evaluate(self._base)

    def federated(self, codec: str) -> list[Result]:
        """A run of the ServerApp with both sites."""
        run = RunConfig.parse({**self.config.as_dict(), "codec": codec})
        node = {"device": "cpu"}
        grid = Sites(
            [
                Context(1, 1, {**node, "site": s, "dataset": u}, RecordDict(), run.as_dict())
                for s, u in self._uris.items()
            ]
        )
        name = f"{codec}-{self._split}-{run.seed}"
        server_app.Run(grid, name, run).execute()  # type: ignore[arg-type]
        directory = runs_root() / name
        assert read_config(directory)["statistics"] == json.loads(
            statistics.to_bytes(self._moments)
        )
        assert not any(record["degraded"] for record in read_rounds(directory))
        return self._evaluate(directory / "checkpoints" / "latest")

    def alone(self) -> dict[str, list[Result]]:
        """Each site trained by itself for as many steps as it takes in the federation; and the mean of the weights."""
        import torch

        from app.training import train

        run, found, weights = self.config, {}, []
        for name, site in self._sites.items():
            policy = load_policy(self._base, "cpu")
            train(
                policy,
                self._loader(policy, site),
                steps=run.rounds * run.local_steps,
                batch_size=run.batch_size,
                learning_rate=partial(schedule.learning_rate, run),
                seed=run.seed,
                global_step=0,
                progress=lambda *_: None,
            )
            found[f"alone {name}"] = self._evaluate(self._base, policy)
            weights.append(trainable_tensors(policy))
        for name, parameter in trainable_tensors(policy).items():
            parameter.data = torch.stack([w[name].data for w in weights]).mean(dim=0)
        return {**found, "alone, weights averaged": self._evaluate(self._base, policy)}

    def _loader(self, policy: Any, site: SiteDataset) -> Any:
        """A site's training frames, as its trainer has them."""
        from app.frames import Frames
        from app.loader import Loader
        from app.prefix_cache import PrefixCache

        frames, processors = Frames(site, site.train_episodes), self._processors(policy)
        cache = PrefixCache.open(
            policy,
            processors,
            frames,
            range(len(frames)),
            choice="auto",
            frozen=frozen_hash(self._base),
            folder=home() / "cache",
            progress=lambda *_: None,
        )
        return Loader(policy, processors, frames, cache)

    def _evaluate(self, model: Path, policy: Any = None) -> list[Result]:
        """Every held-out frame of every site."""
        from app.evaluation import evaluate
        from app.frames import Frames

        policy = policy or load_policy(model, "cpu")
        processors = self._processors(policy)
        found = []
        for name, site in self._sites.items():
            frames = Frames(site, site.held_out_episodes)
            result = evaluate(
                policy,
                processors,
                frames,
                batch_size=self.config.batch_size,
                batches=-(-len(frames) // self.config.batch_size),
                seed=self._split,
            )
            found.append({"site": name, **vars(result)})
        return found

    def _processors(self, policy: Any) -> Any:
        return load_processors(self._base, policy, statistics.normalisation(self._moments))


@contextmanager
def one_process(split: int) -> Iterator[None]:
    """What Flower sets in its processes, a split of its own, and state in a temporary directory."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # Replies are there at once.
    for function in (rounds.wait_for_sites, Exchange.__init__):
        assert function.__kwdefaults__
        function.__kwdefaults__["poll_s"] = 0.02
    opened = dataset.open_dataset

    def fixed(uri: str, *, held_out: float, seed: int) -> SiteDataset:  # noqa: ARG001
        return opened(uri, held_out=held_out, seed=split)

    dataset.open_dataset = fixed
    try:
        with tempfile.TemporaryDirectory() as place:
            os.environ |= {"VLAFLEET_HOME": f"{place}/home", "VLAFLEET_RUNS": f"{place}/runs"}
            yield
    finally:
        dataset.open_dataset = opened


def main() -> None:
    """Append a line per model and held-out site to the results, then print their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--split", type=int, help="hold out the same episodes whatever the seed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=RunConfig().learning_rate)
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--results", type=Path, default=Path("runs/learning.jsonl"))
    options = parser.parse_args()
    setting = {key: getattr(options, key) for key in ("rounds", "local_steps", "learning_rate")}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        split = seed if options.split is None else options.split

        def keep(model: str, found: list[Result], seed: int = seed, split: int = split) -> None:
            with options.results.open("a") as file:
                for result in found:
                    line = {**setting, "seed": seed, "split": split, "model": model, **result}
                    file.write(json.dumps(line) + "\n")

        with one_process(split):
            # The run's own evaluation steers nothing here, so a batch will do.
            config = RunConfig(seed=seed, eval_batches=1, **setting)
            uris = {name: str(options.data / name) for name in SITES}
            trial = Trial(config, uris, split)
            for model in options.models:
                if model == "base":
                    keep("round 0", trial.base())
                elif model == "alone":
                    for name, found in trial.alone().items():
                        keep(name, found)
                else:
                    keep(model, trial.federated(model))
    lines = map(json.loads, options.results.read_text().splitlines())
    show([line for line in lines if setting.items() <= line.items()])


if __name__ == "__main__":
    main()
