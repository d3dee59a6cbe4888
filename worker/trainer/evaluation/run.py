"""An evaluation's run over its work folder."""

from functools import cached_property

from app.spec.evaluation import EvaluationSpec
from worker.trainer.sides.run import SidesRun

JUDGE = "judge"
"""The side that holds the judge's model, in `sides/` and in `parts/`."""


class EvaluationRun(SidesRun):
    """Its folder also holds `evaluation.json`."""

    @cached_property
    def spec(self) -> EvaluationSpec:
        """The evaluation spec with its defaults filled in. Its files are paths relative to the folder."""
        return EvaluationSpec.model_validate_json((self.folder / "evaluation.json").read_text()).resolved()
