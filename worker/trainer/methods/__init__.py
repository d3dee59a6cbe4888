"""Training methods. A new method is a module here and a line in `METHODS`."""

from worker.trainer.methods.method import Method
from worker.trainer.methods.preference import Preference
from worker.trainer.methods.reinforcement import Reinforcement
from worker.trainer.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {"sft": Supervised, "dpo": Preference, "reinforcement": Reinforcement}
"""The method of each stage, by the name of the stage."""
