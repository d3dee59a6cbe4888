"""A run whose models are the sides of an evaluation or of a labelling."""

import gc
from abc import abstractmethod

from app.spec.datasets.rendering import Rendering
from app.spec.evaluation import EvaluationSpec
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec
from worker.model_files import context_length, folder_at
from worker.trainer.loading import load_policy
from worker.trainer.model import Base, Policy
from worker.trainer.run import Run


class SidesRun(Run):
    """Its folder holds `run.json`, `sides/` with a model each, the data, and maybe `parts/` with completions."""

    @property
    @abstractmethod
    def spec(self) -> EvaluationSpec | LabellingSpec:
        """The spec with its defaults filled in. Its files are paths relative to the folder."""

    def load(self, side: str) -> Policy:
        """Load the model of `side`, with all parameters frozen."""
        gc.collect()  # frees the previous model, which reference cycles keep in memory
        folder, settings = self.folder / "sides" / side, self.about["sides"][side]
        start = folder / "start" if (folder / "start").exists() else None
        spec = JobSpec.model_validate(
            {
                "model": settings["model"],
                "training_file": "-",
                "quantization": settings["quantization"],
                "seed": 0,
                "double_quantization": settings.get("double_quantization"),
                "compute_dtype": settings.get("compute_dtype"),
            }
        )
        base = Base(settings["base_model"], None, settings["version"], folder_at(folder / "base"))
        policy = load_policy(spec.resolved(), base, start, self.events, trainable=False)
        self.events.message(f"'{settings['model']}' is loaded on {policy.device.type}.")
        return policy

    def rendering(self, side: str) -> Rendering:
        """How conversations are rendered for the model of `side`: as in its training."""
        settings: JsonObject = self.about["sides"].get(side, {})
        return Rendering(**settings.get("rendering", vars(self.spec.rendering)))

    def max_length(self, policy: Policy) -> int:
        """Maximum tokens of a prompt and its answer together."""
        context = context_of(policy)
        return min(self.spec.max_length or context, context)


def context_of(policy: Policy) -> int:
    """The context length of the model, in tokens."""
    return context_length(policy.causal.config.to_dict()) or DEFAULT_MAX_LENGTH
