"""Methods of training, by the stage that they run. Whoever adds one writes a module here and its line below."""

from worker.trainer.methods.method import Method
from worker.trainer.methods.preference import Preference
from worker.trainer.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {"sft": Supervised, "dpo": Preference}
