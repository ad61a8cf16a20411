"""What the preflight finds about the site's GPU, from what its driver says (``certs.nvml``).

What torch itself makes of it comes from the app's estimate: ``torch_cuda``, ``cuda_available``, ``gpu_memory_bytes``.
"""

import os
from collections.abc import Iterator
from typing import Any

from certs.errors import HardwareError
from certs.nvml import Driver, Gpu, NoDriverError, read
from supernode.findings import Finding, fail, ok, size, warning

# PyTorch's packages for CUDA 12.8 and later have code for Turing and newer GPUs (its RELEASE.md, 2.11).
_OLDEST = (7, 5)
_OLDEST_SINCE_CUDA = (12, 8)
# Ampere is the first to compute in bfloat16, as the policy does on a GPU.
_BFLOAT16 = (8, 0)

_NAME = "gpu"


def check(device: str, estimate: dict[str, Any] | None, *, inherited: bool) -> list[Finding]:
    """Say whether ``device`` (``cpu``, ``cuda``, ``cuda:N``) is there and has room for what ``estimate`` needs.

    ``inherited`` tells whether the site's processes get this environment, and ``CUDA_VISIBLE_DEVICES`` with it.
    """
    try:
        driver = read()
    except NoDriverError as error:
        return [_without(device, str(error))]
    if device == "cpu":
        return [_unused(driver)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if inherited else None
    gpus = driver.gpus if visible is None else list(_visible(driver.gpus, visible))
    index = int(device.partition(":")[2] or 0)
    if index >= len(gpus):
        hidden = f", {len(gpus)} of them visible to CUDA" if len(gpus) < len(driver.gpus) else ""
        return [
            fail(
                _NAME,
                f"device {device} is not there: the driver {driver.version} knows {_count(driver.gpus)}{hidden}",
                "Correct CUDA_VISIBLE_DEVICES, or join with a --device that is there.",
                HardwareError,
            )
        ]
    findings = [
        *_torch(driver, gpus[index], estimate or {}),
        *_memory(gpus[index], estimate or {}),
        *_order(gpus, inherited=inherited),
    ]
    return findings or [ok(_NAME, f"{_described(driver, gpus[index])}{_needed(estimate or {})}")]


def _without(device: str, why: str) -> Finding:
    if device == "cpu":
        return ok(_NAME, "training on the CPU, which is slow for the real model; there is no GPU")
    return fail(
        _NAME,
        f"device {device} cannot be used: {why}",
        "Install NVIDIA's driver until 'nvidia-smi' shows the GPU, or join with '--device cpu', which is slow.",
        HardwareError,
    )


def _unused(driver: Driver) -> Finding:
    if not driver.gpus:
        return ok(_NAME, "training on the CPU, which is slow for the real model; there is no GPU")
    return warning(
        _NAME,
        f"training on the CPU, which is slow, with {_count(driver.gpus)} ({driver.gpus[0].name}) unused",
        "Join with '--device cuda' to use it.",
    )


def _visible(gpus: list[Gpu], variable: str) -> Iterator[Gpu]:
    """Yield the GPUs CUDA sees: numbers or beginnings of UUIDs, up to the first that names none (CUDA C++ guide)."""
    for entry in variable.split(","):
        word = entry.strip()
        if word.isdigit():
            found = gpus[int(word) : int(word) + 1]
        else:
            found = [gpu for gpu in gpus if word.startswith("GPU-") and gpu.uuid.startswith(word)]
        if len(found) != 1:
            return
        yield found[0]


def _torch(driver: Driver, gpu: Gpu, estimate: dict[str, Any]) -> Iterator[Finding]:
    """What keeps torch from using the GPU, or from using it well."""
    if not estimate:
        return
    if estimate["torch_cuda"] is None:
        yield fail(
            _NAME,
            "torch is installed without CUDA, and cannot use the GPU",
            "Install the package of torch that has CUDA, or join with '--device cpu'.",
            HardwareError,
        )
        return
    wanted = _version(estimate["torch_cuda"])
    runs, asks = f"{driver.cuda[0]}.{driver.cuda[1]}", estimate["torch_cuda"]
    told = False
    # A driver runs what was built for any CUDA of its own major version (CUDA's minor version compatibility).
    if driver.cuda[0] < wanted[0]:
        told = True
        yield fail(
            _NAME,
            f"the driver {driver.version} runs CUDA {runs}, and torch needs CUDA {asks}",
            f"Update NVIDIA's driver to one that runs CUDA {wanted[0]} ('nvidia-smi' shows it).",
            HardwareError,
        )
    elif driver.cuda < wanted:
        yield warning(
            _NAME,
            f"the driver {driver.version} runs CUDA {runs}, older than the CUDA {asks} of torch: some of torch's "
            "kernels cannot be compiled for it",
            f"Update NVIDIA's driver to one that runs CUDA {asks}.",
        )
    if gpu.capability and gpu.capability < _OLDEST and wanted >= _OLDEST_SINCE_CUDA:
        told = True
        yield fail(
            _NAME,
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, and torch for CUDA {asks} has no code "
            f"for less than {_dotted(_OLDEST)}",
            "Use a newer GPU, or join with '--device cpu', which is slow.",
            HardwareError,
        )
    elif gpu.capability and gpu.capability < _BFLOAT16:
        yield warning(
            _NAME,
            f"{gpu.name} has compute capability {_dotted(gpu.capability)} and computes bfloat16 in software, slowly",
            f"Expect long rounds; GPUs from compute capability {_dotted(_BFLOAT16)} on do it in hardware.",
        )
    if not estimate["cuda_available"] and not told:
        yield fail(
            _NAME,
            f"the driver {driver.version} is there, and torch cannot use a GPU where the site trains",
            "In containers, install the NVIDIA Container Toolkit; else see what 'nvidia-smi' says, and "
            "CUDA_VISIBLE_DEVICES.",
            HardwareError,
        )


def _memory(gpu: Gpu, estimate: dict[str, Any]) -> Iterator[Finding]:
    need = estimate.get("gpu_memory_bytes")
    if need is None or gpu.total is None or gpu.free is None:
        return
    if gpu.total < need:
        yield fail(
            _NAME,
            f"{gpu.name} has {size(gpu.total)} of memory, and training needs about {size(need)}",
            "Use a larger GPU, or ask the federation's operator for a smaller batch-size or a micro-batch.",
            HardwareError,
        )
    elif gpu.free < need:
        yield warning(
            _NAME,
            f"{gpu.name} has {size(gpu.free)} of {size(gpu.total)} free beside {gpu.processes} processes that compute "
            f"on it, and training needs about {size(need)}",
            "Unless this site's own trainer is among them, end what 'nvidia-smi' lists before a run.",
        )
    elif gpu.processes:
        yield warning(
            _NAME,
            f"{gpu.processes} processes compute on {gpu.name} already; {size(gpu.free)} of {size(gpu.total)} are free, "
            f"and training needs about {size(need)}",
            "Unless this site's own trainer is among them, expect slower rounds while they run.",
        )


def _order(gpus: list[Gpu], *, inherited: bool) -> Iterator[Finding]:
    by_slot = inherited and os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    names = sorted({gpu.name for gpu in gpus})
    if len(names) > 1 and not by_slot:
        yield warning(
            _NAME,
            f"the GPUs differ ({', '.join(names)}): CUDA counts the fastest first, this check by slot",
            "Set CUDA_DEVICE_ORDER=PCI_BUS_ID for the site, so that cuda:N means the same GPU to both.",
        )


def _described(driver: Driver, gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.total is not None and gpu.free is not None:
        parts.append(f"{size(gpu.free)} of {size(gpu.total)} free")
    if gpu.capability:
        parts.append(f"compute capability {_dotted(gpu.capability)}")
    parts.append(f"driver {driver.version} for CUDA {_dotted(driver.cuda)}")
    return ", ".join(parts)


def _needed(estimate: dict[str, Any]) -> str:
    need = estimate.get("gpu_memory_bytes")
    return "" if need is None else f"; training needs about {size(need)}"


def _count(gpus: list[Gpu]) -> str:
    return "1 GPU" if len(gpus) == 1 else f"{len(gpus) or 'no'} GPUs"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)
