"""A machine's GPUs as their driver sees them, through NVML, without torch (https://docs.nvidia.com/deploy/nvml-api)."""

import contextlib
from dataclasses import dataclass
from typing import Any

from certs.errors import first_line


class NoDriverError(Exception):
    """NVML cannot be used; the message says why."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; bytes of memory, and None for what its driver does not tell.

    ``utilization`` is the share of the last moments (a sixth of a second to one) in which the GPU computed, 0 to 1.
    """

    uuid: str
    name: str
    total: int | None
    free: int | None
    capability: tuple[int, int] | None
    processes: int
    utilization: float | None = None


@dataclass(frozen=True)
class Driver:
    """The driver, the newest CUDA it runs, and its GPUs in NVML's order."""

    version: str
    cuda: tuple[int, int]
    gpus: list[Gpu]


def read() -> Driver:
    """Ask the driver; raise ``NoDriverError`` where there is none or it cannot be used."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if isinstance(error, pynvml.NVMLError_LibraryNotFound):
            raise NoDriverError("no NVIDIA driver is installed") from error
        if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
            raise NoDriverError("the NVIDIA driver is not loaded") from error
        raise NoDriverError(f"the NVIDIA driver does not work: {first_line(error)}") from error
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion()
        return Driver(
            pynvml.nvmlSystemGetDriverVersion(),
            (number // 1000, number % 1000 // 10),
            [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())],
        )
    except pynvml.NVMLError as error:
        raise NoDriverError(f"the NVIDIA driver does not work: {first_line(error)}") from error
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpu(pynvml: Any, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    total = free = capability = utilization = None
    processes: list[Any] = []
    # Integrated GPUs, virtual ones and parts of one (MIG) leave out some of it.
    with contextlib.suppress(pynvml.NVMLError_NotSupported):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    with contextlib.suppress(pynvml.NVMLError_NotSupported):
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = (major, minor)
    with contextlib.suppress(pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    with contextlib.suppress(pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        utilization = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    return Gpu(
        pynvml.nvmlDeviceGetUUID(handle),
        pynvml.nvmlDeviceGetName(handle),
        *(total, free, capability, len(processes), utilization),
    )
