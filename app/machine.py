"""What a site's answer says of its machine: a site behind NAT has no port that the operator could ask.

A look at the GPU starts and ends NVML, some ten milliseconds, so there is one every ten seconds of training.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from typing import TYPE_CHECKING

from app.config import home
from certs import nvml

if TYPE_CHECKING:
    import torch

# Seconds between two looks at the GPU.
_LOOK_S = 10.0


class Machine:
    """Watches the machine while it trains on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._looked: float | None = None
        self._used = self._total = 0
        self._busy: list[float] = []

    def look(self) -> None:
        """Note the GPU's state if it is time to: first when it has begun to work, and never of a CPU."""
        now = time.monotonic()
        if self._device.type != "cuda" or (self._looked and now - self._looked < _LOOK_S):
            return
        self._looked = now
        gpu = _gpu(self._device)
        if gpu is None:
            return
        if gpu.total is not None and gpu.free is not None:
            self._used, self._total = max(self._used, gpu.total - gpu.free), gpu.total
        if gpu.utilization is not None:
            self._busy.append(gpu.utilization)

    def figures(self) -> dict[str, float | int]:
        """What is known, by the name of its metric; bytes, and shares from 0 to 1.

        Most GPU memory in use at a look, by whatever process, and the GPU's mean utilization; free space of the disk
        that the site's state is on.
        """
        found: dict[str, float | int] = {}
        if self._total:
            found |= {"gpu_memory_bytes": self._used, "gpu_memory_total_bytes": self._total}
        if self._busy:
            found["gpu_utilization"] = sum(self._busy) / len(self._busy)
        folder = home() / "sites"
        while not folder.exists():
            folder = folder.parent
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(folder)
            found |= {"disk_free_bytes": disk.free, "disk_size_bytes": disk.total}
        return found


def _gpu(device: torch.device) -> nvml.Gpu | None:
    """The GPU that CUDA counts as ``device``; None for a part of one (MIG), and where NVML cannot be used."""
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return next((gpu for gpu in nvml.read().gpus if gpu.uuid == uuid), None)
    except nvml.NoDriverError:
        return None
