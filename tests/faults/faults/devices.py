"""A card that is lost or that fails. The worker takes itself out of service, and the training goes on elsewhere."""

import os
import signal
from collections.abc import Callable

from tests.faults.scene import Scene, Strike


def lose_the_card(scene: Scene) -> Strike | None:
    """The card falls off the bus: its process dies, and the next one finds no library of the driver."""
    return _break(scene, "library", lambda: os.kill(scene.attempt.pid, signal.SIGABRT))


def break_the_card(scene: Scene) -> Strike | None:
    """Each backward pass on the card fails, as after an uncorrectable memory error."""
    return _break(scene, "backward", lambda: None)


def _break(scene: Scene, way: str, strike: Callable[[], None]) -> Strike | None:
    """Break the card of the busy worker until another one has taken over. Then it is replaced, and its worker starts."""
    switch = scene.cluster.home / scene.runner.name / way
    switch.touch()
    try:
        strike()
        line = scene.line("device out of service", seconds=60, job=False)
        outcome = scene.after_next_attempt(line)
        attempt = scene.workload.started(scene.attempt.job, scene.attempt.number + 1)
        if attempt is not None and attempt.program == scene.runner.name:
            scene.workload.problems.append(f"{scene.attempt.job}: its next attempt began on the broken card")
    finally:
        switch.unlink()
        scene.runner.kill()
        scene.runner.start()
    return outcome
