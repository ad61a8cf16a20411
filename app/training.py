"""Local training at a site: lerobot's order of frames, loss and optimiser settings, for a given number of steps."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING

from app.loader import Batch, Loader, ahead, order
from app.manifest import PayloadError
from app.optimizer import OptimizerState, adamw, forget_incomplete, moments, pull
from app.policy import trainable_tensors
from certs.errors import ConfigError, RunFailedError, first_line

if TYPE_CHECKING:
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

type Progress = Callable[[int, float, float, float], None]
"""Told a step (from 1), its loss, and since it was last told: samples a second, and the share of the time spent waiting
for data. What it raises ends the training."""

# Seconds between two looks at the losses: each waits for the device, so a step should be short beside it.
_PROGRESS_S = 1.0

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class TrainResult:
    """What a site reports, and the optimiser's state for the next round.

    Frames drawn; mean and last loss without the proximal term; that term's mean over the steps, None without one; mean
    gradient norm before clipping; wall-clock seconds, and those of them spent waiting for data.
    """

    frames: int
    mean_loss: float
    last_loss: float
    proximal_loss: float | None
    grad_norm: float
    seconds: float
    waited: float
    optimizer_state: OptimizerState


def train(
    policy: "SmolVLAPolicy",
    loader: Loader,
    *,
    steps: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    seed: int,
    global_step: int,
    progress: Progress,
    micro_batch: int = 0,
    compiled: bool = False,
    proximal_mu: float = 0.0,
    optimizer_state: OptimizerState | None = None,
    deadline: float | None = None,
) -> TrainResult:
    """Take ``steps`` optimiser steps on the loader's frames; the policy's trainable tensors change in place.

    ``learning_rate`` is asked with the run's step, from ``global_step`` on, so a round does not warm up again. The
    order of frames and the flow-matching noise of a step are functions of ``seed`` and the run's step alone: with
    ``optimizer_state`` carried over, two rounds end in the same bits as one of twice the length. ``progress`` is told
    about once a second and after the last step: the device is not waited for in between.

    ``micro_batch`` frames are on the device at a time, 0 for the whole batch; the gradient is the batch's either way.
    ``compiled`` compiles the cached path as one graph. ``proximal_mu`` weighs FedProx's pull towards the weights at the
    start (Li et al. 2020, arXiv:1812.06127).

    Raises DatasetError for unreadable data, PayloadError ("finite") when the loss diverges, ConfigError when the step
    does not compile, RunFailedError when ``deadline`` (``time.monotonic``) passes before the last step or the device's
    memory is too small. The weights are then lost.
    """
    started = time.perf_counter()
    run = _Run(
        policy,
        loader,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        global_step=global_step,
        progress=progress,
        compiled=compiled,
        proximal_mu=proximal_mu,
        optimizer_state=optimizer_state,
        deadline=deadline,
    )
    policy.train()
    size = min(micro_batch or batch_size, batch_size)
    with _compiling() if compiled else nullcontext():
        if not run.finish(size):
            smaller = math.ceil(size / 2)
            if size > 1:
                _log.warning("%s: training goes on with %d", _no_room(loader.device, size), smaller)
            if size == 1 or not run.finish(smaller):
                raise RunFailedError(
                    f"{_no_room(loader.device, smaller)}: lower micro-batch or batch-size, or end what else uses it."
                )
    return run.result(time.perf_counter() - started)


@dataclass(frozen=True)
class _Part:
    """Frames of a step that are on the device together, their noise and times, and their share of the step's loss."""

    batch: Batch
    noise: "torch.Tensor"
    times: "torch.Tensor"
    share: float
    last: bool


class _Run:
    """Steps taken so far, and what they came to; ``train`` names the arguments."""

    def __init__(
        self,
        policy: "SmolVLAPolicy",
        loader: Loader,
        *,
        steps: int,
        batch_size: int,
        learning_rate: Callable[[int], float],
        seed: int,
        global_step: int,
        progress: Progress,
        compiled: bool,
        proximal_mu: float,
        optimizer_state: OptimizerState | None,
        deadline: float | None,
    ) -> None:
        self._policy, self._loader = policy, loader
        self._steps, self._batch_size, self._seed = steps, batch_size, seed
        self._learning_rate, self._global_step = learning_rate, global_step
        self._deadline = deadline
        self._flow_losses = _compiled_flow_losses() if compiled else _flow_losses()
        self._trainable = trainable_tensors(policy)
        self._parameters = list(self._trainable.values())
        self._preset = policy.config.get_optimizer_preset()
        self._optimizer = adamw(self._preset, self._trainable, optimizer_state)
        self._mu = proximal_mu
        self._anchors = [p.detach().clone() for p in self._parameters] if proximal_mu else []
        self._sizes: list[int] = []
        self._watch = _Watch(loader.device, steps, global_step, learning_rate, progress)

    def finish(self, micro_batch: int) -> bool:
        """Take the steps that are left; False when the device's memory is too small, before a step that is whole."""
        import torch

        parts = _parts(
            self._loader,
            self._batch_size,
            micro_batch,
            self._seed,
            range(self._global_step + len(self._sizes), self._global_step + self._steps),
        )
        with closing(ahead(parts, self._loader.device)) as made:
            while len(self._sizes) < self._steps:
                _require_time(self._deadline, len(self._sizes), self._steps)
                try:
                    self._step(made)
                except torch.OutOfMemoryError:
                    break
            else:
                return True
        # The error's frames are gone by now, and what they held with them.
        self._optimizer.zero_grad()
        forget_incomplete(self._optimizer)
        torch.cuda.empty_cache()
        return False

    def _step(self, parts: Iterator[_Part]) -> None:
        import torch

        number = self._global_step + len(self._sizes)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(number)
        device, size, waited = self._loader.device, 0, 0.0
        total = torch.zeros((), device=device)
        last = False
        while not last:
            asked = time.perf_counter()
            part = next(parts)
            waited += time.perf_counter() - asked
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = self._loss(part) * part.share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            size += len(part.batch.state)
            last = part.last
        term = pull(self._parameters, self._anchors, self._mu) if self._mu else total.new_zeros(())
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._preset.grad_clip_norm)
        # Before the step: after it, there is nothing left that could run out of memory and be done again.
        values = torch.stack([total, norm, term])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._sizes.append(size)
        self._watch.took(values, size, waited)

    def _loss(self, part: _Part) -> "torch.Tensor":
        """The part's mean loss over what lies within its episodes, as lerobot's ``forward`` has it."""
        batch = part.batch
        if batch.inputs is not None:
            loss: torch.Tensor = self._policy.forward(batch.inputs, part.noise, part.times)[0]
            return loss
        losses = self._flow_losses(
            self._policy, batch.prefix, batch.state, batch.actions, part.noise, part.times
        )
        joints = batch.actions.shape[-1]
        inside = losses[:, :, :joints] * ~batch.pad[..., None]
        return inside.sum() / (batch.valid * joints)

    def result(self, seconds: float) -> TrainResult:
        losses, norms, terms = self._watch.history()
        frames = sum(self._sizes)
        return TrainResult(
            frames=frames,
            mean_loss=math.fsum(loss * size for loss, size in zip(losses, self._sizes, strict=True))
            / frames,
            last_loss=losses[-1],
            proximal_loss=math.fsum(terms) / self._steps if self._mu else None,
            grad_norm=math.fsum(norms) / self._steps,
            seconds=seconds,
            waited=self._watch.waited,
            optimizer_state=moments(self._optimizer, self._trainable),
        )


class _Watch:
    """Losses and norms as they come, on the device; looked at when progress is due."""

    def __init__(
        self,
        device: "torch.device",
        steps: int,
        global_step: int,
        learning_rate: Callable[[int], float],
        progress: Progress,
    ) -> None:
        import torch

        self._values = torch.zeros(steps, 3, device=device)
        self._global_step, self._learning_rate = global_step, learning_rate
        self._progress = progress
        self._taken = self._seen = 0
        self._frames, self._waited, self._told = 0, 0.0, time.perf_counter()
        # Seconds, over all steps.
        self.waited = 0.0

    def took(self, values: "torch.Tensor", frames: int, waited: float) -> None:
        """One more step: its loss, gradient norm and proximal term [3], frames, and seconds waited for them."""
        self._values[self._taken] = values
        self._taken += 1
        self._frames += frames
        self._waited += waited
        self.waited += waited
        if self._taken == len(self._values) or time.perf_counter() - self._told >= _PROGRESS_S:
            self._look()

    def history(self) -> tuple[list[float], list[float], list[float]]:
        """Each step's loss, gradient norm and proximal term."""
        losses, norms, terms = self._values.T.tolist()
        return losses, norms, terms

    def _look(self) -> None:
        new = self._values[self._seen : self._taken].tolist()
        for step, (loss, norm, _) in enumerate(new, self._global_step + self._seen):
            _require_finite(loss, "loss", step, self._learning_rate)
            _require_finite(norm, "gradient", step, self._learning_rate)
        # After the values, for which the device was waited for.
        now = time.perf_counter()
        seconds = now - self._told
        self._seen = self._taken
        self._progress(self._taken, new[-1][0], self._frames / seconds, self._waited / seconds)
        self._frames, self._waited, self._told = 0, 0.0, now


def _parts(
    loader: Loader, batch_size: int, micro_batch: int, seed: int, steps: range
) -> Iterator[_Part]:
    """The frames of these steps of the run, at most ``micro_batch`` at a time."""
    rows_of = order(len(loader.frames), batch_size=batch_size, seed=seed, step=steps.start)
    for step, rows in zip(steps, rows_of, strict=False):
        noise, times = _draw(loader, len(rows), seed, step)
        valid = loader.valid(rows)
        for start in range(0, len(rows), micro_batch):
            end = start + micro_batch
            batch = loader.batch(rows[start:end], step)
            yield _Part(
                batch,
                loader.moved(noise[start:end]),
                loader.moved(times[start:end]),
                batch.valid / valid,
                end >= len(rows),
            )


def _draw(loader: Loader, frames: int, seed: int, step: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Noise [frames, chunk, max_action_dim] and times [frames], drawn as lerobot draws them after this seed."""
    import torch

    config, model = loader.policy.config, loader.policy.model
    # On the CPU, so that they are the same on every device.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(noise_seed(seed, step))
        noise = model.sample_noise((frames, config.chunk_size, config.max_action_dim), "cpu")
        times = model.sample_time(frames, "cpu")
    return noise, times


def _flow_losses() -> Callable[..., "torch.Tensor"]:
    from app.prefix import flow_losses

    return flow_losses


@cache
def _compiled_flow_losses() -> Callable[..., "torch.Tensor"]:
    """One graph, compiled by the first step that uses it and kept while the process lives."""
    import torch

    compiled: Callable[..., torch.Tensor] = torch.compile(_flow_losses(), fullgraph=True)
    return compiled


@contextmanager
def _compiling() -> Iterator[None]:
    """Turn what torch.compile raises into a ConfigError; it compiles in the first step of each shape."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        # Without what torch says of its own layers.
        reason = first_line(getattr(error, "inner_exception", error))
        raise ConfigError(
            f"The run config sets compile=true, but torch cannot compile the step at this site ({reason}): "
            "install a C++ compiler there, or set compile=false."
        ) from error


def _require_time(deadline: float | None, step: int, steps: int) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise RunFailedError(
            f"The round's deadline passed after {step} of {steps} training steps at this site: "
            "raise round-timeout or lower local-steps."
        )


def noise_seed(seed: int, step: int) -> int:
    """What torch's generator is seeded with before a step's noise and times are drawn."""
    # 63 bits, so that it is a valid seed for every torch generator.
    return int.from_bytes(sha256(f"train/{seed}/{step}".encode()).digest()[:8], "little") >> 1


def _no_room(device: "torch.device", frames: int) -> str:
    return f"This site's device ({device}) has too little memory for a micro-batch of {frames}"


def _require_finite(
    value: float, what: str, step: int, learning_rate: Callable[[int], float]
) -> None:
    if not math.isfinite(value):
        raise PayloadError(
            "finite",
            f"Training diverged: the {what} is {value} at step {step} with learning-rate {learning_rate(step):g}, "
            "lower learning-rate.",
        )
