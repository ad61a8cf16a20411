"""What a run will take at a site, before it joins: memory, disk, bytes on the wire, seconds a round.

All of it is worked out from the shapes in the model's files, the run config and two short measurements on the device;
the model is not loaded. Bytes on the wire, in the cache and of the state are exact, or a most. Memory leaves out what
fragmentation takes, about a tenth. Seconds were fitted on one machine (two Xeon cores with AVX-512, float32): there the
real model's steps, its cache and the tiny demo's rounds are met within a quarter. On other processors they may be off
by half, on a GPU by a factor of three: its share of the peak is assumed, not measured. The network's time is not in
them, nor anybody else's work on the machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app import memory, prefix_store, site_state, trainables
from app.architecture import Architecture, words
from app.codec import encoded_size
from app.config import RunConfig, home, models_directory
from app.manifest import Entry, Manifest
from app.policy import resolve_model

if TYPE_CHECKING:
    import torch

    from app.dataset import SiteDataset

# Bytes of a value: masters, gradients and each of AdamW's two moments are float32.
_FLOAT, _HALF = 4, 2
# What a process with torch and lerobot takes before it loads a model: 0.93 GB were measured, with the tiny one. CUDA's
# libraries take about two more, a context and cuBLAS's workspace a gigabyte of the GPU.
_PROCESS = 1_000_000_000
_CUDA_PROCESS = 3_000_000_000
_CUDA_CONTEXT = 1_000_000_000
# Of the rate at which the device multiplies the expert's largest matrix. The CPU's was measured with the real model, at
# batches of 1 to 8: in training, denoising, vision and text alike.
_CPU_SHARE, _GPU_SHARE = 0.75, 0.35
# Memory that a training step moves for each trained value: gradients, their norm, and AdamW. Measured as 0.5 s for
# SmolVLA's 100 million where memory moves 30 GB/s.
_STEP_BYTES = 150
# And that a round moves: moments put back, a model put together, a change encoded, and their hashes (1.8 s there).
_ROUND_BYTES = 550
# What launching a layer's operations takes whatever their size, forward; measured with the tiny model.
_LAYER_SECONDS = 1.3e-3
# Decoding and scaling a pixel of a video, or of an image file (benchmarks/data).
_VIDEO_SECONDS, _IMAGE_SECONDS = 1e-8, 5e-8
# Frames that the VLM sees at a time while the cache is filled (app.prefix_cache).
_FILL_BATCH = 16
# From when the ServerApp sends a message until it has the answer, beside the site's own work: Flower polls, and starts
# a process (benchmarks/round_overhead). A round has two, to train and to evaluate.
_MESSAGE_SECONDS, _MESSAGES = 5.4, 2
# Seconds for each of the two measurements.
_MEASURE_SECONDS = 0.5


@dataclass(frozen=True)
class Estimate:
    """What a run takes at this site.

    ``cache_bytes`` are those of ``cache_tier``, the place where the prefix cache would lie now; ``memory_bytes`` and
    ``gpu_memory_bytes`` (None on a CPU) come on top where it is "memory" or "gpu". ``state_bytes`` is the most that
    lies on the site's disk. ``bytes_up`` and ``bytes_down`` are a round's, ``first_bytes_down`` those of a round before
    which the site does not hold the model. ``seconds_per_round`` begins when the cache is filled, which takes
    ``cache_seconds`` once; both are None where the device is not there.
    """

    device: str
    cache_tier: str
    cache_bytes: int
    memory_bytes: int
    gpu_memory_bytes: int | None
    state_bytes: int
    seconds_per_round: float | None
    cache_seconds: float | None
    bytes_up: int
    bytes_down: int
    first_bytes_down: int
    torch_cuda: str | None
    cuda_available: bool


@dataclass(frozen=True)
class _Speed:
    """What a device does: operations a second in large products, and bytes a second moved."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class _Frames:
    """The frames of a site that a run looks at, and the tokens of one's prefix."""

    trained: int
    held_out: int
    cameras: int
    words: int
    tokens: int
    decode_seconds: float

    @property
    def cached(self) -> int:
        return self.trained + self.held_out


def estimate(dataset: SiteDataset, config: RunConfig, device: str) -> Estimate:
    """Estimate a run of ``config`` on a dataset, on ``device`` ("cpu", "cuda", "cuda:0").

    Takes up to 1.5 s beside the import of torch. The model must be on this machine (the tiny one is generated): raises
    ModelError otherwise.
    """
    import torch

    base = resolve_model(config.model.removeprefix("hf:"), models_directory())
    model = Architecture.read(base)
    shapes = trainables.initial(config, base).shapes
    values = sum(map(math.prod, shapes.values()))
    frames = _frames(dataset, config, model, words(base, dataset.tasks))
    cuda = device.startswith("cuda")
    width = _HALF if cuda else _FLOAT
    weights = model.frozen * width + model.trained * _FLOAT
    # Adapters come beside the expert.
    weights += values * _FLOAT if config.exchange == "lora" else 0
    batch = min(config.micro_batch or config.batch_size, config.batch_size)
    prefixes = batch * model.prefix_values(frames.cameras, frames.words) * width
    working = (
        # Gradients and moments; on a GPU autocast keeps copies of the weights in bfloat16.
        values * (3 * _FLOAT + (_HALF if cuda else 0))
        + batch * model.activations(frames.tokens) * _FLOAT
        + prefixes
    )
    codec = config.codec
    up = _payload_bytes(shapes, codec)
    # The round's model, moments that wait for the disk or the next round, the residual and the answer.
    kept = values * _FLOAT * (1 + 2 + (codec != "fp32")) + up
    host = kept + (_CUDA_PROCESS if cuda else _PROCESS + weights + working)
    available = torch.cuda.is_available()
    on_device = not cuda or available
    tier, cache = _cache(model, frames, config, device if on_device else "cpu", width, host)
    seconds: tuple[float, float] | None = None
    if on_device:
        seconds = _seconds(model, frames, config, tier, values, _measure(model, config, device))
    return Estimate(
        device=device,
        cache_tier=tier,
        cache_bytes=cache,
        memory_bytes=host,
        gpu_memory_bytes=_CUDA_CONTEXT + weights + working if cuda else None,
        state_bytes=site_state.most_bytes(
            values, moments=not config.reset_optimizer, residual=codec != "fp32"
        ),
        seconds_per_round=seconds and round(seconds[0], 2),
        cache_seconds=seconds and round(seconds[1], 2),
        bytes_up=up,
        # A round's model is sent once, after it was committed: as the change since the one before.
        bytes_down=up,
        first_bytes_down=_payload_bytes(shapes, "fp32"),
        torch_cuda=torch.version.cuda,
        cuda_available=available,
    )


def _frames(dataset: SiteDataset, config: RunConfig, model: Architecture, words: int) -> _Frames:
    """As ``app.resident`` chooses them: what the run draws, and what an evaluation spreads."""
    drawn = config.rounds * config.local_steps * config.batch_size
    cameras = len(dataset.cameras)
    seen = [camera for camera in dataset.meta.recorded if camera.key in dataset.cameras]
    pixels = [
        camera.height * camera.width * (_VIDEO_SECONDS if camera.video else _IMAGE_SECONDS)
        for camera in seen
    ]
    return _Frames(
        min(dataset.frames(dataset.train_episodes), drawn),
        min(dataset.frames(dataset.held_out_episodes), config.batch_size * config.eval_batches),
        cameras,
        words,
        model.prefix_tokens(cameras, words),
        sum(pixels),
    )


def _cache(
    model: Architecture, frames: _Frames, config: RunConfig, device: str, width: int, taken: int
) -> tuple[str, int]:
    """The tier that ``app.prefix_cache`` would choose with the space there is now, and its bytes.

    ``taken`` bytes of host memory will be in use by then.
    """
    import torch

    if config.image_augmentation or config.prefix_cache == "none":
        return "none", 0
    folder = home() / "cache"
    rooms = {"memory": max(memory.host() - taken, 0)}
    if device.startswith("cuda"):
        rooms = {"gpu": memory.gpu(torch.device(device)), **rooms}
    rooms["disk"] = memory.disk(folder, prefix_store.reclaimable(folder))
    size = frames.cached * model.prefix_values(frames.cameras, frames.words) * width
    for place, room in rooms.items():
        if config.prefix_cache in ("auto", place) and size <= room:
            return place, size
    embedded = frames.cached * model.embedding_values(frames.cameras) * width
    if config.prefix_cache in ("auto", "embeddings") and embedded <= max(rooms.values()):
        return "embeddings", embedded
    return "none", 0


def _seconds(
    model: Architecture, frames: _Frames, config: RunConfig, tier: str, values: int, speed: _Speed
) -> tuple[float, float]:
    """Seconds of a round with a full cache, and those that fill it."""
    tokens, batch = frames.tokens, config.batch_size
    vision, text = model.vision(frames.cameras), model.text(tokens)
    prefix = {"none": vision + text, "embeddings": text}.get(tier, 0.0)
    adapters = values if config.exchange == "lora" else 0
    layers = model.layers * _LAYER_SECONDS
    # Backward launches about twice as many.
    step = batch * (model.training(tokens, adapters=adapters) + prefix) / speed.operations
    step += 3 * layers + values * _STEP_BYTES / speed.bytes
    # The loss, and a chunk denoised for the joints' errors.
    passes = 1 + model.denoising_steps
    evaluate = frames.held_out * (passes * model.expert(tokens) + prefix) / speed.operations
    evaluate += math.ceil(frames.held_out / batch) * passes * layers
    if tier == "none":
        evaluate += (config.local_steps * batch + frames.held_out) * frames.decode_seconds
    around = _MESSAGES * _MESSAGE_SECONDS + values * _ROUND_BYTES / speed.bytes
    filled = vision if tier == "embeddings" else vision + text
    fill = frames.cached * (filled / speed.operations + frames.decode_seconds)
    fill += math.ceil(frames.cached / _FILL_BATCH) * (1 + frames.cameras) * layers
    return config.local_steps * step + evaluate + around, 0.0 if tier == "none" else fill


def _payload_bytes(shapes: dict[str, tuple[int, ...]], codec: str) -> int:
    """Bytes of a message's tensors, and of the manifest beside them."""
    offset, parts = 0, []
    for name in sorted(shapes):
        size = encoded_size(shapes[name], codec)
        parts.append(Entry(name, shapes[name], offset, size))
        offset += size
    digest = "0" * 64
    manifest = Manifest("update", codec, digest, None, digest, digest, tuple(parts), offset)
    return offset + len(json.dumps(manifest.manifest()))


def _measure(model: Architecture, config: RunConfig, device: str) -> _Speed:
    """How fast the device multiplies a batch by the expert's largest layer, and moves memory."""
    import torch

    torch.set_num_threads(config.threads)
    place = torch.device(device)
    cuda = place.type == "cuda"
    outputs, inputs = model.largest()
    batch = min(config.micro_batch or config.batch_size, config.batch_size)
    rows = batch * model.chunk
    dtype = torch.bfloat16 if cuda else torch.float32
    left = torch.ones(rows, inputs, dtype=dtype, device=place)
    right = torch.ones(outputs, inputs, dtype=dtype, device=place)
    one, other = torch.ones(2, 1 << 24, device=place)

    def rate(work: Callable[[], object], amount: float) -> float:
        work()  # the first call sets up what the others reuse
        _wait(place)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < _MEASURE_SECONDS:
            # Launched together on a GPU, which would else be measured waiting for this loop.
            for _ in range(20 if cuda else 1):
                work()
                done += 1
            _wait(place)
        return amount * done / (time.perf_counter() - started)

    with torch.no_grad():
        operations = rate(
            lambda: torch.nn.functional.linear(left, right), 2.0 * rows * inputs * outputs
        )
        # Two are read and one is written.
        moved = rate(lambda: one.add_(other), 3.0 * one.nbytes)
    return _Speed(operations * (_GPU_SHARE if cuda else _CPU_SHARE), moved)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
