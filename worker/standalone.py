"""`dpo train SPEC.json --output DIR`: run the engine alone, without the service.

SPEC.json is the body of `POST /v1/fine_tuning/jobs`, with file paths in place of file ids. Paths are relative to
SPEC.json's folder. `model` names a base model as on a worker. The artifact is written to DIR.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from app.cli.output import plain
from app.errors import describe_validation_error
from app.estimates import fit
from app.estimates.memory import Shape
from app.estimates.schemas import Device as EstimatedDevice
from app.programs import command
from app.settings import Settings
from app.spec.datasets.check import check
from app.spec.datasets.errors import DatasetError
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.metrics import SUMMARY
from worker.base_models import BaseModels, describe
from worker.device import Device, DeviceUnusable, find_devices, placement
from worker.hub import ModelUnavailable
from worker.model_files import config_of, point_to
from worker.processes import answer_cache, kill_group, trainer_environment
from worker.trainer.events import (
    Broken,
    CacheWanted,
    CheckpointWritten,
    DeviceFailed,
    Failed,
    Metrics,
    Notice,
    Working,
    read,
)

USAGE = 2
"""The exit status for a spec or a file that is wrong."""


class UsageError(Exception):
    """A spec cannot be run. The message is for the user."""


def train(spec_path: Path, output: Path, settings: Settings, console: Console) -> int:
    """Run the trainer. Returns 0 if done, 1 if it failed, 2 if the spec or a file is wrong, 130 after Ctrl-C."""
    try:
        spec, original = _read_spec(spec_path)
        if output.exists() and any(output.iterdir()):
            raise UsageError(f"{output} exists and is not empty.")
        base, revision = BaseModels(settings).locate(spec.model)
        devices = _devices(spec, settings, base)
        reference = spec.reference_model and BaseModels(settings).locate(spec.reference_model)[0]
        graders = [_reward_model(settings, field, name) for field, name in spec.grader_models]
    except (UsageError, ModelUnavailable, DeviceUnusable) as error:
        console.print(plain(str(error)), style="red", highlight=False, markup=False)
        return USAGE
    with tempfile.TemporaryDirectory(prefix="dpo-train-") as name:
        folder = Path(name)
        point_to(folder / "base", base)
        if reference:
            (folder / "reference").mkdir()
            point_to(folder / "reference" / "base", reference)
        for number, grader in enumerate(graders):
            (folder / "graders" / str(number)).mkdir(parents=True)
            point_to(folder / "graders" / str(number) / "base", grader)
        (folder / "spec.json").write_text(spec.model_dump_json())
        run = {
            "base_model": spec.model,
            "revision": revision,
            "version": None,
            "spec": original,
            **placement(devices),
        }
        (folder / "run.json").write_text(json.dumps(run))
        status = _run(folder, console)
        if status == 0:
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder / "output", output, dirs_exist_ok=True)
        return status


def _reward_model(settings: Settings, field: str, name: str) -> Path:
    """The folder of a reward model that was trained here. Raises `UsageError` for another model."""
    folder, _ = BaseModels(settings).locate(name)
    if "reward_mean" not in config_of(folder):
        raise UsageError(f"{field}: '{name}' is not a reward model that a training has made.")
    return folder


def _devices(spec: JobSpec, settings: Settings, base: Path) -> list[Device]:
    """The devices to train on: as many as `spec` asks for, or the fewest on which it fits.

    Raises `UsageError` if there are fewer.
    """
    devices = find_devices(settings.device, settings.cpu_devices)
    try:
        shape = Shape.of(describe(spec.model, base).details)
    except (OSError, ValueError, AttributeError, TypeError):  # the trainer will say what is wrong with the files
        shape = None
    if shape is not None:
        smallest = min(devices, key=lambda device: device.memory_bytes)
        known = EstimatedDevice(**smallest.as_json(), count=len(devices))
        spec = fit.placed(spec, shape, [known], None)
    wanted = spec.resources
    if wanted.least > len(devices):
        hint = "" if devices[0].kind == "cuda" else " DPO_CPU_DEVICES declares more."
        raise UsageError(f"resources.gpus: {wanted.least} are wanted. Devices of this machine: {len(devices)}.{hint}")
    return devices[: wanted.most]


def _read_spec(path: Path) -> tuple[JobSpec, JsonObject]:
    """(the spec with absolute file paths, the spec with the paths of SPEC.json). Both have the defaults filled in.

    Raises `UsageError`.
    """
    try:
        body = json.loads(path.read_text())
        spec = JobSpec.model_validate(body).resolved()
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        message, _, _ = describe_validation_error({**first, "loc": ("body", *first["loc"])})
        raise UsageError(f"{path}: {message}") from error
    if spec.evaluations:
        raise UsageError(f"{path}: 'evaluations' are jobs of the service. Leave them out.")
    located = {}
    for field, name in spec.files():
        file = (path.parent / name).resolve()
        try:
            with file.open("rb") as stream:
                if (need := spec.needs(field)) is not None:
                    check(stream, need, spec.reads(field))
        except (OSError, DatasetError) as error:
            raise UsageError(f"{field}: {file}: {error}") from error
        located[field] = str(file)
    if len(set(located.values())) < len(located) and spec.more_training_files:
        raise UsageError(f"{path}: a training file is named twice.")
    return spec.with_files(located), spec.model_dump(mode="json")


def _run(folder: Path, console: Console) -> int:
    """Run the trainer in `folder` and print its events. Returns the exit status of `train`."""
    with (folder / "trainer.log").open("ab") as log:
        process = subprocess.Popen(
            command("worker.trainer", str(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the trainer
            env=trainer_environment(),
        )
    assert process.stdin is not None
    assert process.stdout is not None
    failed = False
    try:
        with console.status("starting") as now:  # on a terminal only
            for line in process.stdout:
                match read(line):
                    case Metrics() as event:
                        now.update("training")
                        if _is_printed(event):
                            values = "  ".join(f"{name} {value:.4g}" for name, value in _summary(event.metrics))
                            console.print(f"{event.stage} {event.step}/{event.total_steps}  {values}", highlight=False)
                    case Working(activity=activity, done=done, total=total):
                        rows = "" if done is None else f" {done} rows" if total is None else f" {done} of {total} rows"
                        now.update(activity + rows)
                    case CheckpointWritten(path=path):
                        shutil.rmtree(folder / path)  # only the service resumes from checkpoints
                    case CacheWanted(key):
                        answer_cache(process.stdin, key)  # there is no shared cache
                    case Notice(message):
                        console.print(plain(message), highlight=False, markup=False)
                    case Failed(message=message) | Broken(reason=message) | DeviceFailed(reason=message):
                        failed = True
                        console.print(plain(message), highlight=False, markup=False)
        status = process.wait()
    except KeyboardInterrupt:
        kill_group(process)
        return 130
    if status != 0 and not failed:
        console.print(plain((folder / "trainer.log").read_text()[-4000:]), highlight=False, markup=False)
    return 0 if status == 0 else 1


def _is_printed(event: Metrics) -> bool:
    """Whether to print `event`: every validation and about 20 steps. `metrics.csv` has all of them."""
    every = max(1, event.total_steps // 20)
    return event.step % every == 0 or any(name.startswith("eval/") for name in event.metrics)


def _summary(metrics: dict[str, float]) -> list[tuple[str, float]]:
    return [(name, metrics[name]) for name in SUMMARY if name in metrics]


def main() -> int:
    """Run `train` with the paths on the command line, and print how to load the model."""
    spec, output, console = Path(sys.argv[1]), Path(sys.argv[2]), Console(soft_wrap=True)
    status = train(spec, output, Settings(), console)
    if status == 0:
        package, loader = "transformers", "AutoModelForCausalLM"
        if (output / "adapter_config.json").exists():
            package, loader = "peft", "AutoPeftModelForCausalLM"
        elif "reward_mean" in json.loads((output / "config.json").read_text()):
            loader = "AutoModelForSequenceClassification"
        console.print(f"Done. The model is in {output}. Load it with:", highlight=False)
        console.print(f'    from {package} import {loader}\n    {loader}.from_pretrained("{output}")', highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
