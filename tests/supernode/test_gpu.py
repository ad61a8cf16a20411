"""What NVML tells is judged against what training needs; NVML is stood in for, the rest is real."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest

import certs.nvml
from certs.errors import HardwareError
from certs.nvml import Driver, Gpu, NoDriverError
from supernode import gpu
from supernode.findings import Finding

GB = 10**9
ESTIMATE: dict[str, Any] = {
    "torch_cuda": "13.0",
    "cuda_available": True,
    "gpu_memory_bytes": 10 * GB,
}


@dataclass
class Card:
    """A GPU of the stand-in; None is what its driver does not support."""

    name: str = "NVIDIA A10"
    total: int | None = 24 * GB
    used: int = 1 * GB
    capability: tuple[int, int] | None = (8, 6)
    processes: int | None = 0
    busy: int | None = 7
    uuid: str = "GPU-aaaa-1"


@dataclass
class Machine:
    """What the stand-in of NVML answers."""

    cards: list[Card] = field(default_factory=lambda: [Card()])
    cuda: int = 13000
    driver: str = "580.65.06"
    failure: Exception | None = None
    shut_down: int = 0

    def module(self) -> ModuleType:
        """A module with the functions of pynvml that the preflight calls, and pynvml's own errors."""

        def start() -> None:
            if self.failure is not None:
                raise self.failure

        def stop() -> None:
            self.shut_down += 1

        def supported(value: Any) -> Any:
            if value is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value

        def memory(card: Card) -> Any:
            total = supported(card.total)
            return SimpleNamespace(total=total, free=total - card.used, used=card.used)

        made = ModuleType("pynvml")
        made.__dict__.update(
            {name: value for name, value in vars(pynvml).items() if name.startswith("NVMLError")},
            nvmlInit=start,
            nvmlShutdown=stop,
            nvmlSystemGetDriverVersion=lambda: self.driver,
            nvmlSystemGetCudaDriverVersion=lambda: self.cuda,
            nvmlDeviceGetCount=lambda: len(self.cards),
            nvmlDeviceGetHandleByIndex=lambda index: self.cards[index],
            nvmlDeviceGetName=lambda card: card.name,
            nvmlDeviceGetUUID=lambda card: card.uuid,
            nvmlDeviceGetMemoryInfo=memory,
            nvmlDeviceGetCudaComputeCapability=lambda card: supported(card.capability),
            nvmlDeviceGetComputeRunningProcesses=lambda card: [None] * supported(card.processes),
            nvmlDeviceGetUtilizationRates=lambda card: SimpleNamespace(gpu=supported(card.busy)),
        )
        return made


type Install = Callable[[Machine], None]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Install:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return lambda machine: monkeypatch.setitem(sys.modules, "pynvml", machine.module())


def test_the_stand_in_has_what_pynvml_has() -> None:
    missing = [name for name in vars(Machine().module()) if not hasattr(pynvml, name)]
    assert missing == []


def test_the_driver_is_read(nvml: Install) -> None:
    machine = Machine(
        [Card(), Card("NVIDIA L4", 23 * GB, 0, (8, 9), 2, 100, "GPU-bbbb-2")], cuda=12080
    )
    nvml(machine)
    assert certs.nvml.read() == Driver(
        "580.65.06",
        (12, 8),
        [
            Gpu("GPU-aaaa-1", "NVIDIA A10", 24 * GB, 23 * GB, (8, 6), 0, 0.07),
            Gpu("GPU-bbbb-2", "NVIDIA L4", 23 * GB, 23 * GB, (8, 9), 2, 1.0),
        ],
    )
    assert machine.shut_down == 1


def test_what_a_driver_does_not_tell_is_left_out(nvml: Install) -> None:
    nvml(Machine([Card(total=None, capability=None, processes=None, busy=None)]))
    (read,) = certs.nvml.read().gpus
    assert (read.total, read.free, read.capability, read.utilization) == (None,) * 4
    assert read.processes == 0
    (finding,) = gpu.check("cuda", ESTIMATE, inherited=True)
    assert finding.level == "ok"
    assert finding.sentence == (
        "NVIDIA A10, driver 580.65.06 for CUDA 13.0; training needs about 10 GB"
    )


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver is installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "the NVIDIA driver is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "the NVIDIA driver does not work: "),
        (pynvml.NVML_ERROR_UNKNOWN, "the NVIDIA driver does not work: "),
    ],
)
def test_without_a_driver(nvml: Install, code: int, why: str) -> None:
    nvml(Machine(failure=pynvml.NVMLError(code)))
    with pytest.raises(NoDriverError, match=why):
        certs.nvml.read()
    (finding,) = gpu.check("cuda", ESTIMATE, inherited=True)
    failed(finding, f"device cuda cannot be used: {why}", "nvidia-smi")
    (finding,) = gpu.check("cpu", ESTIMATE, inherited=True)
    assert finding.level == "ok"
    assert finding.sentence == (
        "training on the CPU, which is slow for the real model; there is no GPU"
    )


def test_a_driver_that_fails_half_way(nvml: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    nvml(machine)

    def lost() -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetCount", lost)
    (finding,) = gpu.check("cuda", ESTIMATE, inherited=True)
    failed(finding, "device cuda cannot be used: the NVIDIA driver does not work: ", "nvidia-smi")
    assert machine.shut_down == 1


def failed(finding: Finding, sentence: str, remedy: str) -> None:
    assert (finding.name, finding.level) == ("gpu", "fail")
    assert finding.sentence.startswith(sentence), finding.sentence
    assert remedy in (finding.remedy or "")
    assert finding.exit_code == HardwareError.exit_code == 22


def warned(finding: Finding, sentence: str, remedy: str) -> None:
    assert (finding.name, finding.level, finding.exit_code) == ("gpu", "warning", 0)
    assert finding.sentence.startswith(sentence), finding.sentence
    assert remedy in (finding.remedy or "")


def one(machine: Machine, nvml: Install, device: str = "cuda", **changed: Any) -> Finding:
    """The only finding about a machine whose estimate is changed."""
    nvml(machine)
    (finding,) = gpu.check(device, {**ESTIMATE, **changed}, inherited=True)
    return finding


def test_a_gpu_that_suffices(nvml: Install) -> None:
    finding = one(Machine(), nvml)
    assert (finding.level, finding.remedy, finding.exit_code) == ("ok", None, 0)
    assert finding.sentence == (
        "NVIDIA A10, 23 GB of 24 GB free, compute capability 8.6, driver 580.65.06 for CUDA 13.0; "
        "training needs about 10 GB"
    )


def test_without_an_estimate_the_figures_stand_alone(nvml: Install) -> None:
    nvml(Machine())
    (finding,) = gpu.check("cuda", None, inherited=True)
    assert finding.level == "ok"
    assert finding.sentence.endswith("driver 580.65.06 for CUDA 13.0")


def test_the_cpu_beside_an_unused_gpu(nvml: Install) -> None:
    warned(
        one(Machine([Card(), Card()]), nvml, "cpu"),
        "training on the CPU, which is slow, with 2 GPUs (NVIDIA A10) unused",
        "--device cuda",
    )


def test_a_driver_without_gpus(nvml: Install) -> None:
    assert one(Machine([]), nvml, "cpu").level == "ok"
    failed(
        one(Machine([]), nvml, "cuda"),
        "device cuda is not there: the driver 580.65.06 knows no GPUs",
        "--device",
    )


def test_a_gpu_that_is_not_there(nvml: Install) -> None:
    failed(
        one(Machine(), nvml, "cuda:1"),
        "device cuda:1 is not there: the driver 580.65.06 knows 1 GPU",
        "CUDA_VISIBLE_DEVICES",
    )


def test_too_little_memory(nvml: Install) -> None:
    failed(
        one(Machine(), nvml, gpu_memory_bytes=30 * GB),
        "NVIDIA A10 has 24 GB of memory, and training needs about 30 GB",
        "micro-batch",
    )


def test_memory_that_others_use(nvml: Install) -> None:
    warned(
        one(Machine([Card(used=20 * GB, processes=3)]), nvml),
        "NVIDIA A10 has 4.0 GB of 24 GB free beside 3 processes that compute on it, and training needs about 10 GB",
        "nvidia-smi",
    )


def test_others_at_work(nvml: Install) -> None:
    warned(
        one(Machine([Card(processes=2)]), nvml),
        "2 processes compute on NVIDIA A10 already; 23 GB of 24 GB are free",
        "slower rounds",
    )


def test_torch_without_cuda(nvml: Install) -> None:
    failed(
        one(Machine(), nvml, torch_cuda=None, cuda_available=False),
        "torch is installed without CUDA",
        "--device cpu",
    )


def test_a_driver_too_old_for_torch(nvml: Install) -> None:
    failed(
        one(Machine(cuda=12080, driver="570.1"), nvml, cuda_available=False),
        "the driver 570.1 runs CUDA 12.8, and torch needs CUDA 13.0",
        "Update NVIDIA's driver",
    )


def test_a_driver_a_little_older_than_torch(nvml: Install) -> None:
    warned(
        one(Machine(cuda=12040), nvml, torch_cuda="12.8"),
        "the driver 580.65.06 runs CUDA 12.4, older than the CUDA 12.8 of torch",
        "Update NVIDIA's driver",
    )


@pytest.mark.parametrize(
    ("capability", "cuda", "level"),
    [
        ((7, 0), "13.0", "fail"),
        ((7, 0), "12.8", "fail"),
        ((7, 0), "12.6", "warning"),
        ((7, 5), "13.0", "warning"),
        ((8, 0), "13.0", "ok"),
        ((12, 0), "13.0", "ok"),
    ],
)
def test_the_gpus_age(nvml: Install, capability: tuple[int, int], cuda: str, level: str) -> None:
    finding = one(Machine([Card(capability=capability)]), nvml, torch_cuda=cuda)
    assert finding.level == level
    if level == "fail":
        failed(finding, "NVIDIA A10 has compute capability 7.0, and torch for CUDA", "newer GPU")
    if level == "warning":
        warned(finding, "NVIDIA A10 has compute capability 7", "long rounds")


def test_torch_that_cannot_use_the_gpu(nvml: Install) -> None:
    failed(
        one(Machine(), nvml, cuda_available=False),
        "the driver 580.65.06 is there, and torch cannot use a GPU where the site trains",
        "NVIDIA Container Toolkit",
    )


def test_independent_causes_do_not_hide_each_other(nvml: Install) -> None:
    nvml(Machine(cuda=12080))
    found = gpu.check(
        "cuda", {**ESTIMATE, "gpu_memory_bytes": 30 * GB, "cuda_available": False}, inherited=True
    )
    assert [each.level for each in found] == ["fail", "fail"]
    assert "needs CUDA 13.0" in found[0].sentence
    assert "needs about 30 GB" in found[1].sentence


CARDS = [Card("first", uuid="GPU-aaaa-1"), Card("first", uuid="GPU-aabb-2", processes=2)]


@pytest.mark.parametrize(
    ("visible", "device", "level"),
    [
        ("", "cuda", "fail"),
        ("-1", "cuda", "fail"),
        ("0,1", "cuda:1", "warning"),
        ("1", "cuda", "warning"),
        ("1", "cuda:1", "fail"),
        ("1,0", "cuda:1", "ok"),
        ("1,7,0", "cuda:1", "fail"),  # what comes after one that is none is not seen either
        ("GPU-aabb", "cuda", "warning"),
        ("GPU-aa", "cuda", "fail"),  # names two
        ("MIG-1", "cuda", "fail"),
    ],
)
def test_cuda_visible_devices(
    nvml: Install, monkeypatch: pytest.MonkeyPatch, visible: str, device: str, level: str
) -> None:
    """The second card is the one with processes on it, which a warning tells."""
    nvml(Machine(CARDS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (finding,) = gpu.check(device, ESTIMATE, inherited=True)
    assert finding.level == level, finding
    if level == "fail":
        assert "knows 2 GPUs, " in finding.sentence
        assert "visible to CUDA" in finding.sentence
    # Containers do not get the variable.
    (finding,) = gpu.check(device, ESTIMATE, inherited=False)
    assert finding.level == ("warning" if device == "cuda:1" else "ok")


def test_gpus_that_differ(nvml: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(Machine([Card(), Card("NVIDIA L4")]))
    (finding,) = gpu.check("cuda:1", ESTIMATE, inherited=True)
    warned(finding, "the GPUs differ (NVIDIA A10, NVIDIA L4)", "CUDA_DEVICE_ORDER=PCI_BUS_ID")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpu.check("cuda:1", ESTIMATE, inherited=True)[0].level == "ok"


def test_this_machine_is_read_with_the_real_nvml() -> None:
    """With a driver or without: one of the two answers, and nothing left to crash."""
    try:
        driver = certs.nvml.read()
    except NoDriverError as error:
        assert "NVIDIA driver" in str(error)  # noqa: PT017
    else:
        assert driver.cuda > (0, 0)
        assert all(card.name for card in driver.gpus)


def test_nvml_is_imported_when_it_is_asked() -> None:
    code = "import certs.nvml, supernode.gpu, sys; print('pynvml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
