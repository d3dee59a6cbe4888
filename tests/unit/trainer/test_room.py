"""A machine without room: no run begins that cannot end, and a disk that fills during a checkpoint leaves the last one."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.helpers.trainer import dpo_method, load, make_pairs, make_work_folder, run_in_process
from worker import manifest
from worker.model_files import weight_bytes
from worker.trainer import room
from worker.trainer.room import NoRoom, disk_bytes

PLAIN = {"quantization": "none", "adapter": {"r": 4}, "seed": 1}
PAIRS = make_pairs(8)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", folder], check=False)


def work_folder(disk: Path, llama: Path, size: int, **hyperparameters: object) -> Path:
    """A work folder on a disk of `size` bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    method = dpo_method(batch_size=4, **hyperparameters)
    return make_work_folder(disk / "work", llama, PLAIN | {"method": method}, train=PAIRS)


@needs_root
def test_a_run_does_not_begin_on_a_disk_that_cannot_hold_its_checkpoints(mount: Path, llama: Path) -> None:
    folder = work_folder(mount, llama, 200_000, max_steps=2)
    with pytest.raises(NoRoom, match=r"the disk of the work folder has 0\.\d MB free, and .* take 0\.\d MB"):
        run_in_process(folder)
    assert not (folder / "checkpoints").exists()


@needs_root
def test_a_disk_that_fills_during_a_checkpoint_leaves_the_ones_before_it_whole(mount: Path, llama: Path) -> None:
    """Nothing takes the checkpoints away, so they fill the disk."""
    folder = work_folder(mount, llama, 2_000_000, max_steps=50, checkpoint_every=1)
    with pytest.raises((OSError, SafetensorError), match="No space left on device"):
        run_in_process(folder)
    checkpoints = sorted((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert checkpoints[-1].suffix == ".partial" and len(checkpoints) > 2
    assert not any(manifest.damage(checkpoint) for checkpoint in checkpoints[:-1])


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_the_space_that_a_run_takes_is_that_of_the_files_it_writes(llama: Path, tmp_path: Path, optimizer: str) -> None:
    spec = PLAIN | {"method": dpo_method(batch_size=4, max_steps=1, optimizer=optimizer)}
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS)
    run_in_process(folder)
    files = [path for path in folder.rglob("*.safetensors") if path.stem != "generators"]

    def size(place: str) -> int:
        own = (file for file in files if folder / place in file.parents)
        return sum(tensor.nbytes for file in own for tensor in load_file(file).values())

    policy = load(llama, quantization="none", adapter={"r": 4})
    assert disk_bytes(policy, optimizer) == pytest.approx(2 * size("checkpoints") + size("output"), rel=0.01)


@pytest.mark.parametrize(("quantization", "share"), [("none", 1.0), ("int8", 0.5), ("nf4", 0.25)])
def test_a_model_is_not_loaded_into_less_memory_than_its_weights_take(
    llama: Path, quantization: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = weight_bytes(llama)
    monkeypatch.setattr(room, "free_memory", lambda: int(share * size) - 1)
    with pytest.raises(NoRoom, match="the model takes"):
        load(llama, quantization=quantization)
    monkeypatch.setattr(room, "free_memory", lambda: int(share * size) + 1)
    load(llama, quantization=quantization)
