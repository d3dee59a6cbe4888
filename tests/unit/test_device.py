"""A worker finds its device: a GPU that the machine shows must answer, and `DPO_DEVICE` decides."""

from pathlib import Path

import pytest

from worker.device import Device, DeviceUnusable, GpuUse, find_devices, placement, use_of
from worker.machine import total_memory


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script of the only `nvidia-smi` of this machine."""
    program = tmp_path / "nvidia-smi"
    program.touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("worker.device.DRIVER_FILES", ())
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0+cu130")
    return program


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_the_gpus_that_answer_are_the_devices(wanted: str, driver: Path) -> None:
    driver.write_text('#!/bin/sh\nfor k in 1 2; do echo "GPU-$k, NVIDIA H100 80GB HBM3, 81559"; done\n')
    devices = find_devices(wanted)  # type: ignore[arg-type]
    name, memory_bytes = "NVIDIA H100 80GB HBM3", 81559 * 1024**2
    assert devices == [Device("cuda", name, memory_bytes, visible=f"GPU-{k}") for k in (1, 2)]
    assert placement(devices) == {"device": "cuda", "ranks": 2, "visible": ["GPU-1", "GPU-2"], "threads": None}


def test_a_machine_without_gpus_has_as_many_devices_of_one_thread_as_declared(driver: Path) -> None:
    driver.unlink()
    assert [device.threads for device in find_devices("auto")] == [None]
    devices = find_devices("auto", 3)
    assert [(device.kind, device.threads) for device in devices] == [("cpu", 1)] * 3
    assert sum(device.memory_bytes for device in devices) <= total_memory()
    assert placement(devices[:2]) == {"device": "cpu", "ranks": 2, "visible": None, "threads": 1}


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Failed to initialize NVML: Unknown Error'; exit 255", "Failed to initialize NVML: Unknown Error"),
        ("echo 'No devices were found' >&2; exit 6", "No devices were found"),
        ("exit 9", "it says nothing"),
    ],
)
def test_a_gpu_that_does_not_answer_is_not_replaced_by_the_cpu(
    wanted: str, script: str, reason: str, driver: Path
) -> None:
    driver.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(DeviceUnusable, match=reason):
        find_devices(wanted)  # type: ignore[arg-type]


def test_a_driver_that_hangs_counts_as_broken(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.device.QUERY_SECONDS", 0.2)
    driver.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(DeviceUnusable, match="does not answer"):
        find_devices("auto")


def test_a_container_without_its_driver_is_not_a_machine_without_a_gpu(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.unlink()
    assert find_devices("auto")[0].kind == "cpu"
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")
    with pytest.raises(DeviceUnusable, match="'nvidia-smi' is missing"):
        find_devices("auto")
    assert find_devices("cpu")[0].kind == "cpu"


def test_a_gpu_that_is_hidden_or_that_torch_cannot_use_is_not_shown(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.write_text("#!/bin/sh\necho 'GPU-1, NVIDIA H100 80GB HBM3, 81559'\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_devices("auto")[0].kind == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0+cpu")
    assert find_devices("auto")[0].kind == "cpu"


def test_a_worker_tells_how_busy_its_gpu_is(driver: Path) -> None:
    gpu = Device("cuda", "NVIDIA H100", 81559 * 1024**2)
    driver.write_text('#!/bin/sh\n[ "$1" = --query-gpu=utilization.gpu,memory.used ] && echo "97, 70123"\n')
    assert use_of([gpu]) == GpuUse(0.97, 70123 * 1024**2)
    driver.write_text("#!/bin/sh\necho '[N/A], [N/A]'\n")  # some virtual GPUs do not tell
    assert use_of([gpu]) is None
    driver.unlink()
    assert use_of([gpu]) is None
    assert use_of([Device("cpu", "x86_64", 1)]) is None
